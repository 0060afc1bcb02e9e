"""Patch attention on TPUs, forward and backward (Pallas, Mosaic).

One program does a patch and as many heads as fill the 128 lanes: 8 of 16 channels. It reads
queries, keys and values as columns of (S, 3 H D), where the projection wrote them, and a head's
patch of K x K scores never leaves the chip's own memory.

Heads of 16 channels waste a matrix unit of 128 x 128. What decides the form is that a unit takes
in a tile of 128 x 128 weights in a quarter of the time in which 128 rows stream through it:

- Scores are keys x queries, (K, D) x (D, K). Their rows stream through at 128 a time whatever D
  is, so the other heads' channels stay where they are and are zeros in the queries: no lane moves.
- Every other product is made transposed, with the scores' matrix as weights and D rows streaming:
  out^T = v^T w^T, dq^T = k^T s^T, and dv^T = g^T w, dk^T = q^T s. That is bound by loading the
  weights, a quarter of what K rows through weights of D columns take.
- Statistics of queries are rows along the lanes: reductions over keys are plain maxima and sums of
  registers, and log-sum-exps are (H, S), not a lane-wide column a slot.

The backward pass makes the scores once: a patch fits, so the gradients of keys and values add up
where they are, five products in all.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from point_jax.ops.attention_blocks import (
    BLOCK,
    blocks_met,
    cut_patches,
    fill_patches,
    slots_in_use,
)
from point_jax.ops.attention_tpu_kernels import (
    LANES,
    backward_kernel,
    deal_heads,
    forward_kernel,
)

_SUBLANES = 8
_VMEM = 64 << 20  # bytes a program may hold


def _flat(x: jax.Array, width: int) -> jax.Array:
    """(S, ..., D) -> (P K', rest), channels filled up to whole sublanes."""
    short = -x.shape[-1] % _SUBLANES
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    x = fill_patches(x, width)
    return x.reshape(len(x), -1)


def _prepare(width, qkv, segment, narrow, used):
    """The form, scalars that programs are steered by, and the segments (P, 1, K')."""
    heads, channels = qkv.shape[2:]
    segment, count = slots_in_use(width, segment, narrow, used)
    filled = channels + -channels % _SUBLANES
    form = deal_heads(segment.shape[1], heads, filled, channels**-0.5)
    steer = count.reshape(1), *blocks_met(segment, BLOCK, form.keys)
    return form, steer, segment[:, None]


def _lse_block(form):
    return pl.BlockSpec((form.here, form.heads, form.width), lambda p, c, *_: (c, 0, p))


def _call(kernel, form, patches, turns, inputs, outputs, scratch, interpret):
    """A kernel over patches, chunks and turns. `outputs`: pairs of a block and a shape."""
    segment = pl.BlockSpec((1, 1, form.width), lambda p, *_: (p, 0, 0))
    blocks, shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        partial(kernel, form),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(patches, form.chunks // form.here, turns),
            in_specs=[segment, *inputs],
            out_specs=blocks,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name=f"patch_attention_{kernel.__name__}",
    )


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
    form, steer, segment = _prepare(width, qkv, segment, narrow, used)
    flat, dtype = _flat(qkv, width), qkv.dtype
    out_block = form.block((form.width, form.here * form.lanes), lambda p, c, *_: (p, c))
    run = _call(
        forward_kernel,
        form,
        len(segment),
        1,
        form.inputs(3),
        [
            (out_block, jax.ShapeDtypeStruct((len(flat), form.chunks * form.lanes), dtype)),
            (
                _lse_block(form),
                jax.ShapeDtypeStruct((form.chunks, form.heads, len(flat)), jnp.float32),
            ),
        ],
        [
            *(form.by_slot(dtype) for _ in "qk"),
            form.by_head(dtype),
            pltpu.VMEM((form.width, LANES), jnp.int32),
            pltpu.VMEM((form.here, form.heads, form.channels, BLOCK), jnp.float32),
            form.rows(),
        ],
        interpret,
    )
    out, lse = run(*steer, segment, *[flat] * len(form.inputs(3)))
    out = cut_patches(out.reshape(-1, heads, form.channels)[..., :channels], width)
    return out, cut_patches(lse.reshape(heads, -1).T, width).T


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
    form, steer, segment = _prepare(width, qkv, segment, narrow, used)
    dtype = qkv.dtype
    flat, g, out = (_flat(x, width) for x in (qkv, g.astype(dtype), out))
    lse = fill_patches(lse.T, width).T.reshape(form.chunks, form.heads, -1)
    turns = 3 if form.apart else 1

    def grad_block(p, c, t, *_):
        return p, t * form.chunks + c

    columns = (1 if form.apart else 3) * form.here * form.lanes
    run = _call(
        backward_kernel,
        form,
        len(segment),
        turns,
        [*form.inputs(3), *form.inputs(1), *form.inputs(1), _lse_block(form)],
        [
            (
                form.block((form.width, columns), grad_block),
                jax.ShapeDtypeStruct(flat.shape, dtype),
            )
        ],
        [
            *(form.by_slot(dtype) for _ in "qkvg"),
            *(form.by_head(dtype) for _ in "qkg"),
            pltpu.VMEM((form.width, LANES), jnp.int32),
            *(form.rows() for _ in "lf"),
            pltpu.VMEM((3, form.here, form.heads, form.channels, form.width), jnp.float32),
        ],
        interpret,
    )
    (grad,) = run(*steer, segment, *[flat] * len(form.inputs(3)), g, out, lse)
    return cut_patches(grad.reshape(-1, 3, heads, form.channels)[..., :channels], width)
