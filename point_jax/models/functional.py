"""Flax NNX modules as pure functions of plain nested dicts of arrays.

NNX stops here: parameters, gradients, optimizer state and checkpoints are nested dicts, and
transformations are JAX's own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]
# Names of the parameters that start from random values.
RANDOM = ("kernel", "bias_table", "class_token", "position")


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
    """Splits a module into functions.

    Random start values are drawn here and not in the modules: all from one stream, as the
    originals do from a normal distribution of standard deviation 0.02 (they truncate at +-2, which
    is a hundred deviations). A draw per parameter took XLA longer to compile than a training step.

    Args:
      build: makes the module; what it puts in parameters other than `RANDOM` is their start value.

    Returns:
      init: `init(key) -> params`, a nested dict of arrays.
      apply: `apply(params, *args, method="__call__", **kwargs)`.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(build(nnx.Rngs(0)), nnx.Param))
        paths, tree = jax.tree.flatten_with_path(params)
        sizes = [leaf.size for path, leaf in paths if path[-1].key in RANDOM]
        draws = 0.02 * jax.random.normal(key, (sum(sizes),))
        parts = iter(jnp.split(draws, np.cumsum(sizes)[:-1]) if sizes else ())
        leaves = [
            next(parts).reshape(leaf.shape) if path[-1].key in RANDOM else leaf
            for path, leaf in paths
        ]
        return jax.tree.unflatten(tree, leaves)

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    return init, apply
