"""Labelled scenes of a config's sources, loaded when they are asked for, and their classes."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from point_jax.data import rooms
from point_jax.data.frames import Frames, read_frames
from point_jax.data.scenes import Dataset, Scene, SceneError
from point_jax.data.sources import Source, build_sources, images_indexed, load_indexed
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


def identities(sources: Sequence[Source]) -> list[str]:
    """What each scene of some sources is, without loading it; see `Source.identity`."""
    return [one for source in sources for one in source.identities]


def scene_names(sources: Sequence[Source]) -> list[str]:
    """The name of each scene, without loading it; several may have one."""
    return [Path(one).name for one in identities(sources)]


def check_once(sources: Sequence[Source], place: str) -> None:
    """Raises ValueError when a scene is there twice; a copy in another folder is another scene.

    Args:
      sources: built.
      place: the key that lists them, for the error.
    """
    if twice := _repeated(identities(sources)):
        raise ValueError(
            f"config.{place} has {len(twice)} scenes more than once, such as {twice[0]}: give each "
            "of them once"
        )


def check_names(sources: Sequence[Source]) -> None:
    """Raises ValueError when two scenes have one name, by which a submission has their files."""
    if twice := _repeated(scene_names(sources)):
        raise ValueError(
            f"config.test.sources has {len(twice)} names of several scenes, as {twice[0]}, and "
            "a submission has one file a name: evaluate them apart, each in a --workdir of its own"
        )


def _repeated(words: Sequence[str]) -> list[str]:
    return [word for word, times in Counter(words).items() if times > 1]


def check_apart(train: Sequence[Source], test: Sequence[Source], places: tuple[str, str]) -> None:
    """Raises ValueError when scenes are among both the training and the test scenes.

    A scene and its copy, packed or in another folder, are two scenes here.

    Args:
      train, test: the sources.
      places: the keys that list them, for the error.
    """
    both = sorted(set(identities(train)) & set(identities(test)))
    if both:
        raise ValueError(
            f"config.{places[1]} has {len(both)} scenes that config.{places[0]} has, too, such as "
            f"{both[0]}: nothing would be measured; give other scenes or splits"
        )


def class_names(sources: Sequence[Source], known: str) -> Classes:
    """The classes of the scenes of some sources.

    Args:
      sources: of the training and the test scenes.
      known: a key of `CLASSES`, or "" for what the sources state, as dataset.json does; if these
        are the names of one of `CLASSES`, then with its ids.

    Raises:
      ValueError: unknown, not stated, different ones, or not those that a source states.
    """
    if known:
        if known not in CLASSES:
            raise ValueError(
                f"config.labels.classes is {known!r}, expected one of {', '.join(CLASSES)}, or '' "
                "for the names in dataset.json"
            )
        classes = CLASSES[known]
        for source in sources:
            if source.classes and tuple(source.classes) != classes.names:
                raise ValueError(
                    f"{source.root or 'the procedural rooms'}: its classes are "
                    f"{', '.join(source.classes)}, but config.labels.classes={known} are "
                    f"{', '.join(classes.names)}; give config.labels.classes='' for its own"
                )
        return classes
    found = set()
    for source in sources:
        if not source.classes:
            raise ValueError(
                f"{source.root}: no names of classes in its dataset.json; add "
                '"classes": ["wall", ...], or choose config.labels.classes'
            )
        found.add(tuple(source.classes))
    if len(found) != 1:
        raise ValueError(f"the data sources have {len(found)} different lists of classes: {found}")
    (names,) = found
    same = [classes for classes in CLASSES.values() if classes.names == names]
    return same[0] if same else Classes(names, tuple(range(len(names))))


def framed_scenes(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Scene, Frames]]:
    """The scenes of folders that say which points their images see, and those images; lazily."""
    for entry in entries:
        if entry["kind"] != "folder":
            continue
        dataset = Dataset(**{k: v for k, v in entry.items() if k not in ("kind", "weight")})
        for index, folder in enumerate(dataset.folders):
            if (Path(folder) / "frames.npz").is_file():
                scene = dataset.load(index)
                yield scene, read_frames(folder, len(scene.coord))
