"""Matches between the points of two clouds by their features.

The most similar target point of every source point is found block by block: at no time is there
an n x m matrix, so clouds of any size can be matched.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

from point_jax.visual.similarity import unit_rows

BLOCK = 4_096


@dataclass(frozen=True)
class Matches:
    """The nearest target point in feature space of every source point.

    Attributes:
        target: (n,) int64, the target point with the highest cosine (the first of equal ones).
        score: (n,) float32, that cosine.
        mutual: (n,) bool: the source point is also the nearest one of its target point.
        back: (m,) int64, the source point with the highest cosine for every target point.
        back_score: (m,) float32, that cosine.
    """

    target: NDArray[np.int64]
    score: NDArray[np.float32]
    mutual: NDArray[np.bool_]
    back: NDArray[np.int64]
    back_score: NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy:
    """How many matches are right, where the true places are known.

    Attributes:
        correct: (n,) bool: the match lies within `within` of the true place.
        known: (n,) bool: the target cloud has a point within `within` of the true place.
        distance: (n,) float64 metres from the match to the true place.
        within: metres.
    """

    correct: NDArray[np.bool_]
    known: NDArray[np.bool_]
    distance: NDArray[np.float64]
    within: float

    def share(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """Share of right matches among the (chosen) source points that have a true counterpart."""
        counted = self.known if chosen is None else self.known & chosen
        return float(self.correct[counted].mean()) if counted.any() else float("nan")


@partial(jax.jit, static_argnames=("precision",))
def _best(
    source: jax.Array, target: jax.Array, n: jax.Array, m: jax.Array, *, precision: str = "highest"
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Best cosine and its place for the rows and columns of one block; n, m rows are in use."""
    cosine = jnp.einsum("ne,me->nm", source, target, precision=precision)
    used = (jnp.arange(len(source)) < n)[:, None] & (jnp.arange(len(target)) < m)[None, :]
    cosine = jnp.where(used, cosine, -jnp.inf)
    return cosine.max(1), cosine.argmax(1), cosine.max(0), cosine.argmax(0)


def match_features(source: ArrayLike, target: ArrayLike, *, block: int = BLOCK) -> Matches:
    """Nearest neighbours by cosine between two sets of features, both ways in one pass.

    Args:
        source: (n, E) features, n >= 1.
        target: (m, E) features, m >= 1.
        block: rows of each side compared at a time; `block`^2 cosines are held in memory.

    Returns:
        The matches of every source point and, backwards, of every target point.

    Raises:
        ValueError: no points on a side, or different widths.
    """
    rows, columns = np.asarray(source), np.asarray(target)
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"matching needs (n, E) and (m, E), got {rows.shape}, {columns.shape}")
    n, m = len(rows), len(columns)
    if not n or not m:
        raise ValueError(f"matching needs points on both sides, got {n} and {m}")
    high, wide = (min(block, _power_of_two(count)) for count in (n, m))
    score, place = np.full(n, -np.inf, np.float32), np.zeros(n, np.int64)
    back_score, back = np.full(m, -np.inf, np.float32), np.zeros(m, np.int64)
    for j in range(0, m, wide):
        right = _padded(unit_rows(columns[j : j + wide]), wide)
        for i in range(0, n, high):
            left = _padded(unit_rows(rows[i : i + high]), high)
            best = _best(left, right, np.int32(min(high, n - i)), np.int32(min(wide, m - j)))
            row_score, row_place, column_score, column_place = map(np.asarray, best)
            _improve(score[i : i + high], place[i : i + high], row_score, row_place, j)
            _improve(back_score[j : j + wide], back[j : j + wide], column_score, column_place, i)
    mutual = back[place] == np.arange(n)
    return Matches(place, np.clip(score, -1, 1), mutual, back, np.clip(back_score, -1, 1))


def matching_accuracy(
    source: ArrayLike,
    matched: ArrayLike,
    target: ArrayLike,
    *,
    transform: ArrayLike | None = None,
    within: float,
) -> Accuracy:
    """Compares matches with the truth given by a rigid transform between the clouds.

    Source points without any target point near their true place have no right answer and do not
    count: scans overlap only in part.

    Args:
        source: (n, 3) source points, metres.
        matched: (n, 3) the target point that each was matched to.
        target: (m, 3) all target points.
        transform: (4, 4), takes source coordinates to the target's; None where both clouds are
            in one frame.
        within: metres.

    Raises:
        ValueError: `transform` is not rigid, or `within` is not positive.
    """
    if not within > 0:
        raise ValueError(f"a match is right within a positive distance, got {within} m")
    true = np.asarray(source, np.float64)
    if transform is not None:
        turn = rigid(transform)
        true = true @ turn[:3, :3].T + turn[:3, 3]
    distance = np.linalg.norm(np.asarray(matched, np.float64) - true, axis=1)
    nearest, _ = KDTree(np.asarray(target, np.float64)).query(true, distance_upper_bound=within)
    return Accuracy(distance <= within, np.isfinite(nearest), distance, within)


def rigid(transform: ArrayLike) -> NDArray[np.float64]:
    """Checks that a matrix (4, 4) is a rotation and a shift.

    Raises:
        ValueError: it is not.
    """
    matrix = np.asarray(transform, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"a rigid transform is a finite 4 x 4 matrix, got shape {matrix.shape}")
    turn = matrix[:3, :3]
    orthogonal = np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) and np.linalg.det(turn) > 0
    if not orthogonal or not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6):
        raise ValueError(
            "the transform must be a rotation and a shift, without scale or mirroring, with the "
            "last row 0 0 0 1"
        )
    return matrix


def sparse_matches(
    coord: ArrayLike, score: ArrayLike, candidates: ArrayLike, count: int
) -> NDArray[np.int64]:
    """A few matches to draw, spread over the source cloud.

    Starts at the most similar candidate and goes on with the candidate farthest from all chosen
    ones, among the better half of the candidates.

    Args:
        coord: (n, 3) source points, metres.
        score: (n,) cosines of their matches.
        candidates: (n,) bool, matches that may be chosen (the mutual ones, as a rule).
        count: how many to choose; fewer candidates are all chosen.

    Returns:
        (k,) source points, k <= count.
    """
    scores = np.asarray(score, np.float32)
    places = np.flatnonzero(candidates)
    if len(places) > 2 * count:
        places = places[scores[places] >= np.median(scores[places])]
    if len(places) <= count:
        return places
    points = np.asarray(coord, np.float64)[places]
    chosen = [int(scores[places].argmax())]
    away = np.full(len(places), np.inf)
    while len(chosen) < count:
        away = np.minimum(away, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(away.argmax()))
    return np.sort(places[chosen])


def _improve(
    score: NDArray, place: NDArray, new_score: NDArray, new_place: NDArray, offset: int
) -> None:
    """Takes over, in place, what is better in a later block; of equal ones the first stays."""
    new_score, new_place = new_score[: len(score)], new_place[: len(score)]
    better = new_score > score
    score[better] = new_score[better]
    place[better] = new_place[better] + offset


def _padded(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
