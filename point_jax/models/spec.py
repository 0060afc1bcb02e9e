"""What a Point Transformer V3 is made of: stages, and the choices of its published modes."""

from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp

from point_jax import limits
from point_jax.geometry.curves import CURVES, Curve
from point_jax.geometry.hierarchy import HierarchySpec
from point_jax.ops.rotary import frequencies

STEM_RADIUS = 2

REMAT = ("none", "cheap", "all")

STAGE_LIMITS = {name: limits.whole(1) for name in ("depth", "channels", "heads", "patch_size")}
ROTARY_LIMITS = {
    "base": limits.number(above=0),
    "shift": limits.number(0),
    "jitter": limits.number(1),
    "rescale": limits.number(1),
}
NETWORK_LIMITS = {
    "inputs": limits.whole(1),
    "mlp_ratio": limits.number(above=0),
    "drop_path": limits.number(0, below=1),
    "layer_scale": limits.either(limits.NOTHING, limits.number(0)),
    "stem": limits.one_of("linear", "conv"),
    "norm": limits.one_of("layer", "batch"),
    "pooling": limits.one_of("grid", "serialized"),
    "remat": limits.either(limits.SWITCH, limits.each(limits.one_of(*REMAT))),
}


@dataclass(frozen=True)
class StageSpec:
    """Blocks of one level: how many, how wide, their heads and their patch size K."""

    depth: int
    channels: int
    heads: int
    patch_size: int

    def __post_init__(self) -> None:
        limits.check(vars(self), STAGE_LIMITS)
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} is not a multiple of heads={self.heads}")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, and how training varies them (Utonia).

    Training moves the coordinates anew in every block. The originals draw one motion for a whole
    batch, we one for each cloud.

    Attributes:
      base: of the frequencies.
      shift: largest shift of every axis, metres; 0 for none.
      jitter: largest factor of every axis alone, log-uniform in [1 / jitter, jitter]; 1 for none.
      rescale: the same for all axes together.
      decoder: whether the decoder's blocks rotate, too.
    """

    base: float = 10.0
    shift: float = 0.0
    jitter: float = 1.0
    rescale: float = 1.0
    decoder: bool = True

    def __post_init__(self) -> None:
        limits.check(vars(self), ROTARY_LIMITS)


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
      stem: "linear", or "conv" for a 5x5x5 convolution (PT-v3m1).
      norm: of the stem and between levels: "layer", or "batch" (PT-v3m1).
      pooling: "grid", or "serialized" (PT-v3m1): curves are not fitted anew to a coarser level, and
        the first convolution after an un-pooling sees the encoder's branch alone (REFERENCE quirk
        4: weights were trained so).
      relative_bias: whether attention adds a learned bias by relative voxel position.
      rotary: rotary positions (PT-v3m3); None for none.
      dtype: of the arithmetic; parameters, norms, softmax and the residual stream are float32.
      remat: what of each block's activations the backward pass makes again instead of keeping it, a
        word of `REMAT` for each level: "none"; "cheap", all but what convolution and attention
        return, which are most of the work; "all" but the block's input. True is "cheap" and False
        "none" for all levels.
    """

    encoder: tuple[StageSpec, ...]
    decoder: tuple[StageSpec, ...] = ()
    inputs: int = 9
    curves: tuple[Curve, ...] = CURVES
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    mask_token: bool = True
    stem: Literal["linear", "conv"] = "linear"
    norm: Literal["layer", "batch"] = "layer"
    pooling: Literal["grid", "serialized"] = "grid"
    relative_bias: bool = False
    rotary: Rotary | None = None
    dtype: jnp.dtype = field(default=jnp.float32)
    remat: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        limits.check(vars(self), NETWORK_LIMITS)
        if isinstance(self.remat, tuple) and len(self.remat) != len(self.encoder):
            raise ValueError(
                f"remat has {len(self.remat)} words for {len(self.encoder)} levels: {self.remat}"
            )
        if self.decoder and len(self.decoder) != len(self.encoder) - 1:
            raise ValueError(
                f"a decoder of {len(self.encoder)} levels has {len(self.encoder) - 1} stages, "
                f"got {len(self.decoder)}"
            )
        if self.mask_token and self.stem == "conv":
            raise ValueError("a convolutional stem has no mask token: give mask_token=False")
        if self.rotary:
            rotating = self.encoder + (self.decoder if self.rotary.decoder else ())
            for stage in rotating:
                frequencies(stage.channels // stage.heads, self.rotary.base)

    def remat_of(self, level: int) -> str:
        """The word of a level."""
        if isinstance(self.remat, bool):
            return "cheap" if self.remat else "none"
        return self.remat[level]

    def hierarchy(self, capacities: tuple[int, ...], clouds: int) -> HierarchySpec:
        """The hierarchy that this network needs for rows of these capacities."""
        sizes = [{stage.patch_size} for stage in self.encoder]
        for level, stage in enumerate(self.decoder):
            sizes[level].add(stage.patch_size)
        patch_sizes = tuple(tuple(sorted(s)) for s in sizes)
        return HierarchySpec(
            capacities,
            clouds,
            patch_sizes,
            self.curves,
            refit_depths=self.pooling == "grid",
            stem_radius=STEM_RADIUS if self.stem == "conv" else 0,
        )
