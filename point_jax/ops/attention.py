"""Attention within patches, among slots of one segment, without storing the K x K scores.

The forward pass keeps the output and the log-sum-exp of each query; the backward pass makes the
scores again (FlashAttention, arXiv:2205.14135). On CPUs one patch and head at a time keeps the
scores in the cache and the matrix products in their fastest form; patches of padding are never
visited.

XLA fuses product, maximum, exponential and the next product on CPUs as long as nothing stands
between them, which is three times as fast. So the segments' mask is part of the product (`_marks`),
and the backward pass makes the scores twice, once as queries x keys and once as keys x queries:
two more products, and no transposed K x K matrix that would end the fusion.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_NEVER = -1e30  # finite, so that no product with it is NaN


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def patch_attention(
    clouds: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array,
    used: jax.Array,
    grid: jax.Array | None = None,
    table: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v within each patch, among slots of the same segment.

    Args:
      clouds: G, static; segments are below it.
      q, k, v: (P, H, K, D).
      segment: (P, K) int32 from -1; a slot attends to the slots of its patch with the same number.
      used: () int32, patches in use, the first ones; the others give zeros.
      grid: (P, K, 3) int32 voxels, for the relative position bias; None for no bias.
      table: (3, R, H) float32, the bias: for each axis by the voxel of the query minus that of the
        key, clipped to what R = 2 bound + 1 entries hold; the three are added. Its gradient is a
        scatter-add, in an order that GPUs do not fix.

    Returns:
      (P, H, K, D), dtype of v. Scores, softmax and sums are float32.
    """
    return _forward(clouds, q, k, v, segment, used, grid, table)[0]


def _marks(segment, clouds, dtype):
    """Columns for queries and keys (P, K, M) whose product is 0 in a segment and huge without.

    Adding them to q and k masks the scores inside the product, exactly: within a segment every
    added term is zero. A segment's number is written in digits, a column for each value of each
    digit; the query has a one at its own value, the key _NEVER at every other.
    """
    values = clouds + 1  # empty slots have -1
    base = values if values <= 16 else 4
    places = base ** np.arange(int(np.ceil(np.log(values) / np.log(base) - 1e-9)))
    digits = ((segment + 1)[..., None] // places[None, None]) % base  # (P, K, digits)
    same = digits[..., None] == np.arange(base)[None, None, None]
    same = same.reshape(*segment.shape, -1)
    return same.astype(dtype), jnp.where(same, 0, _NEVER).astype(dtype)


def _marked(q, k, segment, clouds):
    """A function of (p, h): queries, divided by sqrt(D), and keys (K, D + M), mask included."""
    on, off = _marks(segment, clouds, q.dtype)
    scale = q.shape[-1] ** -0.5

    def read(p, h):
        queries = jnp.concatenate([q[p, h] * scale, on[p]], axis=1)
        return queries, jnp.concatenate([k[p, h], off[p]], axis=1)

    return read


def _product(a, b):
    """(K, D), (K, D) -> (K, K) float32."""
    return jnp.dot(a, b.T, preferred_element_type=jnp.float32)


def _bias_index(grid, table, p):
    """(3, K, K): the entry of the table that each query and key of a patch read for each axis."""
    bound = table.shape[1] // 2
    at = grid[p].T  # (3, K)
    return jnp.clip(at[:, :, None] - at[:, None], -bound, bound) + bound


def _bias(grid, table, p, h):
    """(K, K) float32 bias of the scores of one patch and head; 0 without a table."""
    if table is None:
        return 0.0
    index = _bias_index(grid, table, p)
    return sum(table[axis, :, h][index[axis]] for axis in range(3))


def _forward(clouds, q, k, v, segment, used, grid, table):
    heads, read = q.shape[1], _marked(q, k, segment, clouds)

    def one(i, carry):
        out, lse = carry
        p, h = i // heads, i % heads
        scores = _product(*read(p, h)) + _bias(grid, table, p, h)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.dot(weights.astype(v.dtype), v[p, h], preferred_element_type=jnp.float32)
        out = out.at[p, h].set((mixed / total).astype(out.dtype))
        return out, lse.at[p, h].set((top + jnp.log(total))[:, 0])

    init = jnp.zeros(q.shape, v.dtype), jnp.zeros(q.shape[:3], jnp.float32)
    return jax.lax.fori_loop(0, used * heads, one, init)


def _fwd(clouds, q, k, v, segment, used, grid, table):
    out, lse = _forward(clouds, q, k, v, segment, used, grid, table)
    return out, (q, k, v, segment, used, grid, table, out, lse)


def _bwd(clouds, saved, g):
    q, k, v, segment, used, grid, table, out, lse = saved
    heads, scale, read = q.shape[1], q.shape[-1] ** -0.5, _marked(q, k, segment, clouds)
    # sum over keys of weight x its gradient, by way of the output
    drop = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def one(i, grads):
        dq, dk, dv, dtable = grads
        p, h = i // heads, i % heads
        queries, keys = read(p, h)
        bias = _bias(grid, table, p, h)
        by_query = jnp.exp(_product(queries, keys) + bias - lse[p, h][:, None])
        by_query *= _product(g[p, h], v[p, h]) - drop[p, h][:, None]
        if dtable is not None:
            axes = jnp.arange(3)[:, None, None]
            dtable = dtable.at[axes, _bias_index(grid, table, p), h].add(by_query[None])
        weights = jnp.exp(_product(keys, queries) + jnp.transpose(bias) - lse[p, h][None])
        by_key = weights * (_product(v[p, h], g[p, h]) - drop[p, h][None])
        return (
            dq.at[p, h].set(scale * jnp.dot(by_query.astype(q.dtype), k[p, h])),
            dk.at[p, h].set(scale * jnp.dot(by_key.astype(q.dtype), q[p, h])),
            dv.at[p, h].set(jnp.dot(weights.astype(g.dtype), g[p, h])),
            dtable,
        )

    zero_table = None if table is None else jnp.zeros_like(table)
    init = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), zero_table
    dq, dk, dv, dtable = jax.lax.fori_loop(0, used * heads, one, init)
    return dq, dk, dv, None, None, None, dtable


patch_attention.defvjp(_fwd, _bwd)
