"""Point Transformer V3 (arXiv:2312.10035) as Sonata uses it (the originals' "PT-v3m2").

The network sees features and a hierarchy, never coordinates. The equal blocks of a stage are one
block with stacked parameters under `lax.scan`, so that a stage is compiled once however deep it is.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from point_jax.geometry.curves import CURVES, Curve
from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec, Level
from point_jax.models.layers import Mlp, SubmanifoldConv, gelu, layer_norm, linear, stack
from point_jax.ops.attention import patch_attention
from point_jax.ops.gather import from_slots, to_children, to_slots
from point_jax.ops.pool import cluster_max


@dataclass(frozen=True)
class StageSpec:
    """Blocks of one level: how many, how wide, their heads and their patch size K."""

    depth: int
    channels: int
    heads: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} is not a multiple of heads={self.heads}")
        if min(self.depth, self.channels, self.heads, self.patch_size) < 1:
            raise ValueError(f"every number of a stage must be positive, got {self}")


@dataclass(frozen=True)
class PTv3Spec:
    """A network.

    Attributes:
      encoder: the stages, finest level first.
      decoder: the stages from level 0 to the last but one; empty for an encoder alone.
      inputs: channels of a point's input features.
      curves: the orders, in the turn in which blocks use them.
      mlp_ratio: hidden channels of a block's MLP over its channels.
      drop_path: rate of the last block; it grows linearly from 0 at the first.
      layer_scale: start value of the per-channel scale of every branch; None for no scale.
      mask_token: whether masked points get a learned embedding.
      dtype: of the arithmetic; parameters, norms, softmax and the residual stream are float32.
      remat: whether the backward pass makes each block's activations again instead of keeping them.
    """

    encoder: tuple[StageSpec, ...]
    decoder: tuple[StageSpec, ...] = ()
    inputs: int = 9
    curves: tuple[Curve, ...] = CURVES
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    mask_token: bool = True
    dtype: jnp.dtype = field(default=jnp.float32)
    remat: bool = False

    def __post_init__(self) -> None:
        if self.decoder and len(self.decoder) != len(self.encoder) - 1:
            raise ValueError(
                f"a decoder of {len(self.encoder)} levels has {len(self.encoder) - 1} stages, "
                f"got {len(self.decoder)}"
            )

    def hierarchy(self, capacities: tuple[int, ...], clouds: int) -> HierarchySpec:
        """The hierarchy that this network needs for rows of these capacities."""
        sizes = [{stage.patch_size} for stage in self.encoder]
        for level, stage in enumerate(self.decoder):
            sizes[level].add(stage.patch_size)
        patch_sizes = tuple(tuple(sorted(s)) for s in sizes)
        return HierarchySpec(capacities, clouds, patch_sizes, self.curves)


class Features(NamedTuple):
    """What the network returns.

    Attributes:
      levels: encoder features of every level, (N, C) each, finest first.
      decoded: decoder features of level 0 up to the last but one; empty without a decoder.
    """

    levels: tuple[jax.Array, ...]
    decoded: tuple[jax.Array, ...]


class Block(nnx.Module):
    """Convolutional position, patch attention, MLP; each a residual branch."""

    def __init__(self, stage: StageSpec, spec: PTv3Spec, *, rngs: nnx.Rngs):
        channels, dtype = stage.channels, spec.dtype
        self.conv = SubmanifoldConv(channels, dtype)
        self.conv_linear = linear(channels, channels, dtype, rngs)
        self.conv_norm = layer_norm(channels, rngs)
        self.norm1 = layer_norm(channels, rngs)
        self.qkv = linear(channels, 3 * channels, dtype, rngs)
        self.proj = linear(channels, channels, dtype, rngs)
        self.norm2 = layer_norm(channels, rngs)
        self.mlp = Mlp(channels, int(channels * spec.mlp_ratio), channels, dtype, rngs=rngs)
        self.scale1 = _layer_scale(channels, spec.layer_scale)
        self.scale2 = _layer_scale(channels, spec.layer_scale)
        self.stage = stage

    def __call__(
        self, x: jax.Array, level: Level, order: jax.Array, keep: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """One block.

        Args:
          x: (N, C) float32.
          level: structure of the level.
          order: () int32, which order the patches follow.
          keep: what drop path multiplies the two branches with, (N,) float32 or () each.
        """
        x = x + self.conv_norm(self.conv_linear(self.conv(x, level)))
        x = x + _branch(self._attention(self.norm1(x), level, order), self.scale1, keep[0])
        return x + _branch(self.mlp(self.norm2(x)), self.scale2, keep[1])

    def _attention(self, x: jax.Array, level: Level, order: jax.Array) -> jax.Array:
        layout, heads = level.patches[self.stage.patch_size], self.stage.heads
        slot_point, point_slot = layout.slot_point[order], layout.point_slot[order]
        patches = len(layout.segment)
        slots = to_slots(x, slot_point, point_slot, layout.point_borrowed[order])
        qkv = rearrange(
            self.qkv(slots), "(p k) (three h d) -> three p h k d", p=patches, three=3, h=heads
        )
        mixed = patch_attention(qkv[0], qkv[1], qkv[2], layout.segment, layout.used)
        mixed = rearrange(mixed, "p h k d -> (p k) (h d)")
        return self.proj(from_slots(mixed, slot_point, point_slot))


def _layer_scale(channels: int, start: float | None) -> nnx.Param | None:
    return None if start is None else nnx.Param(jnp.full(channels, start))


def _branch(y: jax.Array, scale: nnx.Param | None, keep: jax.Array) -> jax.Array:
    y = y.astype(jnp.float32)
    if scale is not None:
        y = y * scale[...][None]
    return y * (keep[:, None] if keep.ndim else keep)


class Embedding(nnx.Module):
    """Linear stem; masked points get a token instead."""

    def __init__(self, spec: PTv3Spec, *, rngs: nnx.Rngs):
        channels = spec.encoder[0].channels
        self.linear = linear(spec.inputs, channels, spec.dtype, rngs)
        self.norm = layer_norm(channels, rngs)
        self.mask_token = nnx.Param(jnp.zeros(channels)) if spec.mask_token else None

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """(N, inputs) -> (N, C); mask is (N,) bool."""
        x = gelu(self.norm(self.linear(x)))
        if mask is None:
            return x
        if self.mask_token is None:
            raise ValueError("a mask needs a network with mask_token=True")
        return jnp.where(mask[:, None], self.mask_token[...][None], x)


class Down(nnx.Module):
    """Pooling to the next level: linear, maximum over the cluster, norm, GELU."""

    def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, dtype, rngs)
        self.norm = layer_norm(outputs, rngs)

    def __call__(self, x: jax.Array, fine: Level, coarse: Level) -> jax.Array:
        """(N, inputs) -> (M, outputs)."""
        return gelu(self.norm(cluster_max(self.proj(x), fine.parent, coarse.first_child)))


class Up(nnx.Module):
    """Un-pooling: the cluster's features on each of its points, plus the encoder's."""

    def __init__(
        self, inputs: int, skipped: int, outputs: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ):
        self.proj = linear(inputs, outputs, dtype, rngs)
        self.norm = layer_norm(outputs, rngs)
        self.skip = linear(skipped, outputs, dtype, rngs)
        self.skip_norm = layer_norm(outputs, rngs)

    def __call__(self, x: jax.Array, skip: jax.Array, fine: Level, coarse: Level) -> jax.Array:
        """(M, inputs), (N, skipped) -> (N, outputs)."""
        x = gelu(self.norm(self.proj(x)))
        skip = gelu(self.skip_norm(self.skip(skip)))
        return skip + to_children(x, fine.parent, coarse.first_child)


class Stage(nnx.Module):
    """The blocks of a level, and the way into it."""

    def __init__(self, stage: StageSpec, spec: PTv3Spec, rates: np.ndarray):
        self.blocks = stack(lambda r: Block(stage, spec, rngs=r), stage.depth)
        self.rates = tuple(float(rate) for rate in rates)
        self.orders = len(spec.curves)
        self.remat = spec.remat

    def __call__(
        self,
        x: jax.Array,
        level: Level,
        turn: jax.Array,
        drop_keys: jax.Array | None,
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          x: (N, C).
          level: structure of the level.
          turn: (O,) int32, the order of each turn; block b takes turn b mod O.
          drop_keys: (G,) keys, one a cloud, for drop path; None for none.
        """
        depth = len(self.rates)
        graph, params = nnx.split(self.blocks)
        orders = turn[jnp.arange(depth) % self.orders]
        keep = _keep(jnp.array(self.rates), level, drop_keys)

        def block(x, this):
            params, order, keep = this
            return nnx.merge(graph, params)(x, level, order, keep), None

        body = jax.checkpoint(block) if self.remat else block
        return jax.lax.scan(body, x, (params, orders, keep))[0]


def _keep(
    rates: jax.Array, level: Level, drop_keys: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Drop-path factors of a stage's two branches: (depth, N) each, or (depth,) ones without keys.

    Drop path acts on single points, as upstream. A point's bits depend on its cloud's key and its
    index in the cloud, so not on what else is in the row.
    """
    if drop_keys is None:
        ones = jnp.ones(rates.shape)
        return ones, ones
    clouds = drop_keys.shape[0]
    cloud = jnp.minimum(level.cloud, clouds - 1)
    index = jnp.arange(level.cloud.shape[0]) - level.starts[level.cloud]

    def draw(key, index):
        return jax.random.bits(jax.random.fold_in(key, index), rates.shape, jnp.uint32)

    bits = jax.vmap(draw)(drop_keys[cloud], index.astype(jnp.uint32)).T  # (depth, N)
    rates = rates[:, None]

    def factor(half):
        return jnp.where(half.astype(jnp.float32) / (1 << 16) < rates, 0.0, 1 / (1 - rates))

    return factor(bits >> 16), factor(bits & 0xFFFF)


class PTv3(nnx.Module):
    """The network; see `PTv3Spec`."""

    def __init__(self, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.embedding = Embedding(spec, rngs=rngs)
        rates = _drop_rates(spec.encoder, spec.drop_path)
        self.enc = nnx.Dict()
        for level, stage in enumerate(spec.encoder):
            self.enc[f"stage{level}"] = Stage(stage, spec, rates[level])
            if level:
                above = spec.encoder[level - 1].channels
                down = Down(above, stage.channels, spec.dtype, rngs=rngs)
                self.enc[f"stage{level}"].down = down
        if spec.decoder:
            self.dec = nnx.Dict()
            rates = _drop_rates(spec.decoder, spec.drop_path)
            below = spec.encoder[-1].channels
            for level in reversed(range(len(spec.decoder))):
                stage, skipped = spec.decoder[level], spec.encoder[level].channels
                self.dec[f"stage{level}"] = Stage(stage, spec, rates[level][::-1])
                up = Up(below, skipped, stage.channels, spec.dtype, rngs=rngs)
                self.dec[f"stage{level}"].up = up
                below = stage.channels
        self.spec = spec

    def __call__(
        self,
        x: jax.Array,
        hierarchy: Hierarchy,
        mask: jax.Array | None = None,
        order_key: jax.Array | None = None,
        drop_keys: jax.Array | None = None,
    ) -> Features:
        """Features of every level.

        Args:
          x: (N, inputs) float32; what is in padding does not matter.
          hierarchy: the row's structure, built for `spec.hierarchy(...)`.
          mask: (N,) bool, points whose embedding is replaced by the mask token.
          order_key: shuffles the turns of the orders at every level (training); None keeps them.
          drop_keys: (G,) keys, one a cloud, for drop path (training); None drops nothing.
        """
        turns = _turns(order_key, len(hierarchy), len(self.spec.curves))

        def keys(stage):
            return (
                None
                if drop_keys is None
                else jax.vmap(jax.random.fold_in, (0, None))(drop_keys, stage)
            )

        x = self.embedding(jnp.where(hierarchy[0].valid[:, None], x, 0.0), mask)
        levels: list[jax.Array] = []
        for i, level in enumerate(hierarchy):
            stage = self.enc[f"stage{i}"]
            if i:
                x = stage.down(x, hierarchy[i - 1], level)
            x = stage(x, level, turns[i], keys(i))
            levels.append(x)

        decoded: list[jax.Array] = []
        for i in reversed(range(len(self.spec.decoder))):
            stage = self.dec[f"stage{i}"]
            x = stage.up(x, levels[i], hierarchy[i], hierarchy[i + 1])
            x = stage(x, hierarchy[i], turns[i], keys(len(hierarchy) + i))
            decoded.append(x)
        return Features(tuple(levels), tuple(reversed(decoded)))


def _drop_rates(stages: tuple[StageSpec, ...], last: float) -> list[np.ndarray]:
    """Rates of each stage's blocks: a line from 0 to `last` over all blocks."""
    depths = [stage.depth for stage in stages]
    return np.split(np.linspace(0, last, sum(depths)), np.cumsum(depths)[:-1])


def _turns(key: jax.Array | None, levels: int, orders: int) -> jax.Array:
    """(levels, O) int32: which order each turn uses."""
    turns = jnp.broadcast_to(jnp.arange(orders), (levels, orders))
    if key is None:
        return turns
    return jax.vmap(lambda level: jax.random.permutation(jax.random.fold_in(key, level), orders))(
        jnp.arange(levels)
    )


def up_cast(levels: tuple[jax.Array, ...], hierarchy: Hierarchy, times: int) -> jax.Array:
    """Features of the coarsest level carried `times` levels up, each joined to that level's own.

    Args:
      levels: (N, C) per level, finest first.
      hierarchy: the row's structure.
      times: how many levels to go up; 0 returns the coarsest level's features.

    Returns:
      (N, sum of C) on level `len(levels) - 1 - times`; its own channels first, as upstream.
    """
    x = levels[-1]
    for level in reversed(range(len(levels) - 1 - times, len(levels) - 1)):
        coarse = hierarchy[level + 1]
        above = to_children(x, hierarchy[level].parent, coarse.first_child)
        x = jnp.concatenate([levels[level], above], axis=-1)
    return x
