"""Seats, tables and beds of procedural rooms, each kind in several styles.

Every function draws a style and sizes from the palette's generator and returns an `Item`.
"""

import math

from point_jax.data.room_sketch import Item, Palette, Pose, Top
from point_jax.data.room_textures import Material


def cushion(palette: Palette, size: float = 0.42) -> Item:
    """A pillow lying flat."""
    rng = palette.rng
    w, d = size * rng.uniform(0.85, 1.15), size * rng.uniform(0.75, 1.0)
    h = rng.uniform(0.1, 0.16)
    item = Item("cushion", (w, d, h))
    cloth = palette.fabric()
    item.ellipsoid((0, 0, h / 2), (w * 1.05, d * 1.05, h), cloth)
    item.box((0, 0, h / 2), (w * 0.8, d * 0.8, h * 0.5), cloth)
    return item


def _leaning(palette: Palette, back_depth: float) -> tuple[Item, float]:
    """A cushion standing against a back rest, and how far from it its middle is."""
    rng = palette.rng
    s = rng.uniform(0.36, 0.48)
    item = Item("cushion", (s, 0.2, s))
    roll = math.pi / 2 - rng.uniform(0.2, 0.4)
    item.ellipsoid((0, 0, s * 0.48), (s * 1.05, s, 0.16), palette.fabric(), (0, 0, roll))
    return item, back_depth + 0.12


def chair(palette: Palette) -> Item:
    """A chair for a table: slats, ladder, solid, shell or stool."""
    rng = palette.rng
    style = rng.choice(
        ["slats", "ladder", "solid", "shell", "stool"], p=[0.25, 0.2, 0.3, 0.17, 0.08]
    )
    w, d = rng.uniform(0.4, 0.48), rng.uniform(0.4, 0.5)
    seat, total = rng.uniform(0.43, 0.48), rng.uniform(0.8, 1.05)
    frame = palette.wood() if rng.uniform() < 0.65 else palette.metal()
    leg = rng.uniform(0.025, 0.045)
    item = Item("chair", (w, d, total))
    round_ = bool(rng.uniform() < 0.4)
    if style == "stool":
        item.size = (w * 0.85, w * 0.85, seat)
        item.legs(w * 0.7, w * 0.7, seat - 0.03, leg, frame, round_)
        top = item.cylinder if round_ else item.box
        top((0, 0, seat - 0.02), (w * 0.85, w * 0.85, 0.04), palette.cover())
        return item
    item.legs(w - 0.02, d - 0.02, seat - 0.02, leg, frame, round_)
    padded = rng.uniform() < 0.5
    surface = palette.cover() if padded or style == "shell" else frame
    thick = 0.07 if padded else 0.03
    item.box((0, 0, seat - thick / 2), (w, d, thick), surface)
    rear, rise = -d / 2 + leg / 2, total - seat
    lean = (0.0, 0.0, rng.uniform(0.03, 0.15))
    middle = seat + rise / 2
    shift = rear - math.tan(lean[2]) * rise / 2
    if style in ("slats", "ladder"):
        for x in (-1, 1):
            item.box((x * (w - leg) / 2, shift, middle), (leg, leg, rise), frame, lean)
        if style == "slats":
            item.box(
                (0, rear - math.tan(lean[2]) * rise, total - 0.03), (w, leg, 0.07), frame, lean
            )
            count = int(rng.integers(3, 6))
            for i in range(count):
                x = ((i + 0.5) / count - 0.5) * (w - 2 * leg)
                item.box((x, shift, middle), (0.025, leg * 0.6, rise), frame, lean)
        else:
            count = int(rng.integers(2, 5))
            for i in range(count):
                up = (i + 0.7) / count
                y = rear - math.tan(lean[2]) * rise * up
                item.box((0, y, seat + rise * up), (w, leg * 0.6, rise * 0.45 / count), frame, lean)
    elif style == "solid":
        item.box((0, shift, middle), (w, 0.05 if padded else 0.025, rise), surface, lean)
    else:
        round_back = (0.0, 0.0, math.pi / 2 + lean[2])
        item.cylinder((0, shift, middle), (w, rise * 1.02, 0.035), surface, round_back)
    if style != "shell" and rng.uniform() < 0.2:
        for x in (-1, 1):
            item.box((x * (w / 2 - 0.02), 0, seat + 0.2), (0.04, d, 0.035), frame)
            item.box((x * (w / 2 - 0.02), d / 2 - 0.04, seat + 0.1), (0.035, 0.035, 0.2), frame)
    return item


def office_chair(palette: Palette) -> Item:
    """A swivel chair on a star base."""
    rng = palette.rng
    w, seat, total = rng.uniform(0.48, 0.54), rng.uniform(0.44, 0.54), rng.uniform(0.85, 1.2)
    item = Item("chair", (0.6, 0.6, total))
    frame, cover = palette.metal(), palette.cover()
    for i in range(5):
        a = 2 * math.pi * i / 5
        item.box(
            (0.14 * math.cos(a), 0.14 * math.sin(a), 0.07), (0.28, 0.045, 0.035), frame, (a, 0, 0)
        )
        item.ellipsoid((0.27 * math.cos(a), 0.27 * math.sin(a), 0.03), (0.06, 0.06, 0.06), frame)
    item.cylinder((0, 0, seat / 2), (0.05, 0.05, seat - 0.06), frame)
    if rng.uniform() < 0.5:
        item.box((0, 0.02, seat - 0.04), (w, w, 0.09), cover)
    else:
        item.cylinder((0, 0.02, seat - 0.04), (w, w, 0.09), cover)
    rise = total - seat
    gap = rng.uniform(0.0, 0.15)
    lean = (0.0, 0.0, rng.uniform(0.05, 0.2))
    high = seat + gap + (rise - gap) / 2
    if rng.uniform() < 0.5:
        item.box((0, -w / 2 - 0.02, high), (w * 0.9, 0.06, rise - gap), cover, lean)
    else:
        item.ellipsoid((0, -w / 2 - 0.02, high), (w, 0.13, (rise - gap) * 1.05), cover, lean)
    item.box((0, -w / 2, seat + gap / 2), (0.07, 0.03, gap + 0.14), frame)
    if rng.uniform() < 0.6:
        for x in (-1, 1):
            item.box((x * w / 2, 0, seat + 0.2), (0.06, 0.27, 0.03), frame)
            item.box((x * w / 2, 0, seat + 0.09), (0.03, 0.05, 0.22), frame)
    return item


def sofa(palette: Palette, width: float) -> Item:
    """A sofa, or an armchair when narrow: straight, round or wooden arms, loose cushions on it."""
    rng = palette.rng
    d, seat, total = rng.uniform(0.8, 1.0), rng.uniform(0.38, 0.45), rng.uniform(0.7, 0.95)
    arm, back = rng.uniform(0.1, 0.24), rng.uniform(0.14, 0.24)
    rest = seat + rng.uniform(0.12, 0.25)
    cover = palette.cover()
    style = rng.choice(["straight", "round", "open"], p=[0.5, 0.3, 0.2])
    item = Item("sofa", (width, d, total))
    foot = rng.uniform(0.04, 0.14)
    wood = palette.wood()
    item.legs(width - 0.1, d - 0.1, foot, 0.05, wood, bool(rng.uniform() < 0.5))
    base = seat - rng.uniform(0.12, 0.18)
    inner = width - 2 * arm
    item.box((0, 0, (foot + base) / 2), (width - 0.02, d - 0.04, base - foot), cover)
    lean = (0.0, 0.0, rng.uniform(0.0, 0.14))
    item.box(
        (0, (back - d) / 2, (foot + total) / 2), (width - 0.04, back, total - foot), cover, lean
    )
    for x in (-1, 1):
        middle = x * (width - arm) / 2
        if style == "open":
            item.box((middle, 0.03, rest - 0.02), (arm * 0.6, d - 0.1, 0.04), wood)
            item.box((middle, d / 2 - 0.06, rest / 2), (0.05, 0.05, rest - 0.04), wood)
        else:
            item.box((middle, 0, (foot + rest) / 2), (arm, d - 0.02, rest - foot), cover)
        if style == "round":
            size = (arm * 1.15, arm * 1.15, d - 0.01)
            item.cylinder((middle, 0, rest), size, cover, (0, 0, math.pi / 2))
    count = max(1, round(inner / rng.uniform(0.6, 0.9)))
    each = inner / count
    deep = d - back
    soft = bool(rng.uniform() < 0.6)
    for i in range(count):
        x = (i + 0.5) * each - inner / 2
        at = (x, back / 2, (base + seat) / 2)
        item.box(at, (each - 0.012, deep - 0.02, seat - base), cover)
        if soft:
            item.ellipsoid((x, back / 2, seat - 0.01), (each * 1.1, deep * 1.1, 0.07), cover)
            high = (total - seat) * 0.95
            roll = (0.0, 0.0, 0.15)
            item.box(
                (x, back - d / 2 + 0.07, seat + high / 2), (each - 0.02, 0.14, high), cover, roll
            )
    reach = back - d / 2 + (0.16 if soft else 0.0)
    for _ in range(int(rng.integers(0, 2 + round(width * 1.5)))):
        pillow, away = _leaning(palette, 0.0)
        x = rng.uniform(-0.5, 0.5) * max(inner - 0.45, 0.01)
        if all(abs(x - pose.x) > 0.4 for _, pose in item.carried):
            item.carry(pillow, Pose(x, reach + away, seat, rng.uniform(-0.2, 0.2)))
    if width > 1.9 and rng.uniform() < 0.3:  # the long end of a corner sofa
        long = rng.uniform(0.5, 0.75)
        x = rng.choice([-1, 1]) * (inner - each) / 2
        item.box((x, (d + long) / 2, (foot + base) / 2), (each, long, base - foot), cover)
        item.box((x, (d + long) / 2, (base + seat) / 2), (each, long, seat - base), cover)
        item.size = (width, d + long, total)
        item.shift(-long / 2)
    return item


def table(palette: Palette, w: float, d: float, h: float, segment: str = "table") -> Item:
    """A table or desk with a free top: legs, trestles, a pedestal, or drawers on one side."""
    rng = palette.rng
    square = abs(w - d) < 0.2
    styles = ["legs", "sides", "pedestal", "trestle"]
    odds = [0.55, 0.15, 0.2, 0.1] if segment == "table" else [0.35, 0.25, 0.0, 0.1]
    if segment == "desk":
        styles, odds = [*styles, "drawers"], [*odds, 0.3]
    style = rng.choice(styles, p=odds)
    round_top = segment == "table" and square and rng.uniform() < 0.5
    thick = rng.uniform(0.02, 0.05)
    slab = palette.front()
    if segment == "table" and rng.uniform() < 0.1:
        slab = Material("plain", (0.55, 0.66, 0.64), (0.6, 0.7, 0.7), 0.5, lost=0.5)  # glass
    frame = palette.metal() if rng.uniform() < 0.4 else (slab if slab.lost == 0 else palette.wood())
    item = Item(segment, (w, d, h))
    under = h - thick
    (item.cylinder if round_top else item.box)((0, 0, h - thick / 2), (w, d, thick), slab)
    leg = rng.uniform(0.035, 0.08)
    if style == "legs":
        inset = 0.72 if round_top else 0.96
        item.legs(w * inset, d * inset, under, leg, frame, bool(rng.uniform() < 0.4))
        if rng.uniform() < 0.6:
            for y in (-1, 1):
                at = (0, y * (d * inset - leg) / 2, under - 0.05)
                item.box(at, (w * inset - leg, 0.02, 0.1), frame)
    elif style == "sides":
        for x in (-1, 1):
            item.box((x * (w / 2 - 0.05), 0, under / 2), (0.03, d * 0.9, under), frame)
        item.box((0, -d * 0.3, under * 0.7), (w - 0.13, 0.02, under * 0.4), frame)
    elif style == "pedestal":
        foot = min(w, d) * 0.6
        item.cylinder((0, 0, 0.02), (foot, foot, 0.04), frame, taper=-0.2)
        item.cylinder(
            (0, 0, under / 2), (0.1, 0.1, under), frame, taper=float(rng.uniform(-0.4, 0.4))
        )
        if max(w, d) > 1.3:
            for x in (-1, 1):
                item.box((x * w * 0.3, 0, under / 2), (0.08, d * 0.5, under), frame)
    elif style == "trestle":
        for x in (-1, 1):
            for y in (-1, 1):
                lean = (0.0, 0.0, -y * 0.25)
                at = (x * w * 0.36, y * d * 0.24, under / 2)
                item.box(at, (leg, leg, under / math.cos(0.25)), frame, lean)
            item.box((x * w * 0.36, 0, under * 0.35), (0.03, d * 0.5, 0.04), frame)
    else:
        block = rng.uniform(0.36, 0.45)
        side = rng.choice([-1, 1])
        x = side * (w / 2 - block / 2 - 0.01)
        item.box((x, 0, under / 2), (block, d * 0.92, under), frame)
        knob = palette.metal()
        count = int(rng.integers(3, 5))
        for i in range(count):
            z = (i + 0.5) * under / count
            item.box((x, d * 0.46, z), (block - 0.03, 0.03, under / count - 0.02), slab)
            item.box((x, d * 0.46 + 0.02, z), (0.12, 0.02, 0.02), knob)
        item.box((-side * (w / 2 - 0.03), 0, under / 2), (0.03, d * 0.92, under), frame)
    used = 0.7 if round_top else 0.92
    item.tops.append(Top(0, 0, w * used, d * used, h, 0.6, segment))
    if segment == "table" and h < 0.55 and style == "legs" and rng.uniform() < 0.5:
        item.box((0, 0, 0.15), (w * 0.85, d * 0.85, 0.02), frame)
        item.tops.append(Top(0, 0, w * 0.6, d * 0.6, 0.16, h - 0.25, "shelf"))
    return item


def bed(palette: Palette, w: float) -> Item:
    """A bed, its head against y < 0: frame, mattress, blanket, pillows, one of four head boards."""
    rng = palette.rng
    length, h = rng.uniform(1.95, 2.15), rng.uniform(0.42, 0.6)
    total = rng.uniform(0.8, 1.2)
    frame = palette.front() if rng.uniform() < 0.75 else palette.cover()
    item = Item("bed", (w + 0.06, length + 0.05, total))
    low = rng.uniform(0.0, 0.16)
    board = h - rng.uniform(0.16, 0.24)
    if low > 0.06:
        item.legs(w - 0.02, length - 0.1, low, 0.07, frame, bool(rng.uniform() < 0.4))
    else:
        low = 0.0
    item.box((0, 0, (low + board) / 2), (w + 0.05, length, board - low), frame)
    sheet = Material("plain", palette.tint((0, 0.15), (0.8, 0.98)), (1, 1, 1), 0.3)
    item.box((0, 0.01, (board + h) / 2), (w - 0.02, length - 0.06, h - board), sheet)
    share = rng.uniform(0.5, 0.78)
    cover = palette.fabric()._replace(scale=float(rng.uniform(0.08, 0.3)))
    drop = rng.uniform(0.05, 0.2)
    y = length / 2 - share * length / 2 + 0.015
    item.box((0, y, h + 0.03 - drop / 2), (w + 0.07, share * length, drop + 0.06), cover)
    if rng.uniform() < 0.6:
        item.ellipsoid((0, y, h + 0.03), (w * 0.95, share * length * 1.05, 0.14), cover)
        fold = (0, y - share * length / 2 + 0.1, h + 0.05)
        item.box(fold, (w + 0.075, 0.22, 0.07), sheet)
    style = rng.choice(["panel", "slats", "none", "low"], p=[0.5, 0.25, 0.1, 0.15])
    head = -length / 2 - 0.0
    if style == "panel":
        thick = rng.uniform(0.03, 0.1)
        skin = palette.cover() if thick > 0.06 else frame
        item.box((0, head, total / 2), (w + 0.06, thick, total), skin)
    elif style == "slats":
        for x in (-1, 1):
            item.box((x * w / 2, head, total / 2), (0.06, 0.05, total), frame)
        item.box((0, head, total - 0.04), (w, 0.04, 0.06), frame)
        for i in range(count := int(w / 0.16)):
            item.box(
                (((i + 0.5) / count - 0.5) * w, head, (h + total) / 2),
                (0.04, 0.025, total - h),
                frame,
            )
    elif style == "low":
        for end in (-1, 1):
            item.box((0, end * length / 2, h / 2 + 0.1), (w + 0.06, 0.04, h + 0.2), frame)
    for i in range(pillows := 1 if w < 1.25 else 2):
        pillow = cushion(palette, rng.uniform(0.5, 0.65) if w / pillows > 0.65 else 0.5)
        x = ((i + 0.5) / pillows - 0.5) * w
        at = Pose(x, -length / 2 + 0.08 + pillow.size[1] / 2, h, rng.normal(0, 0.06))
        item.carry(pillow, at)
    return item
