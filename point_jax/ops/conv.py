"""Submanifold convolution over the neighbour table of a level.

Two forms of the same sum. Side by side (here), blocks of rows gather all their neighbours and meet
the kernel in one matrix product, which is what accelerators like; the transpose of the table is the
table itself with mirrored taps, so that the gradients are gathers as well. Pair by pair
(`conv_pairs`), only the neighbours that exist are multiplied, 10 to 14 of 27: two to four times as
fast on CPUs.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import over_blocks, planned
from point_jax.geometry.pairs import Pairs
from point_jax.ops import conv_pairs
from point_jax.ops.gather import take_rows


class Blocks(NamedTuple):
    """How a platform works side by side.

    Attributes:
      size: bytes of the gathered features of a block of rows.
      axes: of these, by their letters: s rows, t taps, c channels.
    """

    size: int
    axes: Literal["stc", "tsc"]


# Small enough for a cache.
_CPU = Blocks(4 << 20, "stc")
# A loop on a GPU asks the host before each block whether there is one more: few blocks, each as
# large as the second-level cache. A row's taps side by side are one matrix without a copy.
_CUDA = Blocks(64 << 20, "stc")
# The compilers for v5e and v6e keep this much on the chip (seen at levels 0 and 3 of the base
# network); smaller blocks only mean more of them. Side by side, taps of other than 128 channels are
# moved lane by lane: ten times the cycles of the product at level 0. One tap after the other they
# stay where they are.
_TPU = Blocks(16 << 20, "tsc")


@jax.custom_vjp
def submanifold_conv(
    x: jax.Array,
    weight: jax.Array,
    neighbours: jax.Array,
    voxel: jax.Array,
    count: jax.Array,
    pairs: Pairs | None = None,
    stacked: conv_pairs.Kernel | None = None,
) -> jax.Array:
    """out[p] = sum over taps k of x[neighbours[k, p]] @ weight[k].

    Duplicated voxels (level 0 in training): every row reads the representative of a neighbour voxel
    and itself at the centre. This rule is symmetric, deterministic and has exact gradients; the
    originals' differs before and after the centre (REFERENCE quirk 5).

    Args:
      x: (N, C).
      weight: (T, C, F), taps in the order of a cubic kernel (a correlation, not flipped).
      neighbours: (T, N) int32, N for none.
      voxel: (N,) int32, the row that represents each row's voxel.
      count: () int32, rows in use.
      pairs: of the table: CPUs then work pair by pair. None for side by side everywhere.
      stacked: where CPUs read the same kernel pair by pair, if it is one of a stack. The gradient
        is that of `weight` all the same.

    Returns:
      (N, F); zeros in the rows of skipped padding.
    """
    return _forward(x, weight, neighbours, count, pairs, stacked)


def _forward(x, weight, neighbours, count, pairs, stacked):
    side_by_side = partial(_correlate, x, weight, neighbours, count)
    by_pairs = partial(conv_pairs.correlate, x, _kernel(weight, stacked), pairs)
    return _by_platform(side_by_side, None if pairs is None else by_pairs)


def _kernel(weight, stacked):
    """What CPUs read taps from: a kernel without a stack is one of its own."""
    return conv_pairs.Kernel(weight[None], 0) if stacked is None else stacked


def _by_platform(side_by_side, by_pairs):
    """What `side_by_side(blocks)` or, on CPUs, `by_pairs()` returns."""
    return jax.lax.platform_dependent(
        cpu=by_pairs or partial(side_by_side, _CPU),
        cuda=partial(side_by_side, _CUDA),
        default=partial(side_by_side, _TPU),
    )


def _fwd(x, weight, neighbours, voxel, count, pairs, stacked):
    out = _forward(x, weight, neighbours, count, pairs, stacked)
    return out, (x, weight, neighbours, voxel, count, pairs, stacked)


def _bwd(saved, g):
    x, weight, neighbours, voxel, count, pairs, stacked = saved
    g = jnp.where((voxel < len(x))[:, None], g, 0)
    side_by_side = partial(_gradients, x, weight, neighbours, voxel, count, g)
    by_pairs = partial(conv_pairs.gradients, x, _kernel(weight, stacked), pairs, g)
    grad, of_weight = _by_platform(side_by_side, None if pairs is None else by_pairs)
    return grad, of_weight.astype(weight.dtype), None, None, None, None, None


submanifold_conv.defvjp(_fwd, _bwd)


def _gradients(x, weight, neighbours, voxel, count, g, blocks):
    """Of x (N, C), and of the kernel (T, C, F) in float32."""
    centre = len(neighbours) // 2
    # A representative is read by every row of each voxel around it: by the sum of their gradients.
    # The centre tap stays row by row.
    transposed = jnp.swapaxes(weight, 1, 2)
    summed = _sum_duplicates(g, voxel)
    grad = _correlate(summed, transposed, neighbours, count, blocks, voxel)
    grad = (grad + g @ weight[centre].T).astype(x.dtype)
    return grad, _correlate_weight(x, g, neighbours, count, blocks)


def _sum_duplicates(g: jax.Array, voxel: jax.Array) -> jax.Array:
    """(N, F): at each representative the sum over its voxel's rows, which follow it directly."""
    rows = jnp.arange(len(voxel), dtype=voxel.dtype)
    most = jnp.where(voxel < len(voxel), rows - voxel, 0).max()

    def add(j, total):
        here = jnp.take(voxel, rows + j, mode="fill", fill_value=-1) == rows
        return total + jnp.where(here[:, None], take_rows(g, rows + j), 0)

    with planned(1):  # of a room's voxels at 2 cm few have more than two points
        return jax.lax.fori_loop(1, most + 1, add, g)


def _rows(capacity: int, row_bytes: int, block_bytes: int) -> int:
    """Rows a block: whole tiles of TPUs, so that taps one after the other lie without gaps."""
    return max(1, min(capacity, max(64, block_bytes // row_bytes // 64 * 64)))


def _over_blocks(body, init, capacity, size, count):
    """`body(i, carry)` for each block with rows in use; a single block needs no loop."""
    return body(0, init) if capacity <= size else over_blocks(body, init, capacity, size, count)


def _gathered(x, neighbours, start, size, axes, voxel=None):
    """Features around a block of rows, by `axes`; mirrored, for representatives only, with `voxel`.

    The table is turned block by block: whole, with its taps last, it would take 128 / 27 of its
    size on TPUs, and a mirrored one as much as the table again.
    """
    taps, capacity = neighbours.shape
    rows = jax.lax.dynamic_slice_in_dim(neighbours, start, size, axis=1)
    if voxel is not None:
        represents = jax.lax.dynamic_slice_in_dim(voxel, start, size) == start + jnp.arange(size)
        apart = jnp.arange(taps) != taps // 2
        rows = jnp.where(represents[None] & apart[:, None], rows[::-1], capacity)
    rows = jax.lax.optimization_barrier(rows)
    return x.at[rows.T if axes == "stc" else rows].get(mode="promise_in_bounds")


def _correlate(x, weight, neighbours, count, blocks, voxel=None):
    taps, channels, filters = weight.shape
    capacity = neighbours.shape[1]
    size = _rows(capacity, taps * channels * x.dtype.itemsize, blocks.size)
    padded = jnp.pad(x, ((0, 1), (0, 0)))
    product = partial(jnp.einsum, f"{blocks.axes},tcf->sf", preferred_element_type=jnp.float32)

    def block(i, out):
        # The last block overlaps the one before it and writes the same values again.
        start = jnp.minimum(i * size, capacity - size)
        values = product(_gathered(padded, neighbours, start, size, blocks.axes, voxel), weight)
        return jax.lax.dynamic_update_slice_in_dim(out, values.astype(out.dtype), start, axis=0)

    out = jnp.zeros((capacity, filters), x.dtype)
    return _over_blocks(block, out, capacity, size, count)


def _correlate_weight(x, g, neighbours, count, blocks):
    """(T, C, F): the gradient of the kernel, summed in float32."""
    (taps, capacity), channels, filters = neighbours.shape, x.shape[1], g.shape[1]
    size = _rows(capacity, taps * channels * x.dtype.itemsize, blocks.size)
    padded = jnp.pad(x, ((0, 1), (0, 0)))
    product = partial(jnp.einsum, f"{blocks.axes},sf->tcf", preferred_element_type=jnp.float32)

    def block(i, total):
        start = jnp.minimum(i * size, capacity - size)
        slope = jax.lax.dynamic_slice_in_dim(g, start, size, axis=0)
        index = start + jnp.arange(size)
        slope = jnp.where(((index >= i * size) & (index < count))[:, None], slope, 0)
        return total + product(_gathered(padded, neighbours, start, size, blocks.axes), slope)

    total = jnp.zeros((taps, channels, filters), jnp.float32)
    return _over_blocks(block, total, capacity, size, count)
