"""The probe without any fitting: the labels of the most similar voxels of the training scenes.

k = 20, cosine similarity and votes of weight exp(similarity / 0.07) are those of DINO's evaluation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.evaluation.features import Extractor, Labelled
from point_jax.evaluation.ridge import known
from point_jax.evaluation.standard import Standard
from point_jax.features.voxels import Voxels

BANK = 20_000
NEIGHBOURS = 20
TEMPERATURE = 0.07
BLOCK = 1_024  # queries at a time: their similarities to a full bank are 80 MB


@dataclass(frozen=True)
class Directions:
    """Makes features comparable by their direction: standardised channel by channel, then length 1.

    Without the first step the few channels of large values decide, and a part that all features
    share makes all cosines nearly 1.

    Attributes:
      standard: of the features.
    """

    standard: Standard

    @staticmethod
    def of(features: np.ndarray) -> "Directions":
        """By the mean and standard deviation of features (n, C)."""
        return Directions(Standard.of(features))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, C) float32 of length 1, or 0 where a feature equals the mean."""
        standard = self.standard(features)
        length = np.linalg.norm(standard, axis=1, keepdims=True)
        return standard / np.where(length > 0, length, 1)


def draw_rows(there: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """At most `count` of some places, each equally likely, in rising order.

    Args:
      there: (n,) places to draw from.
      count: how many.
      key: of the draw; a sequence of whole numbers, as (seed, scene).
    """
    if len(there) <= count:
        return there
    return np.sort(np.random.default_rng(key).choice(there, count, replace=False))


@dataclass(frozen=True)
class Neighbours:
    """Labelled features to compare with.

    Attributes:
      directions: what was done to the bank, and is done to every query.
      bank: (B, C) float32, of length 1.
      labels: (B,) int32, 0 to K - 1.
      classes: K.
      k: how many neighbours vote; all of the bank where it has fewer.
      temperature: of their weights.
    """

    directions: Directions
    bank: np.ndarray
    labels: np.ndarray
    classes: int
    k: int = NEIGHBOURS
    temperature: float = TEMPERATURE

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(V, K) float32 class probabilities of features (V, C): the shares of the votes."""
        queries = self.directions(features)
        found = np.empty((len(queries), self.classes), np.float32)
        bank, labels = self._on_device
        for start in range(0, len(queries), BLOCK):
            block = queries[start : start + BLOCK]
            padded = np.pad(block, ((0, BLOCK - len(block)), (0, 0)))
            voted = _vote(
                padded, bank, labels, self.temperature, min(self.k, len(bank)), self.classes
            )
            found[start : start + BLOCK] = np.asarray(voted)[: len(block)]
        return found

    @cached_property
    def _on_device(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.bank), jnp.asarray(self.labels)


@partial(jax.jit, static_argnames=("k", "classes"))
def _vote(
    queries: jax.Array,
    bank: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | float,
    k: int,
    classes: int,
) -> jax.Array:
    """(N, K) shares of the votes; of equally similar neighbours the first in the bank count."""
    similarity = jnp.dot(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    nearest, place = jax.lax.top_k(similarity, k)
    weight = jax.nn.softmax(nearest / temperature, axis=1)
    votes = jax.nn.one_hot(labels[place], classes, dtype=weight.dtype)
    return jnp.einsum("nk,nkc->nc", weight, votes, precision=jax.lax.Precision.HIGHEST)


def draw_bank(
    data: Labelled, classes: int, bank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same number of labelled voxels from every scene, or all that it has.

    Args:
      data: training scenes.
      classes: K.
      bank: most voxels of all scenes together, at least one a scene.
      seed: of the draw, which depends on the seed and the scene's place alone.

    Returns:
      Features (B, C) float32, labels (B,) int32 from 0 to K - 1, and places of their scenes (B,).

    Raises:
      ValueError: no labelled voxel, too small a bank, or a label above K - 1.
    """
    share = bank // max(len(data), 1)
    if share < 1:
        raise ValueError(f"bank={bank} for {len(data)} scenes: expected at least one voxel a scene")
    parts, labels = [], []
    for scene, (features, there) in enumerate(data):
        rows = draw_rows(known(there, classes), share, (seed, scene))
        parts.append(features[rows])
        labels.append(there[rows])
    scenes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if not len(scenes):
        raise ValueError("no labelled voxel in the training scenes: their labels are all -1")
    return np.concatenate(parts), np.concatenate(labels), scenes


def collect_neighbours(
    data: Labelled, classes: int, bank: int = BANK, seed: int = 0, k: int = NEIGHBOURS
) -> Neighbours:
    """Neighbours among a bank that is drawn from training scenes.

    Args:
      data, classes, bank, seed: see `draw_bank`.
      k: how many neighbours vote, at least 1.

    Raises:
      ValueError: see `draw_bank`; or k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least one neighbour")
    rows, labels, _ = draw_bank(data, classes, bank, seed)
    directions = Directions.of(rows)
    return Neighbours(directions, directions(rows), labels, classes, k)


@dataclass(frozen=True)
class KnnPredictor:
    """The probe on top of an extractor; a `Predictor`.

    Attributes:
      extractor: gives the features (V, C) float32 of a cloud's voxels.
      neighbours: a bank of features of the same extractor.
    """

    extractor: Extractor
    neighbours: Neighbours

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return self.neighbours.classes

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, K) float32 of each cloud, see `Predictor`."""
        for features in self.extractor(clouds):
            yield self.neighbours(features)
