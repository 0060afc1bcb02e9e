"""The batches that the host ships: scenes of several data sets, mixed, shuffled, cut and padded.

The run is one endless stream of scenes, and everything about position k of it (which scene, where
it is cut) is a pure function of (seed, k). Batch b is the positions b * global_batch onwards, so
resuming means starting at batch b: there is no iterator state to save, and process i of n ships
the i-th part of the same batch that one process would ship alone.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np
from ml_collections import ConfigDict

from point_jax import limits
from point_jax.data.images import (
    IMAGE_LIMITS,
    Images,
    Size,
    default_images,
    pad_images,
    pixel_content,
)
from point_jax.data.patience import Patient, Reading
from point_jax.data.scenes import Scene, SceneError
from point_jax.data.sources import (
    Source,
    build_sources,
    first_scenes,
    images_indexed,
    load_indexed,
    name_indexed,
    with_features,
)

_SHUFFLE, _CUT, _IMAGES = 0, 1, 2  # what a key derived from the run's seed is for

DATA_LIMITS = {
    "scene_points": limits.whole(2),
    "threads": limits.whole(0),
    "prefetch": limits.whole(0),
    "cache": limits.whole(0),
    "patience": limits.number(above=0),
}

log = logging.getLogger(__name__)


def default_data() -> ConfigDict:
    """The config section `data`, for a config file to fill in; locked against misspelt keys."""
    data = ConfigDict()
    data.scene_points = 180_000  # capacity of a scene on the host; larger ones are cut
    data.skip_bad = False  # True: a scene that cannot be read becomes an empty one
    data.sources = ()  # dicts: kind ("folder" or "rooms") and the arguments of that factory
    data.threads = 4  # that load scenes
    data.prefetch = 2  # batches loaded ahead
    data.cache = 64  # scenes kept in memory: about 4 MB each for 100,000 points
    data.patience = 600.0  # seconds without a batch after which the run ends
    data.images = default_images()  # of the scenes that have any
    data.held_out = ConfigDict({"sources": (), "scenes": 0})  # for pictures; never trained on
    data.held_out.lock()
    return data.lock()


def scene_stream(sources: Sequence[Source], seed: int) -> grain.MapDataset:
    """Position in the run -> index of a scene among all sources, laid end to end.

    Sources are interleaved evenly by weight (to 1 % of the smallest weight, Grain's rounding);
    each goes through all its scenes, in a new order, before any of them comes again.

    Args:
        sources: from `build_sources`.
        seed: of the run, not negative.

    Returns:
        A data set without end: `stream[k]` is a pure function of (sources' sizes and weights,
        seed, k).
    """
    parts, first = [], 0
    for index, source in enumerate(sources):
        place = _shuffled(source.size, first, (seed, _SHUFFLE, index))
        parts.append(grain.MapDataset.range(sys.maxsize).map(place))
        first += source.size
    return grain.MapDataset.mix(parts, [source.weight for source in sources])


def _shuffled(size: int, first: int, seed: tuple[int, ...]) -> Callable[[int], int]:
    """Position -> first..first+size-1, each once in an epoch, every epoch in an order of its own.

    Grain's own shuffle() needs 2 ms an element for 64 scenes and 24 ms for 3: it walks through
    2^16 indices to find those below the size. A permutation kept for the epoch is a look-up.
    """

    @functools.lru_cache(maxsize=2)  # threads read on both sides of an epoch's end
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((*seed, epoch)).permutation(size)

    return lambda position: first + int(order(position // size)[position % size])


def cut_scene(coord: np.ndarray, points: int, key: np.random.Generator) -> np.ndarray | None:
    """Chooses the points nearest one of the points, for a scene that is too large.

    Args:
        coord: (n, 3) float32.
        points: how many to keep.
        key: draws the centre.

    Returns:
        (n,) bool with `points` set, ties going to the first; None when n <= points.
    """
    if len(coord) <= points:
        return None
    offset = coord - coord[key.integers(len(coord))]
    square = offset[:, 0] ** 2 + offset[:, 1] ** 2 + offset[:, 2] ** 2
    reach = np.partition(square, points - 1)[points - 1]
    keep = square < reach
    keep[np.flatnonzero(square == reach)[: points - keep.sum()]] = True
    return keep


def pad_scene(scene: Scene | None, points: int, keep: np.ndarray | None) -> dict[str, Any]:
    """One slot of a batch: the scene cut to at most `points` and zero-padded to exactly that.

    Args:
        scene: None makes an empty slot (count 0).
        points: capacity P of a slot.
        keep: from `cut_scene`.

    Returns:
        coord (P, 3) float32, color (P, 3) uint8, normal (P, 3) float32, segment (P,) int32, -1
        where there is no label, count int32, cut float32.
    """
    slot: dict[str, Any] = {
        "coord": np.zeros((points, 3), np.float32),
        "color": np.zeros((points, 3), np.uint8),
        "normal": np.zeros((points, 3), np.float32),
        "segment": np.full(points, -1, np.int32),
        "count": np.int32(0),
        "cut": np.float32(0),
    }
    if scene is None:
        return slot
    count = min(len(scene.coord), points)
    for name in ("coord", "color", "normal", "segment"):
        array = getattr(scene, name)
        if array is not None:
            slot[name][:count] = array if keep is None else array[keep]
    return slot | {
        "count": np.int32(count),
        "cut": np.float32(1 - count / len(scene.coord)),
    }


def make_batches(
    data: Any,
    seed: int,
    global_batch: int,
    start_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    change: Callable[[Scene], Scene] = lambda scene: scene,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the global batches start_batch, start_batch + 1, ... without end.

    Args:
        data: config section as `default_data` makes it.
        seed: of the run; not negative.
        global_batch: scenes of one step over all processes.
        start_batch: number of steps done so far.
        process_index: which of the processes this is.
        process_count: how many processes share the batch; must divide it.
        change: what is done to every scene when it is loaded; its points stay as they are.

    Returns:
        An iterator (close() ends its threads) of dicts with leading axis B = global_batch /
        process_count: coord (B, P, 3) float32 metres, color (B, P, 3) uint8, normal (B, P, 3)
        float32, both zero when missing, segment (B, P) int32, count (B,) int32, cut (B,) float32
        share of the scene's points that did not fit, scene (B,) int32 index among all sources'
        scenes; with `data.images.count` I > 0 also images (B, I, H, W, 3) uint8, pixels (B, P, I,
        2) float32, the place of each point in each image as `data.images` defines it, and
        image_count (B,) int32, 0 for a scene without images. With `data.images.features` in place
        of images features (B, I, h, w, C) float16, and places in pixels of what was encoded. A
        scene that cannot be used has count 0 with `skip_bad`, else the iterator raises its
        SceneError.

    Raises:
        ValueError: for a batch that the processes cannot share, or a wrong source.
        SceneError: for a data set's folder without what it needs. The iterator raises its kind
            HangingInput when a batch is not there within `data.patience` seconds.
    """
    if global_batch % process_count:
        raise ValueError(
            f"a global batch of {global_batch} scenes cannot be shared by {process_count} "
            f"processes; make it a multiple"
        )
    limits.check(data, DATA_LIMITS, "config.data.")
    limits.check(data.images, IMAGE_LIMITS, "config.data.images.")
    local = global_batch // process_count
    sources = build_sources(data.sources)
    content = pixel_content(Size(data.images.height, data.images.width))
    if data.images.features:
        sources, stored = with_features(sources, data.images.features)
        content = stored.content
    stream = scene_stream(sources, seed)

    reading = Reading()

    @functools.lru_cache(maxsize=data.cache)
    def load(scene: int) -> tuple[Scene, Images | None]:
        loaded = load_indexed(sources, scene)
        images = images_indexed(sources, scene, loaded) if data.images.count else None
        return change(loaded), images

    skipped = set[int]()  # scenes named before: each comes again every epoch

    def slot(item: int) -> dict[str, Any]:
        batch, place = divmod(item, local)
        position = (start_batch + batch) * global_batch + process_index * local + place
        index = cast(int, stream[position])
        try:
            with reading(name_indexed(sources, index)):  # images are read where they are filled in
                return fill(index, position, *load(index))
        except SceneError as error:
            if not data.skip_bad:
                advice = "mend it, or leave such scenes out with --config.data.skip_bad=True"
                raise SceneError(f"{error}; {advice}") from error
            if index not in skipped:
                log.warning("skipped a scene: %s", error)
            skipped.add(index)
            return fill(index, position, None, None)

    def fill(
        index: int, position: int, scene: Scene | None, images: Images | None
    ) -> dict[str, Any]:
        points, keep = data.scene_points, None
        if scene is not None:
            keep = cut_scene(scene.coord, points, np.random.default_rng((seed, _CUT, position)))
        filled = pad_scene(scene, points, keep) | {"scene": np.int32(index)}
        if data.images.count:
            key = np.random.default_rng((seed, _IMAGES, position))
            filled |= pad_images(images, keep, points, data.images.count, content, key)
        return filled

    options = grain.ReadOptions(
        num_threads=data.threads, prefetch_buffer_size=max(1, data.prefetch * local)
    )
    items = grain.MapDataset.range(sys.maxsize).map(slot)
    batches = iter(items.to_iter_dataset(options).batch(local))
    batches.start_prefetch()  # loads while the step compiles
    return Patient(batches, data.patience, lambda: str(reading))


def batch_shapes(data: Any, scenes: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of a batch as `make_batches` gives it; no scene is read.

    Args:
        data: config section as `default_data` makes it.
        scenes: B, of the batch.

    Raises:
        ValueError, SceneError: as `make_batches`, where the data's stored features are asked for.
    """
    limits.check(data, DATA_LIMITS, "config.data.")
    limits.check(data.images, IMAGE_LIMITS, "config.data.images.")
    slot = pad_scene(None, data.scene_points, None) | {"scene": np.int32(0)}
    if data.images.count:
        content = pixel_content(Size(data.images.height, data.images.width))
        if data.images.features:
            _, stored = with_features(build_sources(data.sources), data.images.features)
            content = stored.content
        key = np.random.default_rng(0)  # draws nothing: there is no image
        slot |= pad_images(None, None, data.scene_points, data.images.count, content, key)
    return {name: ((scenes, *np.shape(x)), np.asarray(x).dtype) for name, x in slot.items()}


def held_out(data: Any) -> list[Scene]:
    """Scenes for the pictures at the end of a run, never trained on.

    Args:
        data: config section as `default_data` makes it. Of `held_out.sources` it takes the first
            scene of each, then the second of each, and so on, until there are `held_out.scenes`.

    Raises:
        ValueError: for a wrong number or source.
        SceneError: for a scene that cannot be used; none is skipped here.
    """
    limits.check(data.held_out, {"scenes": limits.whole(0)}, "config.data.held_out.")
    if data.held_out.scenes == 0:
        return []
    sources = build_sources(data.held_out.sources, "data.held_out.sources")
    return first_scenes(sources, data.held_out.scenes)
