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


def _over_rows(body, init, slots, count):
    """Folds `body(start, size, new, carry)` over the blocks of rows in use.

    The last block overlaps the one before it. `new` (size,) bool is which rows are in use and have
    been in no block before.
    """
    size = _block_size(slots)

    def block(i, carry):
        start = jnp.minimum(i * size, slots - size)
        rows = start + jnp.arange(size)
        return body(start, size, (rows >= i * size) & (rows < count), carry)

    return over_blocks(block, init, slots, size, count)


def _where(which, values, others):
    """`values` (B, ...) where `which` (B,), or else `others`, for every array of a pytree."""

    def one(value, other):
        return jnp.where(jnp.expand_dims(which, tuple(range(1, value.ndim))), value, other)

    return jax.tree.map(one, values, others)


def _masked(which, values):
    return _where(which, values, jax.tree.map(lambda _: 0, values))


def _gradients(apply, params, rows, fixed, count, g):
    """Of params and of rows, where the result of `apply(params, rows, fixed)` has gradient g."""

    def backward(which, rows, fixed, g):
        rows, fixed, g = _masked(which, (rows, fixed, g))
        return jax.vjp(lambda *inputs: apply(*inputs, fixed), params, rows)[1](g)

    def in_blocks():
        def block(start, size, new, carry):
            total, grads = carry
            of_params, of_rows = backward(new, *_slice((rows, fixed, g), start, size))
            of_rows = _where(new, jax.tree.map(as_bits, of_rows), _slice(grads, start, size))
            return jax.tree.map(jnp.add, total, of_params), _write(grads, of_rows, start)

        # Not in the place of g, all of which XLA would copy in every turn. Zeros of one shape hang
        # on different arrays, so that they are not made once and copied.
        leaves, tree = jax.tree.flatten(rows)
        near = zip(leaves, [g, *leaves[1:]], strict=True)
        grads = tree.unflatten([as_bits(blank(x.shape, x.dtype, y)) for x, y in near])
        init = jax.tree.map(jnp.zeros_like, params), grads
        of_params, of_rows = _over_rows(block, init, len(g), count)
        return of_params, jax.tree.map(of_bits, of_rows)

    def at_once():
        return backward(jnp.arange(len(g)) < count, rows, fixed, g)

    return jax.lax.platform_dependent(cpu=in_blocks, default=at_once)


def _forward(apply, params, x, count):
    def in_blocks():
        def block(start, size, new, out):
            del new  # what the block before has in common with the last one comes out the same
            return _write(out, as_bits(apply(params, _slice(x, start, size))), start)

        whole = jax.eval_shape(apply, params, x)
        out = as_bits(blank(whole.shape, whole.dtype, x))
        return of_bits(_over_rows(block, out, len(x), count))

    return jax.lax.platform_dependent(cpu=in_blocks, default=lambda: apply(params, x))


def _fwd(apply, params, x, count):
    return _forward(apply, params, x, count), (params, x, count)


def _bwd(apply, saved, g):
    params, x, count = saved
    return *_gradients(lambda params, x, _: apply(params, x), params, x, (), count, g), None


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
        def block(start, size, new, out):
            old = _slice(out, start, size)
            rows = of_bits(old), *_slice((more, fixed), start, size)
            # What the block before has in common with the last one is there already.
            return _write(out, _where(new, as_bits(apply(params, *rows)), old), start)

        return of_bits(_over_rows(block, as_bits(x), len(x), count))

    def at_once():
        return apply(params, x, more, fixed)

    return jax.lax.platform_dependent(cpu=in_blocks, default=at_once)


def _update_fwd(apply, params, x, more, fixed, count):
    return _update(apply, params, x, more, fixed, count), (params, x, more, fixed, count)


def _update_bwd(apply, saved, g):
    params, x, more, fixed, count = saved

    def joined(params, rows, fixed):
        return apply(params, *rows, fixed)

    of_params, (of_x, of_more) = _gradients(joined, params, (x, more), fixed, count, g)
    return of_params, of_x, of_more, None, None


update_rows.defvjp(_update_fwd, _update_bwd)
