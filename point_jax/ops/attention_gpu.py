"""Patch attention on GPUs, forward and backward (Pallas, Triton).

One program does one head of one block of a patch, over the blocks of keys (or queries) that it
meets. It reads queries, keys and values of a head where the projection wrote them: 32 bytes a slot
for 16 channels in bfloat16, which is a whole sector of memory. Tensor cores take 16 channels as
they are; exponentials are what bounds it.

The backward pass makes the scores twice in one kernel, for the gradients of keys and values and for
those of queries, so that no two programs add to the same numbers: it repeats bit by bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from point_jax.ops.attention_blocks import (
    BLOCK,
    LOG2_E,
    NEVER,
    blocks_met,
    cut_patches,
    fill_patches,
    slots_in_use,
)

_INNER = 64  # slots of the blocks that a program runs over
_LEAST = 16  # channels that a product of tensor cores takes


def _dot(a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _filled(channels: int) -> int:
    """Channels of the arrays in a program, which are powers of two."""
    return max(_LEAST, 1 << (channels - 1).bit_length())


def _read(ref, segment, channels):
    """(slots, channels) of a head; zeros for empty slots and filled channels."""
    lanes = jnp.arange(ref.shape[-1]) < channels
    return plgpu.load(ref, mask=(segment >= 0)[:, None] & lanes[None], other=0.0)


def _write(ref, values, channels):
    """Without what fills the channels up."""
    lanes = jnp.broadcast_to((jnp.arange(ref.shape[-1]) < channels)[None], values.shape)
    plgpu.store(ref, values.astype(ref.dtype), mask=lanes)


def _third(ref, part):
    """Queries', keys' or values' gradient: (slots, channels)."""
    return ref.at[:, jnp.int32(part)]  # interpreted masked stores take no plain int


def _forward_kernel(channels, first, last, segment, q_ref, k_ref, v_ref, out, lse):
    i, scale = pl.program_id(2), channels**-0.5
    rows = pl.ds(i * BLOCK, BLOCK)
    own = segment[rows]
    q = _read(q_ref.at[rows], own, channels)

    def step(j, carry):
        top, total, sums = carry
        there = pl.ds(j * _INNER, _INNER)
        theirs = segment[there]
        k, v = (_read(ref.at[there], theirs, channels) for ref in (k_ref, v_ref))
        scores = _dot(q, k.T) * (scale * LOG2_E)
        scores = jnp.where(own[:, None] == theirs[None], scores, NEVER)
        higher = jnp.maximum(top, scores.max(1))
        fade, weights = jnp.exp2(top - higher), jnp.exp2(scores - higher[:, None])
        total = total * fade + weights.sum(1)
        return higher, total, sums * fade[:, None] + _dot(weights.astype(v.dtype), v)

    row = jnp.zeros(BLOCK, jnp.float32)
    init = row + NEVER, row, jnp.zeros(q.shape, jnp.float32)
    top, total, sums = jax.lax.fori_loop(first[i], last[i], step, init)
    _write(out, jnp.where(own[:, None] >= 0, sums / total[:, None], 0), channels)
    # so that an empty slot's weights are zeros in the backward pass
    lse[...] = jnp.where(own >= 0, top / LOG2_E + jnp.log(total), -NEVER)


def _backward_kernel(channels, first, last, segment, q_ref, k_ref, v_ref, g_ref, lse, fall, grads):
    i, scale = pl.program_id(2), channels**-0.5
    rows = pl.ds(i * BLOCK, BLOCK)
    own = segment[rows]
    q, k, v, g = (_read(ref.at[rows], own, channels) for ref in (q_ref, k_ref, v_ref, g_ref))
    nothing = jnp.zeros(q.shape, jnp.float32)

    def by_key(j, carry):
        """This block's keys with a block of queries."""
        dk, dv = carry
        there = pl.ds(j * _INNER, _INNER)
        theirs = segment[there]
        q, g = (_read(ref.at[there], theirs, channels) for ref in (q_ref, g_ref))
        powers = _dot(k, q.T) * (scale * LOG2_E) - (lse[there] * LOG2_E)[None]
        weights = jnp.exp2(jnp.where(own[:, None] == theirs[None], powers, NEVER))
        change = weights * (_dot(v, g.T) - fall[there][None])
        return dk + _dot(change.astype(q.dtype), q), dv + _dot(weights.astype(g.dtype), g)

    dk, dv = jax.lax.fori_loop(first[i], last[i], by_key, (nothing, nothing))
    _write(_third(grads, 1), dk * scale, channels)
    _write(_third(grads, 2), dv, channels)
    level, drop = (lse[rows] * LOG2_E)[:, None], fall[rows][:, None]

    def by_query(j, dq):
        there = pl.ds(j * _INNER, _INNER)
        theirs = segment[there]
        k, v = (_read(ref.at[there], theirs, channels) for ref in (k_ref, v_ref))
        powers = _dot(q, k.T) * (scale * LOG2_E) - level
        weights = jnp.exp2(jnp.where(own[:, None] == theirs[None], powers, NEVER))
        change = weights * (_dot(g, v.T) - drop)
        return dq + _dot(change.astype(k.dtype), k)

    dq = jax.lax.fori_loop(first[i], last[i], by_query, nothing)
    _write(_third(grads, 0), dq * scale, channels)


def _call(kernel, width, heads, channels, segment, inputs, outputs, interpret):
    """Runs a kernel over patches, heads and blocks.

    Args:
      width: K' of filled patches.
      segment: (P, K').
      inputs: pairs of a block and an array.
      outputs: pairs of a block and a shape.
    """
    steer = blocks_met(segment, BLOCK, _INNER)
    steered = pl.BlockSpec((None, width // BLOCK), lambda p, h, i: (p, 0))
    slots = pl.BlockSpec((None, width), lambda p, h, i: (p, 0))
    blocks, arrays = zip(*inputs, strict=True)
    out_blocks, shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        partial(kernel, channels),
        out_shape=shapes,
        grid=(len(segment), heads, width // BLOCK),
        in_specs=[steered, steered, slots, *blocks],
        out_specs=out_blocks,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*steer, segment, *arrays)


def _thirds(width, filled):
    """Blocks of the queries, keys and values of one head and patch in (P K', 3, H, D)."""
    block = width, None, None, filled
    return [pl.BlockSpec(block, lambda p, h, i, t=t: (p, t, h, 0)) for t in range(3)]


def forward(
    width: int,
    qkv: jax.Array,
    segment: jax.Array,
    narrow: jax.Array | None,
    used: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output (S, H, D) and log-sum-exp (H, S) of `attention.patch_attention`."""
    heads, channels = qkv.shape[2:]
    segment, _ = slots_in_use(width, segment, narrow, used)
    qkv, filled, wide = fill_patches(qkv, width), _filled(channels), segment.shape[1]
    each = wide // BLOCK
    out = (
        pl.BlockSpec((BLOCK, None, filled), lambda p, h, i: (p * each + i, h, 0)),
        jax.ShapeDtypeStruct((len(qkv), heads, channels), qkv.dtype),
    )
    lse = (
        pl.BlockSpec((None, BLOCK), lambda p, h, i: (h, p * each + i)),
        jax.ShapeDtypeStruct((heads, len(qkv)), jnp.float32),
    )
    inputs = [(block, qkv) for block in _thirds(wide, filled)]
    found = _call(_forward_kernel, wide, heads, channels, segment, inputs, [out, lse], interpret)
    return cut_patches(found[0], width), cut_patches(found[1].T, width).T


def backward(
    width: int,
    qkv: jax.Array,
    segment: jax.Array,
    narrow: jax.Array | None,
    used: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Gradient of qkv (S, 3, H, D) from that of the output, with what `forward` returned."""
    heads, channels = qkv.shape[2:]
    segment, _ = slots_in_use(width, segment, narrow, used)
    g = g.astype(qkv.dtype)
    qkv, out, g, lse = (fill_patches(x, width) for x in (qkv, out, g, lse.T))
    # sum over keys of weight x its gradient, by way of the output
    fall = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    fall = jnp.where(segment.reshape(-1, 1) >= 0, fall, 0).T
    filled, wide = _filled(channels), segment.shape[1]
    each = wide // BLOCK
    slope = pl.BlockSpec((wide, None, filled), lambda p, h, i: (p, h, 0)), g
    row = pl.BlockSpec((None, wide), lambda p, h, i: (h, p))
    inputs = [(block, qkv) for block in _thirds(wide, filled)]
    grads = (
        pl.BlockSpec((BLOCK, 3, None, filled), lambda p, h, i: (p * each + i, 0, h, 0)),
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
    )
    (found,) = _call(
        _backward_kernel,
        wide,
        heads,
        channels,
        segment,
        [*inputs, slope, (row, lse.T), (row, fall)],
        [grads],
        interpret,
    )
    return cut_patches(found, width)
