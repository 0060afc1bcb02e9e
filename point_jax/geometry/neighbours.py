"""Neighbour tables of the convolutions: 3x3x3, and 5x5x5 for the stem of PT-v3m1.

The tables come top-down through the octree: the neighbour of a child is a child of a neighbour of
its parent, so that every entry costs two gathers. Only the coarsest level, which holds a percent of
the points, is searched (a binary search among its sorted codes).
"""

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.geometry.curves import Code, place_in_parent, z_code


def offsets(radius: int) -> np.ndarray:
    """(T, 3) int: tap k of a (2 radius + 1)^3 kernel reads the voxel at p + offsets[k]."""
    side = np.arange(-radius, radius + 1)
    return np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3)


TAPS = len(offsets(1))

_LAST = np.uint32(0xFFFFFFFF)  # sorts after every key


def search_neighbours(
    grid: jax.Array, cloud: jax.Array, count: jax.Array, radius: int = 1
) -> jax.Array:
    """Table of a level whose rows are sorted by (cloud, z-order code), by binary search.

    Args:
      grid: (N, 3) int32.
      cloud: (N,) int32.
      count: () int32, slots in use.
      radius: of the kernel, which has T = (2 radius + 1)^3 taps.

    Returns:
      (T, N) int32: the first row that holds the voxel at each tap; N for none.
    """
    capacity = grid.shape[0]
    valid = jnp.arange(capacity) < count
    high, low = sort_key(z_code(grid), cloud, valid)
    target = grid[None] + jnp.asarray(offsets(radius), jnp.int32)[:, None]  # (T, N, 3)
    cloud = jnp.broadcast_to(cloud, target.shape[:2])
    inside = valid[None] & (target >= 0).all(-1) & (target < 1 << 16).all(-1)
    want_high, want_low = sort_key(z_code(target), cloud, inside)

    def halve(_, bounds):
        lower, upper = bounds
        middle = (lower + upper) // 2
        here_high, here_low = high[middle], low[middle]
        less = (here_high < want_high) | ((here_high == want_high) & (here_low < want_low))
        return jnp.where(less, middle + 1, lower), jnp.where(less, upper, middle)

    bounds = jnp.zeros(target.shape[:2], jnp.int32), jnp.full(target.shape[:2], count, jnp.int32)
    row, _ = jax.lax.fori_loop(0, capacity.bit_length(), halve, bounds)
    row = jnp.minimum(row, capacity - 1)
    found = inside & (row < count) & (high[row] == want_high) & (low[row] == want_low)
    return jnp.where(found, row, capacity)


def sort_key(code: Code, cloud: jax.Array, valid: jax.Array) -> Code:
    """A pair that sorts by (cloud, code), everything invalid last. Holds up to 255 clouds."""
    high, low = code
    high = high | (cloud.astype(jnp.uint32) << 24)
    return jnp.where(valid, high, _LAST), jnp.where(valid, low, _LAST)


def refine_neighbours(
    coarse: jax.Array, grid: jax.Array, parent: jax.Array, first: jax.Array, radius: int = 1
) -> jax.Array:
    """Table of a level from the 3x3x3 table of the next coarser one.

    Args:
      coarse: (27, M) int32, the table of the parents; M for none.
      grid: (N, 3) int32, voxels of this level, sorted by (cloud, z-order code).
      parent: (N,) int32, row of each voxel's parent; M for none.
      first: (N,) bool, whether a row is the first of its voxel.
      radius: of this level's kernel: 1 or 2. Two voxels away is still in a parent next door.

    Returns:
      (T, N) int32: the first row that holds the voxel at each tap; N for none.
    """
    capacity, parents = grid.shape[0], coarse.shape[1]
    child = jnp.full((parents + 1) * 8, capacity, jnp.int32)
    slot = jnp.where(
        first & (parent < parents), parent * 8 + place_in_parent(grid, "z"), child.size
    )
    child = child.at[slot].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")
    coarse = jnp.pad(coarse, ((0, 0), (0, 1)), constant_values=parents).reshape(-1)
    # (T, N) along each axis: voxels from the parent's corner.
    steps = [
        (grid[:, axis] & 1)[None] + jnp.asarray(offsets(radius)[:, axis, None], jnp.int32)
        for axis in range(3)
    ]
    x, y, z = ((step >> 1) + 1 for step in steps)
    uncle = (9 * x + 3 * y + z) * (parents + 1) + parent[None]
    x, y, z = (step & 1 for step in steps)
    which = 4 * x + 2 * y + z
    # Flat: a gather by two dimensions of indices takes TPUs' compiler five times as long.
    return child[coarse[uncle.reshape(-1)] * 8 + which.reshape(-1)].reshape(which.shape)
