"""Pictures of clouds with rings around points and lines between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from point_jax.visual import render
from point_jax.visual.camera import Camera, look
from point_jax.visual.layout import places_in_rows
from point_jax.visual.pictures import FAINT, GAP, INK, PAGE

RING = (0, 103, 163)
FINE = 3  # marks are drawn this much larger and scaled down, which smooths them


@dataclass(frozen=True)
class View:
    """A cloud seen by a camera, to be painted with several colourings.

    Attributes:
        coord: (n, 3) float64 metres.
        camera: where it is seen from.
        raster: what each sub-pixel shows.
    """

    coord: NDArray[np.float64]
    camera: Camera
    raster: render.Raster

    def paint(
        self,
        color: ArrayLike,
        *,
        rings: Sequence[int] = (),
        lines: ArrayLike = (),
        line_colors: ArrayLike = (),
    ) -> Image.Image:
        """A picture with marks on top.

        Args:
            color: (n, 3) uint8 or float in [0, 1].
            rings: points to draw a ring around.
            lines: (k, 2) points to join.
            line_colors: (k, 3) uint8.
        """
        image = render.paint(self.raster, color)
        ends = np.asarray(lines, np.int64).reshape(-1, 2)
        if not len(ends) and not len(rings):
            return image
        over = Image.new("RGBA", (image.width * FINE, image.height * FINE))
        draw = ImageDraw.Draw(over)
        pixel = self.camera.project(self.coord)[0] * FINE
        for (a, b), hue in zip(ends, np.asarray(line_colors).reshape(-1, 3), strict=True):
            color_of_line = (*map(int, hue), 215)
            draw.line([*pixel[a], *pixel[b]], color_of_line, round(1.4 * FINE))
            for x, y in (pixel[a], pixel[b]):
                r = 2.4 * FINE
                draw.ellipse([x - r, y - r, x + r, y + r], color_of_line)
        for point in rings:
            x, y = pixel[point]
            for r, hue, width in ((9.0, PAGE, 5.0), (8.0, RING, 2.6)):
                box = [x - r * FINE, y - r * FINE, x + r * FINE, y + r * FINE]
                draw.ellipse(box, outline=(*hue, 255), width=round(width * FINE))
        small = over.resize(image.size, Image.Resampling.LANCZOS)
        return Image.alpha_composite(image.convert("RGBA"), small).convert("RGB")


def view(
    coord: ArrayLike,
    normal: ArrayLike | None = None,
    *,
    size: tuple[int, int] = (640, 480),
    whole: bool = False,
) -> View:
    """A view into a room from above a corner, or with `whole` of an object, uncut.

    Args:
        coord: (n, 3) metres, z up, n >= 1.
        normal: (n, 3) unit, facing free space; optional.
        size: (width, height) in pixels.
        whole: show every point from the same direction.
    """
    points = np.asarray(coord, np.float64)
    normals = None if normal is None else np.asarray(normal, np.float64)
    camera, keep = render.corner_camera(points, normals, size=size)
    if whole:
        azimuth = render.best_azimuth(points, normals, 35.0)
        reach = 2.0 * float(render.splat_radius(points).max())  # discs, not only their middles
        around = np.concatenate([points - reach, points + reach])
        camera, keep = look(around, azimuth=azimuth, elevation=35.0, size=size), None
        normals = None
    return View(points, camera, render.rasterize(points, camera, normal=normals, keep=keep))


def side_by_side_view(
    coords: Sequence[NDArray[np.floating]],
    normals: Sequence[NDArray[np.floating] | None],
    *,
    size: tuple[int, int],
) -> View:
    """Clouds next to one another in one view; its points are theirs, one cloud after the other."""
    known = all(normal is not None for normal in normals)
    azimuth = render.best_azimuth(coords[0], normals[0], 42.0)
    boxes = [np.quantile(coord, [0.002, 0.998], axis=0).astype(float) for coord in coords]
    keep = [render.without_ceiling(coord) for coord in coords]
    if not known:
        keep = [
            k & render.without_near_walls(c, azimuth) for c, k in zip(coords, keep, strict=True)
        ]
    inside = [
        k & ((coord >= box[0]) & (coord <= box[1])).all(axis=1)
        for coord, k, box in zip(coords, keep, boxes, strict=True)
    ]
    shifts = places_in_rows(boxes, azimuth)
    points = np.concatenate([c + shift for c, shift in zip(coords, shifts, strict=True)])
    facing = np.concatenate([n for n in normals if n is not None]) if known else None
    camera = look(points[np.concatenate(inside)], azimuth=azimuth, elevation=42.0, size=size)
    raster = render.rasterize(points, camera, normal=facing, keep=np.concatenate(keep))
    return View(points, camera, raster)


def row_of(
    pictures: Sequence[tuple[str, Image.Image]], label: str = "", note: str = ""
) -> Image.Image:
    """Pictures of one size next to one another with their titles above.

    Args:
        pictures: (title, picture); of a title with a line break the second line is faint.
        label: caption of the row, at its left above the titles; none if empty.
        note: line below the pictures; none if empty.
    """
    width, height = pictures[0][1].size
    lines = max(title.count("\n") for title, _ in pictures) + 1
    head = (30 if label else 0) + 8 + 20 * lines
    foot = GAP + (26 if note else 0)
    page = Image.new("RGB", (len(pictures) * (width + GAP) + GAP, head + height + foot), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 18), label, INK, ImageFont.load_default(19), anchor="lm")
    for column, (title, picture) in enumerate(pictures):
        left = GAP + column * (width + GAP)
        for i, text in enumerate(title.split("\n")):
            y = head - 14 - 20 * (title.count("\n") - i)
            ink = FAINT if i or lines == 1 else INK
            draw.text((left, y), text, ink, ImageFont.load_default(16), anchor="lm")
        page.paste(picture, (left, head))
    draw.text((GAP, head + height + 16), note, FAINT, ImageFont.load_default(16), anchor="lm")
    return page
