"""Functions of single rows over the rows in use.

A row's capacity is planned for the worst cloud, so at coarse levels most of it is padding. On CPUs
blocks of rows run while there are points, and what a block makes on the way (the hidden layer of an
MLP) stays in the cache. Accelerators take all rows at once. Either way the backward pass makes what
lies between input and output again: only the input is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import blank, over_blocks
from point_jax.ops.bfloat16 import as_bits, of_bits

Params = Any  # a pytree of arrays


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


def _slice(array, start, size):
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _forward(apply, params, x, count):
    def in_blocks():
        size = _block_size(len(x))

        def block(i, out):
            # The last block overlaps the one before it and writes the same values again.
            start = jnp.minimum(i * size, len(x) - size)
            values = as_bits(apply(params, _slice(x, start, size)))
            return jax.lax.dynamic_update_slice_in_dim(out, values, start, axis=0)

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
            rows = (start + jnp.arange(size))[:, None]
            new = (rows >= i * size) & (rows < count)
            slope = jnp.where(new, _slice(g, start, size), 0)
            _, backward = jax.vjp(apply, params, jnp.where(new, _slice(x, start, size), 0))
            of_params, of_rows = backward(slope)
            of_rows = jnp.where(new, as_bits(of_rows), _slice(grad, start, size))
            grad = jax.lax.dynamic_update_slice_in_dim(grad, of_rows, start, axis=0)
            return jax.tree.map(jnp.add, total, of_params), grad

        init = jax.tree.map(jnp.zeros_like, params), as_bits(blank(x.shape, x.dtype, g))
        of_params, of_rows = over_blocks(block, init, len(x), size, count)
        return of_params, of_bits(of_rows)

    def at_once():
        used = (jnp.arange(len(x)) < count)[:, None]
        return jax.vjp(apply, params, jnp.where(used, x, 0))[1](jnp.where(used, g, 0))

    return *jax.lax.platform_dependent(cpu=in_blocks, default=at_once), None


by_rows.defvjp(_fwd, _bwd)
