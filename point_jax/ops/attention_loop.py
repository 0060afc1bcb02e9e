"""Patch attention as an XLA loop over patches and heads: on CPUs, and for what kernels do not do.

One patch and head at a time keeps the scores in the cache and the matrix products in their fastest
form; patches of padding are never visited.

XLA fuses product, maximum, exponential and the next product on CPUs as long as nothing stands
between them, which is three times as fast. So the segments' mask is part of the product (`_marks`),
and the backward pass makes the scores twice, once as queries x keys and once as keys x queries:
two more products, and no transposed K x K matrix that would end the fusion.
"""

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.geometry.loops import planned
from point_jax.geometry.patches import NARROW
from point_jax.ops.bfloat16 import as_bits, of_bits

_NEVER = -1e30  # finite, so that no product with it is NaN


def _either(run, width, narrow):
    """`run(width of a patch)` for the width that the patches have."""
    if narrow is None:
        return run(width)
    return jax.lax.cond(narrow, lambda: run(width // NARROW), lambda: run(width))


def operations_done(clouds: int, width: int, channels: int) -> tuple[int, int]:
    """Operations of one patch and head on CPUs, those of the forward and of the backward pass.

    Args:
      clouds: G.
      width: slots of the patch.
      channels: D, of a head.
    """
    base, places = _digits(clouds)
    plain = 2 * width * width * channels
    marked = 2 * width * width * (channels + base * len(places))
    # scores, mixing; scores both ways, their slopes both ways, and three gradients
    return marked + plain, 2 * marked + 5 * plain


def _digits(clouds):
    """Base and place values of the digits that tell segments apart."""
    values = clouds + 1  # empty slots have -1
    base = values if values <= 16 else 4
    return base, base ** np.arange(int(np.ceil(np.log(values) / np.log(base) - 1e-9)))


def _marks(segment, clouds):
    """Columns for queries and keys (S, M) whose product is 0 in a segment and huge without.

    Adding them to q and k masks the scores inside the product, exactly: within a segment every
    added term is zero. A segment's number is written in digits, a column for each value of each
    digit; the query has a one at its own value, the key _NEVER at every other.
    """
    base, places = _digits(clouds)
    digits = ((segment + 1)[:, None] // places[None]) % base  # (S, digits)
    same = digits[..., None] == np.arange(base)[None, None]
    same = same.reshape(len(segment), -1)
    return same.astype(jnp.float32), jnp.where(same, 0.0, _NEVER)


def _read(array, patch, width, *index):
    """Slots of a patch at an index of the next axes: (K, ...)."""
    start = (patch * width, *index) + (0,) * (array.ndim - 1 - len(index))
    size = (width,) + (1,) * len(index) + array.shape[1 + len(index) :]
    return jax.lax.dynamic_slice(array, start, size).reshape(width, *size[1 + len(index) :])


def _write(array, values, patch, *index):
    """Puts (K, ...) where `_read` reads them."""
    start = (patch * len(values), *index) + (0,) * (array.ndim - 1 - len(index))
    shape = (len(values),) + (1,) * len(index) + array.shape[1 + len(index) :]
    return jax.lax.dynamic_update_slice(array, values.reshape(shape), start)


def _operands(qkv, marks, p, h, width):
    """Marked queries, divided by sqrt(D), and marked keys (K, D + M); plain q, k and v (K, D)."""
    q, k, v = (_read(qkv, p, width, part, h) for part in range(3))
    on, off = (_read(mark, p, width) for mark in marks)
    queries = jnp.concatenate([q * q.shape[-1] ** -0.5, on], axis=1)
    return queries, jnp.concatenate([k, off], axis=1), (q, k, v)


def _product(a, b):
    """(K, D), (K, D) -> (K, K)."""
    return jnp.dot(a, b.T)


def _bias_index(grid, table, p, width):
    """(3, K, K): the entry of the table that each query and key of a patch read for each axis."""
    bound = table.shape[1] // 2
    at = _read(grid, p, width).T  # (3, K)
    return jnp.clip(at[:, :, None] - at[:, None], -bound, bound) + bound


def _bias(grid, table, p, h, width):
    """(K, K) float32 bias of the scores of one patch and head; 0 without a table."""
    if table is None:
        return 0.0
    index = _bias_index(grid, table, p, width)
    return sum(table[axis, :, h][index[axis]] for axis in range(3))


def forward(
    clouds: int,
    width: int,
    qkv: jax.Array,
    segment: jax.Array,
    narrow: jax.Array | None,
    used: jax.Array,
    grid: jax.Array | None = None,
    table: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (S, H, D) and log-sum-exp (H, S) of `attention.patch_attention`."""
    slots, _, heads, channels = qkv.shape
    dtype, marks = qkv.dtype, _marks(segment, clouds)
    # Exponentials take most of the time, so bfloat16 operands gain next to nothing on CPUs.
    qkv = qkv.astype(jnp.float32)

    def run(width):
        def one(i, carry):
            out, lse = carry
            p, h = i // heads, i % heads
            queries, keys, (_, _, v) = _operands(qkv, marks, p, h, width)
            scores = _product(queries, keys) + _bias(grid, table, p, h, width)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            mixed = (jnp.dot(weights, v) / total).astype(dtype)
            out = _write(out, as_bits(mixed), p, h)
            return out, _write(lse, (top + jnp.log(total))[:, 0], p, h)

        init = as_bits(jnp.zeros((slots, heads, channels), dtype)), jnp.zeros((slots, heads))
        with planned(slots // width * heads):
            return jax.lax.fori_loop(0, used * heads, one, init)

    out, lse = _either(run, width, narrow)
    return of_bits(out), lse.T


def backward(
    clouds: int,
    width: int,
    qkv: jax.Array,
    segment: jax.Array,
    narrow: jax.Array | None,
    used: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    grid: jax.Array | None = None,
    table: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of qkv and of the table, with what `forward` returned."""
    heads, scale, dtype = qkv.shape[2], qkv.shape[-1] ** -0.5, qkv.dtype
    marks, lse = _marks(segment, clouds), lse.T
    qkv, g = qkv.astype(jnp.float32), g.astype(jnp.float32)
    # sum over keys of weight x its gradient, by way of the output
    drop = (g * out.astype(jnp.float32)).sum(-1)

    def run(width):
        def one(i, grads):
            dqkv, dtable = grads
            p, h = i // heads, i % heads
            queries, keys, (q, k, v) = _operands(qkv, marks, p, h, width)
            slope, total, fall = (_read(x, p, width, h) for x in (g, lse, drop))
            bias = _bias(grid, table, p, h, width)
            by_query = jnp.exp(_product(queries, keys) + bias - total[:, None])
            by_query *= _product(slope, v) - fall[:, None]
            if dtable is not None:
                axes = jnp.arange(3)[:, None, None]
                index = _bias_index(grid, table, p, width)
                dtable = dtable.at[axes, index, h].add(by_query[None])
            weights = jnp.exp(_product(keys, queries) + jnp.transpose(bias) - total[None])
            by_key = weights * (_product(v, slope) - fall[None])
            dq, dk = scale * jnp.dot(by_query, k), scale * jnp.dot(by_key, q)
            for part, grad in enumerate((dq, dk, jnp.dot(weights, slope))):
                dqkv = _write(dqkv, as_bits(grad.astype(dtype)), p, part, h)
            return dqkv, dtable

        dqkv = as_bits(jnp.zeros(qkv.shape, dtype))
        init = dqkv, None if table is None else jnp.zeros_like(table)
        with planned(len(qkv) // width * heads):
            return jax.lax.fori_loop(0, used * heads, one, init)

    dqkv, dtable = _either(run, width, narrow)
    return of_bits(dqkv), dtable
