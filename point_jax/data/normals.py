"""Normals of a cloud, estimated from the neighbourhoods of its points."""

from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

BLOCK = 50_000  # points at a time bound the memory: 50,000 x 24 x 3 doubles
# A neighbourhood whose second spread is below this share of its first is a line, not a plane.
FLATTEST = 1e-6


class Planes(NamedTuple):
    """Planes fitted around points.

    Attributes:
        normal: (n, 3) float64 unit, of arbitrary sign.
        centre: (n, 3) float64, mean of the neighbourhood.
        known: (n,) bool; False where the neighbours are fewer than three, or lie on a line.
    """

    normal: np.ndarray
    centre: np.ndarray
    known: np.ndarray


def local_planes(
    points: np.ndarray, support: np.ndarray, neighbours: int, radius: float = np.inf
) -> Planes:
    """Fits a plane around each point by principal components.

    Args:
        points: (n, 3).
        support: (m, 3) the points whose neighbourhoods are used; thinner than `points` makes the
            neighbourhoods wider at the same cost.
        neighbours: how many of `support`, the nearest.
        radius: only those no farther than this.
    """
    tree = KDTree(support)
    neighbours = min(neighbours, len(support))
    normal, centre = np.empty(points.shape), np.empty(points.shape)
    known = np.empty(len(points), bool)
    for start in range(0, len(points), BLOCK):
        part = slice(start, start + BLOCK)
        distance, index = (
            found.reshape(-1, neighbours)  # of one neighbour SciPy gives no axis
            for found in tree.query(
                points[part], neighbours, distance_upper_bound=radius, workers=-1
            )
        )
        inside = np.isfinite(distance)
        count = inside.sum(axis=1)
        around = support[np.where(inside, index, 0)].astype(np.float64)
        weight = inside / np.maximum(count, 1)[:, None]
        centre[part] = np.einsum("nk,nki->ni", weight, around)
        around -= centre[part][:, None]
        # eigh sorts ascending: the first vector is the direction of least spread.
        spread, axes = np.linalg.eigh(np.einsum("nk,nki,nkj->nij", weight, around, around))
        normal[part] = axes[:, :, 0]
        known[part] = (count >= 3) & (spread[:, 1] > FLATTEST * spread[:, 2])
    return Planes(normal, centre, known)


def estimate_normals(
    coord: np.ndarray,
    neighbours: int = 24,
    radius: float = np.inf,
    towards: np.ndarray | None = None,
) -> np.ndarray:
    """Normals of a cloud by principal components of each point's neighbourhood.

    The sign of such a normal is free. With a viewpoint it is turned towards that: exact for a scan
    from one place, and for a room seen from within. Without, it is turned upwards: floors and table
    tops come out right, ceilings do not, and vertical walls face either way.

    Args:
        coord: (n, 3) metres, z up.
        neighbours: how many, the point itself included.
        radius: metres; neighbours farther away do not count.
        towards: (3,) a viewpoint, or (n, 3) one a point; None: upwards.

    Returns:
        (n, 3) float32 unit; zeros where unknown: fewer than three neighbours, or on a line.

    Raises:
        ValueError: fewer than three neighbours, or a radius that is not positive.
    """
    if neighbours < 3 or not radius > 0:
        raise ValueError(
            f"{neighbours} neighbours within {radius} m cannot make a plane; expected 3 or more "
            f"and a radius above 0"
        )
    points = coord.astype(np.float64)
    normal, _, known = local_planes(points, points, neighbours, radius)
    wanted = np.array([0.0, 0.0, 1.0]) if towards is None else towards - points
    turned = np.einsum("ni,ni->n", normal, np.broadcast_to(wanted, points.shape))
    normal *= np.where(turned < 0, -1.0, 1.0)[:, None]
    return np.where(known[:, None], normal, 0.0).astype(np.float32)
