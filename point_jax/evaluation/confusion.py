"""Confusion matrices, and the scores that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from point_jax.evaluation.classes import S3DIS_AREAS


@dataclass(frozen=True)
class Scores:
    """How well predictions agree with labels; all are fractions from 0 to 1.

    Attributes:
      mIoU: mean of the intersections over unions of the classes that occur in the labels.
      mAcc: mean over the same classes of the share of their points that is predicted right.
      allAcc: share of all labelled points that is predicted right.
      per_class: intersection over union of each class; None for one that no point is labelled with.
      counts: labelled points of each class.
      confusion: what all of these follow from, K rows of K numbers, see `confusion`; matrices of
        several test sets add up exactly, their scores do not.
    """

    mIoU: float
    mAcc: float
    allAcc: float
    per_class: Mapping[str, float | None]
    counts: Mapping[str, int]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SixFold:
    """Six networks, each tested on the area that it was not trained on.

    Attributes:
      summed: scores of the sum of the confusion matrices: the number that papers state.
      folds: scores of each area.
    """

    summed: Scores
    folds: Mapping[str, Scores]

    @property
    def mean(self) -> Mapping[str, float]:
        """mIoU, mAcc and allAcc averaged over the areas."""
        return {
            name: float(np.mean([getattr(fold, name) for fold in self.folds.values()]))
            for name in ("mIoU", "mAcc", "allAcc")
        }


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts how often points of a class are predicted as each class.

    Args:
      predicted: (n,) integers, 0 to classes - 1.
      labels: (n,) integers, 0 to classes - 1; points with label -1 are not counted.
      classes: K.

    Returns:
      (K, K) int64, row = label, column = prediction. Matrices of several scenes add up.

    Raises:
      ValueError: shapes that differ, or numbers out of range.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ValueError(
            f"predicted has shape {predicted.shape} and labels {labels.shape}, expected (n,) both"
        )
    for name, array, least in (("predicted", predicted, 0), ("labels", labels, -1)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} is {array.dtype}, expected integers")
        if array.size and (array.min() < least or array.max() >= classes):
            raise ValueError(
                f"{name} is from {array.min()} to {array.max()}, expected {least} to {classes - 1} "
                f"for {classes} classes"
            )
    counted = labels >= 0
    pairs = labels[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def scores(confusion: np.ndarray, names: Sequence[str]) -> Scores:
    """Scores of a confusion matrix, as Pointcept defines them but for absent classes.

    Intersection over union is taken over the points of the whole test set together, not scene by
    scene. Pointcept's means are over all classes, and one that occurs nowhere counts as 0; here the
    means leave out classes that no point is labelled with, which cannot be scored. The points
    predicted as such a class are still wrong for their own. Where every class occurs, as on the
    validation scenes of ScanNet and S3DIS, the two are equal (to the 1e-10 that Pointcept adds to
    denominators).

    Args:
      confusion: (K, K) integers, see `confusion`.
      names: of the K classes, all different.

    Raises:
      ValueError: a matrix that does not fit the names, or without a labelled point.
    """
    classes = len(names)
    if confusion.shape != (classes, classes) or len(set(names)) != classes:
        raise ValueError(
            f"confusion has shape {confusion.shape} and {classes} names ({len(set(names))} "
            "different), expected as many different names as classes"
        )
    right, labelled = np.diagonal(confusion), confusion.sum(1)
    union = labelled + confusion.sum(0) - right
    there = labelled > 0
    if not there.any():
        raise ValueError("no point is labelled: the test scenes hold no label from 0 up")
    iou = right / np.maximum(union, 1)
    return Scores(
        mIoU=float(iou[there].mean()),
        mAcc=float((right[there] / labelled[there]).mean()),
        allAcc=float(right.sum() / labelled.sum()),
        per_class={n: float(x) if t else None for n, x, t in zip(names, iou, there, strict=True)},
        counts={name: int(count) for name, count in zip(names, labelled, strict=True)},
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def six_fold(folds: Mapping[str, np.ndarray], names: Sequence[str]) -> SixFold:
    """The six-fold summary of S3DIS.

    Args:
      folds: area -> (K, K) integers, the confusion matrix of the network that did not see it.
      names: of the K classes.

    Raises:
      ValueError: not exactly the six areas.
    """
    if set(folds) != set(S3DIS_AREAS):
        raise ValueError(
            f"folds are of {sorted(folds)}, expected one of each: {', '.join(S3DIS_AREAS)}"
        )
    total = np.sum([folds[area] for area in S3DIS_AREAS], axis=0)
    return SixFold(scores(total, names), {area: scores(folds[area], names) for area in S3DIS_AREAS})


def sum_over_processes(confusion: np.ndarray) -> np.ndarray:
    """The exact sum of the matrices of all processes of a job; each of them gets it.

    Every process must call this, with a matrix of the same shape.

    Args:
      confusion: (K, K) int64.

    Returns:
      (K, K) int64.
    """
    if jax.process_count() == 1:
        return confusion
    # JAX has no 64-bit integers here: the halves travel as 32 bits each and are summed on the host.
    halves = np.stack([confusion >> 32, confusion & 0xFFFFFFFF]).astype(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(halves))
    high, low = gathered.astype(np.int64).sum(0)
    return (high << 32) + low
