"""Bounds and voxel coordinates of a cloud, and one random point per voxel."""

import jax
import jax.numpy as jnp

from point_jax.geometry.curves import MAX_DEPTH, z_code
from point_jax.geometry.select import compact, number, uniform_below
from point_jax.geometry.sorting import sort_words

# One less than codes reach: the voxel above the largest holds the rows without a point.
LARGEST = (1 << MAX_DEPTH) - 2


def floor_divide(values: jax.Array, size: jax.Array | float) -> jax.Array:
    """Floor of the exact quotient, which is what `//` means in Python and PyTorch.

    A rounded quotient can reach an integer that the exact one stays below. Then the remainder is
    negative, and it is computed exactly: the divisor is split into two halves short enough for
    exact products. (A float32 `rem` would do as well, but is a slow library call on CPUs.)

    Args:
      values: float32, any shape. Exact for quotients below 2^12 in magnitude.
      size: positive float32 scalar.

    Returns:
      float32 of the same shape, whole numbers.
    """
    size = jnp.float32(size)
    quotient = jnp.floor(values / size)
    upper_bits = jax.lax.bitcast_convert_type(size, jnp.uint32) & jnp.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(upper_bits, jnp.float32)
    rest = (values - quotient * upper) - quotient * (size - upper)
    return quotient - (rest < 0)


def bounds(coord: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest coordinates (3,) of the valid points; zeros when there are none."""
    used = valid[:, None]
    low = jnp.min(coord, axis=0, where=used, initial=jnp.inf)
    high = jnp.max(coord, axis=0, where=used, initial=-jnp.inf)
    some = low <= high
    return jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)


def voxel_grid(
    coord: jax.Array, valid: jax.Array, size: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Voxel coordinates as the originals' grid sampling has them: floor(coord / size) - minimum.

    Args:
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      size: edge of a voxel, metres.

    Returns:
      (grid, fits): grid (N, 3) int32, at least 0 and at most 65,534 where `fits`; fits (N,) bool,
      the valid rows in reach of the 16 bits an axis that codes have. In other rows grid is 0.
    """
    grid = jnp.floor(jnp.where(valid[:, None], coord, 0.0) / size).astype(jnp.int32)
    lowest = jnp.min(grid, axis=0, where=valid[:, None], initial=jnp.iinfo(jnp.int32).max)
    grid = grid - lowest[None]
    fits = valid & jnp.all(grid <= LARGEST, axis=1)
    return jnp.where(fits[:, None], grid, 0), fits


def grid_sample(
    key: jax.Array, coord: jax.Array, valid: jax.Array, size: jax.Array | float, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One point of every occupied voxel, each of the voxel's points equally likely.

    Args:
      key: random key; the choice is a function of it, the points and their order.
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      size: edge of a voxel, metres.
      capacity: slots of the result.

    Returns:
      (index, count, overflow): index (capacity,) int32 into the rows, sorted by the z-order code
      of the voxels, 0 in the slots from `count` on; count int32 scalar; overflow int32 scalar, the
      occupied voxels beyond the capacity (the last along the curve) plus the points more than
      65,534 voxels above the lowest.
    """
    grid, fits = voxel_grid(coord, valid, size)
    # Rows without a point get the voxel above the largest corner: its code is above all others.
    beyond = jnp.max(grid, axis=0) + jnp.array([1, 0, 0])
    high, low = z_code(jnp.where(fits[:, None], grid, beyond[None]))
    (upper, lower), order = sort_words((high >> 8, (high << 24) | low))

    points = number(fits)
    changes = (upper[1:] != upper[:-1]) | (lower[1:] != lower[:-1])
    first = jnp.concatenate([jnp.ones((1,), bool), changes])
    first = first & (jnp.arange(first.shape[0]) < points)
    voxels = number(first)
    edges, _ = compact(first, capacity + 1)
    edges = jnp.where(jnp.arange(capacity + 1) < voxels, edges, points)
    start, stop = edges[:-1], edges[1:]

    count = jnp.minimum(voxels, capacity)
    draws = jax.random.uniform(key, (capacity,))
    chosen = order[start + uniform_below(draws, stop - start)]
    overflow = voxels - count + number(valid & ~fits)
    return jnp.where(jnp.arange(capacity) < count, chosen, 0), count, overflow
