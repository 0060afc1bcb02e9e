"""The plan of a procedural room: its walls, and where things fit.

A plan is a rectangle with up to two corners cut out. Walls run counter-clockwise with the room on
their left; a wall's frame has x along it, y into the room, z up, its origin at the wall's start.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from point_jax.data.room_sketch import Item, Pose


class Opening(NamedTuple):
    """A hole in a wall, (u0, u1) along it and (z0, z1) up, metres."""

    kind: str
    u0: float
    u1: float
    z0: float
    z1: float


@dataclass
class Wall:
    """One wall of a plan; `closed`: whether the room's corners at its start and end are convex."""

    pose: Pose
    length: float
    closed: tuple[bool, bool]
    openings: list[Opening] = field(default_factory=list)

    def at(self, u: float, out: float, z: float = 0.0) -> Pose:
        """The pose of something with its back to the wall, `out` metres from it."""
        c, s = math.cos(self.pose.yaw), math.sin(self.pose.yaw)
        return Pose(self.pose.x + c * u - s * out, self.pose.y + s * u + c * out, z, self.pose.yaw)

    def blocks(self, u0: float, u1: float, z0: float, z1: float) -> bool:
        """Whether something against the wall would stand before a door or hide a window."""
        return not all(u1 <= o.u0 or u0 >= o.u1 or z1 <= max(o.z0, 0.8 * (o.kind == "window"))
                       or z0 >= o.z1 for o in self.openings)  # fmt: skip

    def is_free(self, u0: float, u1: float, z0: float, z1: float) -> bool:
        """Whether no opening overlaps the rectangle."""
        return all(u1 <= o.u0 or u0 >= o.u1 or z1 <= o.z0 or z0 >= o.z1 for o in self.openings)


class Block(NamedTuple):
    """A rectangle of the floor between two heights that is taken; `soft`: only kept free."""

    x: float
    y: float
    w: float
    d: float
    yaw: float
    z0: float
    z1: float
    soft: bool = False


def _overlap(a: Block, b: Block) -> bool:
    """Whether two turned rectangles overlap (separating axes)."""
    if a.z1 <= b.z0 or b.z1 <= a.z0:
        return False
    dx, dy = b.x - a.x, b.y - a.y
    if math.hypot(dx, dy) >= (math.hypot(a.w, a.d) + math.hypot(b.w, b.d)) / 2:
        return False
    c, s = abs(math.cos(a.yaw - b.yaw)), abs(math.sin(a.yaw - b.yaw))
    for one, other in ((a, b), (b, a)):
        ux, uy = math.cos(one.yaw), math.sin(one.yaw)
        if abs(dx * ux + dy * uy) >= (one.w + other.w * c + other.d * s) / 2:
            return False
        if abs(dy * ux - dx * uy) >= (one.d + other.w * s + other.d * c) / 2:
            return False
    return True


class Plan:
    """The room being furnished: walls, height, what stands where.

    Attributes:
        size: width (x), depth (y), height (z) of the box around the room, metres, from (0, 0, 0).
        outline: corners of the floor, counter-clockwise.
        walls: one for each side of the outline.
        placed: the items of the room so far, with their poses.
        lights: positions and strengths of what lights the room.
    """

    def __init__(self, size: tuple[float, float, float], cuts: dict[int, tuple[float, float]]):
        """Makes the plan.

        Args:
            size: width, depth and height, metres.
            cuts: width and depth cut out of corners, 0 at the origin, then counter-clockwise.
        """
        self.size = size
        self.placed: list[tuple[Item, Pose]] = []
        self.lights: list[tuple[tuple[float, float, float], float]] = []
        self._blocks: list[Block] = []
        w, d, h = size
        corners = [(0.0, 0.0), (w, 0.0), (w, d), (0.0, d)]
        self.outline: list[tuple[float, float]] = []
        convex: list[bool] = []
        for i, (x, y) in enumerate(corners):
            if i not in cuts:
                self.outline.append((x, y))
                convex.append(True)
                continue
            cw, cd = cuts[i]
            ix, iy = (cw if x == 0 else w - cw), (cd if y == 0 else d - cd)
            ends = [(x, iy), (ix, y)] if i % 2 == 0 else [(ix, y), (x, iy)]
            self.outline += [ends[0], (ix, iy), ends[1]]
            convex += [True, False, True]
            self._blocks.append(Block((x + ix) / 2, (y + iy) / 2, cw, cd, 0.0, -1.0, h + 1))
        self.walls = []
        for i, (x, y) in enumerate(self.outline):
            j = (i + 1) % len(self.outline)
            dx, dy = self.outline[j][0] - x, self.outline[j][1] - y
            pose = Pose(x, y, 0.0, math.atan2(dy, dx))
            self.walls.append(Wall(pose, math.hypot(dx, dy), (convex[i], convex[j])))

    def fits(self, block: Block, ignore: tuple[Block, ...] = (), soft: bool = False) -> bool:
        """Whether a block lies within the room and overlaps no other.

        Args:
            block: the block.
            ignore: blocks that it may overlap.
            soft: whether it may overlap what is only kept free.
        """
        c, s = abs(math.cos(block.yaw)), abs(math.sin(block.yaw))
        half_w, half_d = (block.w * c + block.d * s) / 2, (block.w * s + block.d * c) / 2
        w, d, h = self.size
        inside = (
            half_w - 1e-3 <= block.x <= w - half_w + 1e-3
            and half_d - 1e-3 <= block.y <= d - half_d + 1e-3
            and block.z1 <= h
        )
        others = (b for b in self._blocks if b not in ignore and not (soft and b.soft))
        return inside and not any(_overlap(block, b) for b in others)

    def reserve(self, block: Block) -> None:
        """Keeps a block free of what comes later."""
        self._blocks.append(block)

    def put(
        self, item: Item, pose: Pose, ignore: tuple[Block, ...] = (), soft: bool = False
    ) -> Block | None:
        """Adds an item if it fits (see `fits`); returns the block that it takes, else None."""
        w, d, h = item.size
        block = Block(pose.x, pose.y, w, d, pose.yaw, pose.z, pose.z + h)
        if not self.fits(block, ignore, soft):
            return None
        self._blocks.append(block)
        self.placed.append((item, pose))
        return block

    def add(self, item: Item, pose: Pose) -> None:
        """Adds an item that takes no room (rugs, walls)."""
        self.placed.append((item, pose))

    def along_wall(
        self,
        rng: np.random.Generator,
        item: Item,
        z: float = 0.0,
        front: float = 0.0,
        gap: tuple[float, float] = (0.01, 0.06),
        tries: int = 50,
    ) -> tuple[Pose, Block] | None:
        """Puts an item with its back to some wall, often into a corner.

        Args:
            rng: draws the place.
            item: what to put.
            z: height of its underside.
            front: metres of floor before it to keep free of what comes later.
            gap: least and largest distance from the wall.
            tries: places to try.

        Returns:
            Where it stands, None if it fits nowhere.
        """
        w, d, h = item.size
        walls = [wall for wall in self.walls if wall.length > w + 0.04]
        if not walls:
            return None
        odds = np.array([wall.length for wall in walls])
        for _ in range(tries):
            wall = walls[int(rng.choice(len(walls), p=odds / odds.sum()))]
            u = rng.uniform(w / 2 + 0.02, wall.length - w / 2 - 0.02)
            if rng.uniform() < 0.35:
                u = w / 2 + 0.03 if rng.uniform() < 0.5 else wall.length - w / 2 - 0.03
            back = rng.uniform(*gap)
            pose = wall.at(u, d / 2 + back, z)
            reach = wall.at(u, (d + front) / 2 + back)
            zone = Block(reach.x, reach.y, w, d + front, reach.yaw, z, z + h)
            if wall.blocks(u - w / 2, u + w / 2, z, z + h):
                continue
            if self.fits(zone):
                block = self.put(item, pose)
                if block is not None:
                    if front:
                        ahead = wall.at(u, d + back + front / 2)
                        zone = Block(ahead.x, ahead.y, w * 0.8, front, ahead.yaw, 0.0, 1.0, True)
                        self.reserve(zone)
                    return pose, block
        return None
