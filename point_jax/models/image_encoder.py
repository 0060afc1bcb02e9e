"""Image encoders: features of every patch of an image, on a regular grid.

An objective that compares points with pixels needs no more of an image network than `ImageEncoder`.
`NetworkEncoder` makes one of each network here; any other class with these members will do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from point_jax.models.functional import Params, functional

Color = tuple[float, float, float]


class ImageEncoder(Protocol):
    """A network from images to a grid of features; its parameters are an argument.

    Attributes:
      stride: pixels between neighbouring features, along both axes.
      channels: C, of a feature.
    """

    @property
    def stride(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def __call__(self, params: Params, images: jax.Array) -> jax.Array:
        """(B, H, W, 3) -> (B, H / stride, W / stride, C) float32.

        Args:
          params: of the network.
          images: RGB, uint8 from 0 to 255 or floats from 0 to 1; H and W are multiples of the
            stride. Feature (i, j) belongs to the pixels from (i, j) * stride on.
        """
        ...


@dataclass(frozen=True)
class Pixels:
    """What a network was trained to see: (values - mean) / std.

    Attributes:
      mean: for red, green and blue.
      std: likewise.
      top: the value of full brightness, 1 or 255: the unit of mean and std.
      order: of the channels that the network reads.
    """

    mean: Color
    std: Color = (1.0, 1.0, 1.0)
    top: float = 1.0
    order: Literal["rgb", "bgr"] = "rgb"

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, H, W, 3) RGB, uint8 or floats from 0 to 1 -> float32 of the same shape."""
        whole = 255.0 if images.dtype == jnp.uint8 else 1.0
        x = images.astype(jnp.float32) * (self.top / whole)
        mean, std = jnp.array(self.mean), jnp.array(self.std)
        x = (x - mean[None, None, None]) / std[None, None, None]
        return x[..., ::-1] if self.order == "bgr" else x


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CAFFE = Pixels((122.67892, 116.66877, 104.00699), top=255.0, order="bgr")


class ImageNetwork(Protocol):
    """Describes an image network: hashable, with the members of an `ImageEncoder` and these.

    Attributes:
      pixels: what the network reads.
    """

    @property
    def stride(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def pixels(self) -> Pixels: ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module: (B, H, W, 3) float32 as `pixels` says -> (B, H / stride, W / stride, C)."""
        ...


@dataclass(frozen=True)
class NetworkEncoder:
    """A network of this project as an `ImageEncoder`; equal for equal networks, hashable."""

    network: ImageNetwork

    @property
    def stride(self) -> int:
        """Pixels between neighbouring features."""
        return self.network.stride

    @property
    def channels(self) -> int:
        """C, of a feature."""
        return self.network.channels

    @cached_property
    def _functions(self) -> tuple[Callable, Callable]:
        return functional(self.network.build)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, a nested dict of float32 arrays."""
        return self._functions[0](key)

    def __call__(self, params: Params, images: jax.Array) -> jax.Array:
        """See `ImageEncoder`.

        Raises:
          ValueError: images of another shape or dtype.
        """
        _check(images, self.stride)
        return self._functions[1](params, self.network.pixels(images)).astype(jnp.float32)


def _check(images: jax.Array, stride: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}, expected (B, H, W, 3)")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}, expected uint8 from 0 to 255 or floats from 0 to 1"
        )
    height, width = images.shape[1:3]
    if not height or not width or height % stride or width % stride:
        raise ValueError(
            f"images are {height} x {width}; this encoder needs multiples of {stride}: "
            f"resize or crop them, for example to {max(1, height // stride) * stride} x "
            f"{max(1, width // stride) * stride}"
        )
