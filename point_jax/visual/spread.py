"""A chart of means with their range: lines over steps, and levels that hold at any step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from point_jax.visual.axes import (
    FAINT,
    GRID,
    INK,
    PAGE,
    PALETTE,
    axis_limits,
    polyline,
    ticks,
)

_SCALE = 3  # drawn so much larger and reduced, since Pillow's lines are jagged
_ROOM = 17  # pixels from one name to the next
_DASHES = ((9, 5), (3, 4))  # pixels on and off


class Line(NamedTuple):
    """Means over steps.

    Attributes:
        name: stands at the line's end.
        points: (m, 4) step, mean, least, most; by rising step.
    """

    name: str
    points: np.ndarray


class Level(NamedTuple):
    """A mean that has no step: a dashed line across the chart, its range a pale band.

    Attributes:
        name: stands at its end.
        mean, least, most: in the unit of the lines.
        line: place of the line whose colour it takes; None for grey.
        dash: 0 for long dashes, 1 for dots.
    """

    name: str
    mean: float
    least: float
    most: float
    line: int | None = None
    dash: int = 0


def spread_chart(
    lines: Sequence[Line],
    levels: Sequence[Level],
    *,
    title: str,
    below: str,
    size: tuple[int, int] = (900, 520),
) -> Image.Image:
    """Lines through means with a bar from least to most, and levels; named at their right ends.

    Args:
        lines: at least one.
        levels: what they are compared with.
        title: what is drawn, in which unit.
        below: name of the horizontal axis.
        size: (width, height) in pixels.

    Raises:
        ValueError: no lines.
    """
    if not lines:
        raise ValueError("a chart needs at least one line, got none")
    s = _SCALE
    small, plain = ImageFont.load_default(12 * s), ImageFont.load_default(13 * s)
    image = Image.new("RGB", (size[0] * s, size[1] * s), PAGE)
    draw = ImageDraw.Draw(image, "RGBA")
    names = [one.name for one in (*lines, *levels)]
    margin = max(draw.textlength(name, plain) for name in names) + 24 * s
    left, right = 62 * s, max(size[0] * s - margin, size[0] * s / 2)
    top, bottom = 40 * s, (size[1] - 44) * s
    numbers = np.concatenate([one.points for one in lines])
    heights = np.append(numbers[:, 1:], [(one.mean, one.least, one.most) for one in levels])
    y_low, y_high = axis_limits(heights)
    x_low, x_high = axis_limits(numbers[:, 0])

    def x_of(step: float) -> float:
        return left + (step - x_low) / (x_high - x_low) * (right - left)

    def y_of(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    draw.text((left, 18 * s), title, INK, ImageFont.load_default(15 * s), anchor="lm")
    for value, text in zip(*ticks(y_low, y_high, 8), strict=True):
        draw.line([(left, y_of(value)), (right, y_of(value))], GRID, s)
        draw.text((left - 7 * s, y_of(value)), text, FAINT, small, anchor="rm")
    for value, text in zip(*ticks(x_low, x_high, 6), strict=True):
        draw.line([(x_of(value), bottom), (x_of(value), bottom + 4 * s)], FAINT, s)
        draw.text((x_of(value), bottom + 7 * s), text, FAINT, small, anchor="mt")
    draw.line([(left, bottom), (right, bottom)], FAINT, s)
    draw.text(((left + right) / 2, size[1] * s - 6 * s), below, FAINT, small, anchor="mb")

    ends = []
    for one in levels:
        color = FAINT if one.line is None else PALETTE[one.line % len(PALETTE)]
        if one.most > one.least:
            draw.rectangle((left, y_of(one.most), right, y_of(one.least)), (*color, 28))
        on, off = (s * length for length in _DASHES[one.dash])
        for start in np.arange(left, right, on + off):
            end = min(start + on, right)
            draw.line([(start, y_of(one.mean)), (end, y_of(one.mean))], color, round(1.5 * s))
        ends.append((y_of(one.mean), right, one.name, color))
    for place, one in enumerate(lines):
        color = PALETTE[place % len(PALETTE)]
        for step, _, least, most in one.points:
            x = x_of(step)
            for edge in (least, most):
                draw.line([(x - 4 * s, y_of(edge)), (x + 4 * s, y_of(edge))], color, s)
            draw.line([(x, y_of(least)), (x, y_of(most))], color, s)
        path = np.array([(x_of(step), y_of(mean)) for step, mean, _, _ in one.points])
        polyline(draw, path, color, 2 * s)
        for x, y in path:
            inside = PAGE if place >= len(PALETTE) else color  # colours come round: rings then
            draw.ellipse((x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s), inside, color, 2 * s)
        ends.append((path[-1, 1], path[-1, 0], one.name, color))

    ends.sort(key=lambda end: end[0])
    places = apart([y for y, *_ in ends], _ROOM * s, top, bottom)
    for (y, x, name, color), place in zip(ends, places, strict=True):
        draw.line([(max(x, right) + 2 * s, y), (right + 12 * s, place)], (*color, 140), s)
        draw.text((right + 15 * s, place), name, color, plain, anchor="lm")
    return image.reduce(s)


def apart(places: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Moves places (rising) so that neighbours are `room` apart, as little as that takes.

    They stay from low to high if there is room enough, and in their order in any case.
    """
    room = min(room, (high - low) / max(len(places) - 1, 1))
    offsets = room * np.arange(len(places))
    # Places less their offsets must not fall: runs that do are put at their mean.
    runs: list[list[float]] = []
    for value in np.asarray(places, np.float64) - offsets:
        runs.append([float(value)])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            last = runs.pop()
            runs[-1] += last
    flat = np.array([np.mean(run) for run in runs for _ in run])
    flat = np.clip(flat, low, high - room * (len(places) - 1))
    return (flat + offsets).tolist()
