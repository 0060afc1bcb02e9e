"""Rotary positions in three dimensions (Utonia's PT-v3m3)."""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_channels: int, base: float) -> np.ndarray:
    """(D / 6,) float32 turns in radians a metre: base^(-2 i / (D / 3)), i = 0, 1, ...

    Raises:
      ValueError: D is not a multiple of 6: three axes, and pairs of channels in each.
    """
    if head_channels % 6:
        raise ValueError(f"rotary positions need heads of a multiple of 6, got {head_channels}")
    third = head_channels // 3
    exponent = np.arange(0, third, 2, dtype=np.float32) / np.float32(third)
    return (1.0 / np.float32(base) ** exponent).astype(np.float32)


def rotate(x: jax.Array, coord: jax.Array, base: float) -> jax.Array:
    """Turns queries or keys by their positions, so that scores depend on relative positions.

    The first third of the channels turns with x, the second with y, the last with z; in a third,
    channel i and channel i + D / 6 make a pair.

    Args:
      x: (S, J, H, D); J stands for queries and keys.
      coord: (S, 3) float32, metres.
      base: of the frequencies.

    Returns:
      (S, J, H, D), dtype of x; the rotation is float32.
    """
    turns = jnp.asarray(frequencies(x.shape[-1], base))
    angle = coord[:, None, None, :, None] * turns[None, None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # (S, 1, 1, 3, D / 6)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 3, 2, angle.shape[-1])
    a, b = pairs[..., 0, :], pairs[..., 1, :]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
