"""Lamps of procedural rooms: on tables, on the floor, under the ceiling."""

import math

from point_jax.data.room_sketch import Item, Palette
from point_jax.data.room_textures import Material

_CORD = Material("plain", (0.06, 0.06, 0.07), (0.1, 0.1, 0.1), 0.3)


def _shade(palette: Palette) -> Material:
    warm = palette.tint((0.02, 0.35), (0.85, 1.0), any_hue=0.2)
    return Material("plain", warm, warm, 0.2)


def table_lamp(palette: Palette) -> Item:
    """A lamp for tables: foot or ball, stem, shade."""
    rng = palette.rng
    h, w = rng.uniform(0.32, 0.55), rng.uniform(0.18, 0.32)
    item = Item("lamp", (w, w, h))
    body = palette.metal() if rng.uniform() < 0.5 else palette.paint()
    if rng.uniform() < 0.5:
        item.cylinder((0, 0, 0.01), (w * 0.6, w * 0.6, 0.02), body)
        item.cylinder((0, 0, h * 0.35), (0.025, 0.025, h * 0.65), body)
    else:
        item.ellipsoid((0, 0, h * 0.28), (w * 0.6, w * 0.6, h * 0.55), body)
    size = (w * 0.8, w * 0.8, h * 0.42)
    item.cylinder((0, 0, h * 0.79), size, _shade(palette), taper=float(rng.uniform(-0.35, 0)))
    return item


def floor_lamp(palette: Palette) -> Item:
    """A standing lamp: shade on a pole, tripod, or bent arm."""
    rng = palette.rng
    h, w = rng.uniform(1.35, 1.75), rng.uniform(0.28, 0.45)
    item = Item("lamp", (w, w, h))
    body = palette.metal()
    style = rng.integers(3)
    if style == 1:
        for i in range(3):
            a = 2 * math.pi * i / 3
            at = (0.13 * math.cos(a), 0.13 * math.sin(a), h * 0.42)
            item.box(at, (0.025, 0.025, h * 0.86), palette.wood(), (a, -0.2, 0))
    else:
        item.cylinder((0, 0, 0.015), (w * 0.75, w * 0.75, 0.03), body)
        item.cylinder((0, 0, h * 0.42), (0.03, 0.03, h * 0.84), body)
    if style == 2:
        item.ellipsoid((0, 0, h - 0.12), (w * 0.8, w * 0.8, 0.24), _shade(palette))
    else:
        size = (w * 0.8, w * 0.8, 0.28)
        item.cylinder((0, 0, h - 0.14), size, _shade(palette), taper=float(rng.uniform(-0.3, 0.0)))
    return item


def ceiling_lamp(palette: Palette, drop: float) -> Item:
    """A lamp under the ceiling; z = 0 is the ceiling, it hangs `drop` metres down (0: flush)."""
    rng = palette.rng
    shade = _shade(palette)
    w = rng.uniform(0.28, 0.5)
    item = Item("lamp", (w, w, drop + 0.3))
    style = rng.integers(3)
    if drop <= 0.1:
        if style == 0:
            item.box((0, 0, -0.04), (rng.uniform(0.5, 1.2), 0.25, 0.08), shade)
        elif style == 1:
            item.cylinder((0, 0, -0.05), (w, w, 0.1), shade)
        else:
            item.ellipsoid((0, 0, -0.03), (w, w, 0.22), shade)
        return item
    item.cylinder((0, 0, -drop / 2), (0.012, 0.012, drop), _CORD)
    item.cylinder((0, 0, -0.015), (0.1, 0.1, 0.03), _CORD)
    if style == 0:
        item.cylinder((0, 0, -drop - 0.1), (w * 0.7, w * 0.7, 0.2), shade, taper=-0.45)
    elif style == 1:
        item.ellipsoid((0, 0, -drop - 0.12), (w * 0.8, w * 0.8, w * 0.8), shade)
    else:
        metal = palette.metal()
        for i in range(5):
            a = 2 * math.pi * i / 5
            at = (0.14 * math.cos(a), 0.14 * math.sin(a), -drop - 0.03)
            item.box(at, (0.28, 0.02, 0.02), metal, (a, 0, 0))
            at = (0.28 * math.cos(a), 0.28 * math.sin(a), -drop + 0.02)
            item.cylinder(at, (0.1, 0.1, 0.12), shade, taper=0.2)
    return item
