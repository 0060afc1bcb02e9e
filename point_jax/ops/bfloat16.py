"""What bfloat16 needs to be fast on CPUs.

XLA has a fast product there (AMX, oneDNN) for bfloat16 operands and a float32 result alone, and a
slice that is written to a bfloat16 array in a loop costs a pass over the whole array, in float32
and back. Accelerators have neither problem.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **how: Any) -> jax.Array:
    """`jax.lax.dot_general` of a dense layer, as `flax.nnx.Linear` calls it.

    Numbers are those of a plain product: sums in float32, rounded once to bfloat16. Differentiated
    in reverse only. Other dtypes, and whoever asks for a precision, a result's dtype or a sharding,
    get the plain product.

    Args:
      x: (..., C).
      kernel: (C, F).
      dimension_numbers: of `jax.lax.dot_general`; without any but these.
      how: its other arguments.

    Returns:
      (..., F).
    """
    halves = x.dtype == kernel.dtype == jnp.bfloat16
    if not halves or any(value is not None for value in how.values()):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **how)
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"a dense layer contracts x's last dimension, got {dimension_numbers}")
    before = x.shape[:-1]
    product = _product(x.reshape(math.prod(before), x.shape[-1]), kernel)
    return product.reshape(*before, kernel.shape[1])


@jax.custom_vjp
def _product(x, kernel):
    return _dot(x, kernel)


def _product_fwd(x, kernel):
    return _dot(x, kernel), (x, kernel)


def _product_bwd(saved, g):
    x, kernel = saved
    return _dot(g, kernel.T), _dot(x.T, g)


_product.defvjp(_product_fwd, _product_bwd)


def _dot(a, b):
    def through_float32(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cpu=through_float32, default=jnp.dot)


def as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, for arrays that a loop writes slices to; other dtypes as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def of_bits(x: jax.Array) -> jax.Array:
    """Back from `as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
