"""Loops over blocks, and what a program's text cannot tell of them.

How often they run, and what a kernel multiplies.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Carry = TypeVar("Carry")


def planned(times: int) -> contextlib.AbstractContextManager[object]:
    """Scope of one `fori_loop` or `while_loop` that runs up to `times` times, for a full row.

    How often it runs is in the data; a program planned for a machine that is not there
    (`measure.cost`) reads here how often at most. It changes nothing else.
    """
    return jax.named_scope(f"planned_{times}")


def blocks_of(count: jax.Array, size: int | jax.Array) -> jax.Array:
    """How many blocks of `size` hold `count` rows; int32, neither is negative.

    `//` would round towards minus infinity, which takes more instructions.
    """
    return jax.lax.div(count + (size - 1), jnp.int32(size))


def over_blocks(
    body: Callable[[jax.Array, Carry], Carry], init: Carry, rows: int, size: int, count: jax.Array
) -> Carry:
    """Folds `body(i, carry)` over the blocks of `size` of some rows while there are rows in use.

    Args:
      body: of block i, int32.
      init: the first carry.
      rows: all of them.
      size: rows of a block.
      count: () int32, rows in use, the first ones.
    """
    with planned(-(-rows // size)):
        return jax.lax.fori_loop(0, blocks_of(count, size), body, init)


def products(operations: int) -> contextlib.AbstractContextManager[object]:
    """Scope of one kernel written by hand, which and of its matrix products.

    Compilers' texts have such kernels as calls of something unknown; `measure.cost` reads here what
    their matrix products are, for a full row. It changes nothing else.

    Args:
      operations: multiplications and additions of the products.
    """
    return jax.named_scope(f"products_{operations}")


def blank(shape: tuple[int, ...], dtype: DTypeLike, near: jax.Array) -> jax.Array:
    """Zeros that one loop writes to.

    XLA makes equal zeros once and copies them into every loop that starts from them, in one thread.
    These hang on a number of an array that is only here, so they are made in place.

    Args:
      shape, dtype: of the result.
      near: floating, an array that this loop reads and no other.
    """
    if near.size == 0:
        return jnp.zeros(shape, dtype)
    first = near[(0,) * near.ndim]
    nothing = jnp.where(jnp.isnan(first), 0, jnp.minimum(jnp.abs(first), 0))
    return jnp.full(shape, nothing, dtype)
