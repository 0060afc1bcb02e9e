"""Light in procedural rooms: lamps, windows and the sky, soft shadows under things, exposure."""

from dataclasses import dataclass

import numpy as np

from point_jax.data.raycast import Primitives

_CELL = 0.05  # metres: of the map of what hangs over the floor


@dataclass(frozen=True)
class Light:
    """The light in one room.

    Attributes:
        source: (l, 3) float32 positions, metres.
        power: (l, 3) float32, red, green and blue, at one metre.
        ambient: (3,) float32.
        gain: brings the room to a middling brightness.
        cover: (gx, gy) float32, metres: the top of what stands on each cell of the floor.
    """

    source: np.ndarray
    power: np.ndarray
    ambient: np.ndarray
    gain: np.float32
    cover: np.ndarray


def make_light(
    rng: np.random.Generator,
    lights: list[tuple[tuple[float, float, float], float]],
    size: tuple[float, float, float],
    primitives: Primitives,
    standing: np.ndarray,
) -> Light:
    """Draws colours of the lights and maps what casts shadows.

    Args:
        rng: draws.
        lights: positions in metres and strengths.
        size: of the room, metres, from (0, 0, 0).
        primitives: n shapes.
        standing: (n,) bool, which of them stand in the room (furniture).
    """
    warmth = rng.normal(0, 0.08, (len(lights) + 1, 1)) * np.array([[1.0, 0.0, -1.0]])
    strength = np.array([strength for _, strength in lights]) * rng.uniform(0.6, 1.4, len(lights))
    power = strength[:, None] * np.exp(warmth[1:])
    ambient = rng.uniform(0.25, 0.5) * np.exp(warmth[0])
    light = Light(
        source=np.array([position for position, _ in lights], np.float32).reshape(-1, 3),
        power=power.astype(np.float32),
        ambient=ambient.astype(np.float32),
        gain=np.float32(1),
        cover=_cover(primitives, standing, size),
    )
    x, y, z = np.meshgrid(*(np.linspace(0.1, 0.9, 4, dtype=np.float32) * s for s in size))
    grid = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    mean = np.mean([_irradiance(light, grid, n * np.ones_like(grid)).mean()
                    for n in np.eye(3, dtype=np.float32)])  # fmt: skip
    return Light(light.source, light.power, light.ambient, np.float32(0.75 / mean), light.cover)


def _cover(
    primitives: Primitives, standing: np.ndarray, size: tuple[float, float, float]
) -> np.ndarray:
    bottom, top = primitives.extents()
    low = np.floor(bottom[:, :2] / _CELL).astype(int).clip(0)
    high = np.ceil(top[:, :2] / _CELL).astype(int).clip(1)
    cover = np.zeros((int(size[0] / _CELL) + 2, int(size[1] / _CELL) + 2), np.float32)
    hangs = bottom[:, 2] > 1.2
    for i in np.flatnonzero(standing & ~hangs):
        cell = cover[low[i, 0] : high[i, 0], low[i, 1] : high[i, 1]]
        np.maximum(cell, top[i, 2], out=cell)
    return cover


def _irradiance(light: Light, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    result = light.ambient * (0.8 + 0.2 * normal[:, 2:])
    for source, power in zip(light.source, light.power, strict=True):
        to = source - point
        square = (to * to).sum(axis=1)
        # Half of the light comes by way of the walls: it reaches what looks away, too.
        facing = np.maximum(0.3 + 0.7 * (to * normal).sum(axis=1) / np.sqrt(square + 1e-6), 0)
        result = result + (facing / (0.6 + square))[:, None] * (2 * power)
    return result


def shade(light: Light, base: np.ndarray, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Light that surfaces send out.

    Args:
        light: of the room.
        base: (m, 3) float32 sRGB of the surfaces.
        point: (m, 3) float32 positions, metres.
        normal: (m, 3) float32 unit normals.

    Returns:
        (m, 3) float32, linear, about 0.2 for grey.
    """
    lit = _irradiance(light, point, normal) * light.gain
    # What has something above it is darker, and edges of that shadow are soft.
    shadow = np.zeros(len(point), np.float32)
    off = point + np.float32(0.02) * normal
    for dx, dy in ((0, 0), (0.1, 0.1), (0.1, -0.1), (-0.1, 0.1), (-0.1, -0.1)):
        i = ((off[:, 0] + dx) / _CELL).astype(np.int32).clip(0, light.cover.shape[0] - 1)
        j = ((off[:, 1] + dy) / _CELL).astype(np.int32).clip(0, light.cover.shape[1] - 1)
        shadow += np.clip((light.cover[i, j] - point[:, 2] - 0.04) * 8, 0, 1)
    lit *= (1 - 0.09 * shadow)[:, None]
    return base ** np.float32(2.2) * lit


def expose(linear: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """(m, 3) uint8 sRGB of linear light, with noise added as a share of full scale."""
    value = np.maximum(linear, 0) ** np.float32(1 / 2.2)
    value = np.where(value > 0.8, 1 - 0.2 * np.exp((0.8 - value) / 0.2), value)  # no hard clipping
    return (np.clip(value + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
