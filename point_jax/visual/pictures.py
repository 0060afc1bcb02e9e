"""Pictures for people: scenes side by side with captions, and curves of a training run, as PNG."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from point_jax.visual import render
from point_jax.visual.axes import FAINT, GRID, INK, PAGE, PALETTE, axis_limits, polyline, ticks
from point_jax.visual.classes import KeyEntry, share_text
from point_jax.visual.pca import fit_pca_colors

GAP = 12
KEY_LINE, KEY_FONT = 20, ImageFont.load_default(13)


class Panel(NamedTuple):
    """One picture of a row: a title, points (n, 3) in metres, colours (n, 3), normals or None.

    Colours are uint8 in 0-255 or float in [0, 1]. Normals (n, 3) hide surfaces seen from behind.
    A key below the picture says what the colours mean.
    """

    title: str
    coord: ArrayLike
    color: ArrayLike
    normal: ArrayLike | None = None
    key: Sequence[KeyEntry] = ()


@dataclass(frozen=True)
class FeatureScene:
    """A scene with features of several networks, each to be shown in a column of its own.

    Attributes:
        name: caption of the row.
        coord: (n, 3) metres, z up.
        color: (n, 3) uint8 or float in [0, 1], or None for a scene without colours.
        normal: (n, 3) unit, or None.
        features: column title -> (n, E) features.
    """

    name: str
    coord: ArrayLike
    color: ArrayLike | None
    normal: ArrayLike | None
    features: Mapping[str, ArrayLike]


def side_by_side(
    panels: Sequence[Panel | tuple[str, ArrayLike, ArrayLike]],
    *,
    label: str = "",
    size: tuple[int, int] = (640, 480),
    top: bool = False,
) -> Image.Image:
    """One row of rendered clouds with their titles above.

    Args:
        panels: what to show, from left to right. Panels that hold the very same `coord` array are
            rasterised once and share their camera.
        label: caption of the row, at its left above the titles; none if empty.
        size: (width, height) of each panel in pixels.
        top: straight from above in place of the view from a corner.

    Raises:
        ValueError: no panels, or coordinates or colours of a wrong shape.
    """
    if not panels:
        raise ValueError("side_by_side needs at least one panel (title, coord, color), got none")
    view = render.top_view if top else render.corner_view
    head = (30 if label else 0) + 28
    width = len(panels) * (size[0] + GAP) + GAP
    keys = [_place_key(p.key, size[0]) if isinstance(p, Panel) else [] for p in panels]
    lines = max((1 + entry.line for key in keys for entry in key), default=0)
    page = Image.new("RGB", (width, head + size[1] + GAP + lines * KEY_LINE), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 18), label, INK, ImageFont.load_default(19), anchor="lm")
    rasters: dict[tuple[int, int], render.Raster] = {}
    for column, given in enumerate(panels):
        panel = given if isinstance(given, Panel) else Panel(given[0], given[1], given[2])
        same = (id(panel.coord), id(panel.normal))
        if same not in rasters:
            rasters[same] = view(panel.coord, panel.normal, size=size)
        left = GAP + column * (size[0] + GAP)
        draw.text((left, head - 14), panel.title, FAINT, ImageFont.load_default(16), anchor="lm")
        page.paste(render.paint(rasters[same], panel.color), (left, head))
        for entry in keys[column]:
            x, y = left + entry.x, head + size[1] + GAP // 2 + entry.line * KEY_LINE
            draw.rectangle((x, y + 4, x + 11, y + 15), entry.color)
            draw.text((x + 17, y + 10), entry.text, INK, KEY_FONT, anchor="lm")
    return page


class _Placed(NamedTuple):
    text: str
    color: tuple[int, int, int]
    x: float
    line: int


def _place_key(key: Sequence[KeyEntry], width: int) -> list[_Placed]:
    """Entries one after the other, in as many lines as they need."""
    placed, x, line = [], 0.0, 0
    for entry in key:
        name, share = entry.name, share_text(entry.share)
        while name and 17 + KEY_FONT.getlength(f"{name} {share}") > width:
            name = name.rstrip("…")[:-1] + "…" if len(name) > 2 else ""
        text = f"{name} {share}"
        wide = 17 + KEY_FONT.getlength(text)
        if x and x + wide > width:
            x, line = 0.0, line + 1
        placed.append(_Placed(text, entry.color, x, line))
        x += wide + 16
    return placed


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Puts pictures below one another on one page, left-aligned."""
    page = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), PAGE)
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    return page


def feature_picture(
    scenes: Sequence[FeatureScene],
    *,
    joint: bool = True,
    saturate: float = 0.005,
    size: tuple[int, int] = (640, 480),
) -> Image.Image:
    """A row per scene: its colours, then the PCA colours of each network's features.

    Args:
        scenes: all with the same columns of features.
        joint: one PCA per column over all scenes, so that a colour means the same in every row;
            otherwise one per scene, with more contrast in each.
        saturate: see `fit_pca_colors`.
        size: (width, height) of each panel in pixels.

    Raises:
        ValueError: no scenes, or scenes with different columns.
    """
    if not scenes:
        raise ValueError("feature_picture needs at least one scene, got none")
    titles = list(scenes[0].features)
    for scene in scenes:
        if list(scene.features) != titles:
            raise ValueError(
                f"scene {scene.name!r} has features {list(scene.features)}, the first has {titles}"
            )
    maps = {
        title: fit_pca_colors([s.features[title] for s in scenes], saturate=saturate)
        for title in (titles if joint else [])
    }
    rows = []
    for scene in scenes:
        if scene.color is None:
            panels = [Panel("no colours", scene.coord, _grey(scene.coord), scene.normal)]
        else:
            panels = [Panel("colours", scene.coord, scene.color, scene.normal)]
        for title, features in scene.features.items():
            colors = (maps.get(title) or fit_pca_colors(features, saturate=saturate))(features)
            panels.append(Panel(title, scene.coord, colors, scene.normal))
        rows.append(side_by_side(panels, label=scene.name, size=size))
    return stack(rows)


def curves(
    metrics_path: str | Path,
    keys: Sequence[str | Sequence[str]],
    out_png: str | Path,
    *,
    columns: int = 3,
    size: tuple[int, int] = (460, 290),
) -> Path:
    """Draws metrics of a run over its steps, one chart per entry of `keys`.

    From 100 values on a line is drawn twice: pale as logged, and strong as a running average.
    Lines of the file without `step` or without the key leave no mark; NaN leaves a gap.

    Args:
        metrics_path: JSON lines, one object per logged step.
        keys: each entry one chart: a key, or several keys that share a chart.
        out_png: file to write; its folder is made.
        columns: charts per row.
        size: (width, height) of a chart in pixels.

    Returns:
        The path of the picture.

    Raises:
        ValueError: a line is not JSON, or a key is in no line of the file.
    """
    records = _read_metrics(Path(metrics_path))
    groups = [[entry] if isinstance(entry, str) else list(entry) for entry in keys]
    known = sorted({name for record in records for name in record})
    missing = sorted({name for group in groups for name in group} - set(known))
    if missing or not groups:
        raise ValueError(f"{metrics_path} has no {missing or 'keys to draw'}; it has {known}")
    columns = min(columns, len(groups))
    rows = math.ceil(len(groups) / columns)
    page = Image.new("RGB", (columns * size[0], rows * size[1]), PAGE)
    for i, group in enumerate(groups):
        lines = {name: _series(records, name) for name in group}
        page.paste(_chart(lines, size), (i % columns * size[0], i // columns * size[1]))
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    return out


def _grey(coord: ArrayLike) -> NDArray[np.float32]:
    return np.full((len(np.asarray(coord)), 3), 0.72, np.float32)


def _read_metrics(path: Path) -> list[dict[str, object]]:
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue  # the run is writing this line, or was killed while it did
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if "step" in record and "event" not in record:
            records.append(record)
    return records


def _series(records: Sequence[Mapping[str, object]], key: str) -> NDArray[np.float64]:
    """(m, 2) steps and values of a key, as logged; missing numbers (null) are NaN."""
    pairs = [(r["step"], np.nan if r[key] is None else r[key]) for r in records if key in r]
    return np.asarray(pairs, np.float64).reshape(-1, 2)


def _running_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Two passes of the plain average of the `window` values on either side; NaN stays NaN.

    Symmetric, so that it does not lag behind; shorter, but still symmetric, towards the ends.
    """
    known = np.isfinite(values)
    place = np.arange(len(values))
    reach = np.minimum(window, np.minimum(place, len(values) - 1 - place))
    count = np.append(0, np.cumsum(known))
    seen = np.maximum(count[place + reach + 1] - count[place - reach], 1)
    for _ in range(2):
        total = np.append(0.0, np.cumsum(np.where(known, values, 0.0)))
        values = (total[place + reach + 1] - total[place - reach]) / seen
    return np.where(known, values, np.nan)


def _chart(lines: Mapping[str, NDArray[np.float64]], size: tuple[int, int]) -> Image.Image:
    """One chart; drawn at three times its size and reduced, since Pillow's lines are jagged."""
    s = 3
    width, height = size[0] * s, size[1] * s
    image = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(image)
    small = ImageFont.load_default(12 * s)
    left, right, top, bottom = 62 * s, width - 18 * s, 34 * s, height - 42 * s
    everything = np.concatenate(list(lines.values()))
    y_low, y_high = axis_limits(everything[:, 1])
    x_low, x_high = everything[:, 0].min(), everything[:, 0].max()
    x_high = x_high if x_high > x_low else x_low + 1.0

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x = left + (points[:, 0] - x_low) / (x_high - x_low) * (right - left)
        y = bottom - (points[:, 1] - y_low) / (y_high - y_low) * (bottom - top)
        return np.stack([x, y], axis=1)

    for value, text in zip(*ticks(y_low, y_high, 5), strict=True):
        y = place(np.array([[x_low, value]]))[0, 1]
        draw.line([(left, y), (right, y)], GRID, s)
        draw.text((left - 7 * s, y), text, FAINT, small, anchor="rm")
    for value, text in zip(*ticks(x_low, x_high, 5), strict=True):
        x = place(np.array([[value, y_low]]))[0, 0]
        draw.line([(x, bottom), (x, bottom + 4 * s)], FAINT, s)
        draw.text((x, bottom + 7 * s), text, FAINT, small, anchor="mt")
    draw.line([(left, bottom), (right, bottom)], FAINT, s)
    draw.text(((left + right) / 2, height - 6 * s), "step", FAINT, small, anchor="mb")

    x = left
    for (name, points), color in zip(lines.items(), _cycle(len(lines)), strict=True):
        strong = points
        if len(points) >= 100:
            pale = tuple(int(0.3 * c + 0.7 * 255) for c in color)
            polyline(draw, place(points), pale, s)
            strong = points.copy()
            strong[:, 1] = _running_average(points[:, 1], len(points) // 50)
        polyline(draw, place(strong), color, 2 * s)
        draw.rounded_rectangle((x, 15 * s, x + 14 * s, 18 * s), s, color)
        draw.text((x + 20 * s, 17 * s), name, INK, ImageFont.load_default(14 * s), anchor="lm")
        x += 40 * s + draw.textlength(name, ImageFont.load_default(14 * s))
    return image.reduce(s)


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]
