"""What a program of `attention_tpu` does: which heads it gets, and the two kernels.

Shapes in a program: C chunks of N heads of D channels, K slots; lanes are N D.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from point_jax.ops.attention_blocks import BLOCK, LOG2_E, NEVER

LANES = 128
_BY_LANES = ((1,), (1,)), ((), ())  # (A, D), (B, D) -> (A, B)


class Form(NamedTuple):
    """How heads are dealt out to programs.

    Attributes:
      width: K, slots of a patch.
      channels: D.
      heads: N, of a chunk: what fits the lanes and divides H.
      chunks: of all heads.
      apart: whether a program does one chunk, because chunks are whole lanes; else all of them.
      scale: of the scores.
    """

    width: int
    channels: int
    heads: int
    chunks: int
    apart: bool
    scale: float

    @property
    def lanes(self) -> int:
        """N D, of a chunk."""
        return self.heads * self.channels

    @property
    def here(self) -> int:
        """C, chunks of a program."""
        return 1 if self.apart else self.chunks

    @property
    def together(self) -> int:
        """Heads whose work is interleaved: the products of one fill the other's waits."""
        return max(n for n in (1, 2, 3, 4) if self.heads % n == 0)

    @property
    def keys(self) -> int:
        """Slots of a block of keys."""
        return 2 * BLOCK if self.width % (2 * BLOCK) == 0 else BLOCK

    def inputs(self, parts: int) -> list[pl.BlockSpec]:
        """Blocks of an array (S, parts x H D); patches that are not used are not fetched."""

        def index(at, p, c, t, count, *_):
            return jnp.minimum(p, jnp.maximum(count[0] - 1, 0)), at * self.chunks + c

        if self.apart:
            block = self.width, self.lanes
            return [self.block(block, partial(index, part)) for part in range(parts)]
        block = self.width, parts * self.chunks * self.lanes
        return [self.block(block, partial(index, 0))]

    def block(self, shape, index) -> pl.BlockSpec:
        """One buffer for all the chunks of a program, two where the next ones can come meanwhile.

        Two of all would not fit the 16 MB of a v4 with 192 channels.
        """
        return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1 if self.here > 1 else 2))

    def read(self, refs, part: int, chunk: int) -> jax.Array:
        """(K, lanes) of a chunk here."""
        if self.apart:
            return refs[part][...]
        return refs[0][:, self.at(part, chunk)]

    def at(self, part: int, chunk: int) -> slice:
        """Lanes of a chunk in an array that has all of them."""
        start = (part * self.chunks + chunk) * self.lanes
        return slice(start, start + self.lanes)

    def by_head(self, dtype) -> Any:
        return pltpu.VMEM((self.here, self.heads, self.channels, self.width), dtype)

    def rows(self) -> Any:
        return pltpu.VMEM((self.here, self.heads, 1, self.width), jnp.float32)

    def by_slot(self, dtype) -> Any:
        return pltpu.VMEM((self.here, self.width, self.lanes), dtype)


def deal_heads(width: int, heads: int, channels: int, scale: float) -> Form:
    """The form for patches of `width` slots, heads and channels a head."""
    fit = [n for n in range(1, heads + 1) if heads % n == 0 and n * channels <= LANES]
    n = max(fit, default=1)
    return Form(width, channels, n, heads // n, n * channels % LANES == 0, scale)


def _dot(a, b, dims=(((1,), (0,)), ((), ()))):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _own_lanes(form: Form, head) -> jax.Array:
    """(1, lanes) bool, the channels of a head of a chunk."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, form.lanes), 1)
    return (lane >= head * form.channels) & (lane < (head + 1) * form.channels)


def _segment_columns(segment_ref, columns):
    """Writes segments down the slots of (K, 128), the same in every lane."""
    row = segment_ref[0]
    columns[...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _without_empty(x, columns):
    """Rows of empty slots are zeros: whatever they hold would meet weights of zero."""
    return jnp.where(columns[:, :1] >= 0, x.astype(jnp.float32), 0)


def _write_by_head(form, ref, chunk, x):
    """(K, lanes) float32 -> ref[chunk]: (N, D, K)."""
    turned = x.T
    for h in range(form.heads):
        ref[chunk, h] = turned[h * form.channels : (h + 1) * form.channels].astype(ref.dtype)


def _by_slot(heads):
    """N of (D, K) float32 -> (K, lanes)."""
    return jnp.concatenate(heads, axis=0).T


def _loop(stop, body, start=0):
    """`body(i)` for its effects."""
    jax.lax.fori_loop(start, stop, lambda i, _: (body(i), None)[1], None)


def forward_kernel(form: Form, count, first, last, segment, *refs) -> None:
    """One patch, one chunk or all: blocks of queries, heads, blocks of keys.

    Args:
      form: static.
      count: (1,) patches in use.
      first: (P, blocks) and last, of `blocks_met`.
      segment: (1, 1, K).
      refs: queries, keys and values, of `Form.inputs(3)`; out (K, C N D), lse (C, N, K); scratch.
    """
    thirds, (out, lse), scratch = refs[:-8], refs[-8:-6], refs[-6:]
    queries, keys, values, columns, mixed, levels = scratch
    patch = pl.program_id(0)

    @pl.when(patch < count[0])
    def _():
        _segment_columns(segment, columns)
        for c in range(form.here):
            q, k, v = (_without_empty(form.read(thirds, t, c), columns) for t in range(3))
            queries[c], keys[c] = q.astype(queries.dtype), k.astype(keys.dtype)
            _write_by_head(form, values, c, v)

    def block(i):
        rows = pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)
        own = segment[0, :, rows]  # (1, queries)

        def group(c, g):
            heads = [g * form.together + u for u in range(form.together)]
            q = queries[c, rows]
            each = [jnp.where(_own_lanes(form, h), q, 0) for h in heads]

            def step(j, carry):
                there = pl.ds(pl.multiple_of(j * form.keys, form.keys), form.keys)
                k, same = keys[c, there], columns[there] == own
                every = [_dot(k, q, _BY_LANES) for q in each]
                found = []
                for h, scores, (top, total, sums) in zip(heads, every, carry, strict=True):
                    scores = jnp.where(same, scores, NEVER)
                    higher = jnp.maximum(top, scores.max(0, keepdims=True))
                    fade = jnp.exp2((top - higher) * (form.scale * LOG2_E))
                    weights = jnp.exp2((scores - higher) * (form.scale * LOG2_E))
                    total = total * fade + weights.sum(0, keepdims=True)
                    sums = sums * fade + _dot(values[c, h, :, there], weights.astype(q.dtype))
                    found.append((higher, total, sums))
                return found

            row = jnp.zeros((1, BLOCK), jnp.float32)
            init = row + NEVER, row, jnp.zeros((form.channels, BLOCK), jnp.float32)
            carry = jax.lax.fori_loop(first[patch, i], last[patch, i], step, [init] * len(heads))
            for h, (top, total, sums) in zip(heads, carry, strict=True):
                mixed[c, h] = jnp.where(own >= 0, sums / total, 0)
                # so that an empty slot's weights are zeros in the backward pass
                level = jnp.where(own >= 0, top * form.scale + jnp.log(total), -NEVER)
                levels[c, h, :, rows] = level

        _loop(form.here, lambda c: _loop(form.heads // form.together, partial(group, c)))
        for c in range(form.here):
            lanes = slice(None) if form.apart else form.at(0, c)
            heads = [mixed[c, h] for h in range(form.heads)]
            out[rows, lanes] = _by_slot(heads).astype(out.dtype)

    _loop(form.width // BLOCK, block)
    for c in range(form.here):
        for h in range(form.heads):
            lse[c, h : h + 1] = levels[c, h]


def backward_kernel(form: Form, count, first, last, segment, *refs) -> None:
    """As `forward_kernel`, all in the first turn; each turn writes what it has a block for.

    Refs are queries, keys and values; the output's gradient g and out (K, C N D), lse (C, N, K);
    the gradients' block; scratch.
    """
    scratch = refs[-11:]
    thirds, (g, out, lse, grads_out) = refs[:-15], refs[-15:-11]
    queries, keys, values, gradients, by_q, by_k, by_g, columns, levels, falls, grads = scratch
    patch, turn = pl.program_id(0), pl.program_id(2)

    @pl.when((turn == 0) & (patch < count[0]))
    def _():
        _segment_columns(segment, columns)
        for c in range(form.here):
            lanes = slice(None) if form.apart else form.at(0, c)
            parts = [form.read(thirds, t, c) for t in range(3)] + [g[:, lanes]]
            parts = [_without_empty(part, columns) for part in parts]
            for ref, part in zip((queries, keys, values, gradients), parts, strict=True):
                ref[c] = part.astype(ref.dtype)
            for ref, part in zip((by_q, by_k, by_g), (parts[0], parts[1], parts[3]), strict=True):
                _write_by_head(form, ref, c, part)
            # sum over keys of weight x its gradient, by way of the output
            product = parts[3] * out[:, lanes].astype(jnp.float32)
            each = [_own_lanes(form, h).astype(jnp.float32) for h in range(form.heads)]
            fall = _dot(jnp.concatenate(each, axis=0), product, _BY_LANES)
            for h in range(form.heads):
                levels[c, h] = lse[c, h : h + 1] * LOG2_E
                falls[c, h] = fall[h : h + 1]

    def group(c, g):
        heads = [g * form.together + u for u in range(form.together)]
        for h in heads:
            for t in (1, 2):
                grads[t, c, h] = jnp.zeros((form.channels, form.width), jnp.float32)

        def block(i):
            rows = pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)
            own = segment[0, :, rows]  # (1, queries)
            q, slope = queries[c, rows], gradients[c, rows]
            each = [
                (
                    h,
                    jnp.where(_own_lanes(form, h), q, 0),
                    jnp.where(_own_lanes(form, h), slope, 0),
                    levels[c, h, :, rows],
                    falls[c, h, :, rows],
                )
                for h in heads
            ]

            def step(j, carry):
                there = pl.ds(pl.multiple_of(j * form.keys, form.keys), form.keys)
                k, v, same = keys[c, there], values[c, there], columns[there] == own
                # All heads step by step, so that the products of one fill the waits of another.
                scores = [_dot(k, q, _BY_LANES) for _, q, _, _, _ in each]
                slopes = [_dot(v, slope, _BY_LANES) for _, _, slope, _, _ in each]
                weights, changes = [], []
                for (_, _, _, level, drop), score, slope in zip(each, scores, slopes, strict=True):
                    powers = score * (form.scale * LOG2_E) - level
                    weight = jnp.exp2(jnp.where(same, powers, NEVER))
                    changes.append((weight * (slope - drop)).astype(k.dtype))
                    weights.append(weight.astype(k.dtype))
                found = [
                    (
                        dq + _dot(by_k[c, h, :, there], change),
                        _dot(by_q[c, h, :, rows], change, _BY_LANES),
                        _dot(by_g[c, h, :, rows], weight, _BY_LANES),
                    )
                    for h, dq, weight, change in zip(heads, carry, weights, changes, strict=True)
                ]
                for h, (_, dk, dv) in zip(heads, found, strict=True):
                    grads[1, c, h, :, there] += dk
                    grads[2, c, h, :, there] += dv
                return [dq for dq, _, _ in found]

            init = [jnp.zeros((form.channels, BLOCK), jnp.float32)] * len(heads)
            carry = jax.lax.fori_loop(first[patch, i], last[patch, i], step, init)
            for h, dq in zip(heads, carry, strict=True):
                grads[0, c, h, :, rows] = dq

        _loop(form.width // BLOCK, block)

    def write(t, c, lanes):
        scale = jnp.where(t == 2, 1.0, form.scale)
        heads = [grads[t, c, h] * scale for h in range(form.heads)]
        grads_out[:, lanes] = _by_slot(heads).astype(grads_out.dtype)

    @pl.when(turn == 0)
    def _():
        _loop(form.here, lambda c: _loop(form.heads // form.together, partial(group, c)))

    if form.apart:  # queries, keys and values are three blocks of columns: one at a time
        write(turn, 0, slice(None))
    else:
        for t in range(3):
            for c in range(form.here):
                write(t, c, form.at(t, c))
