"""A furnished room with exactly so many voxels: the benchmark's default input.

Plain geometry on the voxel lattice, the same on every machine: floor, walls and boxes of
furniture, their surfaces rough as scans are. It stands for a scan's structure (how many of the 27
neighbours of a voxel exist, how fast levels thin out), not for its looks.
"""

import math
from typing import NamedTuple

import numpy as np

SMALLEST = 100
_SIZE = (5.0, 4.0, 2.4)  # of the room at scale 1, metres
_VOXEL = 0.02  # metres, at scale 1
_FULL = 250_000  # voxels at scale 1, about
_ROUGH = 0.2  # share of the cells that are two voxels thick

# Boxes in the room, metres: lowest corner, size, colour.
_FURNITURE = (
    ((0.0, 0.4, 0.0), (0.6, 1.8, 2.0), (150, 110, 70)),  # wardrobe
    ((4.0, 0.3, 0.0), (1.0, 2.0, 0.5), (90, 110, 160)),  # bed
    ((1.8, 1.4, 0.7), (1.4, 0.8, 0.05), (170, 130, 90)),  # table
    ((1.85, 1.45, 0.0), (0.06, 0.06, 0.7), (120, 90, 60)),
    ((3.09, 1.45, 0.0), (0.06, 0.06, 0.7), (120, 90, 60)),
    ((1.85, 2.09, 0.0), (0.06, 0.06, 0.7), (120, 90, 60)),
    ((3.09, 2.09, 0.0), (0.06, 0.06, 0.7), (120, 90, 60)),
    ((2.2, 2.3, 0.0), (0.45, 0.45, 0.45), (60, 60, 70)),  # chairs
    ((2.2, 0.8, 0.0), (0.45, 0.45, 0.45), (60, 60, 70)),
    ((1.0, 3.4, 0.0), (1.2, 0.6, 0.9), (200, 200, 190)),  # chest of drawers
    ((1.2, 3.5, 0.9), (0.3, 0.3, 0.35), (180, 60, 50)),
    ((3.2, 3.65, 0.0), (0.9, 0.35, 1.8), (140, 100, 60)),  # shelf
)


class Room(NamedTuple):
    """Points, one in each voxel.

    Attributes:
      grid: (N, 3) int32, distinct voxels from 0.
      coord: (N, 3) float32, metres; sampling a grid from the lowest coordinates on gives `grid`.
      color: (N, 3) uint8.
      normal: (N, 3) float32, of unit length.
    """

    grid: np.ndarray
    coord: np.ndarray
    color: np.ndarray
    normal: np.ndarray


def furnished_room(points: int, grid_size: float = 0.02) -> Room:
    """A room of exactly `points` voxels of `grid_size` metres.

    The whole room grows with their number; what is too much of it is cut off at the top.

    Raises:
      ValueError: fewer than `SMALLEST` points.
    """
    if points < SMALLEST:
        raise ValueError(f"a room needs at least {SMALLEST} points, got {points}")
    scale = math.sqrt(points / _FULL)
    while True:
        grid, normal, color = _surfaces(scale / _VOXEL)
        if len(grid) >= points:
            break
        scale *= max(1.01, math.sqrt(points / len(grid)))
    rows = np.sort(np.argsort(grid[:, 2], kind="stable")[:points])
    grid, normal, color = grid[rows], normal[rows], color[rows]
    draw = np.random.default_rng(1)
    # Points on the lowest voxels' floor: there they fix where a grid starts that is sampled anew.
    within = np.where(grid == 0, 0.05, draw.uniform(0.1, 0.9, grid.shape))
    coord = ((grid + within) * grid_size).astype(np.float32)
    shade = draw.integers(-12, 13, grid.shape)
    return Room(grid, coord, np.clip(color + shade, 0, 255).astype(np.uint8), normal)


def _surfaces(cells: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels (n, 3), normals (n, 3) and colours (n, 3) of a room with so many voxels a metre."""

    def lattice(metres: tuple[float, ...]) -> np.ndarray:
        return np.rint(np.array(metres) * cells).astype(np.int64)

    high = np.maximum(lattice(_SIZE), 4)
    zero = np.zeros(3, np.int64)
    wall, floor = (205, 200, 190), (150, 125, 100)
    faces = [_face(zero, high, axis=2, side=0, outwards=1, color=floor)]
    for axis in (0, 1):
        for side in (0, 1):
            faces.append(_face(zero, high, axis, side, outwards=1 - 2 * side, color=wall))
    for corner, size, color in _FURNITURE:
        low = lattice(corner)
        top = np.minimum(low + np.maximum(lattice(size), 1), high)
        low = np.minimum(low, top - 1)
        faces.append(_face(low, top, 2, 1, 1, color))
        for axis in (0, 1):
            faces += [_face(low, top, axis, side, 2 * side - 1, color) for side in (0, 1)]
    grid, normal, color = (np.concatenate(parts) for parts in zip(*faces, strict=True))
    rough = np.random.default_rng(0).random(len(grid)) < _ROUGH
    grid = np.concatenate([grid, np.clip(grid[rough] + normal[rough], 0, high)])
    key = (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]
    rows = np.sort(np.unique(key, return_index=True)[1])
    normal = np.concatenate([normal, normal[rough]])[rows]
    color = np.concatenate([color, color[rough]])[rows]
    grid = grid[rows] - grid.min(0)
    return grid.astype(np.int32), normal.astype(np.float32), color


def _face(
    low: np.ndarray,
    high: np.ndarray,
    axis: int,
    side: int,
    outwards: int,
    color: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels, normals and colours of one face of the box of voxels low <= v < high."""
    spans = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    spans[axis] = np.array([high[axis] - 1 if side else low[axis]])
    grid = np.stack(np.meshgrid(*spans, indexing="ij"), axis=-1).reshape(-1, 3)
    normal = np.zeros_like(grid)
    normal[:, axis] = outwards
    return grid, normal, np.broadcast_to(np.array(color), grid.shape)
