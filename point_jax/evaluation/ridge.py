"""The linear probe in closed form: ridge regression on one-hot labels, without SGD.

All that it needs of a scene is sums (`Moments`), so scenes stream, in any order, and nothing is
drawn at random: the same features give the same probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import log_softmax

from point_jax.evaluation.confusion import confusion, scores
from point_jax.evaluation.features import Extractor, Labelled
from point_jax.evaluation.predict import LinearPredictor

# Weight of a voxel is count^-BALANCE of its class, so a class has count^(1 - BALANCE) in the sums.
# mIoU loses from both ends: unweighted (0), rare classes are never the largest score; with equal
# classes (1), they are claimed everywhere. Half way is the usual square root; for height, normal,
# colour and their products on 8 rooms of 24 classes, 0, 0.5 and 1 gave 13.1, 15.8 and 10.4 mIoU.
BALANCE = 0.5
HELD_OUT = 5  # every so many-th scene chooses the penalty
# In units of a channel's variance; the strongest first, which wins a tie.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
TEMPERATURES = (0.4, 0.2, 0.1, 0.05, 0.025)
BLOCK = 8_192  # rows that are float64 at a time
CONSTANT = 1e-4  # of a channel's size: spreads below would be mostly rounding of the sums


class Moments:
    """Weighted sums over labelled rows, in float64; K classes, C channels.

    Attributes:
      weight: (K,) of each class's rows together.
      first: (K, C) of each class's features.
      second: (C, C) of the features' products, over all classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        self.weight = np.zeros(classes)
        self.first = np.zeros((classes, channels))
        self.second = np.zeros((channels, channels))

    def add(self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        """Adds the rows of a scene.

        Args:
          features: (V, C).
          labels: (V,) int, -1 = ignore.
          weights: (K,) of a row of each class.

        Raises:
          ValueError: a label that is no class.
        """
        kept = known(labels, len(self.weight))
        for start in range(0, len(kept), BLOCK):
            rows = kept[start : start + BLOCK]
            classes = labels[rows]
            # Roots of the weights on both sides keep the product symmetric, half the work.
            root = np.sqrt(weights)[classes, None]
            weighted = features[rows] * root
            self.second += weighted.T @ weighted
            one_hot = np.zeros((len(rows), len(self.weight)))
            one_hot[np.arange(len(rows)), classes] = root[:, 0]
            self.first += one_hot.T @ weighted
            self.weight += (one_hot * root).sum(0)

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(self.first.shape[1], len(self.weight))
        for name in ("weight", "first", "second"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


def solve(moments: Moments, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The ridge of one-hot labels on standardised features, told in the features' own units.

    Minimises the weighted mean of |x' A + b - y|^2, x' the features less their mean over their
    standard deviation, plus penalty * |A|^2. Scores of a row sum to 1, and a class without rows
    scores 0 everywhere; so it is never the largest.

    Args:
      moments: of the rows.
      penalty: > 0.

    Returns:
      kernel (C, K), bias (K,) float64: scores are features @ kernel + bias.

    Raises:
      ValueError: there are no rows.
    """
    total = moments.weight.sum()
    if not total > 0:
        raise ValueError("no labelled voxel to fit to: all labels are -1")
    share = moments.weight / total  # (K,), the mean of the one-hot labels
    mean = moments.first.sum(0) / total
    square = np.diag(moments.second) / total
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    alive = spread > CONSTANT * np.sqrt(square)
    inverse = np.where(alive, 1 / np.where(alive, spread, 1), 0)
    covariance = moments.second / total - np.outer(mean, mean)
    correlation = covariance * np.outer(inverse, inverse)
    correlation[np.diag_indices_from(correlation)] += penalty
    with_labels = (moments.first / total - np.outer(share, mean)).T * inverse[:, None]
    kernel = cho_solve(cho_factor(correlation), with_labels) * inverse[:, None]
    return kernel, share - mean @ kernel


@dataclass(frozen=True)
class Ridge:
    """A fitted probe: class probabilities are softmax(features @ kernel + bias).

    Attributes:
      kernel: (C, K) float32, in units of the features as they are.
      bias: (K,) float32.
      penalty: the one of `PENALTIES` that did best on the held-out scenes.
      temperature: the one of `TEMPERATURES` by which kernel and bias are divided already. The
        ridge's scores lie between 0 and 1, so their softmax would be nearly flat, and a vote of
        several predictions a vote of offsets.
      held_out_mIoU: mIoU of that choice on the held-out scenes, fitted without them.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    temperature: float
    held_out_mIoU: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(V, K) float32 logits of features (V, C)."""
        return features @ self.kernel + self.bias

    def predictor(self, extractor: Extractor) -> LinearPredictor:
        """The probe on top of the extractor whose features it was fitted to."""
        return LinearPredictor(extractor, self.kernel, self.bias)


def fit_ridge(data: Labelled, classes: int, balance: float = BALANCE) -> Ridge:
    """Fits the probe: the penalty chosen on every fifth scene, then all scenes fitted with it.

    Features of all scenes are made once, those of the held-out scenes twice.

    Args:
      data: at least two training scenes; see `held_out`.
      classes: K.
      balance: see `BALANCE`.

    Raises:
      ValueError: too few scenes, no labels in those fitted or held out, or a label above K - 1.
    """
    held = held_out(len(data), "ridge")
    counts = sum(
        np.bincount(labels[known(labels, classes)], minlength=classes) for labels in data.labels()
    )
    weights = np.maximum(counts, 1.0) ** -balance
    fitted: Moments | None = None
    kept_out: Moments | None = None
    for scene, (features, labels) in enumerate(data):
        if fitted is None or kept_out is None:
            channels = features.shape[1]
            fitted, kept_out = Moments(channels, classes), Moments(channels, classes)
        (kept_out if scene in held else fitted).add(features, labels, weights)
    assert fitted is not None and kept_out is not None
    candidates = [solve(fitted, penalty) for penalty in PENALTIES]
    penalty, temperature, miou = _choose(data.take(held), candidates, classes)
    kernel, bias = solve(fitted + kept_out, penalty)
    return Ridge(
        (kernel / temperature).astype(np.float32),
        (bias / temperature).astype(np.float32),
        penalty,
        temperature,
        miou,
    )


def held_out(scenes: int, probe: str) -> list[int]:
    """Places of the training scenes that choose a penalty: every fifth; of fewer the last.

    Raises:
      ValueError: fewer than two scenes; names the probe.
    """
    if scenes < 2:
        raise ValueError(
            f"{probe} chooses its penalty on training scenes held out; there are {scenes} "
            "training scenes, give at least 2"
        )
    return list(range(scenes)[HELD_OUT - 1 :: HELD_OUT]) or [scenes - 1]


def _choose(
    data: Labelled, candidates: Sequence[tuple[np.ndarray, np.ndarray]], classes: int
) -> tuple[float, float, float]:
    """(penalty, temperature, mIoU): the penalty by mIoU, then its temperature by likelihood."""
    counts = np.zeros((len(candidates), classes, classes), np.int64)
    likelihood = np.zeros((len(candidates), len(TEMPERATURES)))
    for features, labels in data:
        rows = known(labels, classes)
        for i, (kernel, bias) in enumerate(candidates):
            found = features[rows] @ kernel.astype(np.float32) + bias.astype(np.float32)
            counts[i] += confusion(found.argmax(1).astype(np.int32), labels[rows], classes)
            for j, temperature in enumerate(TEMPERATURES):
                logs = log_softmax(found / np.float32(temperature), axis=1)
                likelihood[i, j] += logs[np.arange(len(rows)), labels[rows]].sum(dtype=np.float64)
    if not counts.any():
        raise ValueError(
            "no labelled voxel in the training scenes held out (every fifth, of fewer the last): "
            "their labels are all -1"
        )
    names = [str(i) for i in range(classes)]
    miou = [scores(count, names).mIoU for count in counts]
    best = int(np.argmax(miou))
    return PENALTIES[best], TEMPERATURES[int(likelihood[best].argmax())], float(miou[best])


def known(labels: np.ndarray, classes: int) -> np.ndarray:
    """Places of the labels that are not -1.

    Raises:
      ValueError: a label that is no class.
    """
    if len(labels) and (labels.max() >= classes or labels.min() < -1):
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()}, but there are {classes} classes: "
            f"expected -1 (none) to {classes - 1}"
        )
    return np.flatnonzero(labels >= 0)
