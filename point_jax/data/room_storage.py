"""Cupboards, shelves, kitchen units and machines of procedural rooms, in several styles."""

from point_jax.data.room_sketch import Item, Palette, Pose, Top
from point_jax.data.room_textures import Material

_DARK = Material("plain", (0.07, 0.07, 0.08), (0.1, 0.1, 0.1), 0.3, lost=0.2)
_STEEL = Material("plain", (0.66, 0.67, 0.69), (0.7, 0.7, 0.7), 0.3, lost=0.15)


def _fronts(
    item: Item,
    palette: Palette,
    face: tuple[float, float, float, float],
    y: float,
    grid: tuple[int, int],
    skin: Material,
) -> None:
    """Doors or drawers: a grid of panels on the face (x0, x1, z0, z1) at depth y, with handles."""
    rng = palette.rng
    x0, x1, z0, z1 = face
    columns, rows = grid
    w, h = (x1 - x0) / columns, (z1 - z0) / rows
    style = rng.choice(["bar", "knob", "none", "framed"], p=[0.35, 0.3, 0.15, 0.2])
    handle = palette.metal()
    for i in range(columns):
        for j in range(rows):
            x, z = x0 + (i + 0.5) * w, z0 + (j + 0.5) * h
            item.box((x, y + 0.008, z), (w - 0.012, 0.018, h - 0.012), skin)
            if style == "framed" and min(w, h) > 0.25:
                item.box((x, y + 0.013, z), (w - 0.14, 0.02, h - 0.14), skin)
            if style == "none":
                continue
            door = h > w * 0.9
            out = (w / 2 - 0.05) * (1 if i % 2 == 0 else -1) if door else 0.0
            at = (x + out, y + 0.03, z)
            if style == "bar":
                item.box(at, (0.015, 0.025, 0.16) if door else (0.16, 0.025, 0.015), handle)
            else:
                item.ellipsoid(at, (0.035, 0.035, 0.035), handle)


def cabinet(palette: Palette, w: float, d: float, h: float) -> Item:
    """A closed cupboard: chest of drawers, sideboard or wardrobe as its sizes say."""
    rng = palette.rng
    item = Item("cabinet", (w, d + 0.04, h))
    body = palette.front()
    skin = body if rng.uniform() < 0.6 else palette.front()
    foot = float(rng.choice([0.0, 0.06, 0.14]))
    if foot > 0.1:
        item.legs(w - 0.04, d - 0.04, foot, 0.04, palette.wood(), bool(rng.uniform() < 0.5))
    elif foot:
        item.box((0, -0.02, foot / 2), (w - 0.02, d - 0.05, foot), body)
    item.box((0, 0, (foot + h) / 2), (w, d, h - foot), body)
    if rng.uniform() < 0.4:
        item.box((0, 0.01, h - 0.012), (w + 0.03, d + 0.02, 0.024), body)
    face = (-w / 2 + 0.01, w / 2 - 0.01, foot + 0.02, h - 0.03)
    if h > 1.5:
        columns = max(2, round(w / rng.uniform(0.45, 0.7)))
        if rng.uniform() < 0.35:  # drawers below the doors
            low = foot + 0.45
            _fronts(item, palette, (*face[:2], foot + 0.02, low), d / 2, (columns // 2, 2), skin)
            _fronts(item, palette, (*face[:2], low, face[3]), d / 2, (columns, 1), skin)
        else:
            _fronts(item, palette, face, d / 2, (columns, 1), skin)
    elif w > 1.3 * h:
        columns = max(2, round(w / rng.uniform(0.4, 0.7)))
        _fronts(item, palette, face, d / 2, (columns, int(rng.integers(1, 4))), skin)
    else:
        rows = max(1, round(h / rng.uniform(0.18, 0.3)))
        _fronts(item, palette, face, d / 2, (1 if w < 0.7 else 2, rows), skin)
    if h < 1.7:
        item.tops.append(Top(0, 0, w * 0.94, d * 0.9, h, 0.7, "low" if h < 0.7 else "cabinet"))
    else:
        item.tops.append(Top(0, 0, w * 0.9, d * 0.85, h, 0.25, "high"))
    return item


def shelf(palette: Palette, w: float, d: float, h: float) -> Item:
    """A book case: with or without back, boards on poles, or in several columns."""
    rng = palette.rng
    item = Item("bookshelf", (w, d, h))
    wood = palette.front()
    board = rng.uniform(0.018, 0.035)
    style = rng.choice(["closed", "open", "poles"], p=[0.6, 0.2, 0.2])
    columns = max(1, round(w / rng.uniform(0.6, 1.1))) if style != "poles" else 1
    inner = (w - board) / columns
    if style == "poles":
        item.legs(w, d, h, 0.03, palette.metal(), bool(rng.uniform() < 0.5))
    else:
        for i in range(columns + 1):
            item.box((-w / 2 + board / 2 + i * inner, 0, h / 2), (board, d, h), wood)
    if style == "closed":
        back = wood if rng.uniform() < 0.6 else palette.paint()
        item.box((0, -d / 2 + 0.005, h / 2), (w - 0.005, 0.01, h - 0.005), back)
    count = max(2, round(h / rng.uniform(0.3, 0.4)))
    first = rng.uniform(0.04, 0.1)
    step = (h - first - board) / count
    for j in range(count + 1):
        z = first + j * step
        item.box((0, 0.001, z + board / 2), (w - 0.002, d - 0.004, board), wood)
        for i in range(columns):
            if j < count:
                x = -w / 2 + board / 2 + (i + 0.5) * inner
                at = (x, 0.005, inner - board - 0.02, d - 0.03, z + board)
                item.tops.append(Top(*at, step - board - 0.01, "shelf"))
    item.tops.append(Top(0, 0, w * 0.9, d * 0.85, first + count * step + board, 0.3, "high"))
    return item


def wall_board(palette: Palette, w: float) -> Item:
    """A single board on the wall; z = 0 is its underside."""
    item = Item("bookshelf", (w, 0.24, 0.32))
    item.box((0, 0, 0.0125), (w, 0.22, 0.025), palette.front())
    item.tops.append(Top(0, 0, w * 0.95, 0.18, 0.025, 0.28, "shelf"))
    return item


def kitchen_run(palette: Palette, body: Material, w: float, fitted: tuple[str, ...]) -> Item:
    """A run of kitchen units of depth 0.6 m, with any of "sink", "stove", "oven" fitted.

    The counter and its cupboards are one instance, the sink and each machine others.
    """
    rng = palette.rng
    d, h = 0.6, rng.uniform(0.86, 0.94)
    item = Item("counter", (w, d + 0.03, h))
    stone = Material(
        str(rng.choice(["marble", "speckle", "wood", "plain"])),
        palette.tint((0, 0.3), (0.15, 0.9)),
        palette.tint((0, 0.3), (0.3, 0.9)),
        rng.uniform(0.06, 0.3),
    )
    item.box((0, -0.04, 0.05), (w, d - 0.12, 0.1), _DARK)
    item.box((0, -0.01, (0.1 + h - 0.04) / 2), (w, d - 0.04, h - 0.14), body)
    item.box((0, 0, h - 0.02), (w, d, 0.04), stone)
    units = max(1, round(w / 0.6))
    width = w / units
    slots = list(rng.permutation(units))
    taken: dict[str, int] = {name: int(slots.pop()) for name in fitted if slots}
    if "oven" in taken and "stove" in taken:
        taken["oven"] = taken["stove"]
    for i in range(units):
        x0 = -w / 2 + i * width
        x = x0 + width / 2
        if taken.get("oven") == i:
            oven = Item("appliance", (width, 0.05, 0.6))
            oven.box((0, 0, 0.3), (width - 0.02, 0.04, 0.58), _STEEL)
            oven.box((0, 0.005, 0.26), (width - 0.1, 0.04, 0.36), _DARK)
            oven.cylinder((0, 0.04, 0.48), (0.02, 0.02, width * 0.7), _STEEL, (0, 1.5708, 0))
            for k in range(4):
                knob = ((k - 1.5) * 0.09, 0.03, 0.54)
                oven.cylinder(knob, (0.035, 0.035, 0.03), _DARK, (0, 0, 1.5708))
            item.carry(oven, Pose(x, d / 2 - 0.03, h - 0.68))
        else:
            drawers = int(rng.choice([1, 1, 3, 4]))
            face = (x0, x0 + width, 0.11, h - 0.05)
            _fronts(item, palette, face, d / 2 - 0.03, (1, drawers), body)
        if taken.get("sink") == i:
            item.carry(_sink(palette, width), Pose(x, 0, h))
        elif taken.get("stove") == i:
            stove = Item("appliance", (width, 0.5, 0.012))
            stove.box((0, 0, 0.004), (width - 0.04, 0.5, 0.008), _DARK)
            for a in (-1, 1):
                for b in (-1, 1):
                    ring = rng.uniform(0.14, 0.2)
                    stove.cylinder((a * width * 0.22, b * 0.12, 0.008), (ring, ring, 0.01), _STEEL)
            item.carry(stove, Pose(x, 0, h))
        else:
            item.tops.append(Top(x, -0.02, width * 0.95, d * 0.8, h, 0.5, "counter"))
    return item


def _sink(palette: Palette, width: float) -> Item:
    item = Item("sink", (width, 0.5, 0.3))
    w = width * 0.75
    for x in (-1, 1):
        item.box((x * w / 2, 0.02, 0.005), (0.04, 0.42, 0.012), _STEEL)
    for y in (-1, 1):
        item.box((0, y * 0.2 + 0.02, 0.005), (w, 0.04, 0.012), _STEEL)
    item.box((0, 0.02, 0.002), (w, 0.4, 0.004), _STEEL._replace(color=(0.4, 0.41, 0.43)))
    tall = palette.rng.uniform(0.18, 0.32)
    item.cylinder((0, -0.22, tall / 2), (0.03, 0.03, tall), _STEEL)
    item.cylinder((0, -0.14, tall), (0.025, 0.025, 0.18), _STEEL, (0, 0, 1.5708))
    item.cylinder((0, -0.06, tall - 0.03), (0.025, 0.025, 0.06), _STEEL)
    return item


def upper_cabinets(palette: Palette, body: Material, w: float, h: float) -> Item:
    """Kitchen cupboards on the wall; z = 0 is their underside."""
    item = Item("cabinet", (w, 0.36, h))
    item.box((0, 0, h / 2), (w, 0.33, h), body)
    columns = max(1, round(w / palette.rng.uniform(0.4, 0.65)))
    _fronts(item, palette, (-w / 2, w / 2, 0.005, h - 0.005), 0.165, (columns, 1), body)
    return item


def hood(palette: Palette) -> Item:
    """A kitchen hood; z = 0 is its underside."""
    item = Item("appliance", (0.6, 0.5, 0.8))
    if palette.rng.uniform() < 0.5:
        item.cylinder((0, 0, 0.1), (0.41, 0.33, 0.2), _STEEL, taper=-0.45)
    else:
        item.box((0, 0, 0.04), (0.6, 0.48, 0.08), _STEEL)
    item.box((0, -0.08, 0.5), (0.25, 0.25, 0.6), _STEEL)
    return item


def fridge(palette: Palette) -> Item:
    """A refrigerator with one or two doors."""
    rng = palette.rng
    w, d, h = rng.uniform(0.58, 0.9), rng.uniform(0.6, 0.68), rng.uniform(1.4, 1.95)
    item = Item("refrigerator", (w, d + 0.05, h))
    white = Material("plain", (0.93, 0.93, 0.92), (0.9, 0.9, 0.9), 0.5)
    skin = [white, _STEEL, palette.paint()][int(rng.choice(3, p=[0.5, 0.35, 0.15]))]
    item.box((0, 0, h / 2 + 0.01), (w, d - 0.04, h - 0.02), skin)
    split = rng.uniform(0.3, 0.7) * h
    side = rng.choice([-1, 1])
    for z0, z1 in ((0.04, split), (split, h)):
        middle = (z0 + z1) / 2
        item.box((0, d / 2, middle), (w - 0.004, 0.05, z1 - z0 - 0.012), skin)
        at = (side * (w / 2 - 0.05), d / 2 + 0.045, middle)
        item.box(at, (0.025, 0.035, min(0.4, (z1 - z0) * 0.6)), _STEEL)
    item.tops.append(Top(0, 0, w * 0.9, d * 0.8, h, 0.25, "high"))
    return item


def machine(palette: Palette) -> Item:
    """A washing machine, printer or other free-standing machine on the floor."""
    rng = palette.rng
    item = Item("appliance", (0.6, 0.6, 0.85))
    skin = palette.paint()
    if rng.uniform() < 0.5:
        item.box(
            (0, 0, 0.425),
            (0.6, 0.56, 0.85),
            Material("plain", (0.92, 0.92, 0.92), (0.9, 0.9, 0.9), 0.5),
        )
        item.cylinder((0, 0.28, 0.42), (0.36, 0.36, 0.05), _STEEL, (0, 0, -1.5708))
        item.cylinder((0, 0.29, 0.42), (0.28, 0.28, 0.05), _DARK, (0, 0, -1.5708))
        item.box((0, 0.283, 0.78), (0.56, 0.01, 0.1), skin)
        item.tops.append(Top(0, 0, 0.5, 0.5, 0.85, 0.5, "cabinet"))
    else:  # a copier: body, paper trays, lid
        item.size = (0.6, 0.6, 1.0)
        item.box((0, 0, 0.4), (0.56, 0.54, 0.8), skin)
        item.box((0, 0, 0.86), (0.58, 0.5, 0.1), _DARK)
        item.box((0, -0.02, 0.95), (0.56, 0.46, 0.07), skin)
        for i in range(3):
            item.box((0, 0.27, 0.12 + i * 0.18), (0.5, 0.02, 0.15), _STEEL)
    return item
