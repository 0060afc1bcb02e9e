"""The empty room: walls with doors and windows, floor, ceiling, curtains and radiators."""

import math

from point_jax.data.room_plan import Block, Opening, Plan, Wall
from point_jax.data.room_sketch import Item, Palette, Pose
from point_jax.data.room_textures import Material

_THICK = 0.2  # metres: walls reach this far outwards


def empty_room(palette: Palette, kind: str, size: tuple[float, float, float]) -> Plan:
    """A room of about `size` without furniture: shell, doors, windows, curtains, radiators."""
    rng = palette.rng
    cuts: dict[int, tuple[float, float]] = {}
    shares = rng.choice([0, 1, 2], p=[0.6, 0.28, 0.12])
    for corner in rng.permutation(4)[:shares]:
        cuts[int(corner)] = (size[0] * rng.uniform(0.15, 0.42), size[1] * rng.uniform(0.15, 0.42))
    plan = Plan(size, cuts)
    _cut_openings(palette, plan, kind)
    _add_shell(palette, plan, kind)
    return plan


def _cut_openings(palette: Palette, plan: Plan, kind: str) -> None:
    rng = palette.rng
    top = min(2.1, plan.size[2] - 0.2)
    doors, windows = 1 + int(rng.uniform() < 0.3), int(rng.choice([1, 2, 3], p=[0.5, 0.42, 0.08]))
    sill = float(rng.choice([0.1, 0.5, 0.85])) if kind != "kitchen" else 1.05
    upper = float(rng.uniform(top, plan.size[2] - 0.1))
    for opening in ["door"] * doors + ["window"] * windows:
        for _ in range(12):
            wall = plan.walls[int(rng.integers(len(plan.walls)))]
            if opening == "door":
                w = rng.uniform(0.75, 0.95) if rng.uniform() < 0.85 else rng.uniform(1.4, 1.8)
            else:
                w = rng.uniform(0.7, 2.4)
            margin = 0.12 if opening == "door" else 0.3
            if wall.length < w + 2 * margin:
                continue
            u = rng.uniform(margin, wall.length - w - margin)
            if not wall.is_free(u - 0.25, u + w + 0.25, 0.0, 3.0):
                continue
            low, high = (0.0, top) if opening == "door" else (sill, upper)
            # Low furniture may stand before a window.
            depth, base = (0.8, low) if opening == "door" else (0.25, max(low, 0.8))
            zone = wall.at(u + w / 2, depth / 2)
            block = Block(zone.x, zone.y, w, depth, zone.yaw, base, high)
            if opening == "door" and not plan.fits(block):
                continue
            wall.openings.append(Opening(opening, u, u + w, low, high))
            plan.reserve(block)
            if opening == "window":
                light = wall.at(u + w / 2, 0.3)
                plan.lights.append(((light.x, light.y, (low + high) / 2), 0.8 * w * (high - low)))
            break


def _wall_material(palette: Palette, kind: str) -> Material:
    rng = palette.rng
    pale = palette.tint((0.0, 0.22), (0.72, 0.97))
    r = rng.uniform()
    if kind == "kitchen" and r < 0.4:
        joint = (0.75, 0.75, 0.73)
        return Material("tiles", pale, joint, rng.uniform(0.1, 0.3), joined=True)
    if r < 0.65:
        return Material("plain", pale, pale, 0.8, joined=True)
    if r < 0.75:
        brick = (rng.uniform(0.5, 0.7), rng.uniform(0.28, 0.4), rng.uniform(0.2, 0.3))
        return Material("bricks", brick, (0.78, 0.75, 0.7), rng.uniform(0.07, 0.09), joined=True)
    if r < 0.8:
        strong = palette.tint((0.3, 0.7), (0.3, 0.8))
        return Material("plain", strong, strong, 0.8, joined=True)
    texture = str(rng.choice(["bars", "dots", "cloudy", "plaid"]))
    second = palette.tint((0.05, 0.4), (0.6, 0.95))
    return Material(texture, pale, second, rng.uniform(0.1, 0.4), joined=True)


def _floor_material(palette: Palette, kind: str) -> Material:
    rng = palette.rng
    wood = palette.wood()
    styles = {"kitchen": [0.2, 0.45, 0.0, 0.2, 0.15], "office": [0.25, 0.1, 0.5, 0.05, 0.1]}
    style = rng.choice(5, p=styles.get(kind, [0.55, 0.1, 0.25, 0.05, 0.05]))
    if style == 0:
        return Material("planks", wood.color, wood.accent, rng.uniform(0.08, 0.2), joined=True)
    first, second = palette.tint((0, 0.35), (0.3, 0.9)), palette.tint((0, 0.3), (0.4, 0.9))
    if style == 1:
        return Material("tiles", first, (0.6, 0.59, 0.57), rng.uniform(0.2, 0.6), joined=True)
    if style == 2:
        return Material("speckle", first, second, rng.uniform(0.08, 0.2), joined=True)
    if style == 3:
        return Material("checker", first, second, rng.uniform(0.2, 0.5), joined=True)
    return Material("marble", first, second, rng.uniform(0.4, 0.9), joined=True)


def _add_shell(palette: Palette, plan: Plan, kind: str) -> None:
    rng = palette.rng
    w, d, h = plan.size
    slab = (w + 2 * _THICK, d + 2 * _THICK)
    floor = Item("floor")
    # Boards run along x or y: a slab turned by a quarter has its texture turned too.
    turned = rng.uniform() < 0.5
    flat = (slab[1], slab[0], _THICK) if turned else (*slab, _THICK)
    turn = (math.pi / 2 if turned else 0.0, 0.0, 0.0)
    floor.box((w / 2, d / 2, -_THICK / 2), flat, _floor_material(palette, kind), turn)
    plan.add(floor, Pose())
    ceiling = Item("ceiling")
    white = palette.tint((0.0, 0.06), (0.85, 0.98))
    over = Material("plain", white, white, 1.0, joined=True)
    if kind == "office" and rng.uniform() < 0.5:
        over = Material("tiles", white, (0.6, 0.6, 0.6), 0.6, joined=True)
    ceiling.box((w / 2, d / 2, h + _THICK / 2), (*slab, _THICK), over)
    if rng.uniform() < 0.15:
        beam = palette.wood()
        for i in range(count := int(w / 0.9)):
            ceiling.box(((i + 0.5) * w / count, d / 2, h - 0.06), (0.1, d, 0.14), beam)
    plan.add(ceiling, Pose())
    common, accent = _wall_material(palette, kind), _wall_material(palette, kind)
    special = int(rng.integers(len(plan.walls))) if rng.uniform() < 0.4 else -1
    trim = palette.wood() if rng.uniform() < 0.4 else palette.paint()
    board = rng.uniform(0.05, 0.12) if rng.uniform() < 0.8 else 0.0
    leaf, bars, cloth = palette.front(), palette.paint(), palette.fabric()
    hung = rng.uniform() < (0.65 if kind in ("bedroom", "living", "dining") else 0.25)
    for i, wall in enumerate(plan.walls):
        item = Item("wall")
        _wall_strips(item, wall, h, accent if i == special else common)
        if board:
            _skirting(item, wall, board, trim)
        plan.add(item, wall.pose)
        for opening in wall.openings:
            if opening.kind == "door":
                plan.add(_door(palette, opening, leaf, trim), wall.pose)
            else:
                plan.add(_window(palette, opening, bars), wall.pose)
                if hung:
                    _hang_curtains(palette, plan, wall, opening, cloth)
                elif opening.z0 > 0.4 and rng.uniform() < 0.5:
                    _add_radiator(plan, wall, opening)


def _wall_strips(item: Item, wall: Wall, h: float, material: Material) -> None:
    start = -_THICK if wall.closed[0] else 0.0
    end = wall.length + (_THICK if wall.closed[1] else 0.0)

    def strip(u0: float, u1: float, z0: float, z1: float) -> None:
        if u1 - u0 > 1e-3 and z1 - z0 > 1e-3:
            middle = ((u0 + u1) / 2, -_THICK / 2, (z0 + z1) / 2)
            item.box(middle, (u1 - u0, _THICK, z1 - z0), material)

    u = start
    for o in sorted(wall.openings, key=lambda o: o.u0):
        strip(u, o.u0, 0.0, h)
        strip(o.u0, o.u1, 0.0, o.z0)
        strip(o.u0, o.u1, o.z1, h)
        u = o.u1
    strip(u, end, 0.0, h)


def _skirting(item: Item, wall: Wall, board: float, trim: Material) -> None:
    u = 0.0
    doors = sorted(o.u0 for o in wall.openings if o.kind == "door")
    ends = {o.u0: o.u1 for o in wall.openings}
    for stop in [*doors, wall.length]:
        if stop - u > 0.02:
            item.box(((u + stop) / 2, 0.006, board / 2), (stop - u, 0.014, board), trim)
        u = ends.get(stop, stop)


def _casing(item: Item, o: Opening, width: float, material: Material) -> None:
    """A frame around an opening, slightly proud of the wall; no lower bar at a door."""
    for u in (o.u0 - width / 2, o.u1 + width / 2):
        item.box((u, 0.0, (o.z0 + o.z1) / 2), (width, 0.04, o.z1 - o.z0), material)
    middle, span = (o.u0 + o.u1) / 2, o.u1 - o.u0 + 2 * width
    item.box((middle, 0.0, o.z1 + width / 2), (span, 0.04, width), material)
    if o.z0 > 0:
        item.box((middle, 0.03, o.z0 - 0.02), (span, 0.14, 0.04), material)


def _door(palette: Palette, o: Opening, leaf: Material, trim: Material) -> Item:
    rng = palette.rng
    item = Item("door")
    _casing(item, o, 0.07, trim)
    back = -rng.uniform(0.03, 0.09)
    wings = 2 if o.u1 - o.u0 > 1.2 else 1
    w, h = (o.u1 - o.u0) / wings, o.z1
    style = rng.choice(["flat", "panels", "glass"], p=[0.35, 0.45, 0.2])
    pane = Material("cloudy", (0.75, 0.8, 0.8), (0.65, 0.7, 0.72), 0.3, lost=0.4)
    for i in range(wings):
        x = o.u0 + (i + 0.5) * w
        item.box((x, back - 0.02, h / 2), (w, 0.04, h), leaf)
        if style == "panels":
            for z, tall in ((0.28 * h, 0.36 * h), (0.72 * h, 0.36 * h)):
                item.box((x, back, z), (w - 0.22, 0.025, tall), leaf)
        elif style == "glass":
            item.box((x, back, 0.6 * h), (w - 0.26, 0.012, 0.6 * h), pane)
        side = 1 if (i % 2 == 0) == (wings == 2) else -1
        knob = (x + side * (w / 2 - 0.08), back + 0.04, 1.02)
        item.box((knob[0], back + 0.005, 1.0), (0.05, 0.015, 0.2), palette.metal())
        item.box((knob[0] - side * 0.03, *knob[1:]), (0.12, 0.02, 0.025), palette.metal())
    return item


def _window(palette: Palette, o: Opening, bars: Material) -> Item:
    rng = palette.rng
    item = Item("window")
    _casing(item, o, 0.05, bars)
    back = -rng.uniform(0.05, 0.12)
    sky = (rng.uniform(0.6, 0.9), rng.uniform(0.75, 0.93), rng.uniform(0.88, 1.0))
    land = (rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.5), rng.uniform(0.15, 0.4))
    glass = Material("view", sky, land, rng.uniform(0.15, 0.4), lost=0.65)
    w, h = o.u1 - o.u0, o.z1 - o.z0
    middle, center = (o.u0 + o.u1) / 2, (o.z0 + o.z1) / 2
    item.box((middle, back - 0.02, center), (w, 0.02, h), glass)
    wings = max(1, round(w / rng.uniform(0.5, 0.9)))
    for i in range(wings + 1):
        u = o.u0 + 0.025 + i * (w - 0.05) / wings
        item.box((u, back, center), (0.05, 0.05, h), bars)
    levels = 2 + int(rng.uniform() < 0.3)
    for j in range(levels):
        z = o.z0 + 0.025 + j * (h - 0.05) / (levels - 1)
        item.box((middle, back, z), (w, 0.05, 0.05), bars)
    return item


def _hang_curtains(palette: Palette, plan: Plan, wall: Wall, o: Opening, cloth: Material) -> None:
    """Folds at both sides of a window, or a blind over its upper part."""
    rng = palette.rng
    item = Item("curtain")
    top = min(o.z1 + rng.uniform(0.08, 0.2), plan.size[2] - 0.03)
    if rng.uniform() < 0.25:
        drop = rng.uniform(0.25, 0.8) * (o.z1 - o.z0)
        middle = (o.u0 + o.u1) / 2
        slats = Material("stripes", cloth.color, cloth.accent, 0.06)
        item.box((middle, 0.05, top - drop / 2), (o.u1 - o.u0 + 0.06, 0.02, drop), slats)
        plan.add(item, wall.pose)
        return
    low = 0.04 if rng.uniform() < 0.7 else max(o.z0 - 0.1, 0.04)
    rod = (0.025, 0.025, o.u1 - o.u0 + 0.5)
    item.cylinder(((o.u0 + o.u1) / 2, 0.09, top), rod, palette.metal(), (0, math.pi / 2, 0))
    wide = min(rng.uniform(0.2, 0.4), 0.45 * (o.u1 - o.u0))
    for u0 in (o.u0 - 0.22, o.u1 + 0.22 - wide):
        u0 = min(max(u0, 0.03), wall.length - wide - 0.03)
        count = max(3, round(wide / 0.07))
        for i in range(count):
            at = (u0 + (i + 0.5) * wide / count, 0.09 + 0.012 * (i % 2), (low + top) / 2)
            item.cylinder(at, (wide / count * 1.15, 0.09, top - low), cloth)
        zone = wall.at(u0 + wide / 2, 0.08)
        plan.reserve(Block(zone.x, zone.y, wide, 0.16, zone.yaw, low, top))
    plan.add(item, wall.pose)


def _add_radiator(plan: Plan, wall: Wall, o: Opening) -> None:
    w, h = min(o.u1 - o.u0, 1.4), min(o.z0 - 0.18, 0.62)
    item = Item("radiator", (w, 0.1, h))
    white = Material("plain", (0.92, 0.92, 0.9), (0.9, 0.9, 0.9), 0.5)
    for i in range(count := round(w / 0.08)):
        item.box(((i + 0.5) * w / count - w / 2, 0, h / 2), (0.06, 0.08, h), white)
    item.box((0, 0, h / 2), (w, 0.05, h - 0.06), white)
    plan.put(item, wall.at((o.u0 + o.u1) / 2, 0.06, 0.1))
