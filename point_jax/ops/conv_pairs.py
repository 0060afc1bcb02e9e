"""Submanifold convolution pair by pair: blocks of pairs of one tap meet that tap's matrix.

A row has at most one neighbour at a tap, so a block adds to different rows. In the gradient, where
rows of one voxel read the same representative, a block may add to a row several times: CPUs do so
one after the other, always in the same order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import blank, blocks_of, planned
from point_jax.geometry.pairs import Pairs

_NEIGHBOURS = 14  # of 27 that a point of a room has, at most levels less


class Kernel(NamedTuple):
    """One kernel of a stack, whose taps are read one by one: a copy of it is never made.

    Attributes:
      stack: (L, T, C, F), in any precision; a tap is read in that of the features.
      place: () int32, which.
    """

    stack: jax.Array
    place: jax.Array | int

    def tap(self, tap: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """(C, F)."""
        return self.stack.at[self.place, tap].get(mode="promise_in_bounds").astype(dtype)


def _block_size(capacity: int, channels: int) -> int:
    """Pairs a block: enough for a fast product, and not much padding in the last of a tap.

    Measured on 2 cores: 128 pairs of 384 channels run at 140 GFLOP/s, 64 at 85; 256 of 192 are
    best; narrow rows want blocks of 200,000 numbers to outweigh what a step of the loop costs. Rows
    of 256 slots or less, the coarsest of a cloud, mostly have a few tens of pairs a tap or fewer:
    with blocks of 32 a cloud of 2,000 points takes 0.8 of the time that it takes with 128.
    """
    if channels >= 256:
        return 32 if capacity <= 256 else 128
    wide = 256 if channels >= 128 else 196_608 // channels
    # On surfaces a tap but the centre has pairs for less than half of the rows.
    return max(32, min(wide, -(-capacity // 2 // 32) * 32))


def pairs_done(counts: Sequence[int], capacity: int, channels: int) -> int:
    """Pairs that a product of a whole row multiplies, where each tap has so many.

    The last block of every tap is whole. `correlate` makes one such product, `gradients` two.
    """
    size = _block_size(capacity, channels)
    return sum(-(-count // size) for count in counts) * size


def _slots(pairs: Pairs, tap: jax.Array, block: jax.Array, size: int):
    """Rows and neighbours (size,) of a block of a tap; beyond the row where there is no pair."""
    capacity = pairs.rows.shape[1]
    index = block * size + jnp.arange(size)
    used = index < pairs.counts[tap]
    index, beyond = jnp.minimum(index, capacity - 1), capacity + jnp.arange(size)
    return tuple(
        jnp.where(used, table.at[tap, index].get(mode="promise_in_bounds"), beyond)
        for table in (pairs.rows, pairs.reads)
    )


def _read(x, rows):
    return x.at[rows].get(mode="fill", fill_value=0)


def _contract(a, i, b, j):
    """Product of two matrices over dimension i of one and j of the other, summed in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _add(out, rows, values):
    return out.at[rows].add(values, mode="drop")


def _over_tap(block, init, pairs, tap, size, first=0):
    """Folds `block(i, carry)` over the blocks of a tap's pairs, from the `first` on."""
    taps, capacity = pairs.rows.shape
    with planned(-(-capacity * _NEIGHBOURS // (taps * size)) - first):
        return jax.lax.fori_loop(first, blocks_of(pairs.counts[tap], size), block, init)


def _over_taps(one_tap, init, pairs):
    """Folds `one_tap(tap, carry)` over the taps with pairs; small or flat clouds lack some."""
    with planned(len(pairs.taps)):
        return jax.lax.fori_loop(0, pairs.used, lambda i, c: one_tap(pairs.taps[i], c), init)


def correlate(x: jax.Array, kernel: Kernel, pairs: Pairs) -> jax.Array:
    """out[row] += x[read] @ kernel[tap] over all pairs; (N, F), dtype of x, summed in float32."""
    (*_, channels, filters), capacity = kernel.stack.shape, len(x)
    size = _block_size(capacity, channels)

    def one_tap(tap, out):
        weight = kernel.tap(tap, x.dtype)

        def block(i, out):
            rows, reads = _slots(pairs, tap, i, size)
            return _add(out, rows, _contract(_read(x, reads), 1, weight, 0))

        return _over_tap(block, out, pairs, tap, size)

    out = blank((capacity, filters), jnp.float32, x)
    return _over_taps(one_tap, out, pairs).astype(x.dtype)


def gradients(
    x: jax.Array, kernel: Kernel, pairs: Pairs, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x (N, C), in its dtype, and of the kernel (T, C, F), in float32, for g (N, F).

    Both are summed in float32.
    """
    (_, taps, channels, filters), capacity = kernel.stack.shape, len(x)
    size = _block_size(capacity, channels)

    def one_tap(tap, carry):
        weight = kernel.tap(tap, x.dtype)

        def block(i, grad):
            rows, reads = _slots(pairs, tap, i, size)
            slope = _read(g, rows)
            grad = _add(grad, reads, _contract(slope, 1, weight, 1))
            return grad, _contract(_read(x, reads), 0, slope, 0)

        def one_more(i, carry):
            grad, product = block(i, carry[0])
            return grad, carry[1] + product

        grad, of_weight = carry
        # Many taps of coarse levels have a single block: there is nothing to add it to.
        grad, total = _over_tap(one_more, block(0, grad), pairs, tap, size, first=1)
        return grad, jax.lax.dynamic_update_index_in_dim(of_weight, total, tap, 0)

    init = (
        blank((capacity, channels), jnp.float32, g),
        blank((taps, channels, filters), jnp.float32, g),
    )
    grad, of_weight = _over_taps(one_tap, init, pairs)
    return grad.astype(x.dtype), of_weight
