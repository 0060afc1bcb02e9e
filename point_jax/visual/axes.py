"""Axes and lines of charts, and the colours of pages."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

PAGE = (255, 255, 255)
INK = (34, 38, 46)
FAINT = (112, 119, 130)
GRID = (228, 231, 236)
# Okabe and Ito's colours, told apart with any colour vision; yellow left out: too pale for a line.
PALETTE = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (90, 90, 90),
)


def ticks(low: float, high: float, count: int) -> tuple[list[float], list[str]]:
    """Round numbers that cover [low, high], at most about `count` of them, and their labels."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)]
    return values, [_label(value, step, max(map(abs, values), default=0.0)) for value in values]


def axis_limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of an axis for values of which some are finite: a little room, 0 if it is near."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return (0.0 if 0.0 <= low < 0.2 * high else low - room), high + room


def polyline(
    draw: ImageDraw.ImageDraw,
    points: NDArray[np.float64],
    color: tuple[int, ...],
    width: int,
) -> None:
    """A line through (m, 2) pixels, broken where a value is not finite; a lone point is a dot."""
    known = np.isfinite(points[:, 1])
    for run in np.split(np.arange(len(points)), np.flatnonzero(np.diff(known)) + 1):
        if not len(run) or not known[run[0]]:
            continue
        path = [(float(x), float(y)) for x, y in points[run]]
        if len(path) == 1:
            (x, y), r = path[0], 1.5 * width
            draw.ellipse((x - r, y - r, x + r, y + r), color)
        else:
            draw.line(path, color, width, joint="curve")


def _label(value: float, step: float, largest: float) -> str:
    """The text of one tick of an axis: 0.25, 1,500, 120k, 1.5e-4."""
    if abs(value) < 1e-6 * step:
        return "0"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit:
            return f"{value / unit:.6g}{suffix}"
    if largest < 1e-3:
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    decimals = next((d for d in range(12) if math.isclose(round(step, d), step)), 12)
    return f"{value:,.{decimals}f}"
