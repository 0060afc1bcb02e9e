"""Fusing the points of many frames into one cloud: voxel means, normals, no stray points."""

import numpy as np
from scipy.spatial import KDTree

from point_jax.data.normals import local_planes
from point_jax.data.scenes import SceneError


def voxel_codes(points: np.ndarray, size: float) -> np.ndarray:
    """One int64 a point (n, 3): equal exactly where two points share a cubic voxel of `size`."""
    grid = np.floor(points / size).astype(np.int64) + 2**20
    return (grid[:, 0] << 42) | (grid[:, 1] << 21) | grid[:, 2]


def voxel_mean(
    points: np.ndarray, size: float, weight: np.ndarray, *values: np.ndarray
) -> list[np.ndarray]:
    """Weighted means of points and values over the voxels that hold any points.

    Args:
        points: (n, 3) metres.
        size: edge of a voxel, metres.
        weight: (n,) positive.
        *values: (n, C) arrays to average alike.

    Returns:
        [points (m, 3), weight (m,) summed, *values (m, C)], float64, ordered by voxel.
    """
    _, voxel, count = np.unique(voxel_codes(points, size), return_inverse=True, return_counts=True)
    total = np.bincount(voxel, weight, len(count))

    def mean(array: np.ndarray) -> np.ndarray:
        sums = [np.bincount(voxel, weight * array[:, c], len(count)) for c in range(array.shape[1])]
        return np.stack(sums, 1) / total[:, None]

    return [mean(points), total, *(mean(value) for value in values)]


def stray(points: np.ndarray, radius: float, fewest: int) -> np.ndarray:
    """Which points have fewer than `fewest` others within `radius`: (n,) bool."""
    distance, _ = KDTree(points).query(points, fewest + 1, workers=-1)
    return ~(distance[:, -1] <= radius)


def finish_cloud(
    points: np.ndarray,
    weight: np.ndarray,
    color: np.ndarray,
    towards: np.ndarray,
    size: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns the points of some frames into a clean cloud with one point a voxel.

    Depth noise leaves a surface several voxels thick. So points are moved along the local normal
    onto the plane of their neighbourhood (24 points of a grid twice as coarse: about 6 voxels
    wide), by at most 2 voxels, and averaged a second time; stray points are dropped.

    Args:
        points: (n, 3) metres, z up, of all frames.
        weight: (n,) how far to trust each.
        color: (n, 3) in 0..255.
        towards: (n, 3) unit vectors to the camera that saw each.
        size: voxel edge, metres.

    Returns:
        coord (m, 3) float32, color (m, 3) uint8, normal (m, 3) float32 turned to the cameras.

    Raises:
        SceneError: when hardly a voxel has others near it.
    """
    points, weight, color, towards = voxel_mean(points, size, weight, color, towards)
    keep = ~stray(points, 4 * size, 8)
    points, weight, color, towards = points[keep], weight[keep], color[keep], towards[keep]
    if len(points) < 100:
        raise SceneError(
            f"of {len(keep)} voxels of {size} m all but {len(points)} are stray ones: the depth "
            f"images are too coarse for them; choose a larger --grid"
        )
    support = voxel_mean(points, 2 * size, weight)[0]
    planes = local_planes(points, support, 24)
    above = np.sum((points - planes.centre) * planes.normal, axis=1, keepdims=True)
    points = points - planes.normal * np.clip(above, -2 * size, 2 * size)
    points, weight, color, towards = voxel_mean(points, size, weight, color, towards)
    normal = local_planes(points, voxel_mean(points, 2 * size, weight)[0], 24).normal
    normal *= np.where(np.sum(normal * towards, axis=1, keepdims=True) < 0, -1, 1)
    return (
        points.astype(np.float32),
        np.rint(np.clip(color, 0, 255)).astype(np.uint8),
        normal.astype(np.float32),
    )
