"""The path of a hand-held camera through a room."""

import numpy as np
from scipy import ndimage

from point_jax.data.raycast import Primitives

_CELL = 0.1  # metres
_LOW, _HIGH = 1.0, 1.9  # metres: things between these heights are in the camera's way


def walk(
    primitives: Primitives,
    outline: np.ndarray,
    height: float,
    frames: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Poses of a camera that looks around twice, low and high, across the room.

    Args:
        primitives: the room with its furniture.
        outline: (k, 2) corners of the floor, metres.
        height: of the room, metres.
        frames: how many poses.
        rng: draws the path.

    Returns:
        (frames, 4, 4) float64 camera to world, OpenCV axes (x right, y down, z forward).
    """
    free = _free_cells(primitives, outline)
    middle, half = (free.min(axis=0) + free.max(axis=0)) / 2, np.ptp(free, axis=0) / 2
    along = np.arange(frames) / frames
    sense = -1 if rng.uniform() < 0.5 else 1
    heading = rng.uniform(0, 2 * np.pi) + sense * 4 * np.pi * along
    away = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    wish = middle - away * half * rng.uniform(0.5, 0.9)
    # Every step goes to the free place that is near to both the wish and the last place.
    place = np.empty_like(wish)
    last = free[np.square(free - wish[0]).sum(axis=1).argmin()]
    for k in range(frames):
        cost = np.square(free - wish[k]).sum(axis=1) + 1.5 * np.square(free - last).sum(axis=1)
        place[k] = last = free[cost.argmin()]
    phase = 2 * np.pi * along + rng.normal(0, 0.3)
    eye_height = rng.uniform(1.3, 1.6) + 0.15 * np.sin(phase * 2) + rng.normal(0, 0.03, frames)
    eye = np.column_stack([place, np.clip(eye_height, 1.1, height - 0.4)])
    heading = heading + rng.normal(0, 0.1, frames)
    pitch = np.radians(-13 - 20 * np.cos(phase)) + rng.normal(0, 0.06, frames)
    return _poses(eye, heading, pitch, rng.normal(0, 0.04, frames))


def _poses(eye: np.ndarray, heading: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """(n, 4, 4) camera to world from positions (n, 3) and angles (n,) in radians."""
    zero = np.zeros_like(heading)
    forward = np.stack(
        [np.cos(heading) * np.cos(pitch), np.sin(heading) * np.cos(pitch), np.sin(pitch)], axis=1
    )
    right = np.stack([np.sin(heading), -np.cos(heading), zero], axis=1)
    down = np.cross(forward, right)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    pose = np.zeros((len(eye), 4, 4))
    pose[:, :3, 0] = c * right + s * down
    pose[:, :3, 1] = c * down - s * right
    pose[:, :3, 2] = forward
    pose[:, :3, 3] = eye
    pose[:, 3, 3] = 1
    return pose


def _free_cells(primitives: Primitives, outline: np.ndarray) -> np.ndarray:
    """(m, 2) middles of the cells where a camera can be, with as much clearance as there is."""
    size = outline.max(axis=0)
    axes = [np.arange(_CELL / 2, s, _CELL) for s in size]
    x, y = np.meshgrid(*axes, indexing="ij")
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if x0 == x1:  # walls run along x or y: count the crossings of a ray along x
            inside ^= (x < x0) & (y > min(y0, y1)) & (y < max(y0, y1))
    low, high = primitives.extents()
    # Someone walks on free floor; in a full room the camera is held over low furniture. It stays in
    # one connected part, which must span the given share of the room's width and depth.
    for lowest, clearance, span in ((0.2, 0.25, 0.5), (_LOW, 0.3, 0.4), (_LOW, 0.15, 0.0)):
        way = (low[:, 2] < _HIGH) & (high[:, 2] > lowest)
        free = inside.copy()
        first = np.floor((low[way, :2] - clearance) / _CELL).astype(int).clip(0)
        last = np.ceil((high[way, :2] + clearance) / _CELL).astype(int).clip(0)
        for (i0, j0), (i1, j1) in zip(first, last, strict=True):
            free[i0:i1, j0:j1] = False
        if free.any():
            pockets = np.zeros(free.shape, np.int32)
            ndimage.label(free, output=pockets)
            free = pockets == np.bincount(pockets[free]).argmax()
            cells = np.stack([x[free], y[free]], axis=1)
            if (np.ptp(cells, axis=0) >= span * size).all():
                return cells
    return np.stack([x[inside], y[inside]], axis=1)
