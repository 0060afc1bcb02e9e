"""Colour augmentation: photometric changes of the colours of a cloud, 0 to 255."""

from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from point_jax import limits
from point_jax.geometry.sampling import bounds

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(tuple(permutations(range(4))), np.int32)

COLOR_LIMITS = {
    "brightness": limits.number(0),
    "contrast": limits.number(0),
    "saturation": limits.number(0),
    "hue": limits.number(0, 0.5),
    "jitter_probability": limits.PROBABILITY,
    "translation": limits.number(0),
    "translation_probability": limits.PROBABILITY,
}


@dataclass(frozen=True)
class ColorSpec:
    """Random colour changes; the defaults are Sonata's recipe.

    Attributes:
      brightness, contrast, saturation: the factor is uniform in 1 -+ this, but not below 0.
      hue: the shift is uniform in -+ this, in turns of the colour wheel; at most 0.5.
      jitter_probability: of each of these four changes by itself.
      translation: the colours move by a uniform vector of up to this share of 255 an axis.
      translation_probability: of that translation.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.02
    jitter_probability: float = 0.8
    translation: float = 0.05
    translation_probability: float = 0.95

    def __post_init__(self) -> None:
        limits.check(vars(self), COLOR_LIMITS)


class ColorDraw(NamedTuple):
    """What one draw of the colour changes does.

    Attributes:
      order: (4,) int32, a permutation: the changes in the order in which they act; 0 brightness,
        1 contrast, 2 saturation, 3 hue.
      factors: (4,) float32, indexed by change; the last is the shift of the hue in turns.
      apply: (4,) bool, indexed by change.
      translation: (3,) float32, added to the colours; 0 for no translation.
    """

    order: jax.Array
    factors: jax.Array
    apply: jax.Array
    translation: jax.Array


def draw_color(key: jax.Array, spec: ColorSpec) -> ColorDraw:
    """Draws the parameters of the colour changes.

    Every change has its own probability, and the order is one of the 24 at random.
    """
    draws = jax.random.uniform(key, (13,))
    spread = jnp.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    neutral = jnp.array([1.0, 1.0, 1.0, 0.0])
    low = jnp.where(neutral > 0.0, jnp.maximum(neutral - spread, 0.0), -spread)
    order = jnp.minimum((draws[0] * len(ORDERS)).astype(jnp.int32), len(ORDERS) - 1)
    factors = low + draws[1:5] * (neutral + spread - low)
    # Spread 0 means no change at all: not even rounding.
    apply = (draws[5:9] < spec.jitter_probability) & (spread > 0.0)
    translation = 255.0 * spec.translation * (2.0 * draws[9:12] - 1.0)
    translation = jnp.where(draws[12] < spec.translation_probability, translation, 0.0)
    return ColorDraw(jnp.asarray(ORDERS)[order], factors, apply, translation)


def adjust_hue(color: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Turns the colour wheel: h of HSV becomes (h + shift) mod 1, s and v stay.

    Args:
      color: (..., 3) float32, 0 to 255.
      shift: turns, in [-0.5, 0.5].

    Returns:
      float32 of the same shape.
    """
    red, green, blue = color[..., 0], color[..., 1], color[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    is_red, is_green = value == red, value == green
    difference = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    sextant = difference / jnp.where(chroma > 0.0, chroma, 1.0)
    sextant = sextant + jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0)) + 6.0 * shift

    def channel(offset: float) -> jax.Array:
        # How much of the chroma the channel lacks at this place of the wheel.
        place = sextant + offset
        place = place - 6.0 * jnp.floor(place / 6.0)
        return value - chroma * jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def jitter_color(color: jax.Array, valid: jax.Array, draw: ColorDraw) -> jax.Array:
    """Changes brightness, contrast, saturation and hue in the drawn order.

    Brightness blends with black, contrast with the mean luma of the cloud, saturation with a
    point's own luma: factor * color + (1 - factor) * other, clipped to 0..255. Luma has the weights
    of ITU-R BT.601.

    Args:
      color: (N, 3) float32, 0 to 255; finite.
      valid: (N,) bool; only these enter the mean.
      draw: what to do.

    Returns:
      (N, 3) float32, 0 to 255.
    """
    points = jnp.maximum(jnp.sum(valid), 1)

    def blend(color: jax.Array, change: jax.Array, factor: jax.Array) -> jax.Array:
        luma = 0.2989 * color[:, 0] + 0.587 * color[:, 1] + 0.114 * color[:, 2]
        mean = jnp.sum(jnp.where(valid, luma, 0.0)) / points
        other = jnp.where(change == CONTRAST, mean, 0.0)
        other = jnp.where(change == SATURATION, luma, other)
        return jnp.clip(factor * color + (1.0 - factor) * other[:, None], 0.0, 255.0)

    def step(
        color: jax.Array, turn: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        change, factor, apply = turn
        changed = jax.lax.cond(
            change == HUE,
            lambda: adjust_hue(color, factor),
            lambda: blend(color, change, factor),
        )
        return jnp.where(apply, changed, color), None

    turns = (draw.order, draw.factors[draw.order], draw.apply[draw.order])
    return jax.lax.scan(step, color, turns)[0]


def translate_color(color: jax.Array, shift: jax.Array) -> jax.Array:
    """Adds one colour (3,) to all points (N, 3), clipped to 0..255."""
    return jnp.clip(color + shift[None], 0.0, 255.0)


def stretch_color(color: jax.Array, valid: jax.Array, blend: jax.Array | float) -> jax.Array:
    """Blends with the colours whose every channel is stretched to 0..255 (auto-contrast).

    A channel that is the same everywhere is moved to 0 by the stretched part, as in the originals,
    which leave the colours alone only where all three are.

    Args:
      color: (N, 3) float32, 0 to 255.
      valid: (N,) bool; only these say how dark and bright a channel is.
      blend: share of the stretched colours.

    Returns:
      (N, 3) float32.
    """
    low, high = bounds(color, valid)
    spread = high - low
    scale = jnp.where(spread > 0.0, 255.0 / jnp.where(spread > 0.0, spread, 1.0), 1.0)
    stretched = (color - low[None]) * scale[None]
    blend = jnp.where(jnp.any(spread > 0.0), blend, 0.0)
    return (1.0 - blend) * color + blend * stretched


def add_noise(color: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Adds 255 * sigma * noise to every channel of every point, clipped to 0..255.

    `noise` is standard normal (N, 3).
    """
    return jnp.clip(color + 255.0 * sigma * noise, 0.0, 255.0)


def normalize_color(color: jax.Array) -> jax.Array:
    """Colours 0..255 to 0..1."""
    return color / 255.0


def change_color(color: jax.Array, valid: jax.Array, draw: ColorDraw) -> jax.Array:
    """The recipe's colour changes in its order: jitter, translation, then 0..255 to 0..1.

    Args:
      color: (N, 3) float32, 0 to 255. Anything in rows that are not valid.
      valid: (N,) bool.
      draw: what to do.

    Returns:
      (N, 3) float32, 0 to 1; 0 in rows that are not valid.
    """
    color = jnp.where(valid[:, None], color, 0.0)
    color = translate_color(jitter_color(color, valid, draw), draw.translation)
    return jnp.where(valid[:, None], normalize_color(color), 0.0)
