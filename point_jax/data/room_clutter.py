"""Small things of procedural rooms: plants, books, screens, boxes, and what lies on tops."""

import math
from collections.abc import Callable

from point_jax.data.room_furniture import cushion
from point_jax.data.room_lamps import table_lamp
from point_jax.data.room_sketch import Item, Palette, Pose, Top
from point_jax.data.room_textures import Material

_BLACK = Material("plain", (0.06, 0.06, 0.07), (0.1, 0.1, 0.1), 0.3)
_WHITE = Material("plain", (0.93, 0.92, 0.9), (0.9, 0.9, 0.9), 0.3)
_PAGES = Material("stripes", (0.93, 0.9, 0.82), (0.85, 0.82, 0.74), 0.01)
_GLASS = Material("plain", (0.6, 0.7, 0.68), (0.6, 0.7, 0.7), 0.1, lost=0.5)


def books(palette: Palette, w: float, d: float, h: float) -> Item:
    """A row of upright books w wide on a shelf of depth d and free height h, some leaning."""
    rng = palette.rng
    item = Item("books", (w, d, h))
    x = -w / 2
    series = rng.uniform() < 0.25
    cover, tall = palette.vivid(), rng.uniform(0.6, 0.95)
    while True:
        thick = rng.uniform(0.018, 0.06)
        if x + thick > w / 2:
            return item
        if not series or rng.uniform() < 0.1:
            cover, tall = palette.vivid(), rng.uniform(0.55, 0.95)
        deep = min(d * 0.95, rng.uniform(0.13, 0.22))
        high = min(h * tall, 0.36)
        lean = (0.0, rng.uniform(0.05, 0.2), 0.0) if rng.uniform() < 0.06 else (0.0, 0.0, 0.0)
        y = d / 2 - deep / 2 - rng.uniform(0.0, max(0.01, min(0.05, d - deep)))
        item.box((x + thick / 2, y, high / 2), (thick - 0.001, deep, high), cover, lean)
        x += thick + (0.05 if lean[1] else 0.0)


def stack(palette: Palette) -> Item:
    """A pile of books or papers lying flat."""
    rng = palette.rng
    w, d = rng.uniform(0.2, 0.3), rng.uniform(0.15, 0.22)
    item = Item("books", (w, d, 0.2))
    z = 0.0
    for _ in range(int(rng.integers(1, 6))):
        thick = rng.uniform(0.012, 0.045)
        size = (w * rng.uniform(0.75, 1), d * rng.uniform(0.75, 1), thick)
        turn = (rng.normal(0, 0.15), 0.0, 0.0)
        item.box((0, 0, z + thick / 2), size, palette.vivid(), turn)
        inner = (size[0] * 1.005, size[1] * 0.98, thick * 0.7)
        item.box((0.002, 0, z + thick / 2), inner, _PAGES, turn)
        z += thick
    item.size = (w, d, z)
    return item


def carton(palette: Palette, largest: float = 0.5) -> Item:
    """A cardboard box, a basket or a coloured storage box."""
    rng = palette.rng
    w, d, h = (rng.uniform(0.4, 1.0) * largest for _ in range(3))
    item = Item("box", (w, d, h))
    if rng.uniform() < 0.6:
        card = Material("cloudy", (0.68, 0.52, 0.35), (0.6, 0.45, 0.29), 0.3)
        item.box((0, 0, h / 2), (w, d, h), card)
        tape = Material("plain", (0.78, 0.66, 0.45), (0.8, 0.7, 0.5), 0.1)
        item.box((0, 0, h / 2 + 0.001), (min(0.06, w / 3), d + 0.002, h), tape)
    else:
        skin = palette.fabric() if rng.uniform() < 0.5 else palette.vivid()
        item.box((0, 0, h * 0.45), (w * 0.96, d * 0.96, h * 0.9), skin)
        item.box(
            (0, 0, h * 0.92), (w, d, h * 0.16), skin if rng.uniform() < 0.5 else palette.paint()
        )
    return item


def plant(palette: Palette, h: float) -> Item:
    """A pot plant of total height h: bush, broad leaves, palm, cactus or small tree."""
    rng = palette.rng
    pot_h = h * rng.uniform(0.2, 0.35)
    pot_w = min(max(pot_h * rng.uniform(0.8, 1.1), 0.07), 0.4)
    item = Item("plant", (pot_w * 1.3, pot_w * 1.3, h))
    clay = Material("plain", (0.66, 0.37, 0.25), (0.6, 0.35, 0.2), 0.1)
    pot = clay if rng.uniform() < 0.4 else palette.paint()
    taper = float(rng.uniform(0.0, 0.3))
    wide = pot_w / (1 + taper)
    if rng.uniform() < 0.8:
        item.cylinder((0, 0, pot_h / 2), (wide, wide, pot_h), pot, taper=taper)
    else:
        item.box((0, 0, pot_h / 2), (pot_w, pot_w, pot_h), pot)
    soil = Material("speckle", (0.2, 0.14, 0.1), (0.3, 0.22, 0.16), 0.05)
    item.cylinder((0, 0, pot_h), (wide, wide, 0.01), soil)
    g = rng.uniform(0.3, 0.6)
    leaf = Material("cloudy", (0.15, g, 0.12), (0.3, g + 0.2, 0.2), 0.06)
    bark = Material("wood", (0.4, 0.3, 0.2), (0.3, 0.22, 0.15), 0.05)
    rise = h - pot_h
    style = rng.choice(["bush", "leaves", "palm", "cactus", "tree"])
    if style == "bush":
        for _ in range(int(rng.integers(5, 10))):
            r = rng.uniform(0.3, 0.5) * rise
            x, y = rng.normal(0, rise * 0.16, 2)
            at = (x, y, pot_h + rng.uniform(0.3, 0.8) * rise)
            item.ellipsoid(at, (r, r, r * 0.8), leaf, tuple(rng.uniform(0, 1, 3)))
    elif style == "cactus":
        r = min(rise * rng.uniform(0.2, 0.35), 0.18)
        item.cylinder((0, 0, pot_h + rise * 0.42), (r, r, rise * 0.85), leaf)
        item.ellipsoid((0, 0, pot_h + rise * 0.85), (r, r, r), leaf)
        for x in (-1, 1):
            item.ellipsoid(
                (x * r * 0.8, 0, pot_h + rise * 0.5), (r * 0.6, r * 0.6, rise * 0.4), leaf
            )
    else:
        trunk = {"leaves": 0.15, "palm": 0.55, "tree": 0.6}[style] * rise
        thick = max(0.012, 0.03 * rise)
        item.cylinder((0, 0, pot_h + trunk / 2), (thick, thick, trunk), bark, taper=-0.2)
        if style == "tree":
            for _ in range(6):
                x, y, z = rng.normal(0, rise * 0.11, 3)
                r = rise * rng.uniform(0.25, 0.4)
                item.ellipsoid((x, y, pot_h + rise * 0.78 + z), (r, r, r * 0.7), leaf)
        else:
            count = int(rng.integers(7, 13))
            for i in range(count):
                yaw = 2 * math.pi * i / count + rng.normal(0, 0.2)
                tilt = rng.uniform(-1.3, 0.2) if style == "palm" else rng.uniform(-1.4, -0.6)
                size = rise * (rng.uniform(0.4, 0.6) if style == "palm" else rng.uniform(0.6, 0.95))
                reach = size / 2 * math.cos(tilt)
                z = pot_h + trunk - size / 2 * math.sin(tilt)
                at = (reach * math.cos(yaw), reach * math.sin(yaw), z)
                item.ellipsoid(at, (size, size * 0.25, 0.012), leaf, (yaw, tilt, 0.0))
    return item


def monitor(palette: Palette, w: float) -> Item:
    """A screen on a foot, w wide, looking towards +y."""
    rng = palette.rng
    h = w * rng.uniform(0.55, 0.65)
    lift = rng.uniform(0.04, 0.14)
    item = Item("screen", (w, 0.2, h + lift))
    glow = palette.tint((0.1, 0.7), (0.25, 0.8), any_hue=1.0)
    on = Material("screen", glow, (0.92, 0.93, 0.95), 0.04, lost=0.25)
    face = on if rng.uniform() < 0.6 else _BLACK._replace(lost=0.25)
    bezel = _BLACK if rng.uniform() < 0.75 else _WHITE
    item.box((0, 0, 0.008), (w * 0.4, 0.18, 0.015), bezel)
    item.box((0, -0.02, lift / 2 + 0.05), (0.06, 0.03, lift + 0.1), bezel)
    item.box((0, 0, lift + h / 2), (w, 0.035, h), bezel)
    item.box((0, 0.012, lift + h / 2), (w - 0.03, 0.015, h - 0.03), face)
    return item


def laptop(palette: Palette) -> Item:
    """An open laptop looking towards +y."""
    item = Item("screen", (0.34, 0.3, 0.24))
    skin = palette.metal()._replace(lost=0.0)
    item.box((0, 0.03, 0.009), (0.34, 0.24, 0.018), skin)
    item.box((0, 0.05, 0.019), (0.28, 0.12, 0.002), _BLACK._replace(texture="tiles", scale=0.02))
    tilt = (0.0, 0.0, palette.rng.uniform(0.15, 0.45))
    item.box((0, -0.12, 0.12), (0.34, 0.012, 0.23), skin, tilt)
    item.box((0, -0.112, 0.122), (0.31, 0.006, 0.2), _BLACK._replace(lost=0.25), tilt)
    return item


def keyboard(palette: Palette) -> Item:
    """A keyboard with a mouse at its side."""
    item = Item("clutter", (0.58, 0.16, 0.03))
    skin = _BLACK if palette.rng.uniform() < 0.6 else _WHITE
    keys = skin._replace(texture="tiles", scale=0.02, accent=(0.4, 0.4, 0.4))
    item.box((-0.06, 0, 0.012), (0.44, 0.14, 0.022), keys)
    item.ellipsoid((0.24, 0, 0.012), (0.065, 0.11, 0.04), skin)
    return item


def vessel(palette: Palette) -> Item:
    """A cup, bottle, bowl, vase, jar, or plate with fruit."""
    rng = palette.rng
    style = rng.choice(["cup", "bottle", "bowl", "vase", "jar", "fruit"])
    skin = palette.vivid() if rng.uniform() < 0.6 else palette.paint()
    item = Item("clutter", (0.1, 0.1, 0.12))
    if style == "cup":
        item.cylinder((0, 0, 0.05), (0.08, 0.08, 0.1), skin, taper=float(rng.uniform(0, 0.2)))
        item.box((0.05, 0, 0.05), (0.03, 0.012, 0.06), skin)
    elif style == "bottle":
        glass = _GLASS._replace(color=skin.color, lost=0.2) if rng.uniform() < 0.5 else skin
        h = rng.uniform(0.18, 0.26)
        item.size = (0.09, 0.09, h + 0.08)
        item.cylinder((0, 0, h / 2), (0.08, 0.08, h), glass)
        item.cylinder((0, 0, h), (0.053, 0.053, 0.06), glass, taper=-0.5)
        item.cylinder((0, 0, h + 0.05), (0.03, 0.03, 0.07), skin)
    elif style == "vase":
        h, w = rng.uniform(0.18, 0.35), rng.uniform(0.1, 0.16)
        item.size = (w, w, h)
        item.ellipsoid((0, 0, h * 0.42), (w, w, h * 0.85), skin)
        item.cylinder((0, 0, h * 0.88), (w * 0.5, w * 0.5, h * 0.24), skin, taper=0.2)
    elif style == "jar":
        h = rng.uniform(0.1, 0.2)
        item.size = (0.12, 0.12, h)
        item.cylinder((0, 0, h / 2), (0.11, 0.11, h), skin)
        item.cylinder((0, 0, h), (0.115, 0.115, 0.03), palette.metal())
    else:
        w = rng.uniform(0.18, 0.28)
        item.size = (w, w, 0.09)
        item.cylinder((0, 0, 0.03), (w * 0.75, w * 0.75, 0.06), skin, taper=0.33)
        for _ in range(4 if style == "fruit" else 0):
            x, y = rng.uniform(-0.25, 0.25, 2) * w
            fruit = palette.vivid()
            item.ellipsoid((x, y, 0.075), (0.075, 0.075, 0.075), fruit)
    return item


def frame_stand(palette: Palette) -> Item:
    """A small framed photograph standing on a shelf, or a clock, or a figure."""
    rng = palette.rng
    item = Item("clutter", (0.2, 0.1, 0.22))
    style = rng.integers(3)
    if style == 0:
        art = Material(
            "painting", palette.tint((0.2, 0.8), (0.2, 0.9)), palette.vivid().color, 0.05
        )
        lean = (0.0, 0.0, 0.25)
        item.box((0, 0, 0.1), (0.16, 0.015, 0.2), palette.wood(), lean)
        item.box((0, 0.006, 0.1), (0.12, 0.01, 0.16), art, lean)
    elif style == 1:
        skin = palette.vivid()
        item.cylinder((0, 0, 0.07), (0.14, 0.14, 0.05), skin, (0, 0, math.pi / 2))
        item.cylinder((0, 0.01, 0.07), (0.11, 0.11, 0.05), _WHITE, (0, 0, math.pi / 2))
    else:
        skin = palette.paint()
        item.ellipsoid((0, 0, 0.07), (0.09, 0.07, 0.14), skin)
        item.ellipsoid((0, 0, 0.165), (0.06, 0.06, 0.07), skin)
    return item


def bin_(palette: Palette) -> Item:
    """A waste bin."""
    rng = palette.rng
    w, h = rng.uniform(0.2, 0.32), rng.uniform(0.25, 0.5)
    item = Item("clutter", (w, w, h))
    item.cylinder((0, 0, h / 2), (w * 0.87, w * 0.87, h), palette.paint(), taper=0.15)
    item.cylinder((0, 0, h - 0.015), (w * 0.88, w * 0.88, 0.034), _BLACK, taper=0.0)
    return item


def floor_thing(palette: Palette) -> Item:
    """A bag, ball, pair of shoes, or toy that lies about."""
    rng = palette.rng
    style = rng.integers(4)
    skin = palette.vivid()
    item = Item("clutter", (0.35, 0.3, 0.3))
    if style == 0:
        cloth = palette.fabric()
        item.box((0, 0, 0.14), (0.3, 0.17, 0.28), cloth)
        item.ellipsoid((0, 0, 0.28), (0.31, 0.18, 0.24), cloth)
        item.box((0, 0.1, 0.11), (0.2, 0.06, 0.18), palette.fabric())
    elif style == 1:
        r = rng.uniform(0.12, 0.28)
        item.size = (r, r, r)
        item.ellipsoid((0, 0, r / 2), (r, r, r), skin._replace(texture="bars", scale=r / 2))
    elif style == 2:
        for x in (-0.07, 0.07):
            item.ellipsoid((x, 0, 0.04), (0.1, 0.28, 0.1), skin)
            item.cylinder((x, -0.07, 0.07), (0.08, 0.1, 0.08), skin)
    else:
        for i in range(int(rng.integers(3, 7))):
            s = rng.uniform(0.05, 0.1)
            at = (rng.uniform(-0.13, 0.13), rng.uniform(-0.1, 0.1), s / 2 + 0.06 * (i // 4))
            item.box(at, (s, s, s), palette.vivid(), (rng.uniform(0, 3), 0, 0))
    return item


def _box(palette: Palette) -> Item:
    return carton(palette, 0.25)


def _pot(palette: Palette) -> Item:
    return plant(palette, palette.rng.uniform(0.2, 0.35))


# What lies on each kind of top, with odds.
_SMALL: dict[str, tuple[tuple[float, Callable[[Palette], Item]], ...]] = {
    "table": ((0.5, vessel), (0.2, stack), (0.1, laptop), (0.1, _pot), (0.1, frame_stand)),
    "desk": ((0.25, vessel), (0.3, stack), (0.15, table_lamp), (0.15, frame_stand), (0.15, _box)),
    "counter": ((0.7, vessel), (0.1, stack), (0.2, _box)),
    "cabinet": ((0.3, vessel), (0.2, frame_stand), (0.15, table_lamp), (0.15, _pot), (0.2, stack)),
    "low": ((0.35, table_lamp), (0.25, stack), (0.25, frame_stand), (0.15, vessel)),
    "high": ((0.6, carton), (0.2, vessel), (0.2, _pot)),
    "shelf": ((0.4, vessel), (0.3, frame_stand), (0.2, _box), (0.1, _pot)),
}


def _draw(palette: Palette, kind: str) -> Item:
    odds, makers = zip(*_SMALL[kind], strict=True)
    return makers[int(palette.rng.choice(len(makers), p=odds))](palette)


def dress(palette: Palette, item: Item, density: float) -> None:
    """Puts small things on every top of an item, and books on its boards; none touch.

    Args:
        palette: the room's.
        item: furniture, changed in place.
        density: about how many things a square metre of table gets, times ten.
    """
    rng = palette.rng
    for top in item.tops:
        taken: list[tuple[float, float, float]] = []  # x, y, radius
        if top.kind == "shelf" and rng.uniform() < 0.75:
            _fill_board(palette, item, top)
            continue
        count = rng.poisson(min(density * 10 * top.w * top.d, 7))
        for _ in range(count):
            small = _draw(palette, top.kind)
            radius = math.hypot(small.size[0], small.size[1]) / 2
            if small.size[2] > top.room:
                continue
            free_x, free_y = top.w / 2 - radius, top.d / 2 - radius
            if free_x <= 0 or top.d < min(small.size[:2]):
                continue
            x = top.x + rng.uniform(-free_x, free_x)
            y = top.y + (rng.uniform(-free_y, free_y) if free_y > 0 else 0.0)
            old = [(p.x, p.y, math.hypot(i.size[0], i.size[1]) / 2) for i, p in item.carried
                   if abs(p.z - top.z) < 0.1]  # fmt: skip
            if all(math.hypot(x - a, y - b) > radius + r for a, b, r in [*taken, *old]):
                taken.append((x, y, radius))
                turn = rng.normal(0, 0.3) if free_y > 0 else 0.0
                item.carry(small, Pose(x, y, top.z, turn))


def _fill_board(palette: Palette, item: Item, top: Top) -> None:
    """Rows of books with gaps and single things between them."""
    rng = palette.rng
    x, end = -top.w / 2 + 0.01, top.w / 2 - 0.01
    while end - x > 0.12:
        kind = rng.choice(["books", "thing", "gap"], p=[0.6, 0.25, 0.15])
        if kind == "gap":
            x += rng.uniform(0.05, 0.3)
            continue
        if kind == "books":
            w = min(rng.uniform(0.15, 0.6), end - x)
            small = books(palette, w, top.d, top.room)
        else:
            small = _draw(palette, "shelf")
            w = small.size[0]
        if w <= end - x and small.size[1] <= top.d + 0.02 and small.size[2] <= top.room:
            item.carry(small, Pose(top.x + x + w / 2, top.y, top.z))
        x += w + 0.01


def scatter_cushions(palette: Palette, item: Item, count: int) -> None:
    """Puts cushions flat on a bed's far end."""
    for _ in range(count):
        x = palette.rng.uniform(-0.3, 0.3) * item.size[0]
        y = palette.rng.uniform(-0.1, 0.3) * item.size[1]
        if all(math.hypot(x - p.x, y - p.y) > 0.5 for _, p in item.carried):
            z = max(p.center[2] + p.size[2] / 2 for p in item.parts if p.center[1] > -0.2)
            item.carry(cushion(palette, 0.4), Pose(x, y, z - 0.03, palette.rng.uniform(0, 6)))
