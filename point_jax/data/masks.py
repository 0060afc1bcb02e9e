"""Masks of a view by voxel blocks, and the jitter of masked points."""

import jax
import jax.numpy as jnp

from point_jax.geometry.running import running_sum
from point_jax.geometry.sampling import bounds, floor_divide
from point_jax.geometry.select import smallest
from point_jax.geometry.sorting import sort_words

Scalar = jax.Array | float


def block_index(coord: jax.Array, valid: jax.Array, size: Scalar) -> tuple[jax.Array, jax.Array]:
    """Numbers the occupied voxel blocks of a view.

    A block is floor((coord - minimum of the view) / size), as in the originals; blocks are numbered
    lexicographically by (x, y, z).

    Args:
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      size: edge of a block, metres; may be traced. A view has at most 65,535 blocks an axis.

    Returns:
      (block, blocks): block (N,) int32 in [0, blocks), -1 in rows that are not valid; blocks int32
      scalar.
    """
    used = valid[:, None]
    low, _ = bounds(coord, valid)
    cell = floor_divide(jnp.where(used, coord - low[None], 0.0), size).astype(jnp.uint32)
    extent = jnp.max(cell, axis=0) + 1
    # Rows without a point go beyond the last block.
    x = jnp.where(valid, cell[:, 0], extent[0])
    yz = jnp.where(valid, cell[:, 1] * extent[2] + cell[:, 2], 0)
    (x, yz), order = sort_words((x, yz))

    changes = (x[1:] != x[:-1]) | (yz[1:] != yz[:-1])
    rank = running_sum(jnp.pad(changes, (1, 0)))
    block = jnp.zeros_like(rank).at[order].set(rank, unique_indices=True)
    block = jnp.where(valid, block, -1)
    return block, jnp.max(block, initial=-1) + 1


def choose_blocks(key: jax.Array, blocks: jax.Array, ratio: Scalar, capacity: int) -> jax.Array:
    """Chooses int(ratio * blocks) of the blocks, all subsets of that size equally likely.

    Args:
      key: random key. The choice depends on it and the number of blocks, not on the capacity.
      blocks: int32 scalar, at most `capacity`.
      ratio: share of the blocks in [0, 1]; may be traced.
      capacity: slots of the result.

    Returns:
      (capacity,) bool.
    """
    priority = (jax.random.bits(key, (capacity,)) >> 1).astype(jnp.int32)
    chosen = jnp.floor(ratio * blocks.astype(jnp.float32)).astype(jnp.int32)
    return smallest(priority, jnp.arange(capacity) < blocks, chosen)


def random_mask(
    key: jax.Array, coord: jax.Array, valid: jax.Array, size: Scalar, ratio: Scalar
) -> jax.Array:
    """Masks the points of randomly chosen blocks of a view.

    The originals draw the blocks over all clouds of a device, so that a view's share depends on
    what else is there; here every view has exactly int(ratio * blocks) of its own blocks masked.

    Args:
      key: random key.
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      size: edge of a block, metres; may be traced.
      ratio: share of the blocks to mask, in [0, 1]; may be traced.

    Returns:
      (N,) bool, False in rows that are not valid.
    """
    block, blocks = block_index(coord, valid, size)
    chosen = choose_blocks(key, blocks, ratio, coord.shape[0])
    return valid & chosen[block]


def jitter_masked(
    coord: jax.Array, mask: jax.Array, noise: jax.Array, sigma: Scalar, symmetric: bool = False
) -> jax.Array:
    """Moves masked points by sigma * noise, clipped at 2 sigma.

    Args:
      coord: (N, 3) float32, metres.
      mask: (N,) bool, the points to move.
      noise: (N, 3) standard normal.
      sigma: metres.
      symmetric: clip below at -2 sigma, too. The originals clip from above only, the default.

    Returns:
      (N, 3) float32.
    """
    bound = 2.0 * sigma
    step = jnp.clip(sigma * noise, -bound if symmetric else None, bound)
    return jnp.where(mask[:, None], coord + step, coord)
