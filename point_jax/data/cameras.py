"""Pinhole cameras: points to pixels, and which of them a depth image shows.

Poses are camera-to-world 4x4 with OpenCV axes (x right, y down, z forward); depth is along z, in
metres, 0 where there is none; pixel centres have whole coordinates.
"""

import numpy as np


def transform(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (n, 3) through a rigid 4x4."""
    # einsum and not matmul: BLAS picks kernels by CPU.
    return np.einsum("nj,ij->ni", points, matrix[:3, :3]) + matrix[:3, 3]


def project(
    points: np.ndarray, intrinsics: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 3) of a camera's frame -> column, row and depth (n,); for depth > 0 only.

    Args:
        points: (n, 3) in camera axes.
        intrinsics: (3, 3).
    """
    depth = points[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        column = points[:, 0] / depth * intrinsics[0, 0] + intrinsics[0, 2]
        row = points[:, 1] / depth * intrinsics[1, 1] + intrinsics[1, 2]
    return column, row, depth


def pixel_of(
    column: np.ndarray, row: np.ndarray, depth: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest pixel of projected points, and which of them fall inside an image.

    Returns:
        (u, v, inside): int columns and rows (0 where outside), bool; each (n,).
    """
    height, width = shape[:2]
    with np.errstate(invalid="ignore"):
        inside = (depth > 0.05) & (column > -0.5) & (column < width - 0.5)
        inside &= (row > -0.5) & (row < height - 0.5)
    u = np.rint(np.where(inside, column, 0)).astype(int)
    v = np.rint(np.where(inside, row, 0)).astype(int)
    return np.clip(u, 0, width - 1), np.clip(v, 0, height - 1), inside


def sees(points: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Which points (n, 3) of a camera's frame its depth image shows, to 3 cm + 2 %: (n,) bool.

    Points where the image has no depth count as unseen.
    """
    u, v, inside = pixel_of(*project(points, intrinsics), depth.shape)
    there = depth[v, u]
    return inside & (there > 0) & (np.abs(there - points[:, 2]) < 0.03 + 0.02 * there)
