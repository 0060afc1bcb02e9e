"""Depth cameras: cleaning of their images, points out of pixels, colours of points.

Poses are camera-to-world 4x4 with OpenCV axes (x right, y down, z forward); depth is along z, in
metres, 0 where there is none; pixel centres have whole coordinates.
"""

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from point_jax.data.cameras import pixel_of, project


def clean_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """Removes what depth cameras invent: flying pixels between two surfaces, and far noise.

    A pixel goes (becomes 0) when its depth is out of range or when the 3x3 pixels around it span
    more than 2 cm + 4 % of it, which is a jump, or a surface seen at less than about 6 degrees.

    Args:
        depth: (H, W) metres.
        nearest: metres.
        farthest: metres; the noise of structured light and time of flight grows with distance.
    """
    depth = np.where((depth >= nearest) & (depth <= farthest), depth, 0)
    spread = maximum_filter(depth, 3) - minimum_filter(depth, 3)  # a hole (0) counts as a jump
    return np.where(spread <= 0.02 + 0.04 * depth, depth, 0)


def backproject(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels that have a depth -> (n, 3) points in the camera's axes, row by row."""
    row, column = np.nonzero(depth)
    z = depth[row, column].astype(np.float64)
    x = (column - intrinsics[0, 2]) / intrinsics[0, 0] * z
    y = (row - intrinsics[1, 2]) / intrinsics[1, 1] * z
    return np.stack([x, y, z], 1)


def hidden(points: np.ndarray, intrinsics: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which points (n, 3) lie behind others for this camera, by a z-buffer of 4x4-pixel cells.

    For a colour camera beside the depth camera: without this, the rim of a wall behind a chair
    gets the chair's colour. More than 6 cm + 4 % behind the nearest point of the cell is hidden.
    """
    u, v, inside = pixel_of(*project(points, intrinsics), shape)
    cell = (v // 4) * (shape[1] // 4 + 1) + u // 4
    nearest = np.full((shape[0] // 4 + 1) * (shape[1] // 4 + 1), np.inf)
    np.minimum.at(nearest, cell[inside], points[inside, 2])
    return inside & (points[:, 2] > nearest[cell] * 1.04 + 0.06)


def sample_color(image: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Bilinear colours (n, 3) float32 of an (H, W, 3) image; places outside take the border's."""
    height, width = image.shape[:2]
    column, row = np.clip(column, 0, width - 1), np.clip(row, 0, height - 1)
    left = np.minimum(column.astype(int), width - 2)
    top = np.minimum(row.astype(int), height - 2)
    right, down = (column - left)[:, None], (row - top)[:, None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.float32)
