"""Labelled scenes of a config's sources, loaded when they are asked for, and their classes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from point_jax.data import rooms
from point_jax.data.frames import Frames, read_frames
from point_jax.data.pipeline import Source, build_sources, load_indexed
from point_jax.data.scenes import Dataset, Scene, SceneError, read_dataset_json
from point_jax.data.sources import images_indexed
from point_jax.evaluation.classes import S3DIS, SCANNET20, SCANNET200, Classes

CLASSES = {
    "scannet": SCANNET20,
    "scannet200": SCANNET200,
    "s3dis": S3DIS,
    "rooms": Classes(rooms.CLASSES, tuple(range(len(rooms.CLASSES)))),
}
KEPT = 64  # scenes in memory: about 4 MB each for 100,000 points


class LabelledScenes(Sequence[Scene]):
    """The scenes of some sources, laid end to end; loaded lazily, the last `KEPT` kept.

    Attributes:
      sources: from `build_sources`.
      change: what is done to every scene.
      images: whether scenes come with their images.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        change: Callable[[Scene], Scene] = lambda scene: scene,
        images: bool = False,
    ) -> None:
        self.sources, self.change, self.images = sources, change, images
        self._load = functools.lru_cache(maxsize=KEPT)(self._fresh)

    def __len__(self) -> int:
        return sum(source.size for source in self.sources)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return self._load(index)

    def with_change(self, change: Callable[[Scene], Scene]) -> "LabelledScenes":
        """The same scenes, changed once more."""
        return LabelledScenes(self.sources, lambda scene: change(self.change(scene)), self.images)

    def _fresh(self, index: int) -> Scene:
        scene = load_indexed(self.sources, index)
        if self.images:
            images = images_indexed(self.sources, index, scene)
            if not images:
                raise SceneError(
                    f"{scene.name}: has no images, and features of images are to be lifted to its "
                    "points; docs/data.md says how scenes carry images"
                )
            scene = dataclasses.replace(scene, images=images)
        return self.change(scene)


def labelled_scenes(
    entries: Sequence[Mapping[str, Any]], place: str, images: bool = False
) -> LabelledScenes:
    """The scenes that a config lists.

    Args:
      entries: the sources.
      place: the key that lists them, for errors.
      images: whether scenes come with their images; one that has none is then an error.

    Raises:
      ValueError, SceneError: see `build_sources`.
    """
    return LabelledScenes(build_sources(entries, place), images=images)


def check_labels(scene: Scene, classes: int) -> Scene:
    """The scene, if its labels are classes.

    Raises:
      SceneError: it has none, or some beyond the classes.
    """
    if scene.segment is None:
        raise SceneError(
            f"{scene.name}: has no labels; an evaluation needs segment.npy, or the name of the "
            "label file as `segment` in the data source"
        )
    if len(scene.segment) and scene.segment.max() >= classes:
        raise SceneError(
            f"{scene.name}: a label is {scene.segment.max()}, but there are {classes} classes; "
            "check `segment` in the data source and config.labels.classes"
        )
    return scene


def identities(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each scene of a config's sources is, without loading it: its folder, or its seed."""
    found = []
    for entry in entries:
        if entry["kind"] == "folder":
            folders = _dataset(entry).folders
            found += [str(folder.resolve()) for folder in folders]
        else:
            found += [f"{entry['kind']} {seed}" for seed in range(*entry.get("seeds", (0, 64)))]
    return found


def check_apart(train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError when scenes are among both the training and the test scenes."""
    both = sorted(set(identities(train)) & set(identities(test)))
    if both:
        raise ValueError(
            f"config.test.sources has {len(both)} scenes that config.data.sources has, too, such "
            f"as {both[0]}: nothing would be measured; give other scenes or splits"
        )


def _dataset(entry: Mapping[str, Any]) -> Dataset:
    return Dataset(**{k: v for k, v in entry.items() if k not in ("kind", "weight")})


def class_names(entries: Sequence[Mapping[str, Any]], known: str) -> Classes:
    """The classes of a config's scenes.

    Args:
      entries: the sources.
      known: a key of `CLASSES`, or "" for what the folders' dataset.json say.

    Raises:
      ValueError: unknown, not stated, or different ones.
    """
    if known:
        if known not in CLASSES:
            raise ValueError(
                f"config.labels.classes is {known!r}, expected one of {', '.join(CLASSES)}, or '' "
                "for the names in dataset.json"
            )
        return CLASSES[known]
    found = set()
    for entry in entries:
        stated = rooms.CLASSES
        if entry["kind"] == "folder":
            stated = read_dataset_json(entry["root"]).get("classes")
        if not stated:
            raise ValueError(
                f"{entry.get('root')}: no names of classes in its dataset.json; add "
                '"classes": ["wall", ...], or choose config.labels.classes'
            )
        found.add(tuple(stated))
    if len(found) != 1:
        raise ValueError(f"the data sources have {len(found)} different lists of classes: {found}")
    (names,) = found
    return Classes(names, tuple(range(len(names))))


def framed_scenes(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Scene, Frames]]:
    """The scenes of folders that say which points their images see, and those images."""
    found = []
    for entry in entries:
        if entry["kind"] != "folder":
            continue
        dataset = _dataset(entry)
        for index, folder in enumerate(dataset.folders):
            if (Path(folder) / "frames.npz").is_file():
                scene = dataset.load(index)
                found.append((scene, read_frames(folder, len(scene.coord))))
    return found
