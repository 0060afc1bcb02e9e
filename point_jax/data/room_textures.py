"""Materials of procedural rooms: colours as a function of the position on a surface.

Textures live in two coordinates (u, v) in metres on the face that a point lies on, u along the
face's longer side, so that grain runs along a board. Noise is hashed integers: no tables and no
random state, the same colour for the same point whoever asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from point_jax.data.raycast import CYLINDER, Hits, Primitives

Color = tuple[float, float, float]


class Material(NamedTuple):
    """What a surface looks like.

    Attributes:
        texture: a key of `TEXTURES`.
        color: sRGB in [0, 1].
        accent: the second colour of the texture, sRGB in [0, 1].
        scale: size of the texture's features, metres.
        lost: probability that a depth camera gets no reading (glass, screens, polished metal).
        joined: the texture runs on across all primitives that share the material (walls, floors),
            v upwards on upright faces.
    """

    texture: str
    color: Color
    accent: Color
    scale: float = 0.1
    lost: float = 0.0
    joined: bool = False


@dataclass(frozen=True)
class Materials:
    """The materials of n primitives as arrays.

    Attributes:
        texture: (n,) int8, position in `TEXTURES`.
        color: (n, 3) float32.
        accent: (n, 3) float32.
        scale: (n,) float32, metres.
        lost: (n,) float32.
        offset: (n, 2) float32, where in the texture the primitive's middle lies, metres.
        salt: (n,) uint32, makes the noise of one object differ from another's.
        joined: (n,) bool.
    """

    texture: np.ndarray
    color: np.ndarray
    accent: np.ndarray
    scale: np.ndarray
    lost: np.ndarray
    offset: np.ndarray
    salt: np.ndarray
    joined: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).setflags(write=False)


def pack_materials(materials: Sequence[Material], rng: np.random.Generator) -> Materials:
    """Stacks n materials, drawing for each a place in its texture."""
    names = list(TEXTURES)
    count = len(materials)
    offset = rng.uniform(10, 20, (count, 2)).astype(np.float32)
    salt = rng.integers(0, 2**32, count, dtype=np.uint32)
    first: dict[Material, int] = {}
    for i, material in enumerate(materials):
        if material.joined:
            offset[i], salt[i] = offset[first.setdefault(material, i)], salt[first[material]]
    return Materials(
        texture=np.array([names.index(m.texture) for m in materials], np.int8),
        color=np.array([m.color for m in materials], np.float32).reshape(count, 3),
        accent=np.array([m.accent for m in materials], np.float32).reshape(count, 3),
        scale=np.array([m.scale for m in materials], np.float32),
        lost=np.array([m.lost for m in materials], np.float32),
        offset=offset,
        salt=salt,
        joined=np.array([m.joined for m in materials], bool),
    )


class _Spot(NamedTuple):
    """Points that share a texture: all (m,) float32, except color and accent (m, 3), salt uint32.

    u, v: texture coordinates in units of `scale`; up: height within the primitive, 0 to 1.
    """

    u: np.ndarray
    v: np.ndarray
    up: np.ndarray
    scale: np.ndarray
    color: np.ndarray
    accent: np.ndarray
    salt: np.ndarray


def _hash(i: np.ndarray, j: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """Uniform float32 in [0, 1) for every integer pair and salt."""
    x = i.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    x ^= j.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)
    x ^= salt
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x2C1B3C6D)
    x ^= x >> np.uint32(12)
    x *= np.uint32(0x297A2D39)
    x ^= x >> np.uint32(15)
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _noise(u: np.ndarray, v: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """Smooth value noise in [0, 1) with features of size one."""
    i, j = np.floor(u), np.floor(v)
    a, b = u - i, v - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = _hash(i, j, salt) * (1 - a) + _hash(i + 1, j, salt) * a
    high = _hash(i, j + 1, salt) * (1 - a) + _hash(i + 1, j + 1, salt) * a
    return low * (1 - b) + high * b


def _edge(x: np.ndarray, level: float | np.ndarray, width: float) -> np.ndarray:
    """0 below the level, 1 above, a ramp of the given width between."""
    return np.clip((x - level) / width + 0.5, 0, 1)


def _tooth(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period one in [0, 1]."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _mix(s: _Spot, weight: np.ndarray, shade: np.ndarray | None = None) -> np.ndarray:
    color = s.color + (s.accent - s.color) * weight[:, None]
    return color if shade is None else color * shade[:, None]


def _plain(s: _Spot) -> np.ndarray:
    return _mix(s, np.zeros_like(s.u), 0.96 + 0.08 * _noise(s.u, s.v, s.salt))


def _wood(s: _Spot) -> np.ndarray:
    warp = _noise(s.u * 0.5, s.v * 2, s.salt)
    rings = _tooth(s.v * 1.5 + 1.8 * warp)
    fibre = _noise(s.u * 2, s.v * 25, s.salt ^ np.uint32(7))
    return _mix(s, 0.75 * rings * rings + 0.25 * fibre, 0.94 + 0.1 * fibre)


def _stripes(s: _Spot) -> np.ndarray:
    return _mix(s, _edge(_tooth(s.v), 0.5, 0.2), 0.97 + 0.06 * _noise(s.u * 3, s.v * 3, s.salt))


def _bars(s: _Spot) -> np.ndarray:
    return _mix(s, _edge(_tooth(s.u), 0.5, 0.2), 0.97 + 0.06 * _noise(s.u * 3, s.v * 3, s.salt))


def _checker(s: _Spot) -> np.ndarray:
    odd = (np.floor(s.u) + np.floor(s.v)) % 2
    return _mix(s, odd, 0.97 + 0.06 * _noise(s.u * 3, s.v * 3, s.salt))


def _plaid(s: _Spot) -> np.ndarray:
    return _mix(s, 0.5 * _edge(_tooth(s.u), 0.6, 0.2) + 0.5 * _edge(_tooth(s.v), 0.6, 0.2))


def _dots(s: _Spot) -> np.ndarray:
    row = np.floor(s.v)
    a, b = s.u + 0.5 * (row % 2), s.v
    distance = np.hypot(a - np.floor(a) - 0.5, b - row - 0.5)
    return _mix(s, 1 - _edge(distance, 0.27, 0.15))


def _speckle(s: _Spot) -> np.ndarray:
    fine = _hash(np.floor(s.u * 8), np.floor(s.v * 8), s.salt)
    return _mix(s, 0.6 * fine + 0.4 * _noise(s.u, s.v, s.salt))


def _cloudy(s: _Spot) -> np.ndarray:
    coarse = _noise(s.u, s.v, s.salt)
    return _mix(s, 0.65 * coarse + 0.35 * _noise(s.u * 2.7, s.v * 2.7, s.salt ^ np.uint32(3)))


def _marble(s: _Spot) -> np.ndarray:
    warp = 2 * _noise(s.u, s.v, s.salt) + _noise(s.u * 2.3, s.v * 2.3, s.salt ^ np.uint32(5))
    vein = 1.0 - _tooth(0.6 * s.u + 0.8 * s.v + 1.3 * warp)
    return _mix(s, 0.2 * warp / 3 + 0.8 * vein**4)


def _weave(s: _Spot) -> np.ndarray:
    threads = _tooth(s.u) * _tooth(s.v + 0.5 * (np.floor(s.u) % 2))
    return _mix(s, threads, 0.95 + 0.1 * _noise(s.u * 0.2, s.v * 0.2, s.salt))


def _courses(s: _Spot, aspect: float, joint: float) -> tuple[np.ndarray, np.ndarray]:
    """Staggered pieces of 1 x aspect: a hash per piece, and 1 in joints `joint` wide."""
    row = np.floor(s.v)
    shift = s.u / aspect + _hash(row, row, s.salt)
    col = np.floor(shift)
    gap = np.maximum(2 * np.abs(s.v - row - 0.5), 1 - aspect * (1 - 2 * np.abs(shift - col - 0.5)))
    return _hash(row, col, s.salt ^ np.uint32(11)), _edge(gap, 1 - joint, joint)


def _planks(s: _Spot) -> np.ndarray:
    piece, joint = _courses(s, 8.0, 0.06)
    grain = _noise(s.u * 0.8 + 40 * piece, s.v * 6, s.salt)
    return _mix(s, 0.6 * piece + 0.4 * grain, 1 - 0.45 * joint)


def _bricks(s: _Spot) -> np.ndarray:
    piece, joint = _courses(s, 2.6, 0.2)
    return _mix(s, joint, 0.75 + 0.35 * np.maximum(piece, joint))


def _tiles(s: _Spot) -> np.ndarray:
    i, j = np.floor(s.u), np.floor(s.v)
    gap = 2 * np.maximum(np.abs(s.u - i - 0.5), np.abs(s.v - j - 0.5))
    return _mix(s, _edge(gap, 0.92, 0.05), 0.92 + 0.1 * _hash(i, j, s.salt))


def _painting(s: _Spot) -> np.ndarray:
    """Blots in three colours of the object's own."""
    shape = _noise(s.u, s.v, s.salt)
    blot = _edge(_noise(s.u * 0.7, s.v * 0.7, s.salt ^ np.uint32(2)), 0.55, 0.05)
    zero = np.zeros_like(s.u)
    third = np.stack([_hash(zero, zero + c, s.salt) for c in range(3)], axis=1)
    return _mix(s, _edge(shape, 0.5, 0.25)) * (1 - blot[:, None]) + third * blot[:, None]


def _view(s: _Spot) -> np.ndarray:
    """Out of a window: trees or houses (accent) below the sky (color)."""
    skyline = 0.25 + 0.35 * _noise(s.u * 0.6, np.zeros_like(s.u), s.salt)
    land = 1 - _edge(s.up, skyline, 0.06)
    return _mix(s, land, 1 - 0.4 * land * _noise(s.u * 4, s.v * 4, s.salt))


def _screen(s: _Spot) -> np.ndarray:
    """Rectangles of text and pictures on a desktop."""
    block = _hash(np.floor(s.u * 0.4), np.floor(s.v * 0.6), s.salt)
    line = _hash(np.floor(s.u * 2), np.floor(s.v * 5), s.salt)
    return _mix(s, _edge(block, 0.55, 0.02) * (0.6 + 0.4 * line))


TEXTURES: dict[str, Callable[[_Spot], np.ndarray]] = {
    "plain": _plain,
    "wood": _wood,
    "stripes": _stripes,
    "bars": _bars,
    "checker": _checker,
    "plaid": _plaid,
    "dots": _dots,
    "speckle": _speckle,
    "cloudy": _cloudy,
    "marble": _marble,
    "weave": _weave,
    "planks": _planks,
    "bricks": _bricks,
    "tiles": _tiles,
    "painting": _painting,
    "view": _view,
    "screen": _screen,
}


def albedo(
    primitives: Primitives, materials: Materials, index: np.ndarray, hits: Hits
) -> np.ndarray:
    """Colour of surface points before light falls on them.

    Args:
        primitives: n primitives.
        materials: of the same n primitives.
        index: (m,) int, the primitive of each point.
        hits: local positions and normals of the m points.

    Returns:
        (m, 3) float32, sRGB in [0, 1].
    """
    u, v = _face_coordinates(primitives, index, hits, materials.joined[index])
    scale = materials.scale[index]
    u = (u + materials.offset[index, 0]) / scale
    v = (v + materials.offset[index, 1]) / scale
    up = 0.5 + 0.5 * hits.local[:, 2] / primitives.half[index, 2]
    salt = materials.salt[index]
    result = np.empty((len(index), 3), np.float32)
    texture = materials.texture[index]
    for number, paint in enumerate(TEXTURES.values()):
        some = np.flatnonzero(texture == number)
        if len(some):
            prims = index[some]
            spot = _Spot(
                u=u[some],
                v=v[some],
                up=up[some],
                scale=scale[some],
                color=materials.color[prims],
                accent=materials.accent[prims],
                salt=salt[some],
            )
            result[some] = paint(spot)
    return np.clip(result, 0, 1, out=result)


def _face_coordinates(
    primitives: Primitives, index: np.ndarray, hits: Hits, joined: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two coordinates in metres on the face that each point lies on, the longer side first."""
    half = primitives.half[index]
    normal_axis = np.abs(hits.normal).argmax(axis=1)
    first = np.where(normal_axis == 0, 1, 0)
    second = np.where(normal_axis == 2, 1, 2)
    rows = np.arange(len(index))
    swap = (half[rows, second] > half[rows, first]) & ~joined
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    u, v = hits.local[rows, first], hits.local[rows, second]

    side = np.flatnonzero((primitives.shape[index] == CYLINDER) & (normal_axis != 2))
    x, y = hits.local[side, 0] / half[side, 0], hits.local[side, 1] / half[side, 1]
    u[side] = hits.local[side, 2]  # a cylinder's side unrolls
    v[side] = np.arctan2(y, x) * np.minimum(half[side, 0], half[side, 1])

    run = np.flatnonzero(joined)
    prims = index[run]
    middle = np.einsum("mij,mi->mj", primitives.axes[prims], primitives.center[prims])
    u[run] += middle[np.arange(len(run)), first[run]]
    v[run] += middle[np.arange(len(run)), second[run]]
    return u, v
