"""Layers with the originals' initialisation and precision."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from point_jax.geometry.hierarchy import Level
from point_jax.geometry.neighbours import TAPS, offsets
from point_jax.ops.bfloat16 import dot_general
from point_jax.ops.conv import submanifold_conv
from point_jax.ops.conv_pairs import Kernel
from point_jax.ops.rowwise import by_rows, update_rows

_zeros = nnx.initializers.zeros  # kernels get their random values in `functional`


def linear(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Dense layer: float32 parameters, `dtype` arithmetic."""
    return nnx.Linear(
        inputs, outputs, dtype=dtype, kernel_init=_zeros, dot_general=dot_general, rngs=rngs
    )


def layer_norm(channels: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.LayerNorm:
    """LayerNorm in float32."""
    return nnx.LayerNorm(
        channels, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def layer_scale(channels: int, start: float | None) -> nnx.Param | None:
    """What a residual branch is multiplied with, per channel; None for no scale."""
    return None if start is None else nnx.Param(jnp.full(channels, start))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, as the originals: x (1 + erf(x / sqrt 2)) / 2, rounded once.

    `jax.nn.gelu` has `erfc` instead, which is two functions and a choice, and in bfloat16 each of
    its steps is rounded; on CPUs that takes two to three times as long.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation, epsilon 1e-3 (PT-v3m1).

    By the running statistics of a trained network, so that a cloud's features do not depend on what
    else is in its row; or by those of the row, in supervised training. The running ones are
    constants here: who trains the network moves them (`models.statistics`).
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.Param(jnp.zeros(channels))
        self.var = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, C) -> (N, C) float32, by the running statistics."""
        mean, var = jax.lax.stop_gradient((self.mean[...], self.var[...]))
        factor = self.scale[...] * jax.lax.rsqrt(var + 1e-3)
        return (x.astype(jnp.float32) - mean[None]) * factor[None] + self.bias[...][None]

    def over_row(self, x: jax.Array, count: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The same by mean and biased variance of the row's points; gradients flow through both.

        Args:
          x: (N, C); what is in padding does not matter.
          count: () int32, points in use, the first ones.

        Returns:
          (N, C) float32, zeros in padding; and what running statistics move towards, without
          gradient: `mean` and unbiased `var`, (C,) each. The variance of a single point is 0.
        """
        used = (jnp.arange(len(x)) < count)[:, None]
        number = jnp.maximum(count, 1).astype(jnp.float32)
        x = jnp.where(used, x.astype(jnp.float32), 0.0)
        mean = x.sum(0) / number
        centred = jnp.where(used, x - mean[None], 0.0)
        var = (centred * centred).sum(0) / number
        factor = self.scale[...] * jax.lax.rsqrt(var + 1e-3)
        y = jnp.where(used, centred * factor[None] + self.bias[...][None], 0.0)
        moments = {"mean": mean, "var": var * number / jnp.maximum(number - 1.0, 1.0)}
        return y, jax.lax.stop_gradient(moments)


class SubmanifoldConv(nnx.Module):
    """3x3x3 submanifold convolution with bias over a level's neighbour table."""

    def __init__(self, channels: int, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((TAPS, channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.dtype = dtype

    def __call__(self, x: jax.Array, level: Level, stacked: Kernel) -> jax.Array:
        """(N, C) -> (N, C), in `dtype`; `stacked` is the same kernel, see `submanifold_conv`."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        table = level.neighbours, level.voxel, level.count, level.pairs
        out = submanifold_conv(x, kernel, *table, stacked)
        return out + self.bias[...].astype(self.dtype)[None]


class StemConv(nnx.Module):
    """Submanifold convolution of the input features, without bias, over the stem's table."""

    def __init__(self, inputs: int, channels: int, radius: int, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((len(offsets(radius)), inputs, channels)))
        self.dtype = dtype

    def __call__(self, x: jax.Array, level: Level) -> jax.Array:
        """(N, inputs) -> (N, C), in `dtype`."""
        if level.stem_neighbours is None:
            raise ValueError(
                "a convolutional stem needs a hierarchy built for PTv3Spec.hierarchy()"
            )
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return submanifold_conv(x, kernel, level.stem_neighbours, level.voxel, level.count)


class Mlp(nnx.Module):
    """Linear, GELU (or what is given), linear."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        dtype: jnp.dtype,
        activation: Callable[[jax.Array], jax.Array] = gelu,
        *,
        rngs: nnx.Rngs,
    ):
        self.fc1 = linear(inputs, hidden, dtype, rngs)
        self.fc2 = linear(hidden, outputs, dtype, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., inputs) -> (..., outputs)."""
        return self.fc2(self.activation(self.fc1(x)))


def in_turn(
    modules: Sequence[Callable[[jax.Array], jax.Array]], x: jax.Array, count: jax.Array
) -> jax.Array:
    """Modules that treat every row alone, one after the other: (N, C) -> (N, F), see `by_rows`."""
    graph, params = nnx.split(tuple(modules))

    def apply(params, x):
        for module in nnx.merge(graph, params):
            x = module(x)
        return x

    return by_rows(apply, params, x, count)


def updated(
    apply: Callable[..., jax.Array],
    modules: Sequence[Any],
    x: jax.Array,
    more: Sequence[jax.Array],
    fixed: Sequence[jax.Array],
    count: jax.Array,
) -> jax.Array:
    """`apply(modules, x, *more, *fixed)`, new values of x (N, C), see `update_rows`.

    Args:
      apply: treats every row alone.
      modules: its modules and parameters; None where it has none.
      x, more, fixed, count: as for `update_rows`.
    """
    graph, params = nnx.split(tuple(modules))

    def run(params, x, more, fixed):
        return apply(nnx.merge(graph, params), x, *more, *fixed)

    return update_rows(run, params, x, tuple(more), tuple(fixed), count)


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int) -> nnx.Module:
    """`depth` modules of one shape as one whose parameters have a leading axis (depth)."""
    return nnx.vmap(lambda _: build(nnx.Rngs(0)))(jnp.arange(depth))
