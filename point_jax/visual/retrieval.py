"""Nearest scenes or objects by one descriptor each: the mean of their points' unit features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from point_jax.visual.clouds import FeatureCloud
from point_jax.visual.similarity import BLOCK, cosine_similarity, unit_rows

MIN_POINTS = 20  # objects of fewer points have no descriptor


@dataclass(frozen=True)
class Item:
    """A scene, or an object of one.

    Attributes:
        cloud: place of its cloud among those given.
        instance: the object's instance id; None for a whole scene.
        segment: class id that most of its points have; None if unknown.
        points: (k,) int64 its points in the cloud.
    """

    cloud: int
    instance: int | None
    segment: int | None
    points: NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """The items nearest to some queries.

    Attributes:
        item: (q, k) int64 places of the items, by falling cosine.
        score: (q, k) float32 cosines.
    """

    item: NDArray[np.int64]
    score: NDArray[np.float32]


def scenes_of(clouds: Sequence[FeatureCloud]) -> list[Item]:
    """One item for each cloud."""
    return [
        Item(number, None, None, np.arange(len(cloud.coord))) for number, cloud in enumerate(clouds)
    ]


def objects_of(clouds: Sequence[FeatureCloud], min_points: int = MIN_POINTS) -> list[Item]:
    """One item for each instance of at least `min_points` points.

    Raises:
        ValueError: a cloud has no instance ids, or none of them has an object.
    """
    items = []
    for number, cloud in enumerate(clouds):
        if cloud.instance is None:
            raise ValueError(f"{cloud.name!r} has no instance ids; its objects are not known")
        order = np.argsort(cloud.instance, kind="stable")
        ids, start = np.unique(cloud.instance[order], return_index=True)
        for instance, points in zip(ids, np.split(order, start[1:]), strict=True):
            if instance < 0 or len(points) < min_points:
                continue
            segment = None
            if cloud.segment is not None:
                values, counts = np.unique(cloud.segment[points], return_counts=True)
                segment = int(values[counts.argmax()])
            items.append(Item(number, int(instance), segment, points))
    if not items:
        raise ValueError(f"no instance of {min_points} or more points in {len(clouds)} clouds")
    return items


def descriptors(clouds: Sequence[FeatureCloud], items: Sequence[Item]) -> NDArray[np.float32]:
    """Descriptors (k, E) of items, of unit length: the mean direction of their points' features.

    Every point has the same weight, however long its feature and however many points share it.

    Raises:
        ValueError: clouds with features of different widths.
    """
    widths = sorted({cloud.features.shape[1] for cloud in clouds})
    if len(widths) != 1:
        raise ValueError(f"retrieval needs features of one width in all clouds, got {widths}")
    pooled = np.zeros((len(items), widths[0]))
    for row, item in enumerate(items):
        cloud = clouds[item.cloud]
        weight = np.bincount(cloud.owner[item.points], minlength=len(cloud.features))
        used = np.flatnonzero(weight)
        for i in range(0, len(used), BLOCK):
            chosen = used[i : i + BLOCK]
            pooled[row] += weight[chosen] @ unit_rows(cloud.features[chosen])
        pooled[row] /= len(item.points)
    return unit_rows(pooled)


def nearest_items(
    queries: NDArray[np.float32],
    base: NDArray[np.float32],
    count: int,
    *,
    skip: NDArray[np.bool_] | None = None,
) -> Nearest:
    """The items of the base that are most similar to each query, by cosine.

    Args:
        queries: (q, E) descriptors.
        base: (k, E) descriptors.
        count: how many for each query, at most k.
        skip: (q, k) bool, items not to be found by a query: itself, or those of its own scene.

    Raises:
        ValueError: fewer than `count` items are left for a query.
    """
    similarity = cosine_similarity(base, queries)
    left = len(base) if skip is None else int((~skip).sum(axis=1).min())
    if not 1 <= count <= left:
        raise ValueError(f"asked for {count} nearest items, but there are {left} to find")
    if skip is not None:
        similarity = np.where(skip, -np.inf, similarity)
    item = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return Nearest(item, np.take_along_axis(similarity, item, axis=1))


def precision(nearest: Nearest, query: Sequence[int | None], base: Sequence[int | None]) -> float:
    """Share of found items that have the class of their query; queries without one do not count.

    Args:
        nearest: found items.
        query: (q,) class of each query.
        base: (k,) class of each item of the base.

    Returns:
        The share, NaN if no query has a class.
    """
    known = [row for row, segment in enumerate(query) if segment is not None and segment >= 0]
    if not known:
        return float("nan")
    hits = [[base[i] == query[row] for i in nearest.item[row]] for row in known]
    return float(np.mean(hits))
