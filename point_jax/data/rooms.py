"""Procedural furnished rooms, scanned by a simulated depth camera: pure functions of a seed.

`build_room` makes the geometry (primitives and materials), `camera_path` walks a camera through
it, `render_view` takes one clean posed view, and `make_room` fuses many noisy ones to a `Scene`.
The same numpy on the same kind of processor gives the same bytes for the same seed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from point_jax.data.raycast import Hits, Primitives, cast, pixel_rays, surface, to_world
from point_jax.data.room_layout import furnished_room
from point_jax.data.room_light import Light, expose, make_light, shade
from point_jax.data.room_path import walk
from point_jax.data.room_sketch import flatten, pack_primitives
from point_jax.data.room_textures import Materials, albedo, pack_materials
from point_jax.data.scenes import Scene

CLASSES: tuple[str, ...] = (
    "wall",
    "floor",
    "ceiling",
    "door",
    "window",
    "bed",
    "chair",
    "sofa",
    "table",
    "desk",
    "cabinet",
    "bookshelf",
    "refrigerator",
    "appliance",
    "counter",
    "sink",
    "lamp",
    "screen",
    "plant",
    "curtain",
    "picture",
    "clutter",
    "rug",
    "cushion",
    "books",
    "box",
    "radiator",
)


@dataclass(frozen=True)
class RoomSpec:
    """How a room is scanned.

    Attributes:
        frames: depth images along the camera's path.
        width: of an image, pixels.
        height: of an image, pixels.
        field_of_view: horizontal, degrees.
        voxel: edge of the cubes of which at most one point is kept, the nearest seen; metres.
        max_points: a random choice of so many is kept of what is left.
        near: least depth that the camera measures, metres.
        far: greatest depth that the camera measures, metres.
        depth_noise: standard deviation of a depth d is `0.001 + depth_noise * d^2`, metres.
        pose_noise: standard deviation of a frame's position, metres; its rotation errs by as many
            radians.
        normal_noise: standard deviation of the normals' components.
        color_noise: standard deviation of the colours, as a share of full scale.
        dropout: share of readings lost at random, besides glass and grazing angles.
    """

    frames: int = 24
    width: int = 160
    height: int = 120
    field_of_view: float = 75.0
    voxel: float = 0.02
    max_points: int = 120_000
    near: float = 0.4
    far: float = 5.5
    depth_noise: float = 0.001
    pose_noise: float = 0.002
    normal_noise: float = 0.06
    color_noise: float = 0.02
    dropout: float = 0.02

    def __post_init__(self) -> None:
        if min(self.frames, self.width - 1, self.height - 1, self.max_points) < 1:
            raise ValueError(
                f"RoomSpec: frames {self.frames} and max_points {self.max_points} must be at least "
                f"1, width {self.width} and height {self.height} at least 2"
            )
        if not (0 < self.near < self.far and self.voxel > 0 and 0 < self.field_of_view < 150):
            raise ValueError(
                f"RoomSpec: expected 0 < near < far, voxel > 0 and a field of view of 0 to 150 "
                f"degrees, got near {self.near}, far {self.far}, voxel {self.voxel}, "
                f"field_of_view {self.field_of_view}"
            )

    def intrinsics(self) -> np.ndarray:
        """(3, 3) float64 pinhole matrix of the depth images."""
        focal = self.width / 2 / np.tan(np.radians(self.field_of_view) / 2)
        center = ((self.width - 1) / 2, (self.height - 1) / 2)
        return np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1.0]])


# For tests and quick starts: up to 30 thousand points 4 cm apart.
SMALL = RoomSpec(frames=16, width=112, height=84, voxel=0.04, max_points=30_000)


@dataclass(frozen=True)
class Room:
    """The geometry and looks of a room: n primitives, z up, the floor at z = 0.

    Attributes:
        name: kind and seed.
        outline: (k, 2) float32, corners of the floor, counter-clockwise, metres.
        height: of the ceiling, metres.
        primitives: n shapes.
        materials: of the n shapes.
        segment: (n,) int32, position in `CLASSES`.
        instance: (n,) int32, 0, 1, ... for every object; an object is of one class.
        light: what lights it.
    """

    name: str
    outline: np.ndarray
    height: float
    primitives: Primitives
    materials: Materials
    segment: np.ndarray
    instance: np.ndarray
    light: Light

    def __post_init__(self) -> None:
        for array in (self.outline, self.segment, self.instance):
            array.setflags(write=False)


class View(NamedTuple):
    """One posed image: depth (h, w) float32 metres along the optical axis, 0 = none; color
    (h, w, 3) uint8; segment and instance (h, w) int32, -1 = none."""

    depth: np.ndarray
    color: np.ndarray
    segment: np.ndarray
    instance: np.ndarray


def _generator(seed: int, purpose: int) -> np.random.Generator:
    if not 0 <= int(seed) == seed:
        raise ValueError(f"a room's seed is a whole number, 0 or greater; got {seed!r}")
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(purpose,)))


def build_room(seed: int) -> Room:
    """Makes the room of a seed.

    Raises:
        ValueError: for a negative seed.
    """
    rng = _generator(seed, 0)
    kind, plan = furnished_room(rng)
    items = [pair for item, pose in plan.placed for pair in flatten(item, pose)]
    counts = [len(item.parts) for item, _ in items]
    primitives = pack_primitives(items)
    segment = np.repeat([CLASSES.index(item.segment) for item, _ in items], counts)
    instance = np.repeat(np.arange(len(items)), counts)
    outline = np.array(plan.outline, np.float32)
    flat = ("wall", "floor", "ceiling", "door", "window", "curtain", "picture")
    standing = ~np.isin(segment, [CLASSES.index(name) for name in flat])
    light = make_light(rng, plan.lights, plan.size, primitives, standing)
    materials = pack_materials([part.material for item, _ in items for part in item.parts], rng)
    return Room(
        name=f"{kind}_{int(seed)}",
        outline=outline,
        height=plan.size[2],
        primitives=primitives,
        materials=materials,
        segment=segment.astype(np.int32),
        instance=instance.astype(np.int32),
        light=light,
    )


def camera_path(room: Room, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Poses of a camera that is carried through the room and looks around twice.

    Args:
        room: the room.
        frames: how many.
        rng: draws the path.

    Returns:
        (frames, 4, 4) float64 camera to world, OpenCV axes (x right, y down, z forward).
    """
    return walk(room.primitives, room.outline, room.height, frames, rng)


def scan_path(seed: int, spec: RoomSpec) -> np.ndarray:
    """The (frames, 4, 4) poses from which `make_room` scans the room of a seed."""
    return camera_path_of(build_room(seed), seed, spec)


def camera_path_of(room: Room, seed: int, spec: RoomSpec) -> np.ndarray:
    """The same for the `room` of that seed, made already."""
    return camera_path(room, spec.frames, _generator(seed, 1))


def render_view(
    room: Room, cam2world: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]
) -> View:
    """Renders what a perfect camera sees.

    Args:
        room: the room.
        cam2world: (4, 4) pose, OpenCV axes.
        intrinsics: (3, 3) pinhole matrix, pixel centres at whole numbers.
        size: width and height, pixels.
    """
    width, height = size
    depth, index = cast(room.primitives, cam2world, intrinsics, width, height)
    hit = np.flatnonzero(index.ravel() >= 0)
    prims = index.ravel()[hit]
    point = _positions(cam2world, intrinsics, depth)[hit]
    hits = surface(room.primitives, prims, point)
    normal = to_world(room.primitives, prims, hits.normal)
    base = albedo(room.primitives, room.materials, prims, hits)
    color = np.zeros((height * width, 3), np.uint8)
    color[hit] = expose(shade(room.light, base, point, normal))
    seen = index >= 0
    return View(
        depth=np.where(seen, depth, 0),
        color=color.reshape(height, width, 3),
        segment=np.where(seen, room.segment[index], -1).astype(np.int32),
        instance=np.where(seen, room.instance[index], -1).astype(np.int32),
    )


def _positions(cam2world: np.ndarray, intrinsics: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(h * w, 3) float32 world positions of the pixels of a depth image."""
    x, y = pixel_rays(depth.shape[1], depth.shape[0], intrinsics)
    r, t = cam2world[:3, :3].astype(np.float32), cam2world[:3, 3].astype(np.float32)
    ray = x[None, :, None] * r[:, 0] + (y[:, None, None] * r[:, 1] + r[:, 2])
    return (ray * depth[..., None] + t).reshape(-1, 3)


def make_room(seed: int, spec: RoomSpec | None = None) -> Scene:
    """Makes the room of a seed and scans it.

    The geometry depends on the seed alone, the scan on seed and spec. Coordinates carry depth and
    pose noise, colours the exposure and white balance of the frame that saw them; normals are
    those of the true surfaces with a little noise, turned to the camera.

    Raises:
        ValueError: for a negative seed, and for a spec that sees nothing.
    """
    spec = spec or RoomSpec()
    room, rng = build_room(seed), _generator(seed, 2)
    poses = camera_path_of(room, seed, spec)
    seen = _fuse(_scan(room, poses, spec, rng), spec.voxel)
    hits = surface(room.primitives, seen.prim, seen.true)
    normal = to_world(room.primitives, seen.prim, hits.normal)
    sight = seen.true - poses[seen.frame, :3, 3].astype(np.float32)
    facing = -(normal * sight).sum(axis=1) / np.sqrt((sight * sight).sum(axis=1))
    # At grazing angles the projected pattern is lost: from 80 degrees on ever more readings.
    kept = np.flatnonzero(np.abs(facing) > 0.17 * rng.random(len(facing), np.float32))
    if len(kept) > spec.max_points:
        kept = np.sort(rng.permutation(kept)[: spec.max_points])

    seen, sight = _Readings(*(part[kept] for part in seen)), sight[kept]
    hits = Hits(hits.local[kept], hits.normal[kept])
    normal = normal[kept] * np.where(facing[kept] < 0, -1, 1)[:, None].astype(np.float32)
    base = albedo(room.primitives, room.materials, seen.prim, hits)
    lit = shade(room.light, base, seen.true, normal) * _gains(spec.frames, rng)[seen.frame]
    color = expose(lit, spec.color_noise * rng.standard_normal(normal.shape, np.float32))
    normal += np.float32(spec.normal_noise) * rng.standard_normal(normal.shape, np.float32)
    normal /= np.sqrt((normal * normal).sum(axis=1, keepdims=True))
    return Scene(
        name=room.name,
        coord=seen.true + _errors(seen, sight, spec, rng),
        color=color,
        normal=normal,
        segment=room.segment[seen.prim],
        instance=room.instance[seen.prim],
    )


class _Readings(NamedTuple):
    """m depth readings: true (m, 3) float32 positions on the surface, prim (m,) the primitives,
    depth (m,) float32, frame (m,) and pixel (m,), row * width + column, that took them."""

    true: np.ndarray
    prim: np.ndarray
    depth: np.ndarray
    frame: np.ndarray
    pixel: np.ndarray


def _scan(room: Room, poses: np.ndarray, spec: RoomSpec, rng: np.random.Generator) -> _Readings:
    """Takes the depth images; keeps the readings in reach that neither glass nor chance takes."""
    intrinsics = spec.intrinsics()
    frames = []
    for number, pose in enumerate(poses):
        depth, index = cast(room.primitives, pose, intrinsics, spec.width, spec.height)
        seen = (depth > spec.near) & (depth < spec.far)
        keep = (1 - spec.dropout) * (1 - room.materials.lost[index])
        pixel = np.flatnonzero(seen & (rng.random(depth.shape, np.float32) < keep))
        true = _positions(pose, intrinsics, depth)[pixel]
        frame = np.full(len(pixel), number, np.int32)
        frames.append((true, index.ravel()[pixel], depth.ravel()[pixel], frame, pixel))
    return _Readings(*(np.concatenate(parts) for parts in zip(*frames, strict=True)))


def _fuse(readings: _Readings, voxel: float) -> _Readings:
    """Keeps of every voxel of surface the reading from the nearest distance, in scan order.

    Voxels are those of the true positions: volumetric fusion leaves one sheet of points on a
    surface that many frames saw, not a cloud as thick as their noise.

    Raises:
        ValueError: when there is no reading, or voxels are too small to be numbered.
    """
    if not len(readings.depth):
        raise ValueError("a scan saw nothing: RoomSpec.near and far leave no surface in reach")
    cell = np.floor(readings.true / np.float32(voxel)).astype(np.int64)
    cell -= cell.min(axis=0)
    size = cell.max(axis=0) + 1
    key = (cell[:, 0] * size[1] + cell[:, 1]) * size[2] + cell[:, 2]
    # One sort of packed (voxel, depth, reading) numbers; all differ, so that any sort agrees.
    low = len(key).bit_length()
    middle = min(62 - low - int(size.prod()).bit_length(), 16)
    if middle < 4:
        raise ValueError(f"voxels of {voxel} m are too small for a room of {size * voxel} m")
    nearness = (readings.depth / readings.depth.max() * (2**middle - 1)).astype(np.int64)
    packed = np.sort((((key << middle) + nearness) << low) + np.arange(len(key)))
    first = np.diff(packed >> (middle + low), prepend=-1) > 0
    kept = np.sort(packed[first] & (2**low - 1))
    return _Readings(*(part[kept] for part in readings))


def _errors(
    seen: _Readings, sight: np.ndarray, spec: RoomSpec, rng: np.random.Generator
) -> np.ndarray:
    """(m, 3) float32: depth noise along the lines of sight (m, 3), and the errors of the poses.

    Half of the depth noise is shared by patches of 6 x 6 pixels, as stereo matching does.
    """
    rows, cols = spec.height // 6 + 1, spec.width // 6 + 1
    patch = rng.standard_normal((spec.frames, rows, cols), np.float32)
    shared = patch[seen.frame, seen.pixel // spec.width // 6, seen.pixel % spec.width // 6]
    own = rng.standard_normal(len(seen.depth), np.float32)
    sigma = 0.001 + np.float32(spec.depth_noise) * seen.depth * seen.depth
    error = sigma * np.float32(np.sqrt(0.5)) * (shared + own) / seen.depth
    shift, turn = spec.pose_noise * rng.standard_normal((2, spec.frames, 3), np.float32)
    moved = np.cross(turn[seen.frame], sight) + shift[seen.frame]
    return (sight * error[:, None] + moved).astype(np.float32)


def _gains(frames: int, rng: np.random.Generator) -> np.ndarray:
    """(frames, 3) float32: how bright each frame shows red, green, blue; drifts along the path."""
    drift = np.cumsum(rng.normal(0, 0.03, (frames, 3)), axis=0)
    drift -= drift.mean(axis=0)
    balance = rng.normal(0, 0.04, 3) + 0.3 * drift
    return np.exp(rng.normal(0, 0.1) + drift[:, :1] + balance).astype(np.float32)
