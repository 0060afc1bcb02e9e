"""Furnishing of procedural rooms: what goes into each kind of room."""

import math
from collections.abc import Callable

import numpy as np

from point_jax.data.room_clutter import (
    carton,
    dress,
    floor_thing,
    plant,
    scatter_cushions,
)
from point_jax.data.room_furniture import bed, sofa
from point_jax.data.room_groups import Furnisher, offset
from point_jax.data.room_lamps import floor_lamp
from point_jax.data.room_plan import Plan
from point_jax.data.room_shell import empty_room
from point_jax.data.room_sketch import Item, Palette
from point_jax.data.room_storage import cabinet, fridge, machine, shelf, wall_board
from point_jax.data.room_textures import Material


def _bedroom(f: Furnisher) -> None:
    area = f.plan.size[0] * f.plan.size[1]
    widths = [0.9, 1.2, 1.4, 1.6, 1.8] if area > 10 else [0.9, 1.2, 1.4]
    for i in range(2 if area > 12 and f.chance(0.25) else 1):
        for width in (float(f.rng.choice(widths[:2] if i else widths)), 1.2, 0.9):
            one = bed(f.palette, width)
            if f.chance(0.4):
                scatter_cushions(f.palette, one, int(f.rng.integers(1, 4)))
            pose = f.at_wall(one, front=0.3)
            if pose is not None or i:
                break
        if pose is None:
            continue
        if f.chance(0.5):
            f.rug(offset(pose, 0, f.draw(0.1, 0.6)), one.size[0] + 0.9, 1.7)
        size = (f.draw(0.35, 0.5), f.draw(0.32, 0.42), f.draw(0.4, 0.6))
        for side in (-1, 1):
            if f.chance(0.85):
                stand = cabinet(f.palette, *size)
                dress(f.palette, stand, 1.2)
                f.beside(stand, pose, one.size, side)
    f.store(cabinet(f.palette, f.draw(0.9, 2.2), f.draw(0.5, 0.62), f.draw(1.8, 2.25)), 0.4)
    if f.chance(0.6):
        f.store(cabinet(f.palette, f.draw(0.7, 1.3), 0.45, f.draw(0.7, 1.1)), 0.3)
    if f.chance(0.5):
        f.desk(f.draw(0.9, 1.4))
    if f.chance(0.35):
        f.store(shelf(f.palette, f.draw(0.5, 1.0), 0.3, f.draw(1.0, 2.1)))
    if f.chance(0.3):
        f.at_wall(sofa(f.palette, f.draw(0.75, 0.95)), 0.3, gap=0.2)


def _living(f: Furnisher) -> None:
    f.sofa_corner()
    for _ in range(int(f.rng.integers(1, 3))):
        f.store(shelf(f.palette, f.draw(0.6, 1.8), f.draw(0.26, 0.36), f.draw(1.2, 2.2)))
    if f.chance(0.5):
        f.store(cabinet(f.palette, f.draw(0.8, 1.5), 0.42, f.draw(0.7, 1.2)), 0.3)
    if f.plan.size[0] * f.plan.size[1] > 18 and f.chance(0.7):
        f.laid_table(center=False)


def _office(f: Furnisher) -> None:
    area = f.plan.size[0] * f.plan.size[1]
    for _ in range(max(1, min(5, round(area / f.draw(4.5, 7))))):
        f.desk(f.draw(1.2, 1.8))
    for _ in range(int(f.rng.integers(1, 4))):
        if f.chance(0.5):
            f.store(shelf(f.palette, f.draw(0.6, 1.4), 0.32, f.draw(1.2, 2.2)))
        else:
            f.store(cabinet(f.palette, f.draw(0.4, 1.0), 0.45, f.draw(0.7, 2.0)), 0.3)
    if area > 15 and f.chance(0.5):
        f.laid_table(center=False)
    if f.chance(0.4):
        f.at_wall(machine(f.palette), 0.4)
    if f.chance(0.5):
        board = Item("picture", (f.draw(1.2, 2.0), 0.05, 1.0))
        white = Material("plain", (0.95, 0.95, 0.95), (0.9, 0.9, 0.9), 0.5, lost=0.1)
        board.box((0, 0, 0.5), (board.size[0], 0.02, 1.0), f.palette.metal())
        board.box((0, 0.005, 0.5), (board.size[0] - 0.05, 0.02, 0.95), white)
        f.at_wall(board, 0.0, 0.95, 0.03)


def _kitchen(f: Furnisher) -> None:
    walls = sorted(f.plan.walls, key=lambda wall: -wall.length)
    body = f.palette.front()
    runs, wanted = 0, 2 if f.chance(0.6) else 1
    for wall in walls:
        if runs < wanted and f.kitchen_wall(wall, body, () if runs else ("sink", "stove", "oven")):
            runs += 1
    f.at_wall(fridge(f.palette), 0.5)
    if f.chance(0.3):
        f.at_wall(machine(f.palette), 0.4)
    if f.chance(0.85):
        f.laid_table(center=False)
    if f.chance(0.3):
        f.store(cabinet(f.palette, f.draw(0.6, 1.2), 0.42, f.draw(0.8, 2.0)), 0.3)


def _dining(f: Furnisher) -> None:
    f.laid_table(center=True)
    f.store(cabinet(f.palette, f.draw(1.2, 2.0), 0.45, f.draw(0.7, 0.95)), 0.3)
    if f.chance(0.6):
        f.store(cabinet(f.palette, f.draw(0.8, 1.3), 0.45, f.draw(1.6, 2.1)), 0.3)
    if f.chance(0.5):
        f.store(shelf(f.palette, f.draw(0.5, 1.2), 0.3, f.draw(1.0, 2.1)))
    if f.chance(0.3):
        f.at_wall(sofa(f.palette, f.draw(0.8, 1.7)), 0.3, gap=0.15)


# Of each kind of room: least and largest width, least and largest depth in metres, its furnishing.
_KINDS: dict[str, tuple[tuple[float, float], tuple[float, float], Callable[[Furnisher], None]]] = {
    "bedroom": ((2.8, 4.6), (2.8, 4.8), _bedroom),
    "living": ((3.6, 6.0), (3.4, 5.4), _living),
    "office": ((2.8, 5.4), (2.8, 5.0), _office),
    "kitchen": ((2.6, 4.6), (2.6, 4.8), _kitchen),
    "dining": ((3.0, 5.0), (3.0, 4.8), _dining),
}
KINDS = tuple(_KINDS)


def furnished_room(rng: np.random.Generator) -> tuple[str, Plan]:
    """Draws a kind of room, one of `KINDS`, and furnishes it."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    (w0, w1), (d0, d1), furnish = _KINDS[kind]
    palette = Palette(rng)
    size = (rng.uniform(w0, w1), rng.uniform(d0, d1), rng.uniform(2.35, 3.0))
    furnisher = Furnisher(palette, empty_room(palette, kind, size), rng.uniform(0.2, 1.0))
    furnish(furnisher)
    _finish(furnisher, kind)
    return kind, furnisher.plan


def _finish(f: Furnisher, kind: str) -> None:
    """What any room has: plants, boxes, things on the floor, pictures, boards, lamps."""
    w, d, _ = f.plan.size
    large = sum(item.size[2] > 0.4 and pose.z == 0 for item, pose in f.plan.placed)
    for _ in range(5 - large):
        if f.chance(0.5):
            f.store(shelf(f.palette, f.draw(0.5, 1.4), f.draw(0.26, 0.36), f.draw(0.8, 2.1)))
        else:
            f.store(cabinet(f.palette, f.draw(0.5, 1.4), 0.45, f.draw(0.6, 2.0)))
    for _ in range(int(f.rng.poisson(0.8))):
        f.at_wall(plant(f.palette, f.draw(0.5, 1.6)), gap=0.15)
    if f.chance(0.3):
        f.at_wall(floor_lamp(f.palette), gap=0.15)
    for _ in range(int(f.rng.poisson(1.5 * f.density))):
        f.at_wall(carton(f.palette), gap=0.2)
    for _ in range(int(f.rng.poisson(2.5 * f.density))):
        item = floor_thing(f.palette)
        for _ in range(5):
            at = offset(f.plan.walls[0].pose, f.draw(0.2, w - 0.2), f.draw(0.2, d - 0.2))
            if f.plan.put(item, at._replace(yaw=f.draw(0, 2 * math.pi))) is not None:
                break
    if f.chance(0.45):
        board = wall_board(f.palette, f.draw(0.6, 1.3))
        dress(f.palette, board, f.density)
        f.at_wall(board, 0.0, f.draw(1.35, 1.7), 0.02)
    for _ in range(int(f.rng.poisson(1.0 if kind in ("kitchen", "office") else 2.2))):
        _hang_picture(f)
    if f.chance(0.85) or not f.plan.lights:
        for _ in range(6):
            if f.hang_lamp(
                w * f.draw(0.4, 0.6), d * f.draw(0.4, 0.6), float(f.rng.choice([0, 0, 0.35]))
            ):
                break


def _hang_picture(f: Furnisher) -> None:
    w, h = f.draw(0.25, 1.1), f.draw(0.25, 0.8)
    item = Item("picture", (w, 0.05, h))
    frame = f.palette.front() if f.chance(0.8) else f.palette.metal()
    colors = (
        f.palette.tint((0.1, 0.8), (0.2, 0.95), 1.0),
        f.palette.tint((0.1, 0.8), (0.2, 0.95), 1.0),
    )
    art = Material("painting", *colors, f.draw(0.08, 0.25))
    item.box((0, 0, h / 2), (w, 0.03, h), frame)
    border = f.draw(0.02, 0.06)
    item.box((0, 0.006, h / 2), (w - 2 * border, 0.03, h - 2 * border), art)
    f.at_wall(item, 0.0, max(f.draw(1.3, 1.75) - h / 2, 1.0), 0.02)
