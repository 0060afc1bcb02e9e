"""Building blocks of procedural rooms: items made of primitives, and the palette of a room.

An item stands in its own frame: z = 0 is what it stands on, +y is its front, the origin is the
middle of its footprint. Items carry smaller items (cushions, books) with a pose of their own.
"""

import colorsys
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from point_jax.data.raycast import BOX, CYLINDER, ELLIPSOID, Primitives
from point_jax.data.room_textures import Color, Material

Triple = tuple[float, float, float]


class Pose(NamedTuple):
    """Where an item stands in its parent: position in metres and a turn about z in radians."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    yaw: float = 0.0


class Top(NamedTuple):
    """A rectangle that carries smaller items: centre (x, y), size (w, d), height z, free height."""

    x: float
    y: float
    w: float
    d: float
    z: float
    room: float = 0.5
    kind: str = "table"


class Part(NamedTuple):
    """One primitive of an item; `turn` is yaw, pitch (about y), roll (about x) in radians."""

    shape: int
    center: Triple
    size: Triple
    turn: Triple
    taper: float
    material: Material


@dataclass
class Item:
    """A piece of furniture or a part of the room, being built.

    Attributes:
        segment: the class name of its own parts.
        size: width (x), depth (y), height (z) of the space it needs, metres.
        parts: its primitives.
        tops: where smaller items may be put.
        carried: the items on it with their poses; each is an instance of its own.
    """

    segment: str
    size: Triple = (0.0, 0.0, 0.0)
    parts: list[Part] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    carried: list[tuple["Item", Pose]] = field(default_factory=list)

    def box(
        self, center: Triple, size: Triple, material: Material, turn: Triple = (0.0, 0.0, 0.0)
    ) -> None:
        """Adds a box given its full size."""
        self.parts.append(Part(BOX, center, size, turn, 0.0, material))

    def cylinder(
        self,
        center: Triple,
        size: Triple,
        material: Material,
        turn: Triple = (0.0, 0.0, 0.0),
        taper: float = 0.0,
    ) -> None:
        """Adds a cylinder given its full size; `taper` > 0 widens it towards its top."""
        self.parts.append(Part(CYLINDER, center, size, turn, taper, material))

    def ellipsoid(
        self, center: Triple, size: Triple, material: Material, turn: Triple = (0.0, 0.0, 0.0)
    ) -> None:
        """Adds an ellipsoid given its full size."""
        self.parts.append(Part(ELLIPSOID, center, size, turn, 0.0, material))

    def legs(
        self, w: float, d: float, h: float, thick: float, material: Material, round_: bool
    ) -> None:
        """Adds four legs in the corners of a w x d rectangle, from z = 0 to h."""
        add = self.cylinder if round_ else self.box
        for x in (-1, 1):
            for y in (-1, 1):
                center = (x * (w - thick) / 2, y * (d - thick) / 2, h / 2)
                add(center, (thick, thick, h), material)

    def shift(self, y: float) -> None:
        """Moves everything along y, to bring the origin back to the footprint's middle."""
        self.parts = [
            p._replace(center=(p.center[0], p.center[1] + y, p.center[2])) for p in self.parts
        ]
        self.carried = [(item, pose._replace(y=pose.y + y)) for item, pose in self.carried]

    def carry(self, item: "Item", pose: Pose) -> None:
        """Puts another item on this one."""
        self.carried.append((item, pose))


def flatten(item: Item, pose: Pose) -> list[tuple[Item, Pose]]:
    """The item and everything it carries, with poses in the frame that `pose` is in."""
    result = [(item, pose)]
    c, s = np.cos(pose.yaw), np.sin(pose.yaw)
    for child, p in item.carried:
        at = Pose(pose.x + c * p.x - s * p.y, pose.y + s * p.x + c * p.y, pose.z + p.z)
        result += flatten(child, at._replace(yaw=pose.yaw + p.yaw))
    return result


def pack_primitives(placed: list[tuple[Item, Pose]]) -> Primitives:
    """The primitives of flattened items in world coordinates, in the order of items and parts."""
    parts = [part for item, _ in placed for part in item.parts]
    poses = np.array([pose for item, pose in placed for _ in item.parts]).reshape(-1, 4)
    frames = _rotations(poses[:, 3])
    center = np.array([part.center for part in parts]).reshape(-1, 3)
    turn = np.array([part.turn for part in parts]).reshape(-1, 3)
    axes = np.einsum("nij,njk->nik", frames, _rotations(turn[:, 0], turn[:, 1], turn[:, 2]))
    world = np.einsum("nij,nj->ni", frames, center) + poses[:, :3]
    size = np.array([part.size for part in parts]).reshape(-1, 3)
    return Primitives(
        shape=np.array([part.shape for part in parts], np.int8),
        center=world.astype(np.float32),
        axes=axes.astype(np.float32),
        half=np.maximum(size / 2, 5e-4).astype(np.float32),
        taper=np.array([part.taper for part in parts], np.float32),
    )


def _rotations(
    yaw: np.ndarray, pitch: np.ndarray | None = None, roll: np.ndarray | None = None
) -> np.ndarray:
    """(n, 3, 3) rotations Rz(yaw) Ry(pitch) Rx(roll)."""
    one, zero = np.ones_like(yaw), np.zeros_like(yaw)

    def rotation(angle: np.ndarray, axis: int) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        rows = {
            0: [one, zero, zero, zero, c, -s, zero, s, c],
            1: [c, zero, s, zero, one, zero, -s, zero, c],
            2: [c, -s, zero, s, c, zero, zero, zero, one],
        }[axis]
        return np.stack(rows, axis=-1).reshape(-1, 3, 3)

    result = rotation(yaw, 2)
    if pitch is not None:
        result = np.einsum("nij,njk->nik", result, rotation(pitch, 1))
    if roll is not None:
        result = np.einsum("nij,njk->nik", result, rotation(roll, 0))
    return result


_WOODS: tuple[tuple[Color, Color], ...] = (
    ((0.72, 0.53, 0.34), (0.55, 0.37, 0.21)),  # oak
    ((0.86, 0.74, 0.55), (0.75, 0.60, 0.41)),  # birch
    ((0.42, 0.27, 0.17), (0.28, 0.17, 0.10)),  # walnut
    ((0.55, 0.27, 0.16), (0.40, 0.17, 0.10)),  # cherry
    ((0.25, 0.18, 0.14), (0.15, 0.11, 0.09)),  # wenge
    ((0.80, 0.64, 0.42), (0.64, 0.44, 0.24)),  # pine
    ((0.66, 0.62, 0.56), (0.50, 0.46, 0.41)),  # weathered
)
_METALS: tuple[Color, ...] = (
    (0.70, 0.71, 0.73),
    (0.20, 0.20, 0.21),
    (0.88, 0.88, 0.87),
    (0.72, 0.58, 0.32),
    (0.45, 0.32, 0.24),
)
_FABRICS = ("weave", "weave", "plain", "cloudy", "stripes", "plaid", "dots", "speckle", "checker")


class Palette:
    """The materials of one room: a few woods, metals and hues that its furniture shares."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.woods = [_WOODS[i] for i in rng.permutation(len(_WOODS))[:3]]
        self.metals = [_METALS[i] for i in rng.permutation(len(_METALS))[:2]]
        first = rng.uniform()
        self.hues = [first, first + rng.uniform(0.08, 0.2), first + rng.uniform(0.4, 0.6)]

    def _near(self, color: Color, spread: float = 0.04) -> Color:
        r, g, b = (min(max(c + self.rng.normal(0, spread), 0.02), 0.98) for c in color)
        return (r, g, b)

    def tint(
        self, saturation: tuple[float, float], value: tuple[float, float], any_hue: float = 0.3
    ) -> Color:
        """A colour, with probability `any_hue` of a hue that is not of the room's."""
        rng = self.rng
        own = self.hues[int(rng.integers(len(self.hues)))] + rng.normal(0, 0.02)
        hue = rng.uniform() if rng.uniform() < any_hue else own
        return colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))

    def wood(self) -> Material:
        """Wood of one of the room's kinds."""
        dark, light = self.woods[int(self.rng.choice(3, p=[0.6, 0.3, 0.1]))]
        scale = self.rng.uniform(0.08, 0.18)
        return Material("wood", self._near(dark, 0.02), self._near(light, 0.02), scale)

    def metal(self) -> Material:
        """Metal, which a depth camera does not always see."""
        color = self._near(self.metals[int(self.rng.choice(2, p=[0.7, 0.3]))], 0.02)
        return Material("plain", color, color, 0.2, lost=0.1)

    def paint(self) -> Material:
        """Lacquer: white, grey, black or coloured."""
        r = self.rng.uniform()
        if r < 0.4:
            color = self._near((0.9, 0.89, 0.86))
        elif r < 0.6:
            color = self._near((0.3, 0.3, 0.31), 0.1)
        else:
            color = self.tint((0.2, 0.8), (0.3, 0.9))
        return Material("plain", color, color, 0.3)

    def front(self) -> Material:
        """What cupboards and tables are made of: wood or lacquer."""
        return self.wood() if self.rng.uniform() < 0.6 else self.paint()

    def fabric(self) -> Material:
        """Cloth with one of many patterns."""
        texture = _FABRICS[int(self.rng.integers(len(_FABRICS)))]
        color = self.tint((0.05, 0.7), (0.25, 0.95))
        mixed = texture in ("weave", "plain", "cloudy", "speckle")
        accent = self._near(color, 0.1) if mixed else self.tint((0.05, 0.6), (0.3, 0.95))
        return Material(texture, color, accent, self.rng.uniform(0.05, 0.16))

    def leather(self) -> Material:
        """Plain covers in browns, blacks and creams."""
        kinds = ((0.35, 0.22, 0.14), (0.12, 0.11, 0.11), (0.82, 0.77, 0.68), (0.5, 0.15, 0.12))
        color = self._near(kinds[int(self.rng.integers(len(kinds)))], 0.03)
        return Material("cloudy", color, self._near(color, 0.04), 0.15)

    def cover(self) -> Material:
        """What seats are covered with."""
        return self.leather() if self.rng.uniform() < 0.25 else self.fabric()

    def vivid(self) -> Material:
        """Plastic or paper in any strong colour."""
        color = self.tint((0.2, 0.95), (0.2, 0.95), any_hue=0.8)
        return Material("plain", color, color, 0.1)
