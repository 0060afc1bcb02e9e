"""The geometric shortcut, measured: how much of the features' clusters is height and normal alone.

Point encoders may learn to tell a point's height and the direction of its surface, which need no
learning, and little else (Sonata's paper names it the geometric shortcut). Features are clustered,
and a table of height and normal guesses the clusters of scenes that it was not made from.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from point_jax.data.scenes import Scene
from point_jax.evaluation.features import Extractor, extract, kept_points
from point_jax.evaluation.knn import Directions, draw_rows
from point_jax.features.voxels import INPUTS, Input, Voxels

CLUSTERS = 32
ROWS = 4_096  # voxels of a scene, drawn at random; four times as many change the result by 0.02
ROUNDS = 25  # of k-means
STEP, STEPS = 0.2, 15  # metres; heights from 3 m on are one bin
# Voxels that a bin borrows from all bins together, for each cluster that it holds (Witten and Bell
# borrow 1): a bin of many clusters, or of few voxels, claims little. On 10 rooms this gave 0.89 for
# height and normal, -0.01 for colour and noise; 8 voxels for any bin gave 0.89, -0.08 and -0.02.
BORROWED = 4
# The 26 directions to the faces, edges and corners of a cube.
COMPASS = np.array(
    [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if x or y or z],
    np.float32,
)
COMPASS /= np.linalg.norm(COMPASS, axis=1, keepdims=True)


class Surface(NamedTuple):
    """Some voxels of one scene.

    Attributes:
      features: (V, C) float32.
      height: (V,) float32, metres above the scene's lowest point.
      normal: (V, 3) float32, unit length or zero where unknown.
    """

    features: np.ndarray
    height: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True)
class Shortcut:
    """How far height and normal explain the clusters of features.

    Attributes:
      explained: share of the clusters' entropy that is known once height and normal are: 1 - H(c |
        bin) / H(c), both as mean negative log-likelihoods of voxels of scenes that the table does
        not know. 1: the clusters are height and normal; 0: they have nothing to do with them. More
        bins cannot raise it by chance; where there is nothing to know it may be slightly below 0,
        the more so the fewer the scenes.
      accuracy: share of those voxels whose cluster the table guesses.
      chance: share that the most frequent cluster of the other scenes would get.
    """

    explained: float
    accuracy: float
    chance: float


def surface(scene: Scene, cloud: Voxels, features: np.ndarray, rows: np.ndarray) -> Surface:
    """Some voxels of a scene, with what the shortcut is about.

    Args:
      scene: without normals, the height alone is left to explain anything.
      cloud: its V voxels.
      features: (V, C).
      rows: (k,) which of the voxels.
    """
    kept = kept_points(cloud)[rows]
    height = (scene.coord[kept, 2] - scene.coord[:, 2].min()).astype(np.float32)
    nothing = np.zeros((len(rows), 3), np.float32)
    normal = nothing if scene.normal is None else scene.normal[kept]
    return Surface(features[rows], height, normal)


def surfaces(
    extractor: Extractor,
    scenes: Iterable[Scene],
    grid_size: float,
    inputs: Sequence[Input] = INPUTS,
    scale: float = 1.0,
    seed: int = 0,
) -> Iterator[Surface]:
    """At most `ROWS` voxels of every scene; the scenes need no labels.

    Args:
      extractor: of the features.
      scenes: see `surface`.
      grid_size, inputs, scale: see `voxelize`. Heights are in metres whatever the scale is.
      seed: of the draw.
    """
    extracted = extract(extractor, scenes, grid_size, inputs, scale)
    for place, (scene, cloud, features) in enumerate(extracted):
        rows = draw_rows(np.arange(len(features)), ROWS, (seed, place))
        yield surface(scene, cloud, features, rows)


def measure_shortcut(
    pieces: Iterable[Surface], clusters: int = CLUSTERS, seed: int = 0
) -> Shortcut:
    """Clusters the features of all scenes together, then guesses clusters across the halves.

    The table is made from scenes 0, 2, 4, ... and tested on the others, and the other way round.

    Args:
      pieces: of at least two scenes.
      clusters: of k-means by cosine, on standardised features.
      seed: of its start.

    Raises:
      ValueError: fewer than two scenes.
    """
    pieces = list(pieces)
    if len(pieces) < 2:
        raise ValueError(
            f"the shortcut is measured across scenes: expected at least 2, got {len(pieces)}"
        )
    features = np.concatenate([piece.features for piece in pieces])
    cluster = spherical_kmeans(Directions.of(features)(features), clusters, seed)
    bins = np.concatenate([bin_of(piece.height, piece.normal) for piece in pieces])
    half = np.concatenate([np.full(len(p.height), i % 2) for i, p in enumerate(pieces)])
    surprise = np.zeros(2)  # of a voxel's cluster: without its bin, and with it
    right = np.zeros(2)
    for tested in (0, 1):
        known, asked = half != tested, half == tested
        alone, table = _table(cluster[known], bins[known], clusters)
        truth, at = cluster[asked], bins[asked]
        surprise -= np.log(alone[truth]).sum(), np.log(table[at, truth]).sum()
        right += (alone.argmax() == truth).sum(), (table.argmax(1)[at] == truth).sum()
    chance, accuracy = (float(share) for share in right / len(cluster))
    # Features that are all the same are one cluster: there is nothing to explain.
    explained = float(1 - surprise[1] / surprise[0]) if np.ptp(cluster) else 0.0
    return Shortcut(explained, accuracy, chance)


def bin_of(height: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(V,) int bins of height (V,) metres and normal (V, 3): 16 heights times 27 directions."""
    level = np.clip(np.floor(height / STEP), 0, STEPS).astype(int)
    direction = (normal @ COMPASS.T).argmax(1)
    direction[~normal.any(1)] = len(COMPASS)
    return level * (len(COMPASS) + 1) + direction


def spherical_kmeans(rows: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """k-means by cosine, from a k-means++ start; the same for the same rows and seed.

    Args:
      rows: (n, C) float32 of length 1, or 0.
      clusters: most clusters; one that loses all its rows stays empty.
      seed: of the start.

    Returns:
      (n,) int cluster of each row.
    """
    key = np.random.default_rng(seed)
    centers = rows[key.integers(len(rows))][None]
    far = 1 - rows @ centers[0]
    while len(centers) < clusters:
        chance = np.cumsum(np.maximum(far, 0), dtype=np.float64)
        if chance[-1] < 1e-6 * len(rows):  # as many different rows as centres
            break
        pick = min(int(np.searchsorted(chance, key.random() * chance[-1], "right")), len(rows) - 1)
        centers = np.concatenate([centers, rows[pick][None]])
        far = np.minimum(far, 1 - rows @ centers[-1])
    cluster = np.full(len(rows), -1)
    for _ in range(ROUNDS):
        before, cluster = cluster, (rows @ centers.T).argmax(1)
        if (before == cluster).all():
            break
        sums = (np.eye(len(centers), dtype=np.float32)[cluster]).T @ rows
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(length > 0, sums / np.where(length > 0, length, 1), centers)
    return cluster


def _table(cluster: np.ndarray, bins: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of clusters: (clusters,) without and (bins, clusters) with the bin known."""
    count = np.zeros(((STEPS + 1) * (len(COMPASS) + 1), clusters))
    np.add.at(count, (bins, cluster), 1)
    alone = count.sum(0) + 1  # a cluster that this half of the scenes lacks is not impossible
    alone /= alone.sum()
    borrowed = BORROWED * np.maximum((count > 0).sum(1, keepdims=True), 1)
    table = (count + borrowed * alone) / (count.sum(1, keepdims=True) + borrowed)
    return alone, table
