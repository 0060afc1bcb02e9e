"""What the kernels of `attention` share: patches in blocks of slots, and which blocks meet.

A patch is cut into blocks of slots. Clouds that share a patch lie in it one after the other, so
a block of queries needs a short run of the blocks of keys, often one: the others hold strangers.
This also serves narrow patches, whose clouds lie whole in a quarter of a wide one.
"""

import jax
import jax.numpy as jnp

from point_jax.geometry.patches import NARROW

BLOCK = 128  # slots; kernels' patches are multiples of it
LOG2_E = 1.4426950408889634  # kernels take powers of 2: exp(x) = 2^(x LOG2_E)
NEVER = -1e30  # a score that is masked; finite, so that no difference is NaN


def fill_patches(x: jax.Array, width: int, fill: int = 0) -> jax.Array:
    """(S, ...) -> (P K', ...): every patch filled up to a multiple of BLOCK."""
    short = -width % BLOCK
    if not short:
        return x
    patches = x.reshape(-1, width, *x.shape[1:])
    pads = [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(patches, pads, constant_values=fill).reshape(-1, *x.shape[1:])


def cut_patches(x: jax.Array, width: int) -> jax.Array:
    """(P K', ...) -> (S, ...), what `fill_patches` was given."""
    if not -width % BLOCK:
        return x
    patches = x.reshape(-1, width + -width % BLOCK, *x.shape[1:])
    return patches[:, :width].reshape(-1, *x.shape[1:])


def slots_in_use(
    width: int, segment: jax.Array, narrow: jax.Array | None, used: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Segments in filled patches, (P, K') with -1 wherever a slot is not used; patches in use."""
    each = width if narrow is None else jnp.where(narrow, width // NARROW, width)
    slots = used * each
    segment = jnp.where(jnp.arange(len(segment)) < slots, segment, -1)
    segment = fill_patches(segment, width, -1).reshape(len(segment) // width, -1)
    return segment, -(-slots // width)


def blocks_met(segment: jax.Array, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First block of keys that each block of queries needs, and the one after the last.

    Two blocks meet if the ranges of their segments overlap; none meets a block of empty slots.

    Args:
      segment: (P, K).
      queries: slots of a block of queries.
      keys: of a block of keys.

    Returns:
      (P, K / queries) int32 each; equal where nothing is needed.
    """
    far = jnp.iinfo(jnp.int32).max

    def ranges(size):
        blocks = segment.reshape(len(segment), -1, size)
        return jnp.where(blocks < 0, far, blocks).min(2), blocks.max(2)

    low, high = (x[:, :, None] for x in ranges(queries))
    first, last = (x[:, None] for x in ranges(keys))
    meet = (low <= last) & (first <= high)  # (P, blocks of queries, of keys)
    at = jnp.arange(meet.shape[2])
    stop = jnp.where(meet, at + 1, 0).max(2)
    return jnp.minimum(jnp.where(meet, at, far).min(2), stop), stop
