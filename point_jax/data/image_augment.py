"""Augmentation of a scene's images on the device, keyed, and of the places of points in them."""

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from point_jax import limits
from point_jax.data.augment import Range
from point_jax.data.color import ColorSpec, change_color, draw_color

BLUR_REACH = 4  # pixels to either side

_RANGE = ("low", "high")
IMAGE_SPEC_LIMITS = {
    "height": limits.whole(1),
    "width": limits.whole(1),
    "stride": limits.whole(1),
    "area": limits.each(limits.number(above=0, most=1), *_RANGE, rising=True),
    "aspect": limits.each(limits.number(above=0), *_RANGE, rising=True),
    "flip": limits.PROBABILITY,
    "blur": limits.each(limits.number(above=0), *_RANGE, rising=True),
    "blur_probability": limits.PROBABILITY,
}


def _tint() -> ColorSpec:
    return ColorSpec(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


@dataclass(frozen=True)
class ImageSpec:
    """What an image encoder gets. Hashable: a static argument for jit.

    Colours and blur are the original's recipe (it only ever adds to a colour, here either way, and
    one draw serves all its images); it does not crop at random.

    Attributes:
      height, width: of an image, patches.
      stride: edge of a patch, pixels.
      area: an image is cropped to this share of the largest rectangle of the crop's shape, uniform
        in this range, anywhere; in the middle if neither share nor shape is at random.
      aspect: the crop's width over height is this many times that of the result, its logarithm
        uniform in this range; 1 keeps proportions.
      flip: probability of being mirrored, left to right.
      color: changes of the colours, drawn for every image.
      blur: standard deviation of a Gaussian over 9 x 9 pixels, uniform in this range, pixels.
      blur_probability: of that.
    """

    height: int
    width: int
    stride: int = 14
    area: Range = (0.9, 1.0)
    aspect: Range = (0.95, 1.05)
    flip: float = 0.0
    color: ColorSpec = field(default_factory=_tint)
    blur: Range = (0.1, 2.0)
    blur_probability: float = 0.5

    def __post_init__(self) -> None:
        limits.check(vars(self), IMAGE_SPEC_LIMITS)

    @classmethod
    def plain(cls, height: int, width: int, stride: int = 14) -> "ImageSpec":
        """Nothing at random: the largest central crop of the result's shape, resized."""
        still = ColorSpec(0.0, 0.0, 0.0, 0.0, translation=0.0)
        one = (1.0, 1.0)
        return cls(height, width, stride, one, one, 0.0, still, blur_probability=0.0)


def augment_images(
    images: jax.Array,
    pixels: jax.Array,
    image_count: jax.Array,
    key: jax.Array,
    spec: ImageSpec,
) -> tuple[jax.Array, jax.Array]:
    """Crops, resizes, flips and recolours a scene's images; takes the places of points along.

    What happens to an image follows from the key and its index, not from how many others there are.

    Args:
      images: (I, H, W, 3) uint8. Anything from `image_count` on.
      pixels: (P, I, 2) float32, place of each point: row and column in pixels, where pixel i covers
        [i, i + 1); -1 where the image does not see the point.
      image_count: () int32.
      key: random key.
      spec: what to do; static.

    Returns:
      (images (I, height * stride, width * stride, 3) float32 0 to 1, places (P, I, 2) float32 in
      patches, -1 where the crop does not show the point). Images from `image_count` on are black
      and see nothing.
    """
    number = jnp.arange(len(images))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
    grid = jnp.array([[spec.height, spec.width]], jnp.float32)

    # Image by image: the memory of one, and a loop skips what a draw leaves out.
    def augment(
        image: jax.Array, pixels: jax.Array, key: jax.Array, used: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        crop_key, color_key, blur_key = jax.random.split(key, 3)
        scale, shift, flip = draw_crop(crop_key, (image.shape[0], image.shape[1]), spec)
        image = resize(image.astype(jnp.float32), scale, shift, spec)
        image = jnp.where(flip, image[:, ::-1], image)
        image = _recolour(image, color_key, spec)
        image = _blurred(image, blur_key, spec)

        places = (pixels * scale[None] + shift[None]) / spec.stride
        row, column = places[:, 0], places[:, 1]
        places = jnp.stack([row, jnp.where(flip, spec.width - column, column)], axis=1)
        inside = (pixels >= 0).all(1) & (places >= 0).all(1) & (places < grid).all(1) & used
        return jnp.where(used, image, 0.0), jnp.where(inside[:, None], places, -1.0)

    arguments = (images, pixels.swapaxes(0, 1), keys, number < image_count)
    made, places = jax.lax.map(lambda one: augment(*one), arguments)
    return made, places.swapaxes(0, 1)


def draw_crop(
    key: jax.Array, full: tuple[int, int], spec: ImageSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a crop: a place p of an image of `full` (height, width) goes to p * scale + shift.

    Returns:
      (scale (2,), shift (2,) float32 for rows and columns, pixels; () bool, mirror it afterwards).
    """
    draws = jax.random.uniform(key, (5,))
    low, high = map(math.log, spec.aspect)
    ratio = jnp.exp(low + draws[0] * (high - low)) * spec.width / spec.height
    # The largest rectangle of this shape, then a part of it: no shape needs another draw.
    height = jnp.minimum(full[0], full[1] / ratio)
    side = jnp.sqrt(spec.area[0] + draws[1] * (spec.area[1] - spec.area[0]))
    crop = side * jnp.stack([height, height * ratio])
    space = jnp.maximum(jnp.array(full, jnp.float32) - crop, 0.0)
    still = spec.area[0] == 1.0 and spec.aspect[0] == spec.aspect[1]
    corner = space * (0.5 if still else draws[2:4])
    scale = jnp.array([spec.height, spec.width]) * spec.stride / crop
    return scale, -corner * scale, draws[4] < spec.flip


def resize(image: jax.Array, scale: jax.Array, shift: jax.Array, spec: ImageSpec) -> jax.Array:
    """Image (H, W, 3) -> (height * stride, width * stride, 3), bilinear and antialiased."""
    shape = (spec.height * spec.stride, spec.width * spec.stride, image.shape[2])
    return jax.image.scale_and_translate(
        image, shape, (0, 1), scale, shift, method="linear", antialias=True
    )


def _recolour(image: jax.Array, key: jax.Array, spec: ImageSpec) -> jax.Array:
    """Colours 0..255 to 0..1, changed."""
    flat = image.reshape(-1, 3)
    changed = change_color(flat, jnp.ones(len(flat), bool), draw_color(key, spec.color))
    return changed.reshape(image.shape)


def _blurred(image: jax.Array, key: jax.Array, spec: ImageSpec) -> jax.Array:
    draws = jax.random.uniform(key, (2,))
    sigma = spec.blur[0] + draws[1] * (spec.blur[1] - spec.blur[0])
    blurs = draws[0] < spec.blur_probability
    return jax.lax.cond(blurs, lambda: blur(image, sigma), lambda: image)


def blur(image: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """A Gaussian over 9 x 9 pixels of an image (H, W, 3), whose border is repeated outwards."""
    reach = jnp.arange(-BLUR_REACH, BLUR_REACH + 1)
    weights = jax.nn.softmax(-(reach**2) / (2.0 * sigma**2))
    for axis in (0, 1):
        length = image.shape[axis]
        around = [(0, 0)] * 3
        around[axis] = (BLUR_REACH, BLUR_REACH)
        wide = jnp.pad(image, around, mode="edge")
        parts = [
            weight * jax.lax.slice_in_dim(wide, start, start + length, axis=axis)
            for start, weight in enumerate(weights)
        ]
        image = functools.reduce(jnp.add, parts)
    return image
