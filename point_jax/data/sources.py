"""Where scenes come from: folders, shards and generators, as a config lists them."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from point_jax import limits
from point_jax.data.image_features import FeatureImages, FeatureSpec, ImageFeatures
from point_jax.data.images import Images
from point_jax.data.packed import PackedDataset
from point_jax.data.room_images import RoomImages
from point_jax.data.rooms import CLASSES, RoomSpec, make_room
from point_jax.data.scenes import Dataset, Scene, SceneError

SOURCE_LIMITS = {
    "kind": limits.text(),
    "root": limits.text(empty=False),
    "splits": limits.either(limits.each(limits.text()), limits.text()),
    "units": limits.text(),
    "up": limits.text(),
    "segment": limits.either(limits.NOTHING, limits.text()),
    "seeds": limits.each(limits.whole(0), "first", "end"),
    "spec": limits.either(limits.NOTHING, limits.MAPPING),
    "image_splits": limits.SWITCH,
    "weight": limits.number(above=0),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Scenes 0..size-1 of one origin, and how often it is drawn from.

    Attributes:
        size: number of scenes.
        load: index -> Scene; raises SceneError for a scene that cannot be used.
        weight: share of the stream, relative to the other sources' weights.
        images: (index, the scene that `load` gave) -> its images, None if it has none; raises
            SceneError.
        root: folder of the data set; None for scenes that are made on the fly, or lie in an object
            store.
        name: index -> what a message calls the scene before it is loaded.
        identity: index -> what scene it is, in whatever source: its place, or its seed. The last
            part of the path is the scene's name.
        classes: names of the labels; None where they are not stated.
    """

    size: int
    load: Callable[[int], Scene]
    weight: float = 1.0
    images: Callable[[int, Scene], Images | None] = lambda index, scene: None
    root: Path | None = None
    name: Callable[[int], str] = str
    identity: Callable[[int], str] = str
    classes: tuple[str, ...] | None = None

    @property
    def identities(self) -> list[str]:
        """Of all its scenes."""
        return [self.identity(index) for index in range(self.size)]


def folder_source(
    root: str,
    splits: Sequence[str] = ("train",),
    units: str = "",
    up: str = "",
    segment: str | None = None,
    image_splits: bool = False,
    weight: float = 1.0,
) -> Source:
    """The scene folders of `root`; see `point_jax.data.scenes.Dataset` for the arguments."""
    dataset = Dataset(root, splits, units, up, segment or None, image_splits)
    return Source(
        len(dataset),
        dataset.load,
        weight,
        dataset.images,
        dataset.root,
        lambda index: str(dataset.folders[index]),
        lambda index: str(dataset.folders[index].resolve()),
        dataset.classes,
    )


def packed_source(
    root: str,
    splits: Sequence[str] = ("train",),
    segment: str | None = None,
    weight: float = 1.0,
) -> Source:
    """Scenes that `data_prep.pack` packed; see `point_jax.data.packed.PackedDataset`."""
    packed = PackedDataset(root, splits, segment or None)
    return Source(
        len(packed),
        packed.load,
        weight,
        packed.images,
        packed.local_root,
        packed.describe,
        packed.place,
        packed.classes,
    )


def rooms_source(
    seeds: tuple[int, int] = (0, 64),
    spec: Mapping[str, Any] | None = None,
    weight: float = 1.0,
) -> Source:
    """Procedural rooms of seeds[0] <= seed < seeds[1]; `spec` overrides fields of `RoomSpec`."""
    first, end = seeds
    if not 0 <= first < end:
        raise ValueError(f"seeds={seeds!r} of a rooms source: expected (first, end), first < end")
    chosen = _known(dict(spec or {}), [field.name for field in dataclasses.fields(RoomSpec)])
    kinds = {int: limits.whole(), float: limits.number()}
    limits.check(chosen, {f.name: kinds[type(f.default)] for f in dataclasses.fields(RoomSpec)})
    room = RoomSpec(**chosen)
    return Source(
        end - first,
        lambda index: make_room(first + index, room),
        weight,
        lambda index, scene: RoomImages(first + index, room, scene.coord),
        name=lambda index: f"procedural room {first + index}",
        identity=lambda index: f"rooms {first + index}",
        classes=CLASSES,
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "folder": folder_source,
    "packed": packed_source,
    "rooms": rooms_source,
}


def build_sources(
    entries: Sequence[Mapping[str, Any]], place: str = "data.sources"
) -> list[Source]:
    """Makes the sources that a config lists.

    Args:
        entries: mappings with `kind` (a key of `SOURCES`) and that factory's arguments.
        place: the key that lists them, for errors.

    Raises:
        ValueError: there is none, or one has an unknown, missing or wrong argument.
        SceneError: for a folder that is missing or lacks metadata.
    """
    if not entries:
        raise ValueError(f"config.{place} is empty; list at least one dict(kind=..., ...)")
    sources = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"config.{place} lists {entry!r}, expected dicts, as in "
                "({'kind': 'folder', 'root': 'DIR'},) with the comma at the end"
            )
        try:
            sources.append(_build_source(entry))
        except SceneError as error:
            raise SceneError(f"config.{place}[{index}]: {error}") from error
        except ValueError as error:
            raise ValueError(f"config.{place}[{index}]: {error}") from error
    return sources


def _build_source(entry: Mapping[str, Any]) -> Source:
    arguments = dict(entry)
    kind = arguments.pop("kind", None)
    _known({kind: None}, list(SOURCES))
    factory = SOURCES[str(kind)]
    parameters = inspect.signature(factory).parameters
    _known(arguments, list(parameters))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ValueError(f"a {kind} source needs {name!r}, got {dict(entry)}")
    limits.check(arguments, SOURCE_LIMITS)
    return factory(**arguments)


def with_features(sources: Sequence[Source], name: str) -> tuple[list[Source], FeatureSpec]:
    """The same sources, whose images give their stored features in place of pixels.

    Args:
        sources: of scenes with image files.
        name: that the features have in every data set.

    Returns:
        The sources, and what the features are.

    Raises:
        ValueError: a source without files, or two with different features.
        SceneError: a data set without these features.
    """
    place = f"config.data.images.features={name!r}"
    found, specs = [], []
    for index, source in enumerate(sources):
        if source.root is None:
            raise ValueError(
                f"{place}: config.data.sources[{index}] has no folder on this machine; only those "
                "of kind 'folder' and 'packed' have stored features"
            )
        features = ImageFeatures(source.root, name)
        specs.append(features.spec)
        if different := features.spec.differences(specs[0]):
            raise ValueError(
                f"{place}: {features.folder} and those of config.data.sources[0] differ: "
                f"{different}"
            )
        found.append(_featured(source, features))
    return found, specs[0]


def _featured(source: Source, features: ImageFeatures) -> Source:
    def images(index: int, scene: Scene) -> Images | None:
        there = source.images(index, scene)
        return None if there is None else FeatureImages(there, features)

    return dataclasses.replace(source, images=images)


def load_indexed(sources: Sequence[Source], scene: int) -> Scene:
    """Loads a scene by its index among all sources, laid end to end."""
    source, index = _locate(sources, scene)
    return source.load(index)


def name_indexed(sources: Sequence[Source], scene: int) -> str:
    """What messages call a scene, by its index among all sources; nothing is read."""
    source, index = _locate(sources, scene)
    return source.name(index)


def images_indexed(sources: Sequence[Source], scene: int, loaded: Scene) -> Images | None:
    """The images of a scene that `load_indexed` loaded, by the same index."""
    source, index = _locate(sources, scene)
    return source.images(index, loaded)


def _locate(sources: Sequence[Source], scene: int) -> tuple[Source, int]:
    for source in sources:
        if scene < source.size:
            return source, scene
        scene -= source.size
    raise IndexError(f"scene index beyond the {sum(s.size for s in sources)} scenes there are")


def first_scenes(sources: Sequence[Source], count: int) -> list[Scene]:
    """The first scene of every source, then the second of every source, up to `count`."""
    order = sorted((i, s) for s, source in enumerate(sources) for i in range(source.size))
    return [sources[s].load(i) for i, s in order[:count]]


def _known(given: dict[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Returns `given` when all its keys are among `names`."""
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{key!r} in a data source: {guess}known are {', '.join(names)}")
    return given
