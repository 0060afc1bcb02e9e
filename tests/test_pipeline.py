"""The stream of batches: a pure function of seed and step, however it is read."""

import dataclasses
import itertools
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from point_jax.data import pipeline
from point_jax.data.pipeline import (
    Source,
    cut_scene,
    default_data,
    held_out,
    make_batches,
    scene_stream,
)
from point_jax.data.rooms import RoomSpec, make_room
from point_jax.data.scenes import Scene, SceneError, write_scene


def tiny_scene(index: int) -> Scene:
    """A scene of 40 + 10 x index points whose colours tell its index."""
    draw = np.random.default_rng(index)
    count = 40 + 10 * index
    normal = draw.normal(size=(count, 3))
    return Scene(
        f"scene{index:03d}",
        draw.uniform(0, 3, (count, 3)).astype(np.float32),
        np.full((count, 3), index + 2, np.uint8),
        (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        draw.integers(-1, 5, count).astype(np.int32),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Splits a (5 scenes) and b (3 scenes)."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(8):
        scene = tiny_scene(index)
        write_scene(folder / ("a" if index < 5 else "b") / scene.name, scene)
    return folder


def config(root: Path, **changes) -> ConfigDict:
    folder = dict(kind="folder", root=str(root), units="m", up="z")
    data = default_data()
    data.update(scene_points=64, threads=2, cache=4)
    data.sources = (
        folder | dict(splits=("a",), weight=2.0),
        folder | dict(splits=("b",), weight=1.0),
    )
    data.held_out.update(scenes=3, sources=(folder | dict(splits=("a", "b")),))
    data.update(changes)
    return data


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def sources(*sizes: int, weights: tuple[float, ...] = ()) -> list[Source]:
    weights = weights or (1.0,) * len(sizes)
    pairs = zip(sizes, weights, strict=True)
    return [Source(size, lambda index: tiny_scene(index), weight) for size, weight in pairs]


# The stream


def test_every_epoch_shows_every_scene_once_in_a_new_order():
    stream = scene_stream(sources(31), seed=5)
    epochs = [[stream[31 * e + k] for k in range(31)] for e in range(4)]
    assert all(sorted(epoch) == list(range(31)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = scene_stream(sources(31), seed=6)
    assert [other[k] for k in range(31)] != epochs[0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=4))
def test_sources_appear_by_weight_in_every_stretch(parts):
    sizes, weights = zip(*parts, strict=True)
    stream = scene_stream(sources(*sizes, weights=weights), seed=1)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    drawn = Counter(int(owner[stream[k]]) for k in range(1000, 1600))
    for index, weight in enumerate(weights):
        expected = 600 * weight / sum(weights)
        assert abs(drawn[index] - expected) < 1 + len(sizes) + 0.02 * expected


def test_the_stream_has_no_end_and_no_state():
    stream = scene_stream(sources(5, 3), seed=2)
    far = 10**11
    assert [stream[far + k] for k in range(8)] == [stream[far + k] for k in range(8)]
    assert {stream[far + k] for k in range(32)} == set(range(8))


# Batches


def test_a_batch_holds_what_the_step_expects(root):
    (batch,) = take(make_batches(config(root), seed=0, global_batch=6), 1)
    expected = {
        "coord": ((6, 64, 3), np.float32),
        "color": ((6, 64, 3), np.uint8),
        "normal": ((6, 64, 3), np.float32),
        "segment": ((6, 64), np.int32),
        "count": ((6,), np.int32),
        "cut": ((6,), np.float32),
        "scene": ((6,), np.int32),
    }
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected
    for slot, index in enumerate(batch["scene"]):
        scene, count = tiny_scene(int(index)), int(batch["count"][slot])
        assert count == min(64, len(scene.coord))
        np.testing.assert_allclose(batch["cut"][slot], 1 - count / len(scene.coord), atol=1e-7)
        for name in ("coord", "color", "normal"):
            assert not batch[name][slot, count:].any()
            rows = {row.tobytes() for row in getattr(scene, name)}
            assert all(row.tobytes() in rows for row in batch[name][slot, :count])
        assert (batch["segment"][slot, count:] == -1).all()
        label = dict(zip(map(bytes, scene.coord), scene.segment, strict=True))
        found = [label[bytes(row)] for row in batch["coord"][slot, :count]]
        assert list(batch["segment"][slot, :count]) == found


def test_scenes_are_changed_when_they_are_loaded_and_need_no_labels(root):
    def bare(scene):
        return dataclasses.replace(scene, color=None, segment=None)

    (batch,) = take(make_batches(config(root), seed=0, global_batch=6, change=bare), 1)
    assert not batch["color"].any() and (batch["segment"] == -1).all() and batch["coord"].any()


@pytest.mark.parametrize("start", [1, 2, 7, 1000])
def test_starting_at_batch_b_is_resuming_there(root, start):
    run = make_batches(config(root), 3, 4)
    tail = make_batches(config(root), 3, 4, start_batch=start)
    if start < 10:
        for a, b in zip(take(run, start + 3)[start:], take(tail, 3), strict=True):
            assert_equal(a, b)
    else:
        before = take(make_batches(config(root), 3, 4, start_batch=start - 1), 2)
        assert_equal(before[1], take(tail, 1)[0])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_batch_of_one_process(root, processes):
    whole = take(make_batches(config(root), 4, 6), 3)
    parts = [
        take(make_batches(config(root), 4, 6, 0, index, processes), 3) for index in range(processes)
    ]
    for step, batch in enumerate(whole):
        joined = {k: np.concatenate([part[step][k] for part in parts]) for k in batch}
        assert_equal(joined, batch)


def test_threads_prefetch_and_cache_change_nothing(root):
    reference = take(make_batches(config(root, threads=0, prefetch=0, cache=0), 5, 3), 5)
    for changes in (dict(threads=4, prefetch=4, cache=0), dict(threads=1, prefetch=1, cache=99)):
        for a, b in zip(
            reference, take(make_batches(config(root, **changes), 5, 3), 5), strict=True
        ):
            assert_equal(a, b)


def test_the_cache_spares_loading_again(root, monkeypatch):
    loads = Counter()
    load = pipeline.load_indexed
    monkeypatch.setattr(
        pipeline, "load_indexed", lambda s, index: (loads.update([index]), load(s, index))[1]
    )
    take(make_batches(config(root, cache=8, threads=0), 0, 4), 8)
    assert set(loads) == set(range(8)) and set(loads.values()) == {1}


def test_a_repeated_scene_is_cut_elsewhere(root):
    batches = take(make_batches(config(root), 0, 8), 6)
    places = {
        batch["coord"][slot].tobytes()
        for batch in batches
        for slot in range(8)
        if batch["scene"][slot] == 4  # 80 points, 64 fit
    }
    shown = sum(int((batch["scene"] == 4).sum()) for batch in batches)
    assert shown > 3 and len(places) > 1


def test_a_batch_that_processes_cannot_share_is_refused(root):
    with pytest.raises(ValueError, match="7 scenes cannot be shared by 2 processes"):
        make_batches(config(root), 0, 7, process_count=2)


# Cutting


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 80), st.integers(1, 80), st.integers(0, 2**32 - 1), st.booleans())
def test_a_cut_keeps_the_points_nearest_to_one_of_them(count, points, seed, ties):
    coord = np.random.default_rng(seed).uniform(0, 4, (count, 3)).astype(np.float32)
    if ties:
        coord = np.round(coord)
    keep = cut_scene(coord, points, np.random.default_rng(seed))
    if count <= points:
        assert keep is None
        return
    assert keep.sum() == points
    offset = coord.astype(np.float64)[:, None] - coord[None]
    distance = np.sqrt((offset**2).sum(-1))  # [from, to]
    farthest_kept = np.where(keep, distance, -1).max(axis=1)
    nearest_left = np.where(keep, np.inf, distance).min(axis=1)
    fits = (farthest_kept <= nearest_left + 1e-5) & keep
    assert fits.any()


def test_ties_go_to_the_first_points():
    coord = np.zeros((10, 3), np.float32)
    coord[5:, 0] = 1
    for seed in range(8):
        keep = cut_scene(coord, 7, np.random.default_rng(seed))
        near = np.arange(5) + 5 * (not keep[:5].all())
        others = sorted(set(range(10)) - set(near))[:2]
        np.testing.assert_array_equal(np.flatnonzero(keep), sorted([*near, *others]))


# Scenes that cannot be used


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Three good scenes and one without coord.npy."""
    for index in range(4):
        write_scene(tmp_path / "a" / f"s{index}", tiny_scene(index))
    (tmp_path / "a" / "s2" / "coord.npy").unlink()
    return tmp_path


def one_source(root: Path, **changes) -> ConfigDict:
    source = dict(kind="folder", root=str(root), splits=("a",), units="m", up="z")
    return config(root, sources=(source,), **changes)


def test_a_bad_scene_stops_the_run_by_name(damaged):
    with pytest.raises(SceneError, match=r"s2/coord.npy: missing.*--config.data.skip_bad=True"):
        take(make_batches(one_source(damaged), 0, 4), 1)


def test_with_skip_bad_its_slot_is_empty_counted_and_logged(damaged, caplog):
    with caplog.at_level(logging.WARNING):
        batches = take(make_batches(one_source(damaged, skip_bad=True), 0, 4), 5)
    for batch in batches:  # an epoch each: all four scenes
        empty = batch["count"] == 0
        assert empty.sum() == 1 and batch["scene"][empty] == [2]
        assert not any(batch[name][empty].any() for name in ("coord", "color", "normal", "cut"))
    assert caplog.text.count("s2/coord.npy: missing") == 1  # not once more in every epoch


def test_missing_colours_and_normals_are_zeros(tmp_path):
    write_scene(tmp_path / "a" / "bare", Scene("bare", tiny_scene(0).coord))
    (batch,) = take(make_batches(one_source(tmp_path), 0, 1), 1)
    assert batch["count"] == [40] and batch["coord"].any()
    assert not batch["color"].any() and not batch["normal"].any()


# Config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(kind="folders"), "'folders' in a data source: did you mean 'folder'"),
        (dict(root="x"), "None in a data source: known are folder, packed, rooms"),
        (dict(kind="folder", roots="x"), "'roots' .* did you mean 'root'"),
        (dict(kind="rooms", seeds=(4, 4)), "seeds=.*first < end"),
        (dict(kind="rooms", weight=0.0), "weight is 0.0, expected a number above 0"),
        (dict(kind="rooms", spec=dict(nonsense=1)), "'nonsense' in a data source"),
        (dict(kind="folder", root="nowhere"), r"data.sources\[0\]: nowhere: no such folder"),
        (dict(kind="folder"), r"config.data.sources\[0\]: a folder source needs 'root'"),
        (dict(kind="folder", root=""), "root is '', expected a text in quotes that is not empty"),
        (dict(kind="folder", root="x", splits=5), "splits is 5, expected several values"),
        (dict(kind="rooms", weight="a"), "weight is 'a', expected a number above 0"),
        (dict(kind="rooms", seeds=5), r"seeds is 5, expected \(first, end\), each a whole number"),
        (dict(kind="rooms", spec=dict(frames="x")), "frames is 'x', expected a whole number"),
        (dict(kind="rooms", spec=dict(frames=0)), "frames 0 and max_points .* at least"),
        ("scans", "lists 'scans', expected dicts, as in .* with the comma at the end"),
    ],
)
def test_wrong_sources_are_refused(root, source, message):
    with pytest.raises(ValueError, match=message):
        make_batches(config(root, sources=(source,)), 0, 1)


def test_no_sources_are_refused(root):
    with pytest.raises(ValueError, match="data.sources is empty"):
        make_batches(config(root, sources=()), 0, 1)


@pytest.mark.parametrize("name", ["threads", "prefetch", "cache", "scene_points"])
def test_impossible_numbers_are_refused(root, name):
    with pytest.raises(ValueError, match=f"config.data.{name} is -1, expected a whole number"):
        make_batches(config(root, **{name: -1}), 0, 1)


def test_held_out_sources_are_named_as_such(root):
    with pytest.raises(ValueError, match="config.data.held_out.scenes is -1"):
        held_out(config(root, held_out=dict(scenes=-1, sources=())))
    with pytest.raises(ValueError, match="config.data.held_out.sources is empty"):
        held_out(config(root, held_out=dict(scenes=1, sources=())))


def test_rooms_are_made_from_their_seeds(root):
    rooms = dict(kind="rooms", seeds=(7, 8))
    (batch,) = take(make_batches(config(root, sources=(rooms,), scene_points=400_000), 0, 1), 1)
    room, count = make_room(7, RoomSpec()), int(batch["count"][0])
    assert count == len(room.coord)
    np.testing.assert_array_equal(batch["coord"][0, :count], room.coord)


def test_held_out_scenes_come_in_turns(root):
    data = config(root)
    assert [scene.name for scene in held_out(data)] == ["scene000", "scene001", "scene002"]
    parts = data.sources
    both = dict(scenes=4, sources=parts)
    names = [scene.name for scene in held_out(config(root, held_out=both))]
    assert names == ["scene000", "scene005", "scene001", "scene006"]
    assert held_out(config(root, held_out=dict(scenes=0, sources=()))) == []
