"""Cosine similarity of features to picked points, and the colours that show it.

Heat maps of trained features look flat when cosines are mapped to colours as they are: most of
them lie close together. The Sonata release therefore takes its scale from three quantiles of the
similarities: the median, the top 10 % and the top 2 %. So does `heat_scale`; where the release
joins two logistic curves with a gap between them, this scale is piecewise linear and monotone, so
that a legend can name the cosine at each of its five knots.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

BLOCK = 8_192
# Shares of the points above each knot but the first (the lowest value); the knots are at equal
# distances on the colour ramp.
SHARES_ABOVE = (1.0, 0.5, 0.1, 0.02, 0.0)
# Blue over sand to red, dark to light to dark: told apart with any colour vision.
RAMP = (
    (52, 58, 104),
    (66, 106, 165),
    (132, 178, 200),
    (226, 226, 206),
    (247, 205, 133),
    (235, 126, 62),
    (186, 28, 40),
)


def unit_rows(features: ArrayLike) -> NDArray[np.float32]:
    """Rows (n, E) divided by their lengths, float32; rows of zeros stay zeros."""
    rows = np.asarray(features, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"features must be (n, E), got {rows.shape}")
    # Two steps, so that the squares of very large or small values stay within float32.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = rows / np.where(largest > 0, largest, np.float32(1.0))
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled / np.where(length > 0, length, 1.0)).astype(np.float32)


def cosine_similarity(features: ArrayLike, queries: ArrayLike) -> NDArray[np.float32]:
    """Cosine of every feature to each of a few queries, computed block by block.

    Args:
        features: (n, E).
        queries: (q, E).

    Returns:
        (q, n) float32 in [-1, 1]; 0 where a feature or the query is all zeros.

    Raises:
        ValueError: the widths differ.
    """
    rows, wanted = np.asarray(features), unit_rows(queries)
    if rows.ndim != 2 or rows.shape[1] != wanted.shape[1]:
        raise ValueError(
            f"features {rows.shape} and queries {wanted.shape} must be (n, E) and (q, E)"
        )
    out = np.empty((len(wanted), len(rows)), np.float32)
    for i in range(0, len(rows), BLOCK):
        out[:, i : i + BLOCK] = wanted @ unit_rows(rows[i : i + BLOCK]).T
    return np.clip(out, -1.0, 1.0, out=out)


def nearest_point(coord: ArrayLike, position: ArrayLike) -> int:
    """Index of the point of (n, 3) that is nearest to a position (3,), both in metres."""
    where = np.asarray(position, np.float64)
    if where.shape != (3,) or not np.isfinite(where).all():
        raise ValueError(f"a position is three finite numbers x, y, z, got {position}")
    return int(KDTree(np.asarray(coord, np.float64)).query(where)[1])


def heat_scale(similarity: ArrayLike) -> NDArray[np.float32]:
    """Cosines at the five knots of the colour ramp: lowest, median, top 10 %, top 2 %, highest.

    Args:
        similarity: (n,) cosines of all the points that share the scale, n >= 1.

    Returns:
        (5,) float32, not falling.
    """
    values = np.sort(np.asarray(similarity, np.float32).ravel())
    last = len(values) - 1
    return np.array([values[int(last * (1.0 - share))] for share in SHARES_ABOVE], np.float32)


def heat(similarity: ArrayLike, scale: ArrayLike) -> NDArray[np.float32]:
    """Places on the colour ramp, in [0, 1], of similarities of any shape by a `heat_scale`.

    Where knots coincide (many points as similar as one another), their points take the highest.
    """
    knots = np.asarray(scale, np.float64)
    values = np.asarray(similarity, np.float64)
    below = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, len(knots) - 2)
    span = knots[below + 1] - knots[below]
    part = np.where(span > 0, (values - knots[below]) / np.where(span > 0, span, 1.0), 1.0)
    return ((below + np.clip(part, 0.0, 1.0)) / (len(knots) - 1)).astype(np.float32)


def heat_colors(place: ArrayLike) -> NDArray[np.uint8]:
    """Colours (..., 3) uint8 of places on the ramp in [0, 1]."""
    stops = np.asarray(RAMP, np.float64)
    at = np.clip(np.asarray(place, np.float64), 0.0, 1.0) * (len(stops) - 1)
    low = np.minimum(at.astype(np.int64), len(stops) - 2)
    part = (at - low)[..., None]
    return np.rint(stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def similarity_colors(similarity: ArrayLike) -> NDArray[np.uint8]:
    """Colours (n, 3) uint8 of one heat map's similarities (n,), with a scale of its own."""
    return heat_colors(heat(similarity, heat_scale(similarity)))
