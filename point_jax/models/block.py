"""The blocks of a level: convolutional position, patch attention, MLP.

The equal blocks of a stage are one block with stacked parameters under `lax.scan`, so that a stage
is compiled once however deep it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from point_jax.geometry.hierarchy import Level
from point_jax.models.layers import (
    Mlp,
    SubmanifoldConv,
    in_turn,
    layer_norm,
    layer_scale,
    linear,
    stack,
    updated,
)
from point_jax.models.spec import PTv3Spec, Rotary, StageSpec
from point_jax.ops.attention import SAVED, patch_attention
from point_jax.ops.conv_pairs import Kernel
from point_jax.ops.gather import from_slots, take_rows, to_slots
from point_jax.ops.rotary import rotate


class Motion(NamedTuple):
    """How rotary coordinates move: (coord + shift) * scale, (..., G, 3) float32 each."""

    shift: jax.Array
    scale: jax.Array


class Block(nnx.Module):
    """Convolutional position, patch attention, MLP; each a residual branch."""

    def __init__(self, stage: StageSpec, spec: PTv3Spec, rotary: Rotary | None, *, rngs: nnx.Rngs):
        channels, dtype = stage.channels, spec.dtype
        self.conv = SubmanifoldConv(channels, dtype)
        self.conv_linear = linear(channels, channels, dtype, rngs)
        self.conv_norm = layer_norm(channels, rngs)
        self.norm1 = layer_norm(channels, rngs)
        self.qkv = linear(channels, 3 * channels, dtype, rngs)
        self.proj = linear(channels, channels, dtype, rngs)
        self.norm2 = layer_norm(channels, rngs)
        self.mlp = Mlp(channels, int(channels * spec.mlp_ratio), channels, dtype, rngs=rngs)
        self.scale1 = layer_scale(channels, spec.layer_scale)
        self.scale2 = layer_scale(channels, spec.layer_scale)
        entries = 2 * bias_bound(stage.patch_size) + 1
        self.bias_table = (
            nnx.Param(jnp.zeros((3, entries, stage.heads))) if spec.relative_bias else None
        )
        self.stage, self.rotary = stage, rotary

    @jax.named_scope("projections")
    def __call__(
        self,
        x: jax.Array,
        seen: jax.Array,
        level: Level,
        order: jax.Array,
        keep: tuple[jax.Array, ...],
        coord: jax.Array | None,
        motion: Motion | None,
        stacked: Kernel,
    ) -> jax.Array:
        """One block.

        Args:
          x: (N, C) float32.
          seen: (N, C) float32, what the convolution reads: x, but see `PTv3Spec.pooling`.
          level: structure of the level.
          order: () int32, which order the patches follow.
          keep: what drop path multiplies the two branches with, (N,) float32 each; or nothing.
          coord: (N, 3) float32 metres, and motion of (G, 3): for rotary positions, else None.
          stacked: the convolution's kernel among those of the stage.
        """
        with jax.named_scope("convolution"):
            near = checkpoint_name(self.conv(seen, level, stacked), "convolution_out")
        modules = self.conv_linear, self.conv_norm
        x = updated(_positioned, modules, x, (near,), (), level.count)
        mixed = self._attention(x, level, order, coord, motion)
        modules = self.proj, self.scale1, self.norm2, self.mlp, self.scale2
        return updated(_branches, modules, x, (mixed,), keep, level.count)

    @jax.named_scope("attention")
    def _attention(
        self,
        x: jax.Array,
        level: Level,
        order: jax.Array,
        coord: jax.Array | None,
        motion: Motion | None,
    ) -> jax.Array:
        """What the points' heads read of their patches, side by side: (N, C)."""
        layout, heads = level.patches[self.stage.patch_size], self.stage.heads
        slot_point, point_slot = layout.slot_point[order], layout.point_slot[order]
        slots = to_slots(x, slot_point, point_slot, layout.point_borrowed[order])
        with jax.named_scope("projections"):
            qkv = in_turn([self.norm1, self.qkv], slots, layout.used_slots)
        qkv = rearrange(qkv, "s (three h d) -> s three h d", three=3, h=heads)
        if self.rotary is not None:
            if coord is None or motion is None:
                raise ValueError("a network with rotary positions needs `coord`")
            cloud = jnp.maximum(layout.segment, 0)
            at = take_rows(coord, slot_point)
            at = (at + motion.shift[cloud]) * motion.scale[cloud]
            turned = rotate(qkv[:, :2], at, self.rotary.base)
            qkv = jnp.concatenate([turned, qkv[:, 2:]], axis=1)
        grid = table = None
        if self.bias_table is not None:
            grid, table = take_rows(level.grid, slot_point), self.bias_table[...]
        mixed = patch_attention(
            len(level.starts) - 1,
            layout.width,
            qkv,
            layout.segment,
            layout.narrow,
            layout.used,
            grid,
            table,
        )
        mixed = rearrange(mixed, "s h d -> s (h d)")
        return from_slots(mixed, slot_point, point_slot)


def bias_bound(patch_size: int) -> int:
    """Farthest voxel that the relative position bias tells apart, as the originals set it."""
    return int((4 * patch_size) ** (1 / 3) * 2)


def _positioned(modules: Sequence[Any], x: jax.Array, near: jax.Array) -> jax.Array:
    """The residual stream (B, C) with what the convolution saw."""
    linear, norm = modules
    return x + norm(linear(near))


def _branches(
    modules: Sequence[Any], x: jax.Array, mixed: jax.Array, *keep: jax.Array
) -> jax.Array:
    """The residual stream (B, C) with attention's projection, then with the MLP's branch."""
    proj, scale1, norm2, mlp, scale2 = modules
    attention_keep, mlp_keep = keep or (None, None)
    x = x + _branch(proj(mixed), scale1, attention_keep)
    with jax.named_scope("mlp"):
        return x + _branch(mlp(norm2(x)), scale2, mlp_keep)


def _branch(y: jax.Array, scale: nnx.Param | None, keep: jax.Array | None) -> jax.Array:
    y = y.astype(jnp.float32)
    if scale is not None:
        y = y * scale[...][None]
    return y if keep is None else y * keep[:, None]


class Stage(nnx.Module):
    """The blocks of a level, and the way into it."""

    def __init__(
        self,
        level: int,
        stage: StageSpec,
        spec: PTv3Spec,
        rates: np.ndarray,
        rotary: Rotary | None,
    ):
        self.blocks = stack(lambda r: Block(stage, spec, rotary, rngs=r), stage.depth)
        self.rates = tuple(float(rate) for rate in rates)
        self.orders = len(spec.curves)
        self.remat = spec.remat_of(level)
        self.rotary = rotary

    def __call__(
        self,
        x: jax.Array,
        level: Level,
        turn: jax.Array,
        noise_keys: jax.Array | None,
        coord: jax.Array | None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          x: (N, C).
          level: structure of the level.
          turn: (O,) int32, the order of each turn; block b takes turn b mod O.
          noise_keys: (G,) keys, one a cloud, for drop path and moved coordinates; None for none.
          coord: (N, 3) float32 metres, for rotary positions.
          seen: (N, C), what the first convolution reads; None for x.
        """
        depth = len(self.rates)
        graph, params = nnx.split(self.blocks)
        # Scanned parameters are copied out of their stacks on CPUs. Kernels are most of them.
        kernel: Any = params["conv"]["kernel"]
        kernels = jax.lax.stop_gradient(kernel[...])
        orders = turn[jnp.arange(depth) % self.orders]
        keep = _keep(jnp.array(self.rates), level, noise_keys if any(self.rates) else None)
        motion = None
        if self.rotary is not None:
            motion = _motion(self.rotary, depth, len(level.starts) - 1, noise_keys)

        def block(carry, this):
            x, seen = carry
            params, order, keep, motion, index = this
            module, stacked = nnx.merge(graph, params), Kernel(kernels, index)
            x = module(x, x if seen is None else seen, level, order, keep, coord, motion, stacked)
            return (x, None if seen is None else x), None

        kept = ("convolution_out", *SAVED) if self.remat == "cheap" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        body = block if self.remat == "none" else jax.checkpoint(block, policy=policy)
        blocks = params, orders, keep, motion, jnp.arange(depth)
        return jax.lax.scan(body, (x, seen), blocks)[0][0]


def _motion(rotary: Rotary, depth: int, clouds: int, keys: jax.Array | None) -> Motion:
    """The motion of every block's rotary coordinates, (depth, G, 3): none without keys."""
    shape = depth, clouds, 3
    if keys is None:
        return Motion(jnp.zeros(shape), jnp.ones(shape))

    def draw(key):
        # Drop path folds in indices of points; this number is not one.
        parts = jax.random.split(jax.random.fold_in(key, np.uint32(0xFFFFFFFF)), 3)

        def uniform(part, width, bound):
            return jax.random.uniform(part, (depth, width), minval=-bound, maxval=bound)

        shift = uniform(parts[0], 3, rotary.shift)
        stretch = uniform(parts[1], 3, np.log(rotary.jitter))
        return shift, jnp.exp(stretch + uniform(parts[2], 1, np.log(rotary.rescale)))

    shift, scale = jax.vmap(draw, out_axes=1)(keys)
    return Motion(shift, scale)


def _keep(rates: jax.Array, level: Level, keys: jax.Array | None) -> tuple[jax.Array, ...]:
    """Drop-path factors of a stage's two branches, (depth, N) each; nothing without keys.

    Drop path acts on single points, as upstream. A point's bits depend on its cloud's key and its
    index in the cloud, so not on what else is in the row.
    """
    if keys is None:
        return ()
    clouds = keys.shape[0]
    cloud = jnp.minimum(level.cloud, clouds - 1)
    index = jnp.arange(level.cloud.shape[0]) - level.starts[level.cloud]

    def draw(key, index):
        return jax.random.bits(jax.random.fold_in(key, index), rates.shape, jnp.uint32)

    bits = jax.vmap(draw)(keys[cloud], index.astype(jnp.uint32)).T  # (depth, N)
    rates = rates[:, None]

    def factor(half):
        return jnp.where(half.astype(jnp.float32) / (1 << 16) < rates, 0.0, 1 / (1 - rates))

    return factor(bits >> 16), factor(bits & 0xFFFF)
