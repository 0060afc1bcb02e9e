"""VGG16 (arXiv:1409.1556): features of its convolutions, where no transformer is at hand.

The weights that `launch.convert` reads were trained further to find edges (HED, arXiv:1504.06375).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from point_jax.models.image_encoder import CAFFE, Pixels

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each block
LAYERS = tuple(f"conv{block}_{count}" for block, count in enumerate(CONVOLUTIONS, 1))


@dataclass(frozen=True)
class VGGSpec:
    """VGG16 without its dense layers.

    Attributes:
      layers: whose output, after ReLU, are the features: one or several of `LAYERS`, the last
        convolutions of the blocks, at strides 1 to 16. Of several, the coarser ones are repeated on
        the grid of the finest, and all are joined in the order given.
      widths: channels of each block.
      pixels: what the network reads.
      dtype: of the arithmetic; parameters are float32.
    """

    layers: tuple[str, ...] = ("conv4_3",)
    widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)
    pixels: Pixels = CAFFE
    dtype: jnp.dtype = field(default=jnp.float32)

    def __post_init__(self) -> None:
        if not self.layers or not set(self.layers) <= set(LAYERS):
            raise ValueError(f"layers is {self.layers!r}, expected some of {', '.join(LAYERS)}")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Index of each layer's block."""
        return tuple(LAYERS.index(layer) for layer in self.layers)

    @property
    def stride(self) -> int:
        """Pixels between neighbouring features: the finest layer's."""
        return 2 ** min(self.blocks)

    @property
    def channels(self) -> int:
        """Of all layers together."""
        return sum(self.widths[block] for block in self.blocks)

    def build(self, rngs: nnx.Rngs) -> "VGG":
        """The network."""
        return VGG(self, rngs=rngs)


class VGG(nnx.Module):
    """The network; see `VGGSpec`. Blocks after the last of its layers do no work."""

    def __init__(self, spec: VGGSpec, *, rngs: nnx.Rngs):
        inputs = 3
        for block, (count, width) in enumerate(zip(CONVOLUTIONS, spec.widths, strict=True), 1):
            for number in range(1, count + 1):
                conv = nnx.Conv(
                    inputs,
                    width,
                    (3, 3),
                    dtype=spec.dtype,
                    kernel_init=nnx.initializers.zeros,  # random values come from `functional`
                    rngs=rngs,
                )
                setattr(self, f"conv{block}_{number}", conv)
                inputs = width
        self.spec = spec

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, 3) float32 -> (B, H / stride, W / stride, C) in `dtype`."""
        found: dict[int, jax.Array] = {}
        for block in range(max(self.spec.blocks) + 1):
            if block:
                x = nnx.max_pool(x, (2, 2), (2, 2), "SAME")
            for number in range(1, CONVOLUTIONS[block] + 1):
                x = jax.nn.relu(getattr(self, f"conv{block + 1}_{number}")(x))
            found[block] = x
        finest = min(self.spec.blocks)
        height, width = found[finest].shape[1:3]
        parts = []
        for block in self.spec.blocks:
            times = 2 ** (block - finest)
            part = found[block].repeat(times, axis=1).repeat(times, axis=2)
            parts.append(part[:, :height, :width])
        return jnp.concatenate(parts, axis=-1)
