"""Vision transformers: DINOv2 with registers (arXiv:2309.16588), SigLIP's image tower.

All tokens of an image attend to one another; images know nothing of each other. Blocks are one
block with stacked parameters under `lax.scan`. Both families fit one module:

                      DINOv2 with registers              SigLIP, SigLIP 2 (arXiv:2502.14786)
    before patches    class token, registers             nothing
    branches          scaled per channel                 plain
    MLP               GELU; SwiGLU in the giant          GELU by tanh
    other grids       cubic, antialiased                 cubic, not antialiased
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from point_jax import limits
from point_jax.models.image_encoder import IMAGENET, Pixels
from point_jax.models.layers import Mlp, gelu, layer_norm, layer_scale, linear, stack
from point_jax.ops.attention import patch_attention

EPSILON = 1e-6  # of the norms

VIT_LIMITS = {
    "depth": limits.whole(1, 1000),
    **{name: limits.whole(1) for name in ("channels", "heads", "hidden", "stride", "side")},
    "registers": limits.whole(0),
}


@dataclass(frozen=True)
class ViTSpec:
    """A vision transformer.

    Attributes:
      depth: blocks.
      channels: C, of a token.
      heads: of attention.
      hidden: channels within a block's MLP (SwiGLU: of each of its two halves).
      stride: edge of an image patch, pixels.
      side: the network has a position embedding for each of side x side patches. Other grids take
        them interpolated.
      pixels: how images were normalised in training.
      mlp: its kind; "gelu_tanh" is GELU by its approximation with tanh.
      class_token: whether a token for the whole image comes first.
      registers: tokens without position or meaning, after the class token.
      mask_token: whether masked patches get a learned embedding.
      layer_scale: start value of the per-channel scale of every branch; None for no scale.
      antialias: whether position embeddings are smoothed where they are made fewer; see
        `interpolate`.
      dtype: of the arithmetic; parameters, norms, softmax and the residual stream are float32.
    """

    depth: int
    channels: int
    heads: int
    hidden: int
    stride: int
    side: int
    pixels: Pixels = IMAGENET
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    class_token: bool = True
    registers: int = 4
    mask_token: bool = True
    layer_scale: float | None = 1.0
    antialias: bool = True
    dtype: jnp.dtype = field(default=jnp.float32)

    def __post_init__(self) -> None:
        limits.check(vars(self), VIT_LIMITS)
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} is not a multiple of heads={self.heads}")

    def build(self, rngs: nnx.Rngs) -> "ViT":
        """The network."""
        return ViT(self, rngs=rngs)


# depth, channels, heads of DINOv2 with registers
DINOV2 = {
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "giant": (40, 1536, 24),
}


def dinov2_spec(size: str, dtype: jnp.dtype = jnp.float32) -> ViTSpec:
    """DINOv2 with registers as published, for patches of 14 pixels and images of 518 x 518.

    Args:
      size: one of `DINOV2`.
      dtype: of the arithmetic.
    """
    if size not in DINOV2:
        raise ValueError(f"no size {size!r}, expected one of {', '.join(DINOV2)}")
    depth, channels, heads = DINOV2[size]
    swiglu = size == "giant"
    hidden = swiglu_hidden(4 * channels) if swiglu else 4 * channels
    mlp = "swiglu" if swiglu else "gelu"
    return ViTSpec(depth, channels, heads, hidden, stride=14, side=37, mlp=mlp, dtype=dtype)


def swiglu_hidden(hidden: int) -> int:
    """Width of DINOv2's SwiGLU in place of an MLP: two thirds, in multiples of 8."""
    return math.ceil(hidden * 2 // 3 / 8) * 8


class SwiGlu(nnx.Module):
    """(silu(x A) * x B) C (arXiv:2002.05202); A and B are one layer."""

    def __init__(self, channels: int, hidden: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.gate_up = linear(channels, 2 * hidden, dtype, rngs)
        self.down = linear(hidden, channels, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class ViTBlock(nnx.Module):
    """Attention of all tokens, MLP; each a residual branch."""

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        channels, dtype = spec.channels, spec.dtype
        self.norm1 = layer_norm(channels, rngs, EPSILON)
        self.qkv = linear(channels, 3 * channels, dtype, rngs)
        self.proj = linear(channels, channels, dtype, rngs)
        self.scale1 = layer_scale(channels, spec.layer_scale)
        self.norm2 = layer_norm(channels, rngs, EPSILON)
        if spec.mlp == "swiglu":
            self.mlp = SwiGlu(channels, spec.hidden, dtype, rngs=rngs)
        else:
            activation: Callable = jax.nn.gelu if spec.mlp == "gelu_tanh" else gelu
            self.mlp = Mlp(channels, spec.hidden, channels, dtype, activation, rngs=rngs)
        self.scale2 = layer_scale(channels, spec.layer_scale)
        self.heads = spec.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) float32 -> (B, T, C) float32."""
        with jax.named_scope("attention"):
            x = x + _branch(self._attention(self.norm1(x)), self.scale1)
        with jax.named_scope("mlp"):
            return x + _branch(self.mlp(self.norm2(x)), self.scale2)

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, tokens = x.shape[:2]
        qkv = rearrange(self.qkv(x), "b t (three h d) -> (b t) three h d", three=3, h=self.heads)
        image = jnp.zeros(batch * tokens, jnp.int32)
        # An image is a patch. The scores of 24 layers of large, (1374, 1374) a head, would else be
        # most of what a step of Concerto moves on accelerators.
        mixed: jax.Array = patch_attention(1, tokens, qkv, image, None, jnp.int32(batch))
        return self.proj(rearrange(mixed, "(b t) h d -> b t (h d)", b=batch))


def _branch(y: jax.Array, scale: nnx.Param | None) -> jax.Array:
    y = y.astype(jnp.float32)
    return y if scale is None else y * scale[...][None, None]


class ViT(nnx.Module):
    """The network; see `ViTSpec`. T tokens: class token, registers, patches row by row."""

    def __init__(self, spec: ViTSpec, *, rngs: nnx.Rngs):
        channels = spec.channels
        self.patch = linear(3 * spec.stride**2, channels, spec.dtype, rngs)
        places = spec.class_token + spec.side**2
        self.position = nnx.Param(jnp.zeros((places, channels)))  # the class token's first
        self.class_token = nnx.Param(jnp.zeros(channels)) if spec.class_token else None
        self.registers = (
            nnx.Param(jnp.zeros((spec.registers, channels))) if spec.registers else None
        )
        self.mask_token = nnx.Param(jnp.zeros(channels)) if spec.mask_token else None
        self.blocks = stack(lambda r: ViTBlock(spec, rngs=r), spec.depth)
        self.norm = layer_norm(channels, rngs, EPSILON)
        self.spec = spec

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Features of the patches.

        Args:
          x: (B, H, W, 3) float32, normalised; H and W are multiples of the stride.
          mask: (B, H / stride, W / stride) bool, patches whose embedding is replaced by the mask
            token; None for none.

        Returns:
          (B, H / stride, W / stride, C) float32, after the last norm.
        """
        height, width = (size // self.spec.stride for size in x.shape[1:3])
        patches = self.tokens(x, mask)[:, -height * width :]
        return rearrange(patches, "b (h w) c -> b h w c", h=height)

    def tokens(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The same for all tokens, (B, T, C) float32."""
        return self.norm(self.trunk(self.embed(x, mask)))

    def embed(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(B, H, W, 3) -> (B, T, C) float32, what the first block reads."""
        edge = self.spec.stride
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=edge, q=edge)
        batch, height, width = x.shape[:3]
        x = self.patch(x).astype(jnp.float32)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("a mask needs a network with mask_token=True")
            x = jnp.where(mask[..., None], self.mask_token[...][None, None, None], x)
        places = self.positions(height, width)
        x = rearrange(x, "b h w c -> b (h w) c") + places[None, -height * width :]
        first = []
        if self.class_token is not None:
            first.append(self.class_token[...][None] + places[:1])
        if self.registers is not None:
            first.append(self.registers[...])
        shared = [jnp.broadcast_to(part[None], (batch, *part.shape)) for part in first]
        return jnp.concatenate([*shared, x], axis=1)

    def positions(self, height: int, width: int) -> jax.Array:
        """(class token + height x width, C) float32 position embeddings of a grid of patches."""
        side, table = self.spec.side, self.position[...]
        if (height, width) == (side, side):
            return table
        first, patches = jnp.split(table, [int(self.spec.class_token)])
        patches = rearrange(patches, "(h w) c -> h w c", h=side)
        patches = interpolate(patches, height, width, self.spec.antialias)
        return jnp.concatenate([first, rearrange(patches, "h w c -> (h w) c")])

    def trunk(self, x: jax.Array) -> jax.Array:
        """The blocks: (B, T, C) -> (B, T, C) float32."""
        graph, params = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, p: (nnx.merge(graph, p)(x), None), x, params)[0]


def interpolate(table: jax.Array, height: int, width: int, antialias: bool) -> jax.Array:
    """(h, w, C) float32 -> (height, width, C), cubic, as PyTorch's `interpolate` does it.

    Args:
      table: values at the centres of a grid's cells.
      height: cells wanted.
      width: likewise.
      antialias: Keys' kernel with a = -0.5, widened where cells become fewer, weights beyond the
        border left out; False: a = -0.75, never widened, the border repeated.
    """
    if antialias:
        return jax.image.resize(table, (height, width, table.shape[-1]), "cubic")
    rows, columns = (_cubic(n, m) for n, m in zip(table.shape, (height, width), strict=False))
    return jnp.einsum("hi,wj,ijc->hwc", rows, columns, table, precision="highest")


def _cubic(inputs: int, outputs: int, a: float = -0.75) -> np.ndarray:
    """(outputs, inputs) float32 weights of the four nearest cells, the border repeated."""
    at = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(at[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    weights = np.zeros((outputs, inputs))
    place = np.arange(outputs)[:, None], np.clip(taps, 0, inputs - 1)
    np.add.at(weights, place, np.where(d <= 1, near, far))
    return weights.astype(np.float32)
