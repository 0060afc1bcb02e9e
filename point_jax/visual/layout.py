"""Where clouds stand when several are shown, and which points stay when there are too many."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from point_jax.visual.camera import direction

GAP = 0.1  # between clouds, of the larger side of the largest cloud
SHADOW = 1.1  # free ground behind a cloud, of its height: seen from 42 degrees it hides no other


def places_in_rows(
    boxes: Sequence[NDArray[np.floating]], azimuth: float, columns: int | None = None
) -> list[NDArray[np.float64]]:
    """Shifts that put clouds side by side on one floor, as seen from an azimuth.

    Args:
        boxes: for each cloud (2, 3), its lowest and highest coordinates in metres.
        azimuth: degrees around z from +x, where the camera stands.
        columns: clouds in a row; by default all of up to four, otherwise what is about square.
            The first cloud is at the left of the row farthest from the camera.

    Returns:
        For each cloud (3,): added to its coordinates it gives its place; 0 is amid all clouds.
    """
    right, toward = direction(azimuth + 90.0, 0.0), direction(azimuth, 0.0)
    if columns is None:
        columns = len(boxes) if len(boxes) <= 4 else int(np.rint(np.sqrt(1.6 * len(boxes))))
    sides = np.array([box[1, :2] - box[0, :2] for box in boxes])
    wide = sides @ np.abs(right[:2])
    deep = sides @ np.abs(toward[:2])
    gap = GAP * float(sides.max())
    row, column = np.divmod(np.arange(len(boxes)), columns)
    widths = np.array([wide[column == c].max() for c in range(column.max() + 1)]) + gap
    tall = np.array([box[1, 2] - box[0, 2] for box in boxes])
    depths = np.array([deep[row == r].max() for r in range(row.max() + 1)])
    behind = [gap + SHADOW * tall[row == r].max() if r else 0.0 for r in range(row.max() + 1)]
    across = np.cumsum(widths) - widths / 2 - widths.sum() / 2
    near = np.cumsum(depths + behind) - depths / 2 - (depths.sum() + sum(behind)) / 2
    half = tall.max() / 2
    return [
        across[c] * right
        + near[r] * toward
        - np.array([*(box[0, :2] + box[1, :2]) / 2, box[0, 2] + half])
        for box, r, c in zip(boxes, row, column, strict=True)
    ]


def thin(
    coords: Sequence[NDArray[np.floating]], limit: int, needed: Sequence[Sequence[int]]
) -> tuple[list[NDArray[np.int64]], float]:
    """Points that stay so that all clouds together have about `limit`, none if they have fewer.

    Args:
        coords: for each cloud (n, 3) metres.
        limit: points of all clouds together, beside the needed ones.
        needed: for each cloud points that stay in any case.

    Returns:
        For each cloud the points that stay, ascending: the first in each cube of one size, the
        smallest that meets the limit to within 5 %; and that size in metres, 0 if all stay.
    """
    if sum(map(len, coords)) <= limit:
        return [np.arange(len(coord)) for coord in coords], 0.0
    high = max(float(np.ptp(coord, axis=0).max()) for coord in coords) + 1e-6
    low = 1e-5 * high
    best = [_first_in_cubes(coord, high) for coord in coords]
    while high / low > 1.02:
        middle = float(np.sqrt(low * high))
        tried = [_first_in_cubes(coord, middle) for coord in coords]
        count = sum(map(len, tried))
        if count > limit:
            low = middle
        else:
            best, high = tried, middle
            if count > 0.95 * limit:
                break
    kept = [
        np.union1d(points, np.asarray(must, np.int64))
        for points, must in zip(best, needed, strict=True)
    ]
    return kept, high


def _first_in_cubes(coord: NDArray[np.floating], size: float) -> NDArray[np.int64]:
    low = coord.min(axis=0).astype(np.float64)
    cell = np.floor((coord - low) / size).astype(np.int64)
    _, first = np.unique(cell @ np.array([1, 1 << 20, 1 << 40]), return_index=True)
    return np.sort(first)
