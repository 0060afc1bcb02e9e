"""Point Transformer V3 (arXiv:2312.10035) in its three published modes, one family of modules.

"PT-v3m2" is the default: Sonata's and Concerto's. "PT-v3m1", the first one, has a convolutional
stem, batch norms and serialized pooling; "PT-v3m3", Utonia's, has rotary positions.

The network sees features and a hierarchy; coordinates only for rotary positions.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from point_jax.geometry.hierarchy import Hierarchy, Level
from point_jax.models.block import Stage
from point_jax.models.functional import Params
from point_jax.models.layers import BatchNorm, StemConv, gelu, layer_norm, linear
from point_jax.models.spec import STEM_RADIUS, PTv3Spec, StageSpec
from point_jax.models.statistics import without_empty
from point_jax.ops.gather import to_children
from point_jax.ops.pool import cluster_max, cluster_mean


class Features(NamedTuple):
    """What the network returns.

    Attributes:
      levels: encoder features of every level, (N, C) each, finest first.
      decoded: decoder features of level 0 up to the last but one; empty without a decoder.
      moments: mean and unbiased variance of the row for every norm that used the row's, in the
        places that the running ones have among the parameters; empty if none did.
    """

    levels: tuple[jax.Array, ...]
    decoded: tuple[jax.Array, ...]
    moments: Params


def _norm(channels: int, spec: PTv3Spec, rngs: nnx.Rngs) -> nnx.LayerNorm | BatchNorm:
    """The norm of the stem and between levels."""
    return BatchNorm(channels) if spec.norm == "batch" else layer_norm(channels, rngs)


def _normalize(
    norm: nnx.LayerNorm | BatchNorm, x: jax.Array, level: Level, over_row: bool
) -> tuple[jax.Array, Params]:
    """(N, C) -> (N, C) float32, and the moments of the row if it was by them."""
    if over_row and isinstance(norm, BatchNorm):
        return norm.over_row(x, level.count)
    return norm(x), {}


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

    def __call__(
        self, x: jax.Array, level: Level, mask: jax.Array | None, over_row: bool
    ) -> tuple[jax.Array, Params]:
        """(N, inputs) -> (N, C) and the norm's moments; mask is (N,) bool."""
        with jax.named_scope("convolution" if self.stem == "conv" else "projections"):
            x = self.conv(x, level) if self.stem == "conv" else self.linear(x)
        x, moments = _normalize(self.norm, x, level, over_row)
        x = gelu(x)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("a mask needs a network with mask_token=True")
            x = jnp.where(mask[:, None], self.mask_token[...][None], x)
        return x, {"norm": moments}


class Down(nnx.Module):
    """Pooling to the next level: linear, maximum over the cluster, norm, GELU."""

    def __init__(self, inputs: int, outputs: int, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, spec.dtype, rngs)
        self.norm = _norm(outputs, spec, rngs)

    def __call__(
        self, x: jax.Array, fine: Level, coarse: Level, over_row: bool
    ) -> tuple[jax.Array, Params]:
        """(N, inputs) -> (M, outputs) and the norm's moments."""
        x = cluster_max(self.proj(x), fine.parent, coarse.first_child)
        x, moments = _normalize(self.norm, x, coarse, over_row)
        return gelu(x), {"norm": moments}


class Up(nnx.Module):
    """Un-pooling: the cluster's features on each of its points, plus the encoder's."""

    def __init__(self, inputs: int, skipped: int, outputs: int, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, spec.dtype, rngs)
        self.norm = _norm(outputs, spec, rngs)
        self.skip = linear(skipped, outputs, spec.dtype, rngs)
        self.skip_norm = _norm(outputs, spec, rngs)

    def __call__(
        self, x: jax.Array, skip: jax.Array, fine: Level, coarse: Level, over_row: bool
    ) -> tuple[jax.Array, jax.Array, Params]:
        """(M, inputs), (N, skipped) -> (N, outputs) twice: the sum, the encoder alone; moments."""
        x, moments = _normalize(self.norm, self.proj(x), coarse, over_row)
        skip, skip_moments = _normalize(self.skip_norm, self.skip(skip), fine, over_row)
        skip = gelu(skip)
        out = skip + to_children(gelu(x), fine.parent, coarse.first_child)
        return out, skip, {"norm": moments, "skip_norm": skip_moments}


class PTv3(nnx.Module):
    """The network; see `PTv3Spec`."""

    def __init__(self, spec: PTv3Spec, *, rngs: nnx.Rngs):
        self.embedding = Embedding(spec, rngs=rngs)
        rates = _drop_rates(spec.encoder, spec.drop_path)
        self.enc = nnx.Dict()
        for level, stage in enumerate(spec.encoder):
            self.enc[f"stage{level}"] = Stage(level, stage, spec, rates[level], spec.rotary)
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
                self.dec[f"stage{level}"] = Stage(level, stage, spec, rates[level][::-1], rotary)
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
        row_statistics: Collection[str] = (),
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
          row_statistics: names of the parts (`embedding`, `enc`, `dec`) whose batch norms take the
            statistics of the row's points (supervised training) instead of the running ones.
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
            x, embedding = self.embedding(x, hierarchy[0], mask, "embedding" in row_statistics)
        levels: list[jax.Array] = []
        moments: Params = {"embedding": embedding, "enc": {}, "dec": {}}
        for i, level in enumerate(hierarchy):
            stage = self.enc[f"stage{i}"]
            if i:
                with jax.named_scope("pooling"):
                    x, down = stage.down(x, hierarchy[i - 1], level, "enc" in row_statistics)
                moments["enc"][f"stage{i}"] = {"down": down}
            with jax.named_scope("blocks"):
                x = stage(x, level, turns[i], keys(i), coords[i])
            levels.append(x)

        decoded: list[jax.Array] = []
        for i in reversed(range(len(self.spec.decoder))):
            stage = self.dec[f"stage{i}"]
            with jax.named_scope("pooling"):
                fine, coarse = hierarchy[i : i + 2]
                x, skip, up = stage.up(x, levels[i], fine, coarse, "dec" in row_statistics)
            moments["dec"][f"stage{i}"] = {"up": up}
            seen = skip if self.spec.pooling == "serialized" else None
            with jax.named_scope("blocks"):
                x = stage(x, hierarchy[i], turns[i], keys(len(hierarchy) + i), coords[i], seen)
            decoded.append(x)
        return Features(tuple(levels), tuple(reversed(decoded)), without_empty(moments))

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
