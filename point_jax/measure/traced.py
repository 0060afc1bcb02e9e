"""Counts from a function's trace, before XLA: products, and what a backward pass keeps."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from point_jax.ops.attention import forward_operations


def product_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of a forward pass's products, convolutions and attention, a multiply-add two.

    Loops count as often as they run where that is fixed (`lax.scan`), else once; of a condition's
    branches the first.

    Args:
      function: traced, not run.
      arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[d] for d in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        if equation.primitive.name == "patch_attention":
            total += forward_operations(equation.params["width"], equation.invars[0].aval)
            continue
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            results = math.prod(equation.outvars[0].aval.shape)
            total += 2.0 * results * math.prod(kernel) / outputs
            continue
        inner = [
            value.jaxpr if hasattr(value, "jaxpr") else value
            for value in _each(equation.params.values())
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        inner = inner[:1] if equation.primitive.name == "cond" else inner
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(_flops, inner))
    return total


def _each(values: Any) -> list[Any]:
    found = []
    for value in values:
        found.extend(value if isinstance(value, (tuple, list)) else [value])
    return found


def kept_bytes(loss: Callable[..., Any], variables: Any, *arguments: Any) -> int:
    """Bytes that the backward pass of `loss` keeps of its forward pass, its arguments apart.

    Args:
      loss: (variables, *arguments) -> (value, auxiliary); differentiated in its variables.
      variables: arrays or `jax.ShapeDtypeStruct`, as the arguments.
    """

    def residuals(variables: Any, *arguments: Any) -> Any:
        def of_variables(v: Any) -> Any:
            return loss(v, *arguments)

        return jax.vjp(of_variables, variables, has_aux=True)[1]

    traced = jax.make_jaxpr(residuals)(variables, *arguments).jaxpr
    given = {id(v) for v in (*traced.invars, *traced.constvars)}
    kept = {id(v): v for v in traced.outvars if not isinstance(v, Literal)}
    return sum(_size(v.aval) for key, v in kept.items() if key not in given)


def _size(aval: Any) -> int:
    itemsize = 8 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.dtype.itemsize
    return int(np.prod(aval.shape, dtype=np.int64)) * itemsize
