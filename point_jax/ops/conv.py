"""Submanifold convolution over the neighbour table of a level.

Blocks of rows gather their 27 neighbours side by side and meet the kernel in one matrix product;
blocks of padding are skipped. The transpose of the table is the table itself with mirrored taps, so
that the gradients are gathers as well.
"""

import jax
import jax.numpy as jnp

from point_jax.ops.gather import take_rows

_BLOCK_BYTES = (
    4 << 20
)  # of gathered features: large enough for the matrix unit, small enough for a cache


@jax.custom_vjp
def submanifold_conv(
    x: jax.Array, weight: jax.Array, neighbours: jax.Array, voxel: jax.Array, count: jax.Array
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

    Returns:
      (N, F); zeros in the rows of skipped padding.
    """
    return _correlate(x, weight, neighbours, count)


def _fwd(x, weight, neighbours, voxel, count):
    out = _correlate(x, weight, neighbours, count)
    return out, (x, weight, neighbours, voxel, count)


def _bwd(saved, g):
    x, weight, neighbours, voxel, count = saved
    centre = len(neighbours) // 2
    g = jnp.where((voxel < len(x))[:, None], g, 0)
    grad_weight = _correlate_weight(x, g, neighbours, count).astype(weight.dtype)
    # A representative is read by every row of each voxel around it: by the sum of their gradients.
    # The centre tap stays row by row.
    rows = jnp.arange(len(x), dtype=voxel.dtype)
    mirrored = jnp.where((rows == voxel)[None], neighbours[::-1], len(x)).at[centre].set(len(x))
    transposed = jnp.swapaxes(weight, 1, 2)
    grad = _correlate(_sum_duplicates(g, voxel), transposed, mirrored, count)
    grad = grad + g @ weight[centre].T
    return grad.astype(x.dtype), grad_weight, None, None, None


submanifold_conv.defvjp(_fwd, _bwd)


def _sum_duplicates(g: jax.Array, voxel: jax.Array) -> jax.Array:
    """(N, F): at each representative the sum over its voxel's rows, which follow it directly."""
    rows = jnp.arange(len(voxel), dtype=voxel.dtype)
    most = jnp.where(voxel < len(voxel), rows - voxel, 0).max()

    def add(j, total):
        here = jnp.take(voxel, rows + j, mode="fill", fill_value=-1) == rows
        return total + jnp.where(here[:, None], take_rows(g, rows + j), 0)

    return jax.lax.fori_loop(1, most + 1, add, g)


def _blocks(capacity: int, width: int, itemsize: int) -> int:
    """Rows a block."""
    return max(1, min(capacity, max(64, _BLOCK_BYTES // (width * itemsize))))


def _correlate(x, weight, neighbours, count):
    taps, channels, filters = weight.shape
    capacity = neighbours.shape[1]
    size = _blocks(capacity, taps * channels, x.dtype.itemsize)
    kernel = weight.reshape(taps * channels, filters)
    padded = jnp.pad(x, ((0, 1), (0, 0)))

    def block(i, out):
        # The last block overlaps the one before it and writes the same values again.
        start = jnp.minimum(i * size, capacity - size)
        rows = jax.lax.dynamic_slice_in_dim(neighbours, start, size, axis=1).T
        gathered = padded.at[rows].get(mode="promise_in_bounds").reshape(size, taps * channels)
        product = jnp.dot(gathered, kernel, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, axis=0)

    out = jnp.zeros((capacity, filters), x.dtype)
    return jax.lax.fori_loop(0, -(-count // size), block, out)


def _correlate_weight(x, g, neighbours, count):
    """(T, C, F): the gradient of the kernel, summed in float32."""
    (taps, capacity), channels, filters = neighbours.shape, x.shape[1], g.shape[1]
    size = _blocks(capacity, taps * channels, x.dtype.itemsize)
    padded = jnp.pad(x, ((0, 1), (0, 0)))

    def block(i, total):
        start = jnp.minimum(i * size, capacity - size)
        rows = jax.lax.dynamic_slice_in_dim(neighbours, start, size, axis=1).T
        gathered = padded.at[rows].get(mode="promise_in_bounds").reshape(size, taps * channels)
        slope = jax.lax.dynamic_slice_in_dim(g, start, size, axis=0)
        index = start + jnp.arange(size)
        slope = jnp.where(((index >= i * size) & (index < count))[:, None], slope, 0)
        return total + jnp.dot(gathered.T, slope, preferred_element_type=jnp.float32)

    total = jnp.zeros((taps * channels, filters), jnp.float32)
    total = jax.lax.fori_loop(0, -(-count // size), block, total)
    return total.reshape(taps, channels, filters)
