"""Functions of single rows over the rows in use.

A row's capacity is planned for the worst cloud, so at coarse levels most of it is padding. On CPUs
blocks of rows run while there are points, and what a block makes on the way (the hidden layer of an
MLP) stays in the cache. Accelerators take all rows at once. Either way the backward pass makes what
lies between input and output again: only the input is kept.

`by_rows` makes rows of another kind, `update_rows` new values of the same ones, in their place: a
residual stream is read and written once for all that its branches do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import blank, over_blocks
from point_jax.ops.bfloat16 import as_bits, of_bits

Params = Any  # a pytree of arrays
Rows = Any  # a pytree of arrays (N, ...)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_rows(
    apply: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    x: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """`apply(params, x)` for a function whose every output row depends on the same input row alone.

    Args:
      apply: (params, (B, C)) -> (B, F), for any B.
      params: differentiated.
      x: (N, C).
      count: () int32, rows in use, the first ones.

    Returns:
      (N, F); the rows from `count` on mean nothing, but are finite where x is.
    """
    return _forward(apply, params, x, count)


def _block_size(capacity: int) -> int:
    """Rows a block: enough for a fast product, few enough to end near the last point."""
    return min(capacity, 1024, max(64, -(-capacity // 4 // 64) * 64))


def rows_done(capacity: int, count: int) -> int:
    """Rows that CPUs take through the function where `count` of `capacity` are in use.

    Blocks are whole: what the last one has done before counts again. The backward pass has the same
    blocks.
    """
    size = _block_size(capacity)
    return -(-count // size) * size


def _slice(arrays, start, size):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays)


def _write(arrays, values, start):
    def one(array, new):
        return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=0)

    return jax.tree.map(one, arrays, values)


def _new(start, i, size, count):
    """(size,) bool, which rows of block i no block before it has had."""
    rows = start + jnp.arange(size)
    return (rows >= i * size) & (rows < count)


def _where(which, values, others):
    """`values` (B, ...) where `which` (B,), or else `others`, for every array of a pytree."""

    def one(value, other):
        return jnp.where(jnp.expand_dims(which, tuple(range(1, value.ndim))), value, other)

    return jax.tree.map(one, values, others)


def _masked(which, values):
    return _where(which, values, jax.tree.map(lambda _: 0, values))


def _forward(apply, params, x, count):
    def in_blocks():
        size = _block_size(len(x))

        def block(i, out):
            # The last block overlaps the one before it and writes the same values again.
            start = jnp.minimum(i * size, len(x) - size)
            return _write(out, as_bits(apply(params, _slice(x, start, size))), start)

        whole = jax.eval_shape(apply, params, x)
        out = as_bits(blank(whole.shape, whole.dtype, x))
        return of_bits(over_blocks(block, out, len(x), size, count))

    return jax.lax.platform_dependent(cpu=in_blocks, default=lambda: apply(params, x))


def _fwd(apply, params, x, count):
    return _forward(apply, params, x, count), (params, x, count)


def _bwd(apply, saved, g):
    params, x, count = saved

    def in_blocks():
        size = _block_size(len(x))

        def block(i, carry):
            total, grad = carry
            start = jnp.minimum(i * size, len(x) - size)
            new = _new(start, i, size, count)
            _, backward = jax.vjp(apply, params, _masked(new, _slice(x, start, size)))
            of_params, of_rows = backward(_masked(new, _slice(g, start, size)))
            of_rows = _where(new, as_bits(of_rows), _slice(grad, start, size))
            return jax.tree.map(jnp.add, total, of_params), _write(grad, of_rows, start)

        init = jax.tree.map(jnp.zeros_like, params), as_bits(blank(x.shape, x.dtype, g))
        of_params, of_rows = over_blocks(block, init, len(x), size, count)
        return of_params, of_bits(of_rows)

    def at_once():
        used = jnp.arange(len(x)) < count
        return jax.vjp(apply, params, _masked(used, x))[1](_masked(used, g))

    return *jax.lax.platform_dependent(cpu=in_blocks, default=at_once), None


by_rows.defvjp(_fwd, _bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def update_rows(
    apply: Callable[[Params, jax.Array, Rows, Rows], jax.Array],
    params: Params,
    x: jax.Array,
    more: Rows,
    fixed: Rows,
    count: jax.Array,
) -> jax.Array:
    """`apply(params, x, more, fixed)`, new values of x, row by row.

    Args:
      apply: of parameters and as many rows of each array, to (B, C) in x's dtype, for any B.
      params: differentiated.
      x: (N, C).
      more: arrays (N, ...) that are differentiated, too.
      fixed: arrays (N, ...) that have no gradient.
      count: () int32, rows in use, the first ones.

    Returns:
      (N, C); the rows from `count` on mean nothing, but are finite where all that is given is.
    """
    return _update(apply, params, x, more, fixed, count)


def _update(apply, params, x, more, fixed, count):
    def in_blocks():
        size = _block_size(len(x))

        def block(i, out):
            start = jnp.minimum(i * size, len(x) - size)
            old = _slice(out, start, size)
            rows = of_bits(old), *_slice((more, fixed), start, size)
            # What the block before has in common with the last one is there already.
            new = _where(_new(start, i, size, count), as_bits(apply(params, *rows)), old)
            return _write(out, new, start)

        return of_bits(over_blocks(block, as_bits(x), len(x), size, count))

    def at_once():
        return apply(params, x, more, fixed)

    return jax.lax.platform_dependent(cpu=in_blocks, default=at_once)


def _update_fwd(apply, params, x, more, fixed, count):
    return _update(apply, params, x, more, fixed, count), (params, x, more, fixed, count)


def _update_bwd(apply, saved, g):
    params, x, more, fixed, count = saved

    def backward(which, x, more, fixed, g):
        x, more, fixed, g = _masked(which, (x, more, fixed, g))
        return jax.vjp(lambda *rows: apply(*rows, fixed), params, x, more)[1](g)

    def in_blocks():
        size = _block_size(len(x))

        def block(i, carry):
            total, grads = carry
            start = jnp.minimum(i * size, len(x) - size)
            new = _new(start, i, size, count)
            of_params, *of_rows = backward(new, *_slice((x, more, fixed, g), start, size))
            rows = _where(new, jax.tree.map(as_bits, tuple(of_rows)), _slice(grads, start, size))
            return jax.tree.map(jnp.add, total, of_params), _write(grads, rows, start)

        # Not in the place of the result's gradient: XLA would copy all of it in every turn.
        of_more = jax.tree.map(lambda y: as_bits(blank(y.shape, y.dtype, y)), more)
        grads = as_bits(blank(x.shape, x.dtype, g)), of_more
        init = jax.tree.map(jnp.zeros_like, params), grads
        of_params, of_rows = over_blocks(block, init, len(x), size, count)
        return of_params, *jax.tree.map(of_bits, of_rows)

    def at_once():
        return backward(jnp.arange(len(x)) < count, x, more, fixed, g)

    return *jax.lax.platform_dependent(cpu=in_blocks, default=at_once), None, None


update_rows.defvjp(_update_fwd, _update_bwd)
