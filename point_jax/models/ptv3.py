"""Point Transformer V3 (arXiv:2312.10035) in its three published modes, one family of modules.

"PT-v3m2" is the default: Sonata's and Concerto's. "PT-v3m1", the first one, has a convolutional
stem, batch norms and serialized pooling; "PT-v3m3", Utonia's, has rotary positions.

The network sees features and a hierarchy; coordinates only for rotary positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from point_jax.geometry.hierarchy import Hierarchy, Level
from point_jax.models.block import Stage
from point_jax.models.layers import BatchNorm, StemConv, gelu, layer_norm, linear
from point_jax.models.spec import STEM_RADIUS, PTv3Spec, StageSpec
from point_jax.ops.gather import to_children
from point_jax.ops.pool import cluster_max, cluster_mean


class Features(NamedTuple):
    """What the network returns.

    Attributes:
      levels: encoder features of every level, (N, C) each, finest first.
      decoded: decoder features of level 0 up to the last but one; empty without a decoder.
    """

    levels: tuple[jax.Array, ...]
    decoded: tuple[jax.Array, ...]


def _norm(channels: int, spec: PTv3Spec, rngs: nnx.Rngs) -> nnx.LayerNorm | BatchNorm:
    """The norm of the stem and between levels."""
    return BatchNorm(channels) if spec.norm == "batch" else layer_norm(channels, rngs)


class Embedding(nnx.Module):
    """Linear or convolutional stem; masked points get a token instead."""

    def __init__(self, spec: PTv3Spec, *, rngs: nnx.Rngs):
        channels = spec.encoder[0].channels
        if spec.stem == "conv":
            self.conv = StemConv(spec.inputs, channels, STEM_RADIUS, spec.dtype)
        else:
            self.linear = linear(spec.inputs, channels, spec.dtype, rngs)
        self.norm = _norm(channels, spec, rngs)
        self.mask_token = nnx.Param(jnp.zeros(channels)) if spec.mask_token else None
        self.stem = spec.stem

    def __call__(self, x: jax.Array, level: Level, mask: jax.Array | None) -> jax.Array:
        """(N, inputs) -> (N, C); mask is (N,) bool."""
        with jax.named_scope("convolution" if self.stem == "conv" else "projections"):
            x = self.conv(x, level) if self.stem == "conv" else self.linear(x)
        x = gelu(self.norm(x))
        if mask is None:
            return x
        if self.mask_token is None:
            raise ValueError("a mask needs a network with mask_token=True")
        return jnp.where(mask[:, None], self.mask_token[...][None], x)


class Down(nnx.Module):
    """Pooling to the next level: linear, maximum over the cluster, norm, GELU."""

    def __init__(self, inputs: int, outputs: int, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, spec.dtype, rngs)
        self.norm = _norm(outputs, spec, rngs)

    def __call__(self, x: jax.Array, fine: Level, coarse: Level) -> jax.Array:
        """(N, inputs) -> (M, outputs)."""
        return gelu(self.norm(cluster_max(self.proj(x), fine.parent, coarse.first_child)))


class Up(nnx.Module):
    """Un-pooling: the cluster's features on each of its points, plus the encoder's."""

    def __init__(self, inputs: int, skipped: int, outputs: int, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, spec.dtype, rngs)
        self.norm = _norm(outputs, spec, rngs)
        self.skip = linear(skipped, outputs, spec.dtype, rngs)
        self.skip_norm = _norm(outputs, spec, rngs)

    def __call__(
        self, x: jax.Array, skip: jax.Array, fine: Level, coarse: Level
    ) -> tuple[jax.Array, jax.Array]:
        """(M, inputs), (N, skipped) -> (N, outputs) twice: the sum, the encoder alone."""
        x = gelu(self.norm(self.proj(x)))
        skip = gelu(self.skip_norm(self.skip(skip)))
        return skip + to_children(x, fine.parent, coarse.first_child), skip


class PTv3(nnx.Module):
    """The network; see `PTv3Spec`."""

    def __init__(self, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.embedding = Embedding(spec, rngs=rngs)
        rates = _drop_rates(spec.encoder, spec.drop_path)
        self.enc = nnx.Dict()
        for level, stage in enumerate(spec.encoder):
            self.enc[f"stage{level}"] = Stage(stage, spec, rates[level], spec.rotary)
            if level:
                above = spec.encoder[level - 1].channels
                self.enc[f"stage{level}"].down = Down(above, stage.channels, spec, rngs=rngs)
        if spec.decoder:
            self.dec = nnx.Dict()
            rates = _drop_rates(spec.decoder, spec.drop_path)
            rotary = spec.rotary if spec.rotary and spec.rotary.decoder else None
            below = spec.encoder[-1].channels
            for level in reversed(range(len(spec.decoder))):
                stage, skipped = spec.decoder[level], spec.encoder[level].channels
                self.dec[f"stage{level}"] = Stage(stage, spec, rates[level][::-1], rotary)
                up = Up(below, skipped, stage.channels, spec, rngs=rngs)
                self.dec[f"stage{level}"].up = up
                below = stage.channels
        self.spec = spec

    def __call__(
        self,
        x: jax.Array,
        hierarchy: Hierarchy,
        mask: jax.Array | None = None,
        coord: jax.Array | None = None,
        order_key: jax.Array | None = None,
        noise_keys: jax.Array | None = None,
    ) -> Features:
        """Features of every level.

        Args:
          x: (N, inputs) float32; what is in padding does not matter.
          hierarchy: the row's structure, built for `spec.hierarchy(...)`.
          mask: (N,) bool, points whose embedding is replaced by the mask token.
          coord: (N, 3) float32 metres; only rotary positions need it. Coarser levels take the means
            over their clusters, of the means below (REFERENCE quirk 8).
          order_key: shuffles the turns of the orders at every level (training); None keeps them.
          noise_keys: (G,) keys, one a cloud, for drop path and moved rotary coordinates (training);
            None for neither.
        """
        turns = _turns(order_key, len(hierarchy), len(self.spec.curves))
        coords = self._coords(coord, hierarchy)

        def keys(stage):
            return (
                None
                if noise_keys is None
                else jax.vmap(jax.random.fold_in, (0, None))(noise_keys, stage)
            )

        x = jnp.where(hierarchy[0].valid[:, None], x, 0.0)
        with jax.named_scope("projections"):
            x = self.embedding(x, hierarchy[0], mask)
        levels: list[jax.Array] = []
        for i, level in enumerate(hierarchy):
            stage = self.enc[f"stage{i}"]
            if i:
                with jax.named_scope("pooling"):
                    x = stage.down(x, hierarchy[i - 1], level)
            with jax.named_scope("blocks"):
                x = stage(x, level, turns[i], keys(i), coords[i])
            levels.append(x)

        decoded: list[jax.Array] = []
        for i in reversed(range(len(self.spec.decoder))):
            stage = self.dec[f"stage{i}"]
            with jax.named_scope("pooling"):
                x, skip = stage.up(x, levels[i], hierarchy[i], hierarchy[i + 1])
            seen = skip if self.spec.pooling == "serialized" else None
            with jax.named_scope("blocks"):
                x = stage(x, hierarchy[i], turns[i], keys(len(hierarchy) + i), coords[i], seen)
            decoded.append(x)
        return Features(tuple(levels), tuple(reversed(decoded)))

    @jax.named_scope("pooling")
    def _coords(self, coord: jax.Array | None, hierarchy: Hierarchy) -> Sequence[jax.Array | None]:
        """(N, 3) coordinates of every level; None where nothing rotates."""
        if self.spec.rotary is None:
            return [None] * len(hierarchy)
        if coord is None:
            raise ValueError("a network with rotary positions needs `coord`")
        coords = [jnp.where(hierarchy[0].valid[:, None], coord, 0.0)]
        for level in hierarchy[1:]:
            coords.append(cluster_mean(coords[-1], level.first_child))
        return coords


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


@jax.named_scope("pooling")
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
