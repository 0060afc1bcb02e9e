"""Procedural rooms: repeatable, plausible, and scanned as a depth camera would."""

import math
from functools import cache

import numpy as np
import pytest

from point_jax.data.room_layout import furnished_room
from point_jax.data.rooms import (
    CLASSES,
    SMALL,
    Room,
    RoomSpec,
    build_room,
    camera_path,
    make_room,
    render_view,
    scan_path,
)
from point_jax.data.scenes import Scene, validate

SEEDS = range(12)
STRUCTURE = [CLASSES.index(name) for name in ("wall", "floor", "ceiling", "door", "window")]


@cache
def small(seed: int) -> Scene:
    return make_room(seed, SMALL)


@cache
def room_of(seed: int) -> Room:
    return build_room(seed)


def arrays(scene: Scene) -> list[bytes]:
    return [a.tobytes() for a in (scene.coord, scene.color, scene.normal, scene.segment,
                                  scene.instance) if a is not None]  # fmt: skip


# Repeatable


def test_a_room_is_a_pure_function_of_its_seed() -> None:
    np.random.seed(0)  # noqa: NPY002 - must make no difference
    first = make_room(7, SMALL)
    np.random.seed(1)  # noqa: NPY002
    make_room(8, SMALL)
    assert arrays(make_room(7, SMALL)) == arrays(first)
    assert len(arrays(first)) == 5


def test_different_seeds_make_different_rooms() -> None:
    assert len({arrays(small(seed))[0] for seed in SEEDS}) == len(SEEDS)
    assert len({room_of(seed).outline.tobytes() for seed in SEEDS}) == len(SEEDS)
    assert len({room_of(seed).name.split("_")[0] for seed in range(20)}) == 5


def test_geometry_does_not_depend_on_the_scan() -> None:
    scene = make_room(3, RoomSpec(frames=3, width=40, height=30))
    room, again = room_of(3), build_room(3)
    assert np.array_equal(room.primitives.center, again.primitives.center)
    assert scene.name == room.name == small(3).name


def test_geometry_cannot_be_changed() -> None:
    room = room_of(0)
    for array in (room.primitives.center, room.materials.color, room.segment):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# What a scene holds


@pytest.mark.parametrize("seed", SEEDS)
def test_scenes_are_valid_and_sized_as_asked(seed: int) -> None:
    scene = small(seed)
    validate(scene)
    count = len(scene.coord)
    assert 10_000 <= count <= SMALL.max_points
    assert (scene.coord.dtype, scene.coord.shape) == (np.float32, (count, 3))
    assert scene.color is not None and scene.normal is not None
    assert (scene.color.dtype, scene.color.shape) == (np.uint8, (count, 3))
    assert (scene.normal.dtype, scene.normal.shape) == (np.float32, (count, 3))
    np.testing.assert_allclose(np.linalg.norm(scene.normal, axis=1), 1, atol=1e-5)


def test_the_default_scan_is_dense() -> None:
    scene = make_room(5)
    assert 40_000 <= len(scene.coord) <= RoomSpec().max_points
    cell = np.floor(scene.coord / 0.04).astype(int)
    _, members = np.unique(cell, axis=0, return_counts=True)
    assert np.average(members, weights=members) > 2.0  # so many of the 4 in a 4 cm square


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_are_consistent(seed: int) -> None:
    scene = small(seed)
    assert scene.segment is not None and scene.instance is not None
    assert scene.segment.dtype == scene.instance.dtype == np.int32
    assert scene.segment.min() >= 0
    assert scene.segment.max() < len(CLASSES)
    assert len(np.unique(scene.segment)) >= 9
    pairs = np.unique(np.stack([scene.instance, scene.segment]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]  # one class an instance
    assert set(STRUCTURE[:3]) <= set(scene.segment.tolist())


def test_many_rooms_have_all_classes_and_many_colours() -> None:
    seen: set[int] = set()
    means = []
    for seed in range(30):
        room = room_of(seed)
        seen |= set(room.segment.tolist())
        means.append(room.materials.color.mean(axis=0))
    assert seen == set(range(len(CLASSES)))
    assert np.std(means, axis=0).min() > 0.04


# Surfaces as a depth camera sees them


@pytest.mark.parametrize("seed", SEEDS)
def test_points_lie_in_the_room(seed: int) -> None:
    scene, room = small(seed), room_of(seed)
    noise = 6 * (0.001 + SMALL.depth_noise * SMALL.far**2)
    low, high = room.outline.min(axis=0), room.outline.max(axis=0)
    recess = 0.2  # how deep doors and windows lie in the walls
    assert (scene.coord[:, :2] > low - recess - noise).all()
    assert (scene.coord[:, :2] < high + recess + noise).all()
    assert scene.coord[:, 2].min() > -noise
    assert scene.coord[:, 2].max() < room.height + noise
    # Nothing behind the walls either where a corner is cut out.
    outside = ~_inside(room.outline, scene.coord[:, :2])
    assert _distance_to(room.outline, scene.coord[outside, :2]).max() < recess + noise


def _inside(outline: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Even-odd rule."""
    result = np.zeros(len(xy), bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (xy[:, 1] < y0) != (xy[:, 1] < y1)
            result ^= crosses & (xy[:, 0] < x0 + (xy[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    return result


def _distance_to(outline: np.ndarray, xy: np.ndarray) -> np.ndarray:
    best = np.full(len(xy), np.inf)
    for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        along = np.clip((xy - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        best = np.minimum(best, np.linalg.norm(xy - a - along[:, None] * (b - a), axis=1))
    return best


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_every_point_is_what_some_frame_saw(seed: int) -> None:
    """Without noise each point lies on the depth image of a frame that its normal looks at."""
    spec = RoomSpec(frames=8, width=120, height=90, depth_noise=0, pose_noise=0, normal_noise=0,
                    max_points=5000)  # fmt: skip
    scene, room = make_room(seed, spec), room_of(seed)
    assert scene.normal is not None and scene.segment is not None and scene.instance is not None
    seen = np.zeros(len(scene.coord), bool)
    for pose in scan_path(seed, spec):
        view = render_view(room, pose, spec.intrinsics(), (spec.width, spec.height))
        local = (scene.coord - pose[:3, 3]) @ pose[:3, :3]
        pixel = np.round(local @ spec.intrinsics().T / local[:, 2:])[:, :2].astype(int)
        fits = (pixel >= 0).all(axis=1) & (pixel < (spec.width, spec.height)).all(axis=1)
        col, row = np.where(fits[:, None], pixel, 0).T
        hit = fits & (np.abs(view.depth[row, col] - local[:, 2]) < 0.01)
        hit &= (view.instance[row, col] == scene.instance) & (local[:, 2] > 0)
        hit &= ((pose[:3, 3] - scene.coord) * scene.normal).sum(axis=1) > 0
        seen |= hit
    assert seen.mean() > 0.99  # 1 mm of noise remains, which at grazing angles is a pixel


def test_noise_grows_with_distance_and_glass_is_often_missed() -> None:
    spec = RoomSpec(frames=8, depth_noise=0.004, pose_noise=0)
    spread, panes = [], []
    for seed in (1, 2, 5):
        scene, room, poses = make_room(seed, spec), room_of(seed), scan_path(seed, spec)
        assert scene.segment is not None
        floor = scene.coord[scene.segment == CLASSES.index("floor")]
        distance = np.linalg.norm(floor[:, None] - poses[:, :3, 3], axis=2).min(axis=1)
        near, far = distance < 1.8, distance > 2.2
        spread.append((np.abs(floor[near, 2]).mean(), np.abs(floor[far, 2]).mean()))
        views = [render_view(room, pose, spec.intrinsics(), (160, 120)) for pose in poses]
        window = CLASSES.index("window")
        share = np.mean([view.segment == window for view in views])
        panes.append((np.mean(scene.segment == window), share))
    near, far = np.mean(spread, axis=0)
    assert far > 1.2 * near > 0
    measured, rendered = np.mean(panes, axis=0)
    assert measured < rendered


def test_views_are_metric() -> None:
    exact: dict[str, list[bool]] = {"floor": [], "ceiling": []}
    for seed in (0, 2, 6):
        room = room_of(seed)
        intrinsics = RoomSpec(width=80, height=60).intrinsics()
        for pose in camera_path(room, 4, np.random.default_rng(seed)):
            view = render_view(room, pose, intrinsics, (80, 60))
            assert view.depth.shape == view.segment.shape == (60, 80)
            assert view.color.dtype == np.uint8
            assert view.color.std() > 5
            v, u = np.mgrid[:60, :80]
            ray = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T
            world = (ray * view.depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
            for name, z in (("floor", 0.0), ("ceiling", room.height)):
                height = world[view.segment == CLASSES.index(name)][:, 2]
                exact[name] += (np.abs(height - z) < 1e-3).tolist()
            assert (view.depth > 0).all()  # a room is closed
    assert len(exact["floor"]) > 1000 < len(exact["ceiling"])
    assert all(exact["floor"])
    assert np.mean(exact["ceiling"]) > 0.6  # the rest are beams


def test_the_camera_walks_through_free_space() -> None:
    steps: list[float] = []
    for seed in SEEDS:
        room = room_of(seed)
        poses = camera_path(room, 24, np.random.default_rng(seed))
        rotation = poses[:, :3, :3]
        eye3 = np.tile(np.eye(3), (24, 1, 1))
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), eye3, atol=1e-9)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-9)
        assert (rotation[:, 2, 1] < 0).all()  # the image's y points down
        eye = poses[:, :3, 3]
        assert _inside(room.outline, eye[:, :2]).all()
        assert (eye[:, 2] > 0.9).all() and (eye[:, 2] < room.height - 0.3).all()
        p = room.primitives
        local = np.einsum("nij,nmi->nmj", p.axes, eye[None] - p.center[:, None])
        assert (np.abs(local) > p.bounds()[:, None]).any(axis=2).all()  # in no primitive's box
        steps += np.linalg.norm(np.diff(eye, axis=0), axis=1).tolist()
    # Two rounds in 24 frames: a walker's steps, with seldom one around a piece of furniture.
    assert np.quantile(steps, 0.98) < 1.2
    assert max(steps) < 2.5


# Furniture


@pytest.mark.parametrize("seed", range(20))
def test_furniture_stands_apart(seed: int) -> None:
    """Footprints at the same height do not overlap; chairs may reach under tables."""
    _, plan = furnished_room(np.random.default_rng(seed))
    items = [(i, p) for i, p in plan.placed if i.size[0] > 0 and i.segment != "lamp"]
    grid = np.stack(np.meshgrid(*[np.linspace(-0.49, 0.49, 9)] * 2), axis=-1).reshape(-1, 2)
    for a, pose in items:
        c, s = math.cos(pose.yaw), math.sin(pose.yaw)
        xy = grid * a.size[:2] @ np.array([[c, s], [-s, c]]) + (pose.x, pose.y)
        assert (xy > 0).all() and (xy < plan.size[:2]).all()
        for b, other in items:
            under = {a.segment, b.segment} in ({"chair", "table"}, {"chair", "desk"})
            apart = pose.z >= other.z + b.size[2] or other.z >= pose.z + a.size[2]
            if a is b or under or apart:
                continue
            c, s = math.cos(other.yaw), math.sin(other.yaw)
            local = (xy - (other.x, other.y)) @ np.array([[c, -s], [s, c]])
            assert (np.abs(local) > np.array(b.size[:2]) * 0.49).any(axis=1).all(), (a, b)


def test_chairs_look_at_tables() -> None:
    angles = []
    for seed in range(20):
        _, plan = furnished_room(np.random.default_rng(seed))
        tables = [(i, p) for i, p in plan.placed if i.segment in ("table", "desk")]
        for chair, pose in plan.placed:
            if chair.segment != "chair":
                continue
            front = np.array([-math.sin(pose.yaw), math.cos(pose.yaw)])
            best, cosine = math.inf, 0.0
            for item, at in tables:  # the nearest point of the table from the chair
                c, s = math.cos(at.yaw), math.sin(at.yaw)
                turn = np.array([[c, -s], [s, c]])
                half = np.array(item.size[:2]) / 2
                local = np.array([pose.x - at.x, pose.y - at.y]) @ turn
                way = (np.clip(local, -half, half) - local) @ turn.T
                if np.linalg.norm(way) < best:
                    best = float(np.linalg.norm(way))
                    cosine = front @ way / max(best, 1e-6)
            if best < 0.6:
                angles.append(math.degrees(math.acos(np.clip(cosine, -1, 1))))
    assert len(angles) > 20
    assert np.median(angles) < 15
    assert np.mean(np.array(angles) < 60) > 0.95


# Mistakes


def test_wrong_specs_and_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        make_room(-1, SMALL)
    with pytest.raises(ValueError, match="frames 0"):
        RoomSpec(frames=0)
    with pytest.raises(ValueError, match="near 3"):
        RoomSpec(near=3, far=2)
    with pytest.raises(ValueError, match="saw nothing"):
        make_room(0, RoomSpec(frames=2, width=20, height=20, near=50, far=51))
    with pytest.raises(ValueError, match="too small"):
        make_room(0, RoomSpec(frames=2, width=20, height=20, voxel=1e-7))
