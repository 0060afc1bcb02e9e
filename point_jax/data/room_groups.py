"""Groups of furniture in procedural rooms: desks, laid tables, sofa corners, kitchens."""

import math

import numpy as np

from point_jax.data.room_clutter import (
    bin_,
    dress,
    keyboard,
    laptop,
    monitor,
)
from point_jax.data.room_furniture import chair, office_chair, sofa, table
from point_jax.data.room_lamps import ceiling_lamp, floor_lamp
from point_jax.data.room_plan import Block, Plan, Wall
from point_jax.data.room_sketch import Item, Palette, Pose
from point_jax.data.room_storage import cabinet, hood, kitchen_run, upper_cabinets
from point_jax.data.room_textures import Material


def offset(pose: Pose, x: float, y: float, turn: float = 0.0) -> Pose:
    """The pose x to the right and y ahead of another, turned by `turn`."""
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    return Pose(pose.x + c * x - s * y, pose.y + s * x + c * y, pose.z, pose.yaw + turn)


class Furnisher:
    """Puts furniture into one plan.

    Attributes:
        palette: the room's materials.
        plan: what is furnished.
        density: how much clutter there is, about 0.2 to 1.
        rng: draws everything.
    """

    def __init__(self, palette: Palette, plan: Plan, density: float):
        self.palette, self.plan, self.density = palette, plan, density
        self.rng = palette.rng

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.uniform() < probability)

    def draw(self, low: float, high: float) -> float:
        """Uniform between two bounds."""
        return float(self.rng.uniform(low, high))

    def at_wall(
        self, item: Item, front: float = 0.0, z: float = 0.0, gap: float = 0.05
    ) -> Pose | None:
        """Puts an item against a wall with `front` metres of free floor before it, if it fits."""
        found = self.plan.along_wall(self.rng, item, z, front, (0.015, max(gap, 0.02)))
        return found[0] if found else None

    def store(self, item: Item, front: float = 0.2) -> None:
        """Puts a cupboard or shelf with things on it against a wall."""
        dress(self.palette, item, self.density)
        self.at_wall(item, front)

    def beside(self, item: Item, pose: Pose, size: tuple[float, float, float], side: int) -> None:
        """Puts an item left (-1) or right (1) of another of the given size, backs aligned."""
        x = side * (size[0] / 2 + item.size[0] / 2 + self.draw(0.02, 0.12))
        self.plan.put(item, offset(pose, x, (item.size[1] - size[1]) / 2), soft=True)

    def rug(self, pose: Pose, w: float, d: float) -> None:
        """Lays a rug, also under furniture, if the room has the place."""
        if not self.plan.fits(Block(pose.x, pose.y, w, d, pose.yaw, -0.5, -0.4)):
            return
        rug = Item("rug")
        cloth = self.palette.fabric()._replace(scale=self.draw(0.08, 0.4))
        if self.chance(0.2):
            rug.cylinder((0, 0, 0.006), (w, d, 0.014), cloth)
        else:
            rug.box((0, 0, 0.006), (w, d, 0.014), cloth)
            if self.chance(0.5):
                rug.box((0, 0, 0.008), (w - 0.3, d - 0.3, 0.014), self.palette.fabric())
        self.plan.add(rug, pose)

    def desk(self, w: float) -> None:
        """A desk at a wall with screens and papers on it and a chair before it."""
        rng, palette = self.rng, self.palette
        d, h = self.draw(0.6, 0.8), self.draw(0.7, 0.77)
        desk = table(palette, w, d, h, "desk")
        screens = (
            int(rng.choice([0, 1, 2], p=[0.15, 0.55, 0.3])) if w > 1.3 else int(self.chance(0.6))
        )
        for i in range(screens):
            side = i - (screens - 1) / 2
            at = Pose(side * 0.62 + rng.normal(0, 0.03), -d / 2 + 0.17, h, -0.25 * side)
            desk.carry(monitor(palette, self.draw(0.42, 0.6)), at)
        if screens:
            at = Pose(rng.normal(0, 0.05), d / 2 - 0.18, h, rng.normal(0, 0.06))
            desk.carry(keyboard(palette), at)
        elif self.chance(0.6):
            desk.carry(laptop(palette), Pose(rng.normal(0, 0.1), 0.0, h, rng.normal(0, 0.1)))
        dress(palette, desk, self.density)
        found = self.plan.along_wall(rng, desk, 0.0, 0.75)
        if found is None:
            return
        pose, block = found
        seat = office_chair(palette) if self.chance(0.75) else chair(palette)
        out = d / 2 + seat.size[1] / 2 + self.draw(-0.05, 0.2)
        at = offset(pose, rng.normal(0, 0.06), out, math.pi + rng.normal(0, 0.3))
        self.plan.put(seat, at, (block,), soft=True)
        if self.chance(0.35):
            self.beside(bin_(palette), pose, desk.size, int(rng.choice([-1, 1])))

    def laid_table(self, center: bool) -> None:
        """A table with chairs around it that look at it, in the middle or anywhere."""
        rng, palette = self.rng, self.palette
        round_ = self.chance(0.35)
        w = self.draw(0.8, 1.3) if round_ else self.draw(1.1, 2.1 if center else 1.6)
        d = w if round_ else self.draw(0.75, 1.0)
        width, depth, height = self.plan.size
        for attempt in range(60):
            if attempt % 20 == 19:
                w, d = 0.85 * w, 0.85 * d
            spread = 0.5 * min(0.1 + attempt / 40, 0.3 if center else 1.0)
            x, y = (
                width * (0.5 + self.draw(-spread, spread)),
                depth * (0.5 + self.draw(-spread, spread)),
            )
            yaw = (math.pi / 2 if self.chance(0.5) else 0.0) + rng.normal(0, 0.05)
            if self.plan.fits(Block(x, y, w + 0.7, d + 0.7, yaw, 0.0, 1.0), soft=True):
                break
        else:
            return
        one = table(palette, w, d, self.draw(0.71, 0.78))
        dress(palette, one, self.density * 0.8)
        pose = Pose(x, y, 0.0, yaw)
        if (block := self.plan.put(one, pose, soft=True)) is None:
            return
        if self.chance(0.35):
            self.rug(pose, w + 1.0, d + 1.0)
        seats: list[tuple[float, float, float, float]] = []  # x, y of the edge; direction away
        if round_:
            count, start = max(2, int(math.pi * w / 0.8)), self.draw(0, math.pi)
            for i in range(count):
                a = start + 2 * math.pi * i / count
                seats.append((w / 2 * math.cos(a), w / 2 * math.sin(a), math.cos(a), math.sin(a)))
        else:
            each = max(1, int(w / 0.65))
            for i in range(each):
                side = ((i + 0.5) / each - 0.5) * w
                seats += [(side, d / 2, 0.0, 1.0), (side, -d / 2, 0.0, -1.0)]
            if self.chance(0.5):
                seats += [(w / 2 + 0.1, 0.0, 1.0, 0.0), (-w / 2 - 0.1, 0.0, -1.0, 0.0)]
        alike, seat = self.chance(0.85), chair(palette)
        for sx, sy, ux, uy in seats:
            if not alike:
                seat = chair(palette)
            if self.chance(0.08):
                continue
            away = seat.size[1] / 2 + self.draw(-0.1, 0.12)
            turn = math.atan2(ux, -uy) + rng.normal(0, 0.12)  # its front, +y, looks at the table
            at = offset(pose, sx + ux * away, sy + uy * away, turn)
            self.plan.put(seat, at, (block,), soft=True)
        if self.chance(0.6):
            self.hang_lamp(pose.x, pose.y, self.draw(0.4, max(0.41, height - 1.9)))

    def hang_lamp(self, x: float, y: float, drop: float) -> bool:
        """Hangs a lamp from the ceiling and lets it light the room; whether there was place."""
        height = self.plan.size[2]
        lamp = ceiling_lamp(self.palette, drop)
        zone = Block(x, y, *lamp.size[:2], 0.0, height - lamp.size[2], height)
        if not self.plan.fits(zone):
            return False
        self.plan.reserve(zone)
        self.plan.add(lamp, Pose(x, y, height))
        self.plan.lights.append(((x, y, height - drop - 0.25), self.draw(0.8, 1.6)))
        return True

    def sofa_corner(self) -> None:
        """A sofa, a low table before it on a rug, armchairs or lamps at its sides, a television."""
        rng, palette = self.rng, self.palette
        main = sofa(palette, self.draw(1.7, 2.5))
        pose = self.at_wall(main, front=0.9, gap=0.2)
        if pose is None:
            return
        if self.chance(0.4):
            w = d = self.draw(0.6, 0.9)
        else:
            w, d = self.draw(0.8, 1.2), self.draw(0.45, 0.65)
        coffee = table(palette, w, d, self.draw(0.35, 0.48))
        dress(palette, coffee, self.density)
        ahead = main.size[1] / 2 + d / 2 + self.draw(0.25, 0.4)
        spot = offset(pose, rng.normal(0, 0.1), ahead)
        if self.plan.put(coffee, spot, soft=True) is not None and self.chance(0.75):
            self.rug(spot, self.draw(1.6, 2.4), self.draw(1.1, 1.7))
        self.television(pose, ahead)
        for side in (-1, 1):
            if self.chance(0.45):
                small = sofa(palette, self.draw(0.75, 0.95))
                at = offset(pose, side * (main.size[0] / 2 + 0.3), ahead + self.draw(0, 0.3))
                turned = at._replace(yaw=pose.yaw + side * self.draw(1.0, 1.7))
                self.plan.put(small, turned, soft=True)
            elif self.chance(0.5):
                w = self.draw(0.4, 0.5)
                stand = table(palette, w, w, self.draw(0.45, 0.6))
                dress(palette, stand, 1.0)
                self.beside(stand, pose, main.size, side)
            elif self.chance(0.7):
                self.beside(floor_lamp(palette), pose, main.size, side)

    def television(self, seat: Pose, ahead: float) -> None:
        """A low board with a screen: at the wall that the seat looks at, else at any wall."""
        rng, palette = self.rng, self.palette
        size = (self.draw(1.1, 1.9), self.draw(0.36, 0.45), self.draw(0.35, 0.6))
        board = cabinet(palette, *size)
        board.carry(monitor(palette, self.draw(0.8, 1.1)), Pose(rng.normal(0, 0.05), 0, size[2]))
        dress(palette, board, self.density * 0.7)
        for step in range(60, 0, -1):  # from far away towards the seat: the first place that fits
            at = offset(seat, rng.normal(0, 0.15), ahead + 0.8 + 0.06 * step, math.pi)
            behind = offset(at, 0, -board.size[1] / 2 - 0.1)
            inside = self.plan.fits(Block(behind.x, behind.y, 0.1, 0.1, behind.yaw, -0.3, -0.2))
            if not inside and self.plan.put(board, at) is not None:
                return
        self.at_wall(board, 0.5)

    def kitchen_wall(self, wall: Wall, body: Material, fitted: tuple[str, ...]) -> bool:
        """Kitchen units along a wall, clear of doors; whether they found place."""
        u = 0.0
        spans = []
        for o in sorted(wall.openings, key=lambda o: o.u0):
            if o.z0 < 1.0:
                spans.append((u, o.u0 - 0.08))
                u = o.u1 + 0.08
        start, end = max([*spans, (u, wall.length)], key=lambda s: s[1] - s[0])
        longest = min(end - start - 0.05, self.draw(2.0, 3.8))
        run = None
        for w in np.arange(longest, 1.2, -0.3):
            middle = start + 0.025 + w / 2 if self.chance(0.5) else end - 0.025 - w / 2
            run = kitchen_run(self.palette, body, float(w), fitted)
            pose = wall.at(middle, run.size[1] / 2 + 0.005)
            if self.plan.put(run, pose) is not None:
                break
        else:
            return False
        dress(self.palette, run, self.density)
        ahead = offset(pose, 0, run.size[1] / 2 + 0.35)
        self.plan.reserve(Block(ahead.x, ahead.y, w, 0.6, ahead.yaw, 0.0, 1.0, True))
        stoves = [p.x for item, p in run.carried if item.segment == "appliance" and p.z > 0.8]
        self._above_kitchen(wall, body, middle, float(w), stoves)
        return True

    def _above_kitchen(
        self, wall: Wall, body: Material, middle: float, w: float, stoves: list[float]
    ) -> None:
        """Wall cupboards over kitchen units, a hood over the stove."""
        low, high = 1.42, min(self.plan.size[2] - 0.1, 1.42 + self.draw(0.55, 0.85))
        if stoves:
            fume = hood(self.palette)
            fume.size = (0.6, 0.5, min(0.8, self.plan.size[2] - 1.6))
            at = wall.at(middle + stoves[0], 0.26, 1.55)
            if wall.is_free(middle + stoves[0] - 0.3, middle + stoves[0] + 0.3, 1.5, 2.3):
                self.plan.put(fume, at)
        start = middle - w / 2
        while start < middle + w / 2 - 0.5:
            span = min(self.draw(0.6, 1.4), middle + w / 2 - start)
            if wall.is_free(start, start + span, low, high) and self.chance(0.85):
                row = upper_cabinets(self.palette, body, span, high - low)
                self.plan.put(row, wall.at(start + span / 2, 0.185, low))
            start += span + 0.005
