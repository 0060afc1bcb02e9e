"""Submanifold convolution pair by pair: blocks of pairs of one tap meet that tap's matrix.

A row has at most one neighbour at a tap, so a block adds to different rows. In the gradient, where
rows of one voxel read the same representative, a block may add to a row several times: CPUs do so
one after the other, always in the same order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import blank, planned
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
    best; narrow rows want blocks of 200,000 numbers to outweigh what a step of the loop costs.
    """
    wide = 128 if channels >= 256 else 256 if channels >= 128 else 196_608 // channels
    fitting = (
        -(-capacity // 2 // 32) * 32
    )  # on surfaces a tap but the centre has pairs for less than half of the rows
    return max(32, min(wide, fitting))


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


def _add(out, rows, values):
    return out.at[rows].add(values, mode="drop")


def correlate(x: jax.Array, kernel: Kernel, pairs: Pairs) -> jax.Array:
    """out[row] += x[read] @ kernel[tap] over all pairs; (N, F), dtype of x, summed in float32."""
    (*_, channels, filters), capacity = kernel.stack.shape, len(x)
    size = _block_size(capacity, channels)
    ends = jnp.cumsum(-(-pairs.counts // size))  # blocks up to and with each tap

    def block(i, out):
        tap = (ends <= i).sum()
        first = jnp.where(tap > 0, ends[tap - 1], 0)
        rows, reads = _slots(pairs, tap, i - first, size)
        weight = kernel.tap(tap, x.dtype)
        product = jnp.dot(_read(x, reads), weight, preferred_element_type=jnp.float32)
        return _add(out, rows, product)

    out = blank((capacity, filters), jnp.float32, x)
    with planned(-(-capacity * _NEIGHBOURS // size)):
        return jax.lax.fori_loop(0, ends[-1], block, out).astype(x.dtype)


def gradients(
    x: jax.Array, kernel: Kernel, pairs: Pairs, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x (N, C), in its dtype, and of the kernel (T, C, F), in float32, for g (N, F).

    Both are summed in float32.
    """
    (_, taps, channels, filters), capacity = kernel.stack.shape, len(x)
    size = _block_size(capacity, channels)

    def one_tap(tap, carry):
        transposed = kernel.tap(tap, x.dtype).T

        def block(i, carry):
            grad, total = carry
            rows, reads = _slots(pairs, tap, i, size)
            slope = _read(g, rows)
            back = jnp.dot(slope, transposed, preferred_element_type=jnp.float32)
            product = jnp.dot(_read(x, reads).T, slope, preferred_element_type=jnp.float32)
            return _add(grad, reads, back), total + product

        grad, grad_weight = carry
        none = jnp.zeros((channels, filters), jnp.float32)
        blocks = -(-pairs.counts[tap] // size)
        with planned(-(-capacity * _NEIGHBOURS // (taps * size))):
            grad, total = jax.lax.fori_loop(0, blocks, block, (grad, none))
        return grad, grad_weight.at[tap].set(total)

    init = (
        blank((capacity, channels), jnp.float32, g),
        blank((taps, channels, filters), jnp.float32, g),
    )
    grad, grad_weight = jax.lax.fori_loop(0, taps, one_tap, init)
    return grad.astype(x.dtype), grad_weight
