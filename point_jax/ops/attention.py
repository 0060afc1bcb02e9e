"""Attention within patches, under a segment mask, without storing the K x K scores.

The forward pass keeps the output and the log-sum-exp of each query; the backward pass makes the
scores again (FlashAttention, arXiv:2205.14135). On CPUs one patch and head at a time keeps the
scores in the cache and the matrix products in their fastest form; patches of padding are never
visited. Patches that one cloud fills have a loop of their own: with no mask between them XLA fuses
product, maximum and exponential, which is three times as fast.
"""

from functools import partial

import jax
import jax.numpy as jnp

_NEVER = -1e30  # finite, so that a fully masked row stays free of NaN


@jax.custom_vjp
def patch_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array,
    full: jax.Array,
    used: jax.Array,
    grid: jax.Array | None = None,
    table: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v within each patch, among slots of the same segment.

    Args:
      q, k, v: (P, H, K, D).
      segment: (P, K) int32; a slot attends to the slots of its patch with the same number.
      full: () int32, how many patches, the first ones, have one segment alone.
      used: () int32, patches in use; the others give zeros.
      grid: (P, K, 3) int32 voxels, for the relative position bias; None for no bias.
      table: (3, R, H) float32, the bias: for each axis by the voxel of the query minus that of the
        key, clipped to what R = 2 bound + 1 entries hold; the three are added. Its gradient is a
        scatter-add, in an order that GPUs do not fix.

    Returns:
      (P, H, K, D), dtype of v. Scores, softmax and sums are float32.
    """
    return _forward(q, k, v, segment, full, used, grid, table)[0]


def _scores(q, k, segment, bias):
    """(K, K) float32 scores of one patch and head; `segment` None for no mask."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.dot(q * scale, k.T, preferred_element_type=jnp.float32)
    if bias is not None:
        index, table = bias
        scores = scores + sum(table[axis][index[axis]] for axis in range(3))
    if segment is None:
        return scores
    return jnp.where(segment[:, None] == segment[None], scores, _NEVER)


def _bias(grid, table, p, h):
    """Entries of the table (3, K, K) that a patch reads, and the head's table (3, R)."""
    if grid is None:
        return None
    bound = table.shape[1] // 2
    at = grid[p].T  # (3, K)
    return jnp.clip(at[:, :, None] - at[:, None], -bound, bound) + bound, table[..., h]


def _visit(one, full, used, heads, init):
    """Folds `one(masked, i, carry)` over all patches and heads."""
    carry = jax.lax.fori_loop(0, full * heads, partial(one, False), init)
    return jax.lax.fori_loop(full * heads, used * heads, partial(one, True), carry)


def _forward(q, k, v, segment, full, used, grid, table):
    heads = q.shape[1]

    def one(masked, i, carry):
        out, lse = carry
        p, h = i // heads, i % heads
        mask = segment[p] if masked else None
        scores = _scores(q[p, h], k[p, h], mask, _bias(grid, table, p, h))
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.dot(weights.astype(v.dtype), v[p, h], preferred_element_type=jnp.float32)
        out = out.at[p, h].set((mixed / total).astype(out.dtype))
        return out, lse.at[p, h].set((top + jnp.log(total))[:, 0])

    init = jnp.zeros(q.shape, v.dtype), jnp.zeros(q.shape[:3], jnp.float32)
    return _visit(one, full, used, heads, init)


def _fwd(q, k, v, segment, full, used, grid, table):
    out, lse = _forward(q, k, v, segment, full, used, grid, table)
    return out, (q, k, v, segment, full, used, grid, table, out, lse)


def _bwd(saved, g):
    q, k, v, segment, full, used, grid, table, out, lse = saved
    heads, scale = q.shape[1], q.shape[-1] ** -0.5
    # sum over keys of weight x its gradient, by way of the output
    drop = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def one(masked, i, grads):
        dq, dk, dv, dtable = grads
        p, h = i // heads, i % heads
        mask, bias = segment[p] if masked else None, _bias(grid, table, p, h)
        weights = jnp.exp(_scores(q[p, h], k[p, h], mask, bias) - lse[p, h][:, None])
        slope = jnp.dot(g[p, h], v[p, h].T, preferred_element_type=jnp.float32)
        slope = weights * (slope - drop[p, h][:, None])
        if bias is not None:
            axes = jnp.arange(3)[:, None, None]
            dtable = dtable.at[axes, bias[0], h].add(slope[None])
        slope = (slope * scale).astype(q.dtype)
        weights = weights.astype(g.dtype)
        return (
            dq.at[p, h].set(jnp.dot(slope, k[p, h])),
            dk.at[p, h].set(jnp.dot(slope.T, q[p, h])),
            dv.at[p, h].set(jnp.dot(weights.T, g[p, h])),
            dtable,
        )

    zero_table = None if table is None else jnp.zeros_like(table)
    init = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), zero_table
    dq, dk, dv, dtable = _visit(one, full, used, heads, init)
    return dq, dk, dv, None, None, None, None, dtable


patch_attention.defvjp(_fwd, _bwd)
