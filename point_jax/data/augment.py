"""Geometric augmentation of a cloud, and the dropping of colours or normals.

Every transform is a deterministic function of explicit parameters; `draw_geometry` draws them and
`random_geometry` puts them together. Rows that are not valid may hold anything, NaN included; they
reach no other row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax import limits
from point_jax.data.elastic import elastic
from point_jax.geometry.sampling import bounds
from point_jax.geometry.select import smallest

Range = tuple[float, float]

GEOMETRY_LIMITS = {
    "scale": limits.each(limits.number(above=0), "low", "high", rising=True),
    "turn": limits.each(limits.number(), "low", "high", rising=True),
    "tilt": limits.each(limits.number(), "low", "high", rising=True),
    "rotation_probability": limits.PROBABILITY,
    "flip_probability": limits.PROBABILITY,
    "jitter": limits.number(0),
    "jitter_clip": limits.number(0),
    "elastic": limits.each(limits.each(limits.number(above=0), "granularity", "magnitude")),
    "elastic_probability": limits.PROBABILITY,
    "elastic_cells_per_area": limits.number(above=0),
}


@dataclass(frozen=True)
class GeometrySpec:
    """Random changes of the geometry of a view; the defaults are Sonata's recipe.

    Attributes:
      scale: range of the common factor of the three axes.
      turn: range of the rotation about the z axis through the origin, in half turns.
      tilt: range of the rotations about x and then about y, through the middle of the bounding box,
        in half turns.
      rotation_probability: of each of the three rotations by itself.
      flip_probability: of the mirroring of x, and of y.
      jitter: standard deviation of the noise of every coordinate, metres.
      jitter_clip: largest noise, metres.
      elastic: (granularity, magnitude) of each elastic distortion, metres; one after the other.
      elastic_probability: of all of them together (in the originals always 0.95).
      elastic_cells_per_area: capacity of the noise grids, see `elastic.noise_cells`.
    """

    scale: Range = (0.9, 1.1)
    turn: Range = (-1.0, 1.0)
    tilt: Range = (-1 / 64, 1 / 64)
    rotation_probability: float = 0.8
    flip_probability: float = 0.5
    jitter: float = 0.005
    jitter_clip: float = 0.02
    elastic: tuple[tuple[float, float], ...] = ((0.2, 0.4), (0.8, 1.6))
    elastic_probability: float = 0.95
    elastic_cells_per_area: float = 50.0

    def __post_init__(self) -> None:
        limits.check(vars(self), GEOMETRY_LIMITS)


class GeometryDraw(NamedTuple):
    """What one draw of the geometric changes does, but for the noise.

    Attributes:
      scale: () float32.
      angles: (3,) float32, radians, of the rotations about z, x and y, in this order.
      rotates: (3,) bool, which of them happen.
      flips: (2,) bool, mirror x, mirror y.
      distort: () bool, whether the elastic distortions happen.
    """

    scale: jax.Array
    angles: jax.Array
    rotates: jax.Array
    flips: jax.Array
    distort: jax.Array


def draw_geometry(key: jax.Array, spec: GeometrySpec) -> GeometryDraw:
    """Draws the parameters of the geometric changes; angles and factor are uniform."""
    draws = jax.random.uniform(key, (10,))
    low = jnp.array([spec.scale[0], spec.turn[0], spec.tilt[0], spec.tilt[0]])
    high = jnp.array([spec.scale[1], spec.turn[1], spec.tilt[1], spec.tilt[1]])
    values = low + draws[:4] * (high - low)
    return GeometryDraw(
        scale=values[0],
        angles=jnp.pi * values[1:],
        rotates=draws[4:7] < spec.rotation_probability,
        flips=draws[7:9] < spec.flip_probability,
        distort=draws[9] < spec.elastic_probability,
    )


def centre_shift(coord: jax.Array, valid: jax.Array, apply_z: bool = True) -> jax.Array:
    """Moves the middle of the bounding box to x = y = 0, and its floor to z = 0 if `apply_z`."""
    low, high = bounds(coord, valid)
    middle = (low + high) / 2
    origin = jnp.stack([middle[0], middle[1], low[2] if apply_z else jnp.zeros(())])
    return coord - origin[None]


def rotation(angle: jax.Array | float, axis: int) -> jax.Array:
    """Rotation matrix (3, 3) about an axis, 0, 1 or 2 for x, y or z.

    `angle` is in radians, counter-clockwise as seen from the tip of the axis.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = jnp.eye(3).at[first, first].set(cos).at[second, second].set(cos)
    return matrix.at[first, second].set(-sin).at[second, first].set(sin)


def transform(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """`matrix @ vector` for every row of (N, 3)."""
    # Written out instead of a matrix product, which accelerators may round to fewer bits.
    x, y, z = (vectors[:, axis, None] * matrix[None, :, axis] for axis in range(3))
    return x + y + z


def rotate(coord: jax.Array, matrix: jax.Array, centre: jax.Array) -> jax.Array:
    """Turns points (N, 3) about `centre` (3,) by a rotation matrix (3, 3)."""
    return transform(coord - centre[None], matrix) + centre[None]


def mirror(flips: jax.Array) -> jax.Array:
    """Factors (3,) of the axes that mirror x and/or y where `flips` (2,) bool says so."""
    return jnp.where(jnp.append(flips, False), -1.0, 1.0)


def jitter(
    coord: jax.Array, noise: jax.Array, sigma: jax.Array | float, clip: jax.Array | float
) -> jax.Array:
    """Adds sigma * noise clipped to -+ clip, metres; `noise` is standard normal (N, 3)."""
    return coord + jnp.clip(sigma * noise, -clip, clip)


def distort(
    keys: jax.Array,
    coord: jax.Array,
    valid: jax.Array,
    stages: tuple[tuple[float, float], ...],
    cells: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Elastic distortions with fresh noise, one after the other; see `elastic.elastic`.

    Args:
      keys: one random key for each.
      coord: (N, 3) float32, metres.
      valid: (N,) bool.
      stages: (granularity, magnitude) of each, metres.
      cells: capacity of the noise grid of each.

    Returns:
      (coord, overflow): overflow int32 scalar, points that a full noise grid left in place, counted
      in every stage.
    """
    overflow = jnp.zeros((), jnp.int32)
    for key, size, (granularity, magnitude) in zip(keys, cells, stages, strict=True):
        noise = jax.random.normal(key, (size, 3))
        coord, beyond = elastic(coord, valid, noise, granularity, magnitude)
        overflow = overflow + beyond
    return coord, overflow


def random_geometry(
    key: jax.Array,
    coord: jax.Array,
    normal: jax.Array,
    valid: jax.Array,
    spec: GeometrySpec,
    cells: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The recipe's geometric changes in its order.

    Centre shift, scale, rotation about z through the origin, about x and about y through the middle
    of the bounding box at that moment, flips, jitter, elastic distortion. The noise of a point
    depends on the key and its row alone, not on the number of rows.

    Args:
      key: random key.
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      normal: (N, 3) float32.
      valid: (N,) bool.
      spec: strengths and probabilities.
      cells: capacity of the noise grid of each elastic stage.

    Returns:
      (coord, normal, overflow): zeros in rows that are not valid; overflow as `distort` has it.
    """
    keys = jax.random.split(key, 2 + len(spec.elastic))
    draw = draw_geometry(keys[0], spec)
    used = valid[:, None]
    coord, normal = jnp.where(used, coord, 0.0), jnp.where(used, normal, 0.0)

    coord = centre_shift(coord, valid) * draw.scale
    turned = jnp.eye(3)
    for turn, axis in enumerate((2, 0, 1)):
        matrix = jnp.where(draw.rotates[turn], rotation(draw.angles[turn], axis), jnp.eye(3))
        low, high = bounds(coord, valid)
        coord = rotate(coord, matrix, jnp.zeros(3) if axis == 2 else (low + high) / 2)
        turned = jnp.matmul(matrix, turned, precision="highest")
    signs = mirror(draw.flips)
    coord, normal = coord * signs[None], transform(normal, signs[:, None] * turned)
    noise = jax.random.normal(keys[1], coord.shape)
    coord = jnp.where(used, jitter(coord, noise, spec.jitter, spec.jitter_clip), 0.0)
    coord, overflow = jax.lax.cond(
        draw.distort,
        lambda: distort(keys[2:], coord, valid, spec.elastic, cells),
        lambda: (coord, jnp.zeros((), jnp.int32)),
    )
    return coord, normal, overflow


def random_drop(
    key: jax.Array, values: jax.Array, valid: jax.Array, share: float, probability: float
) -> jax.Array:
    """With `probability` sets the values of int(share * points) random points to zero.

    Args:
      key: random key.
      values: (N, 3) colours or normals.
      valid: (N,) bool.
      share: of the points; 1 drops all of them.
      probability: that anything is dropped.

    Returns:
      (N, 3); 0 in rows that are not valid.
    """
    apply_key, point_key = jax.random.split(key)
    count = jnp.floor(share * jnp.sum(valid)).astype(jnp.int32)
    count = jnp.where(jax.random.uniform(apply_key) < probability, count, 0)
    priority = (jax.random.bits(point_key, valid.shape) >> 1).astype(jnp.int32)
    return jnp.where((valid & ~smallest(priority, valid, count))[:, None], values, 0)
