"""Patch attention as an XLA loop over patches and heads: on CPUs, and for what kernels do not do.

A few heads of one patch at a time keep the scores in the cache; patches of padding are never
visited. What makes the loop fast on CPUs is that XLA hands a chain of products, exponentials and
sums to its library (YNNPACK) as one kernel, whose scores never leave the cache. It does so

- from a reduction on, not from a product (`_joined`);
- as long as one array leaves the kernel. So the sum of the weights is a column of their product
  with the values, what the scores are taken from is known before (`_shift`), the segments' mask is
  part of the product (`_marks`), and the backward pass makes the scores twice, once as queries x
  keys and once as keys x queries: two more products, and no transposed K x K matrix.

Elsewhere, with a table of relative position bias, all of this is one kernel after the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.geometry.loops import blank, planned
from point_jax.geometry.patches import NARROW
from point_jax.ops.bfloat16 import as_bits, of_bits

_NEVER = -1e30  # finite, so that no product with it is NaN
_SPREAD = 80.0  # exp(+-40), times thousands of slots and any values, are normal float32


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
    plain = 2 * width * width
    marked = plain * (channels + base * len(places))
    # scores, mixing and sum; scores both ways, their slopes both ways, and three gradients
    forward = marked + plain * (channels + 1)
    return forward, 2 * (marked + plain) + 2 * plain * (channels + 1) + 3 * plain * channels


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


class _Tile(NamedTuple):
    """Heads of one patch that are worked on together.

    Attributes:
      patch: which, () int32.
      head: the first, () int32.
      width: K.
      heads: how many, B.
    """

    patch: jax.Array
    head: jax.Array
    width: int
    heads: int

    def marks(self, marks):
        """(B, K, M) of what slots (S, M) have, for every head the same."""
        here = jax.lax.dynamic_slice_in_dim(marks, self.patch * self.width, self.width)
        return jnp.broadcast_to(here, (self.heads, *here.shape))

    def read(self, array, *index):
        """(B, K, ...) of (S, H, ...), or of (S, parts, H, ...) at a part."""
        start, size = self._place(array, index)
        here = jax.lax.dynamic_slice(array, start, size)
        return jnp.swapaxes(here.reshape(self.width, *size[1 + len(index) :]), 0, 1)

    def write(self, array, values, *index):
        """Puts (B, K, ...) where `read` reads them."""
        start, size = self._place(array, index)
        values = jnp.swapaxes(values, 0, 1).reshape(size)
        return jax.lax.dynamic_update_slice(array, values, start)

    def _place(self, array, index):
        rest = array.shape[2 + len(index) :]
        start = (self.patch * self.width, *index, self.head, *(0 for _ in rest))
        return start, (self.width, *(1 for _ in index), self.heads, *rest)


def _together(heads, width, wide):
    """Heads of a tile: many in narrow patches, where calling kernels takes as long as they do.

    Measured on two cores for patches of 256 to 1,024 slots. In wide ones the forward pass gains by
    two or three, the backward pass by none.

    Args:
      heads: of which it is a divisor.
      width: K.
      wide: numbers of heads in wide patches, the best first.
    """
    counts = range(12, 0, -1) if width <= 256 else wide
    return next(n for n in counts if heads % n == 0)


def _operands(qkv, marks, tile):
    """Queries / sqrt(D), keys and values (B, K, D), and marks (B, K, M) of queries and of keys."""
    q, k, v = (tile.read(qkv, part) for part in range(3))
    on, off = (tile.marks(mark) for mark in marks)
    return q * q.shape[-1] ** -0.5, k, v, on, off


def _tiles(body, init, slots, width, heads, together, used):
    """Folds `body(tile, carry)` over the tiles of the patches in use."""
    groups = heads // together

    def one(i, carry):
        return body(_Tile(i // groups, i % groups * together, width, together), carry)

    with planned(slots // width * groups):
        return jax.lax.fori_loop(0, used * groups, one, init)


def _product(a, b):
    """(B, K, D), (B, K, D) -> (B, K, K)."""
    return a @ jnp.swapaxes(b, 1, 2)


def _columns(*arrays):
    return jnp.concatenate([x if x.ndim == 3 else x[..., None] for x in arrays], axis=2)


def _ones(x):
    return jnp.ones(x.shape[:2], x.dtype)


def _joined(x):
    """The same (B, K, C); on CPUs what is computed from it becomes one kernel.

    XLA's library pass grows a kernel around a reduction alone, and takes up the products and
    exponentials that follow. This reduction is of a few columns, and what it subtracts is 0.
    """
    nothing = jax.lax.reduce(jnp.abs(x), np.float32(0), jax.lax.min, (2,))
    return x - nothing[..., None]


def _bias_index(grid, table, tile):
    """(3, K, K): the entry of the table that each query and key of a patch read for each axis."""
    bound = table.shape[1] // 2
    at = jax.lax.dynamic_slice_in_dim(grid, tile.patch * tile.width, tile.width).T  # (3, K)
    return jnp.clip(at[:, :, None] - at[:, None], -bound, bound) + bound


def _bias(grid, table, tile):
    """(1, K, K) float32 bias of the scores of one patch and head."""
    index = _bias_index(grid, table, tile)
    x, y, z = (table[axis, :, tile.head][index[axis]] for axis in range(3))
    return (x + y + z)[None]


def _shift(q, k, queries, keys):
    """(B, K) what to take from each query's scores so that their exponentials are normal numbers.

    The largest score lies between the slot's own, which is of its segment, and the product of
    lengths. Where all of these are close, the middle of the two will do, and the largest need not
    be known, which would take a kernel of its own. Either way a constant for the query; but other
    keys of the patch, whatever their segment, may move its last bits.
    """
    own = (q * k).sum(-1)
    bound = jnp.sqrt((q * q).sum(-1) * (k * k).sum(-1).max(-1, keepdims=True))
    close = jnp.all(bound - own < _SPREAD)
    return jax.lax.cond(close, lambda: 0.5 * (own + bound), lambda: _product(queries, keys).max(-1))


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
    qkv = qkv.astype(jnp.float32)

    def run(width):
        together = 1 if table is not None else _together(heads, width, (2, 3, 1))

        def one(tile, carry):
            out, lse = carry
            q, k, v, on, off = _operands(qkv, marks, tile)
            queries, keys = _columns(q, on), _columns(k, off)
            scores = _product(_joined(queries), keys)
            if table is None:
                shift = _shift(q, k, queries, keys)
            else:
                scores += _bias(grid, table, tile)
                shift = scores.max(-1)
            weights = jnp.exp(scores - shift[..., None])
            values = _columns(v, _ones(v)).astype(dtype)
            mixed = jnp.matmul(weights.astype(dtype), values, preferred_element_type=jnp.float32)
            total = mixed[..., channels]
            mixed = (mixed[..., :channels] / total[..., None]).astype(dtype)
            out = tile.write(out, as_bits(mixed))
            return out, tile.write(lse, shift + jnp.log(total))

        out = as_bits(blank((slots, heads, channels), dtype, qkv))
        init = out, blank((slots, heads), jnp.float32, qkv)
        return _tiles(one, init, slots, width, heads, together, used)

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
    slots, _, heads, channels = qkv.shape
    dtype = qkv.dtype
    marks, lse = _marks(segment, clouds), lse.T
    qkv, g = qkv.astype(jnp.float32), g.astype(jnp.float32)
    # sum over keys of weight x its gradient, by way of the output
    drop = (g * out.astype(jnp.float32)).sum(-1)

    def run(width):
        together = 1 if table is not None else _together(heads, width, (1,))

        def one(tile, grads):
            dqkv, dtable = grads
            q, k, v, on, off = _operands(qkv, marks, tile)
            slope, total, fall = (tile.read(x) for x in (g, lse, drop))
            if table is None:
                # The columns at the end take from the scores what is known of each query.
                queries, keys = _columns(q, on, -total), _columns(k, off, _ones(k))
                slopes, values = _columns(slope, -fall), _columns(v, _ones(v))
                more = less = jnp.zeros((1, 1, 1))
            else:  # where products may round what they multiply
                queries, keys, slopes, values = _columns(q, on), _columns(k, off), slope, v
                more, less = _bias(grid, table, tile) - total[..., None], -fall[..., None]
            by_query = jnp.exp(_product(_joined(queries), keys) + more)
            by_query *= _product(slopes, values) + less
            if dtable is not None:
                axes = jnp.arange(3)[:, None, None]
                index = _bias_index(grid, table, tile)
                dtable = dtable.at[axes, index, tile.head].add(by_query)
            more, less = (jnp.swapaxes(x, 1, 2) for x in (more, less))
            weights = jnp.exp(_product(_joined(keys), queries) + more)
            by_key = weights * (_product(_joined(values), slopes) + less)
            found = channels**-0.5 * (by_query @ k), by_key @ q, weights @ slope
            for part, grad in enumerate(found):
                dqkv = tile.write(dqkv, as_bits(grad.astype(dtype)), part)
            return dqkv, dtable

        dqkv = as_bits(blank(qkv.shape, dtype, g))
        init = dqkv, None if table is None else jnp.zeros_like(table)
        return _tiles(one, init, slots, width, heads, together, used)

    dqkv, dtable = _either(run, width, narrow)
    return of_bits(dqkv), dtable
