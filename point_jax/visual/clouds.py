"""Point clouds with features to be shown; points that share a feature share its row."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

from point_jax.visual.similarity import nearest_point

BLOCK = 8_192
SPACING_SAMPLE = 20_000


@dataclass(frozen=True)
class FeatureCloud:
    """A cloud and the features of its points.

    Features of a coarse level are carried to many points each. Whatever is computed from them is
    computed once for each of the m rows and handed to the n points by `owner`.

    Attributes:
        name: caption.
        coord: (n, 3) float32, metres, z up.
        features: (m, E) float32.
        owner: (n,) int32, the row of `features` that each point has.
        color: (n, 3) uint8, or None.
        normal: (n, 3) float32 unit, or None.
        segment: (n,) int32 class ids, -1 = ignore; or None.
        instance: (n,) int32 instance ids, -1 = none; or None.
        origin: (3,) float64 metres, to be added to coordinates when they are told to a person.
    """

    name: str
    coord: NDArray[np.float32]
    features: NDArray[np.float32]
    owner: NDArray[np.int32]
    color: NDArray[np.uint8] | None = None
    normal: NDArray[np.float32] | None = None
    segment: NDArray[np.int32] | None = None
    instance: NDArray[np.int32] | None = None
    origin: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    @cached_property
    def place(self) -> NDArray[np.float32]:
        """(m, 3) mean coordinates of the points of each feature."""
        count = np.bincount(self.owner, minlength=len(self.features))
        sums = [
            np.bincount(self.owner, axis, minlength=len(self.features))
            for axis in self.coord.astype(np.float64).T
        ]
        return (np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]).astype(np.float32)

    @cached_property
    def middle(self) -> NDArray[np.int64]:
        """(m,) the point nearest to `place` among the points of each feature."""
        away = np.linalg.norm(self.coord - self.place[self.owner], axis=1)
        order = np.lexsort((away, self.owner))
        first = np.searchsorted(self.owner[order], np.arange(len(self.features)))
        return order[np.minimum(first, len(order) - 1)]

    @cached_property
    def spacing(self) -> float:
        """Usual distance in metres from the place of a feature to the nearest other one."""
        if len(self.place) < 2:
            return 0.0
        sample = self.place[:: -(-len(self.place) // SPACING_SAMPLE)]
        return float(np.median(KDTree(self.place).query(sample, k=2)[0][:, 1]))

    def part(self, points: NDArray, name: str) -> "FeatureCloud":
        """The cloud of some of the points (indices or a mask), with the rows that they use."""
        kept, owner = np.unique(self.owner[points], return_inverse=True)
        chosen = {
            key: value[points]
            for key in ("coord", "color", "normal", "segment", "instance")
            if (value := getattr(self, key)) is not None
        }
        return replace(
            self, name=name, features=self.features[kept], owner=owner.astype(np.int32), **chosen
        )

    def point_at(self, index: int | None, position: ArrayLike | None) -> int:
        """The point of an index or nearest to a position.

        Raises:
            ValueError: neither is given, or there is no such point.
        """
        if index is not None:
            if not 0 <= index < len(self.coord):
                raise ValueError(
                    f"{self.name!r} has points 0 to {len(self.coord) - 1}, there is no {index}"
                )
            return index
        if position is None:
            raise ValueError("a point is given by its index or by a position x,y,z")
        return nearest_point(self.coord, np.asarray(position, np.float64) - self.origin)


def feature_cloud(
    name: str,
    coord: ArrayLike,
    features: ArrayLike,
    *,
    inverse: ArrayLike | None = None,
    color: ArrayLike | None = None,
    normal: ArrayLike | None = None,
    segment: ArrayLike | None = None,
    instance: ArrayLike | None = None,
    origin: ArrayLike = (0.0, 0.0, 0.0),
) -> FeatureCloud:
    """A cloud whose features are given for each point or voxel; equal features become one row.

    Args:
        name: caption.
        coord: (n, 3) metres, finite, n >= 1.
        features: (n, E), or (v, E) with `inverse`; any float dtype, finite.
        inverse: (n,) row of `features` that each point has; None: point i has row i.
        color: (n, 3) 0-255, or None.
        normal: (n, 3) unit, or None.
        segment: (n,) class ids, or None.
        instance: (n,) instance ids, or None.
        origin: (3,) metres, see `FeatureCloud`.

    Raises:
        ValueError: something has a wrong shape or is not finite.
    """
    points = np.asarray(coord, np.float32)
    given = np.asarray(features)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"{name}: coord must be (n, 3) with n >= 1, got {points.shape}")
    if given.ndim != 2 or given.shape[1] == 0 or (inverse is None and len(given) != len(points)):
        raise ValueError(
            f"{name}: features must be ({len(points)}, E), one row a point, got {given.shape}"
        )
    if not np.issubdtype(given.dtype, np.number):
        raise ValueError(f"{name}: features must be numbers, got {given.dtype}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name}: coord has values that are NaN or infinite")
    rows, owner = distinct_rows(np.asarray(given, np.float32))
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: features have values that are NaN or infinite")
    if inverse is not None:
        owner = owner[np.asarray(inverse)]

    def optional(key: str, value: ArrayLike | None, dtype: type, tail: tuple) -> NDArray | None:
        if value is None:
            return None
        array = np.asarray(value)
        if array.shape != (len(points), *tail):
            raise ValueError(
                f"{name}: {key} must have shape {(len(points), *tail)}, got {array.shape}"
            )
        return array.astype(dtype)

    return FeatureCloud(
        name,
        points,
        rows,
        owner,
        optional("color", color, np.uint8, (3,)),
        optional("normal", normal, np.float32, (3,)),
        optional("segment", segment, np.int32, ()),
        optional("instance", instance, np.int32, ()),
        np.asarray(origin, np.float64),
    )


def distinct_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The distinct rows of (n, E) in order of first appearance, and the place of each row there.

    Rows are told apart by a 64-bit hash of their bits; the result is compared with the input, and
    in case of a collision the rows are left as they are, every row its own.
    """
    bits = np.ascontiguousarray(rows).view(np.uint32)
    factors = np.random.default_rng(0).integers(0, 2**64, bits.shape[1], np.uint64) | np.uint64(1)
    code = np.concatenate(
        [
            (bits[i : i + BLOCK].astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
            for i in range(0, len(bits), BLOCK)
        ]
    )
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first, owner = first[order], place[inverse.ravel()].astype(np.int32)
    for i in range(0, len(bits), BLOCK):
        if not np.array_equal(bits[first[owner[i : i + BLOCK]]], bits[i : i + BLOCK]):
            return rows, np.arange(len(rows), dtype=np.int32)
    return rows[first], owner
