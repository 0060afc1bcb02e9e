"""The image side of a joint objective: images through an encoder, or features stored before."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from point_jax.data.image_augment import ImageSpec, augment_images
from point_jax.data.image_features import FeatureSpec
from point_jax.models.functional import Params
from point_jax.models.image_encoder import NetworkEncoder
from point_jax.objectives.interface import Scene


@dataclass(frozen=True)
class EncodedImages:
    """Images that a network encodes within the step; an `ImageBranch`.

    Attributes:
      encoder: the network.
      spec: how images are augmented, and their size in patches; its stride is the encoder's.

    Raises:
      ValueError: two strides.
    """

    encoder: NetworkEncoder
    spec: ImageSpec

    def __post_init__(self) -> None:
        if self.spec.stride != self.encoder.stride:
            raise ValueError(
                f"images have patches of {self.spec.stride} pixels, the encoder of "
                f"{self.encoder.stride}"
            )

    @property
    def height(self) -> int:
        """Of an image, patches."""
        return self.spec.height

    @property
    def width(self) -> int:
        """Of an image, patches."""
        return self.spec.width

    @property
    def channels(self) -> int:
        """F, of a patch's features."""
        return self.encoder.channels

    def init(self, key: jax.Array) -> Params:
        """Random parameters of the encoder."""
        return self.encoder.init(key)

    def prepare(self, scene: Scene, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Augmented images (I, H, W, 3) and the places (P, I, 2) of the scene's points in them."""
        return augment_images(
            scene["images"], scene["pixels"], scene["image_count"], key, self.spec
        )

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        """(I, height * width, F) float32."""
        encoded = self.encoder(params, images)
        return encoded.reshape(len(images), self.height * self.width, self.channels)


@dataclass(frozen=True)
class StoredImages:
    """Features that come with the scenes; an `ImageBranch` without parameters.

    What `EncodedImages` gives with `ImageSpec.plain`, up to the rounding to float16: nothing about
    an image is at random.

    Attributes:
      spec: of the features.
    """

    spec: FeatureSpec

    @property
    def height(self) -> int:
        """Of an image, patches."""
        return self.spec.height

    @property
    def width(self) -> int:
        """Of an image, patches."""
        return self.spec.width

    @property
    def channels(self) -> int:
        """F, of a patch's features."""
        return self.spec.channels

    def init(self, key: jax.Array) -> Params:
        """{}."""
        return {}

    def prepare(self, scene: Scene, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (I, h, w, F) float16 and the places (P, I, 2) of the scene's points in them.

        The host has left out what lies outside the crop. The key draws nothing.
        """
        pixels = scene["pixels"]
        return scene["features"], jnp.where(pixels >= 0, pixels / self.spec.stride, -1.0)

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        """(I, height * width, F) float32."""
        flat = images.reshape(len(images), self.height * self.width, self.channels)
        return flat.astype(jnp.float32)
