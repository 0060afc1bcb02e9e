"""Image features lifted to points: what a scene's images say about its voxels, without learning.

As the baseline of Sonata's authors (Pointcept's `preprocess_dino_feature` and
`DINOEnhancedSegmentor`): features of patches are interpolated bilinearly to the pixels that show a
surface, averaged over all images, and what no image shows takes those of the nearest place that is
shown. There the average is over grid cells of 8 cm, from which points take the nearest; here it is
over the voxels that are asked for.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.sparse import csr_array
from scipy.spatial import KDTree

from point_jax import limits
from point_jax.data.checks import SceneError
from point_jax.data.images import Images, Sight, Size
from point_jax.data.scenes import Scene
from point_jax.evaluation.features import Extractor
from point_jax.features.voxels import Voxels, voxelize
from point_jax.interop.image_encoders import load_image_encoder
from point_jax.models.functional import Params
from point_jax.models.image_encoder import ImageEncoder
from point_jax.objectives.settings import dtype_of

BATCH = 8  # images that are encoded together, always as many: one compilation
LIFTING_LIMITS = {
    "height": limits.whole(1),
    "width": limits.whole(1),
    "layers": limits.each(limits.text()),
}


def default_lifting() -> ConfigDict:
    """The config section `images` of an evaluation; locked against misspelt keys."""
    images = ConfigDict()
    images.height = 30  # of an image, patches of the encoder; 3:4, as most RGB-D cameras
    images.width = 40
    images.dtype = "float32"  # of the arithmetic, or "bfloat16"
    images.layers = ()  # of VGG16, which outputs are the features; () for its default
    return images.lock()


@dataclass(frozen=True)
class LiftedFeatures:
    """An `Extractor`: the mean over all sightings of a voxel's points, each in one image.

    A sighting's features are interpolated bilinearly between the four patches whose centres are
    around it; beyond the outermost centres they stay as they are there. A voxel that no image sees
    takes the features of the nearest one that is seen.

    Attributes:
      encoder: hashable, see `ImageEncoder`.
      params: of the encoder.
      height, width: of an image, patches. Images are cropped to this shape in the middle.
    """

    encoder: ImageEncoder
    params: Params
    height: int
    width: int

    @property
    def channels(self) -> int:
        """C, of a patch's features."""
        return self.encoder.channels

    @property
    def size(self) -> Size:
        """Of the images that are encoded, pixels."""
        return Size(self.height * self.encoder.stride, self.width * self.encoder.stride)

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, C) float32 for each cloud, in their order, lazily.

        Raises:
          ValueError: voxels that came without images.
          SceneError: an image that cannot be used, or images that see none of a cloud's points.
        """
        every = (sight for cloud in clouds for sight in _sights(cloud, self.size))
        encoded = self._encoded(every)
        for cloud in clouds:
            yield self._mean(cloud, itertools.islice(encoded, len(_images(cloud))))

    def _encoded(self, sights: Iterator[Sight]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(pixels (n, 2), features (height * width, C)) of one image after the other."""
        while group := list(itertools.islice(sights, BATCH)):
            images = np.zeros((BATCH, *self.size, 3), np.uint8)
            for slot, sight in enumerate(group):
                images[slot] = sight.read()
            features = np.asarray(_encode(self.encoder, self.params, images))
            features = features.reshape(BATCH, self.height * self.width, self.channels)
            yield from zip((sight.pixels for sight in group), features, strict=False)

    def _mean(self, cloud: Voxels, encoded: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        sums = np.zeros((len(cloud.grid), self.channels), np.float32)
        count = np.zeros(len(cloud.grid), np.float32)
        for pixels, features in encoded:
            points = np.flatnonzero(pixels[:, 0] >= 0)
            voxels, row = np.unique(cloud.inverse[points], return_inverse=True)
            patches, weights = self._between(pixels[points])
            rows = np.repeat(row.reshape(-1), 4)
            shape = len(voxels), self.height * self.width
            # Entries at the same place add up.
            mixed = csr_array((weights.ravel(), (rows, patches.ravel())), shape=shape)
            sums[voxels] += mixed @ features
            count[voxels] += np.bincount(row.reshape(-1), minlength=len(voxels))
        seen = count > 0
        if not seen.any():
            raise SceneError(
                f"none of the {len(_images(cloud))} images of a scene of {len(cloud.points)} "
                "points sees any of them, so no features can be lifted"
            )
        sums[seen] /= count[seen, None]
        if not seen.all():
            _, nearest = KDTree(cloud.grid[seen]).query(cloud.grid[~seen])
            sums[~seen] = sums[seen][nearest]
        return sums

    def _between(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of places (k, 2) the four patches around them and their weights, both (k, 4)."""
        last = np.array([self.height, self.width]) - 1
        place = np.clip(pixels / np.float32(self.encoder.stride) - np.float32(0.5), 0, last)
        low = np.floor(place).astype(np.int64)
        high, part = np.minimum(low + 1, last), place - low
        rows = np.stack([low[:, 0], high[:, 0]], axis=1)
        columns = np.stack([low[:, 1], high[:, 1]], axis=1)
        down, right = (np.stack([1 - x, x], axis=1) for x in part.T)
        patches = rows[:, :, None] * self.width + columns[:, None]
        weights = down[:, :, None] * right[:, None]
        return patches.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


@dataclass(frozen=True)
class JoinedFeatures:
    """The features of several extractors side by side, each in its own units.

    The probes standardise every channel, so none outweighs another by its scale.

    Attributes:
      parts: the extractors, in the order of their channels.
    """

    parts: tuple[Extractor, ...]

    @property
    def channels(self) -> int:
        """C, of all parts together."""
        return sum(part.channels for part in self.parts)

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, C) float32 for each cloud, in their order, lazily."""
        for features in zip(*(part(clouds) for part in self.parts), strict=True):
            yield np.concatenate(features, axis=1)


def load_lifted(path: str | Path, section: Any) -> LiftedFeatures:
    """The lifted features of a frozen image encoder.

    Args:
      path: a folder that `launch.convert` wrote.
      section: as `default_lifting` makes it.

    Raises:
      CheckpointError: no image encoder there.
      ValueError: a wrong setting.
    """
    limits.check(section, LIFTING_LIMITS, "config.images.")
    dtype = dtype_of(section, "config.images.")
    layers = tuple(section.layers) or None
    encoder, params = load_image_encoder(path, dtype=dtype, layers=layers)
    return LiftedFeatures(encoder, params, section.height, section.width)


def unseen_share(scenes: Iterable[Scene], grid_size: float, size: Size) -> float:
    """The share of all voxels of some scenes that no image sees; images are not encoded.

    Args:
      scenes: with images.
      grid_size: edge of a voxel, metres.
      size: of the images, pixels, see `LiftedFeatures.size`.

    Raises:
      ValueError: scenes without images.
      SceneError: a scene or an image that cannot be used.
    """
    voxels = unseen = 0
    for scene in scenes:
        cloud = voxelize(scene, grid_size, inputs=("coord",))
        seen = np.zeros(len(cloud.grid), bool)
        for sight in _sights(cloud, size):
            seen[cloud.inverse[sight.pixels[:, 0] >= 0]] = True
        voxels, unseen = voxels + len(seen), unseen + int((~seen).sum())
    return unseen / voxels


def _sights(cloud: Voxels, size: Size) -> Iterator[Sight]:
    images = _images(cloud)
    return (images.sight(image, size) for image in range(len(images)))


def _images(cloud: Voxels) -> Images:
    if cloud.images is None:
        raise ValueError(
            "features of images are to be lifted to voxels that came without images: load the "
            "scenes with theirs; fragments of votes and single frames have none"
        )
    return cloud.images


@partial(jax.jit, static_argnums=0)
def _encode(encoder: ImageEncoder, params: Params, images: jax.Array) -> jax.Array:
    return encoder(params, images)
