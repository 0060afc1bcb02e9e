"""Analytic ray casting of scenes made of boxes, tapered cylinders and ellipsoids (numpy, float32).

A primitive is a unit shape under an affine map: rotate by `axes`, scale by `half`, move to
`center`. Rays are tested in the unit frame, where a pinhole camera's ray directions are affine in
the pixel, so that a direction costs three additions. An image is cut into tiles and a primitive is
tested only against the rays of the tiles that its projected bounding box touches.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

BOX, CYLINDER, ELLIPSOID = 0, 1, 2

_TILE_ROWS, _TILE_COLS = 8, 16
_NEAR = np.float32(0.02)  # metres; what is nearer to the image plane than this is not seen
_CORNERS = np.array(
    [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32
)
_EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if bin(a ^ b).count("1") == 1])


@dataclass(frozen=True)
class Primitives:
    """n primitives as arrays.

    Attributes:
        shape: (n,) int8, BOX, CYLINDER (axis along local z) or ELLIPSOID.
        center: (n, 3) float32, metres.
        axes: (n, 3, 3) float32; column j is the local axis j in world coordinates.
        half: (n, 3) float32, half extents along the local axes, metres, > 0.
        taper: (n,) float32 in (-1, 1); a cylinder's radius is `half * (1 + taper * z)` where z
            runs from -1 at its bottom to 1 at its top. Ignored for the other shapes.
    """

    shape: np.ndarray
    center: np.ndarray
    axes: np.ndarray
    half: np.ndarray
    taper: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.shape)

    def bounds(self) -> np.ndarray:
        """(n, 3) half extents of boxes in the local frames that hold the shapes, metres."""
        wider = 1 + np.where(self.shape == CYLINDER, np.abs(self.taper), 0)
        return self.half * np.stack([wider, wider, np.ones_like(wider)], axis=1)

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3) lowest and highest world coordinates of those boxes, metres."""
        reach = np.einsum("nij,nj->ni", np.abs(self.axes), self.bounds())
        return self.center - reach, self.center + reach


class Hits(NamedTuple):
    """Where rays met primitives: m rays.

    local: (m, 3) float32 hit position in the primitive's frame, metres.
    normal: (m, 3) float32 outward unit normal in the primitive's frame.
    """

    local: np.ndarray
    normal: np.ndarray


def pixel_rays(width: int, height: int, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rays as x (width,) and y (height,) float32: that of row v, column u is (x[u], y[v], 1).

    Args:
        width: pixels.
        height: pixels.
        intrinsics: (3, 3) pinhole matrix; pixel centres are at whole numbers.
    """
    k = np.asarray(intrinsics, np.float64)
    x = (np.arange(width) - k[0, 2]) / k[0, 0]
    y = (np.arange(height) - k[1, 2]) / k[1, 1]
    return x.astype(np.float32), y.astype(np.float32)


def cast(
    primitives: Primitives, cam2world: np.ndarray, intrinsics: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Casts one ray per pixel of a pinhole camera and returns the first surface it meets.

    Args:
        primitives: the scene; a primitive that contains the camera is not seen.
        cam2world: (4, 4) pose, OpenCV axes (x right, y down, z forward).
        intrinsics: (3, 3) pinhole matrix.
        width: pixels.
        height: pixels.

    Returns:
        depth: (height, width) float32, metres along the optical axis, inf where nothing is hit.
        index: (height, width) int32, the primitive hit, -1 where nothing is.
    """
    rotation = np.asarray(cam2world[:3, :3], np.float32)
    origin = np.asarray(cam2world[:3, 3], np.float32)
    x, y = pixel_rays(width, height, intrinsics)

    # Camera to unit frame: p_unit = A p_cam + o. einsum and not matmul: BLAS picks kernels by CPU.
    to_local = primitives.axes.transpose(0, 2, 1) / primitives.half[:, :, None]
    matrix = np.einsum("nij,jk->nik", to_local, rotation)
    offset = np.einsum("nij,nj->ni", to_local, origin - primitives.center)

    prim, tile = _tile_pairs(primitives, rotation, origin, x, y)
    rows, cols = -(-height // _TILE_ROWS), -(-width // _TILE_COLS)
    x_tiles = _padded(x, cols * _TILE_COLS).reshape(cols, _TILE_COLS)
    y_tiles = _padded(y, rows * _TILE_ROWS).reshape(rows, _TILE_ROWS)

    pair_depth = np.empty((len(prim), _TILE_ROWS, _TILE_COLS), np.float32)
    for shape, intersect in _INTERSECTORS.items():
        pairs = np.flatnonzero(primitives.shape[prim] == shape)
        for start in range(0, len(pairs), 256):  # a block's arrays stay in cache
            block = pairs[start : start + 256]
            p, t = prim[block], tile[block]
            xs, ys = x_tiles[t % cols][:, None, :], y_tiles[t // cols][:, :, None]
            a = matrix[p][..., None, None]
            d = [a[:, i, 0] * xs + (a[:, i, 1] * ys + a[:, i, 2]) for i in range(3)]
            o = [offset[p, i][:, None, None] for i in range(3)]
            with np.errstate(divide="ignore", invalid="ignore"):
                pair_depth[block] = intersect(d, o, primitives.taper[p][:, None, None])

    return _nearest(pair_depth, prim, tile, rows, cols, width, height)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), mode="edge")


def _tile_pairs(
    primitives: Primitives, rotation: np.ndarray, origin: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The (primitive, tile) pairs whose rays may meet, sorted by tile: two (pairs,) int arrays."""
    spans = _CORNERS[None] * primitives.bounds()[:, None, :]  # (n, 8, 3)
    world = np.einsum("nij,ncj->nci", primitives.axes, spans) + primitives.center[:, None]
    corner = np.einsum("nci,ij->ncj", world - origin, rotation)
    # Where an edge crosses the near plane, the crossing stands for the corner behind the camera.
    a, b = corner[:, _EDGES[:, 0]], corner[:, _EDGES[:, 1]]
    crosses = (a[..., 2] < _NEAR) != (b[..., 2] < _NEAR)
    step = np.where(crosses, (_NEAR - a[..., 2]) / np.where(crosses, b[..., 2] - a[..., 2], 1), 0)
    edge = a + step[..., None] * (b - a)
    points = np.concatenate([corner, edge], axis=1)
    seen = np.concatenate([corner[..., 2] >= _NEAR, crosses], axis=1)
    scale = 1 / np.maximum(points[..., 2], _NEAR)

    def pixel_range(axis: int, grid: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
        pixel = (points[..., axis] * scale - grid[0]) / (grid[1] - grid[0])
        low = np.where(seen, pixel, np.inf).min(axis=1)
        high = np.where(seen, pixel, -np.inf).max(axis=1)
        first = np.clip(np.floor(low - 0.1), 0, len(grid)) // tile
        last = np.clip(np.ceil(high + 0.1), -1, len(grid) - 1) // tile
        return first.astype(np.int64), last.astype(np.int64)

    c0, c1 = pixel_range(0, x, _TILE_COLS)
    r0, r1 = pixel_range(1, y, _TILE_ROWS)
    wide, tall = np.maximum(c1 - c0 + 1, 0), np.maximum(r1 - r0 + 1, 0)
    count = wide * tall
    prim = np.repeat(np.arange(len(primitives)), count)
    rank = np.arange(len(prim)) - np.repeat(np.cumsum(count) - count, count)
    row, col = r0[prim] + rank // wide[prim], c0[prim] + rank % wide[prim]
    tile = row * -(-len(x) // _TILE_COLS) + col
    inside = (row * _TILE_ROWS < len(y)) & (col * _TILE_COLS < len(x))
    prim, tile = prim[inside], tile[inside]
    order = np.argsort(tile, kind="stable")
    return prim[order], tile[order]


def _box_depth(d: list[np.ndarray], o: list[np.ndarray], _: np.ndarray) -> np.ndarray:
    near, far = np.float32(-np.inf), np.float32(np.inf)
    for di, oi in zip(d, o, strict=True):
        inverse = 1 / di
        middle = -oi * inverse
        inverse = np.abs(inverse)
        near = np.maximum(near, middle - inverse)
        far = np.minimum(far, middle + inverse)
    return np.where((near <= far) & (near > _NEAR), near, np.inf)


def _ellipsoid_depth(d: list[np.ndarray], o: list[np.ndarray], _: np.ndarray) -> np.ndarray:
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    middle = -(o[0] * d[0] + o[1] * d[1] + o[2] * d[2]) / a
    # Squared distance of the ray from the centre, from the point of closest approach: the
    # discriminant of the quadratic cancels badly for small shapes far away.
    miss = sum((oi + middle * di) ** 2 for oi, di in zip(o, d, strict=True))
    depth = middle - np.sqrt((1 - miss) / a)
    return np.where(depth > _NEAR, depth, np.inf)  # NaN compares false


def _cylinder_depth(d: list[np.ndarray], o: list[np.ndarray], k: np.ndarray) -> np.ndarray:
    # Side: x^2 + y^2 = (1 + k z)^2 with |z| <= 1, where 1 + k z > 0 because |k| < 1. Measured from
    # the point of closest approach to the centre, `start` along the ray, against cancellation.
    start = -(o[0] * d[0] + o[1] * d[1] + o[2] * d[2]) / (d[0] ** 2 + d[1] ** 2 + d[2] ** 2)
    above = o[2]
    o = [oi + start * di for oi, di in zip(o, d, strict=True)]
    grow = 1 + k * o[2]
    a = d[0] * d[0] + d[1] * d[1] - k * k * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] - k * grow * d[2]
    c = o[0] * o[0] + o[1] * o[1] - grow * grow
    root = np.sqrt(b * b - a * c)
    best = np.full(a.shape, np.inf, np.float32)
    for sign in (-1, 1):
        t = (sign * root - b) / a
        valid = (np.abs(o[2] + t * d[2]) <= 1) & (t > _NEAR - start)
        best = np.where(valid & (t < best), t, best)
    # The cap on the camera's side.
    top = np.sign(above)
    t = (top - o[2]) / d[2]
    radius = (o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2
    valid = (np.abs(above) > 1) & (radius <= (1 + k * top) ** 2) & (t > _NEAR - start)
    return start + np.where(valid & (t < best), t, best)


_INTERSECTORS = {BOX: _box_depth, CYLINDER: _cylinder_depth, ELLIPSOID: _ellipsoid_depth}


def _nearest(
    pair_depth: np.ndarray,
    prim: np.ndarray,
    tile: np.ndarray,
    rows: int,
    cols: int,
    width: int,
    height: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the minimum over the pairs of each tile and puts the tiles together."""
    depth = np.full((rows * cols, _TILE_ROWS * _TILE_COLS), np.inf, np.float32)
    index = np.full(depth.shape, -1, np.int32)
    if len(prim):
        flat = pair_depth.reshape(len(prim), -1)
        starts = np.flatnonzero(np.diff(tile, prepend=-1))
        depth[tile[starts]] = np.minimum.reduceat(flat, starts, axis=0)
        pair, ray = np.nonzero((flat == depth[tile]) & np.isfinite(flat))
        index[tile[pair], ray] = prim[pair]

    def assemble(tiles: np.ndarray) -> np.ndarray:
        image = tiles.reshape(rows, cols, _TILE_ROWS, _TILE_COLS).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(
            image.reshape(rows * _TILE_ROWS, cols * _TILE_COLS)[:height, :width]
        )

    return assemble(depth), assemble(index)


def surface(primitives: Primitives, index: np.ndarray, point: np.ndarray) -> Hits:
    """Local position and outward normal of points on the surface of primitives.

    Args:
        primitives: the scene.
        index: (m,) int, the primitive of each point, >= 0.
        point: (m, 3) float32, world position on (or very near) that primitive's surface.
    """
    axes = primitives.axes[index]
    offset = point - primitives.center[index]
    local = np.einsum("mij,mi->mj", axes, offset)
    half = primitives.half[index]
    unit = local / half
    shape = primitives.shape[index]

    normal = unit / half  # ellipsoid
    box = np.flatnonzero(shape == BOX)
    face = np.abs(unit[box]).argmax(axis=1)
    normal[box] = 0
    normal[box, face] = np.where(unit[box, face] < 0, -1, 1)

    round_ = np.flatnonzero(shape == CYLINDER)
    u, h, k = unit[round_], half[round_], primitives.taper[index[round_]]
    grow = 1 + k * u[:, 2]
    side = np.abs(np.hypot(u[:, 0], u[:, 1]) - grow) * np.minimum(h[:, 0], h[:, 1])
    cap = np.abs(1 - np.abs(u[:, 2])) * h[:, 2] < side
    normal[round_, 2] = -k * grow / h[:, 2]
    normal[round_[cap], :2] = 0
    normal[round_[cap], 2] = np.where(u[cap, 2] < 0, -1, 1)

    normal /= np.sqrt((normal * normal).sum(axis=1, keepdims=True))
    return Hits(local, normal)


def to_world(primitives: Primitives, index: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Rotates (m, 3) vectors from the frames of primitives `index` (m,) to world coordinates."""
    return np.einsum("mij,mj->mi", primitives.axes[index], vector)
