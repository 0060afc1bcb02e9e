"""What probes read: features at the voxels of level 0, and the labels beside them.

Everything streams scene by scene: a data set's features together may be a hundred times its points.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene
from point_jax.features.encoder import Encoder
from point_jax.features.voxels import INPUTS, Input, Voxels, voxelize

# Scenes made voxels ahead of an extractor: an encoder compiles one shape for all that it is told
# of, so told of one at a time it would compile more often. About 6 MB for 100,000 points.
GROUP = 32


class Extractor(Protocol):
    """Whatever gives every voxel of a cloud a feature vector."""

    @property
    def channels(self) -> int:
        """C, the width of the features."""
        ...

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, C) float32 for each cloud, in their order, lazily."""
        ...


@dataclass(frozen=True)
class EncoderFeatures:
    """An encoder's features, coarser levels carried up and joined.

    Attributes:
      encoder: frozen.
      up_cast: how many levels the coarsest is carried up, see `PointFeatures.up_cast`; None for
        all of them, the linear probe's protocol in Sonata's paper.

    Raises:
      ValueError: the network has fewer levels.
    """

    encoder: Encoder
    up_cast: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.encoder.spec.encoder)
        if self.up_cast is not None and not 0 <= self.up_cast < levels:
            raise ValueError(
                f"up_cast={self.up_cast}: expected 0 to {levels - 1} for a network of {levels} "
                "levels, or None for all of them"
            )

    @property
    def channels(self) -> int:
        """C, the channels of the levels that are joined."""
        stages = self.encoder.spec.encoder
        joined = len(stages) if self.up_cast is None else self.up_cast + 1
        return sum(stage.channels for stage in stages[-joined:])

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, C) float32 for each cloud, in their order, lazily."""
        for features in self.encoder.encode_voxels(clouds):
            levels = features.depth - 1 if self.up_cast is None else self.up_cast
            yield features.up_cast(levels).at_voxels()


@dataclass(frozen=True)
class RawFeatures:
    """The floor that an encoder must beat: height above the lowest point, normal, colour.

    x and y are left out: they say where the scene's origin is, not what stands there.

    Attributes:
      inputs: the properties of a point that the voxels' features are made of, as `voxelize` was
        told; one that is not among them is zero here, as one that a scene lacks.
    """

    inputs: Sequence[Input] = INPUTS

    @property
    def channels(self) -> int:
        """7: height, normal (3), colour (3)."""
        return 7

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, 7) float32 for each cloud: height in metres, the normal, colour from 0 to 1."""
        for cloud in clouds:
            coord, normal, color = (
                column(cloud, self.inputs, name) for name in ("coord", "normal", "color")
            )
            yield np.concatenate([coord[:, 2:], normal, color], axis=1)


def column(cloud: Voxels, inputs: Sequence[Input], name: Input) -> np.ndarray:
    """One property of a cloud's voxels.

    Args:
      cloud: V voxels.
      inputs: what its features are made of, in their order, three channels each.
      name: the one wanted.

    Returns:
      (V, 3) float32, zeros where it is not among the inputs.

    Raises:
      ValueError: the features are not of these inputs.
    """
    if cloud.features.shape[1] != 3 * len(inputs):
        raise ValueError(
            f"voxels have {cloud.features.shape[1]} channels, but inputs {tuple(inputs)} make "
            f"{3 * len(inputs)}: give the inputs that `voxelize` was given"
        )
    if name not in inputs:
        return np.zeros((len(cloud.features), 3), np.float32)
    first = 3 * list(inputs).index(name)
    return cloud.features[:, first : first + 3]


def kept_points(cloud: Voxels) -> np.ndarray:
    """(V,) int64, the point of each voxel that `voxelize` keeps: the first."""
    kept = np.empty(len(cloud.grid), np.int64)
    kept[cloud.inverse[::-1]] = np.arange(len(cloud.inverse))[::-1]  # of equal places the last wins
    return kept


def voxel_labels(scene: Scene, cloud: Voxels) -> np.ndarray:
    """(V,) int32 labels of voxels: that of the point which each of them keeps.

    Raises:
      SceneError: the scene has no labels.
    """
    if scene.segment is None:
        raise SceneError(
            f"{scene.name}: has no labels; a probe needs segment.npy, or name the label file with "
            "`segment` in the data source"
        )
    return scene.segment[kept_points(cloud)]


def extract(
    extractor: Extractor,
    scenes: Iterable[Scene],
    grid_size: float,
    inputs: Sequence[Input] = INPUTS,
    scale: float = 1.0,
) -> Iterator[tuple[Scene, Voxels, np.ndarray]]:
    """Voxels and features of one scene after the other.

    Args:
      extractor: of the features.
      scenes: read as they are needed.
      grid_size, inputs, scale: see `voxelize`.

    Yields:
      The scene, its V voxels, their features (V, C) float32.

    Raises:
      SceneError: a scene that cannot be used.
    """
    scenes = iter(scenes)
    while group := list(itertools.islice(scenes, GROUP)):
        clouds = [voxelize(scene, grid_size, scale, inputs) for scene in group]
        yield from zip(group, clouds, extractor(clouds), strict=True)


class Labelled(Protocol):
    """Features and labels of some scenes; every iteration starts again at the first."""

    def __len__(self) -> int:
        """Number of scenes."""
        ...

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(features (V, C) float32, labels (V,) int32) of one scene after the other."""
        ...

    def labels(self) -> Iterator[np.ndarray]:
        """(V,) int32 of one scene after the other, without the cost of features."""
        ...

    def take(self, scenes: Iterable[int]) -> "Labelled":
        """Some of the scenes, by their places."""
        ...


@dataclass(frozen=True)
class LabelledVoxels:
    """Scenes whose features are computed when they are asked for, again at every iteration.

    Attributes:
      extractor: makes the features.
      scenes: scenes with labels; anything with a length whose `[i]` gives a scene.
      grid_size, inputs, scale: see `voxelize`.
      places: which of the scenes; None for all.
    """

    extractor: Extractor
    scenes: Sequence[Scene]
    grid_size: float
    inputs: Sequence[Input] = INPUTS
    scale: float = 1.0
    places: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._places())

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        extracted = extract(self.extractor, self._chosen(), self.grid_size, self.inputs, self.scale)
        for scene, cloud, features in extracted:
            yield features, voxel_labels(scene, cloud)

    def labels(self) -> Iterator[np.ndarray]:
        """(V,) int32 of one scene after the other; nothing is extracted."""
        for scene in self._chosen():
            yield voxel_labels(scene, voxelize(scene, self.grid_size, self.scale, ("coord",)))

    def take(self, scenes: Iterable[int]) -> "LabelledVoxels":
        """Some of the scenes, by their places."""
        own = self._places()
        places = tuple(own[i] for i in scenes)
        return LabelledVoxels(
            self.extractor, self.scenes, self.grid_size, self.inputs, self.scale, places
        )

    def _places(self) -> Sequence[int]:
        return range(len(self.scenes)) if self.places is None else self.places

    def _chosen(self) -> Iterator[Scene]:
        return (self.scenes[place] for place in self._places())


@dataclass(frozen=True)
class LabelledArrays:
    """The same of features in memory.

    Attributes:
      pieces: (features (V, C) float32, labels (V,) int32) of each scene.
    """

    pieces: Sequence[tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(self.pieces)

    def labels(self) -> Iterator[np.ndarray]:
        """(V,) int32 of one scene after the other."""
        return (labels for _, labels in self.pieces)

    def take(self, scenes: Iterable[int]) -> "LabelledArrays":
        """Some of the scenes, by their places."""
        return LabelledArrays([self.pieces[i] for i in scenes])
