"""Features of a cloud at every level, and the ways back to its voxels and points."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class FeatureMap:
    """Features on the voxels of one level; m voxels here, V at level 0, n input points.

    Attributes:
      grid: (m, 3) int32, voxel coordinates of this level.
      coord: (m, 3) mean of the input points in each voxel, in the input's frame.
      features: (m, C) float32.
      ancestor: (V,) int32, this level's voxel of each voxel of level 0.
      inverse: (n,) int32, the voxel of level 0 of each input point.
    """

    grid: np.ndarray
    coord: np.ndarray
    features: np.ndarray
    ancestor: np.ndarray
    inverse: np.ndarray

    def at_voxels(self) -> np.ndarray:
        """(V, C): the features that each voxel of level 0 has here."""
        return self.features[self.ancestor]

    def at_points(self) -> np.ndarray:
        """(n, C): the features of each input point; row i belongs to point i."""
        return self.features[self.ancestor[self.inverse]]


@dataclass(frozen=True)
class PointFeatures:
    """What an encoder knows of one cloud.

    Attributes:
      coord: (n, 3) the input points as given.
      inverse: (n,) int32, the voxel of level 0 of each point.
      grids: (m, 3) int32 voxel coordinates of each level, finest first.
      parents: (m,) int32, the next level's voxel of each voxel, for all levels but the last.
      levels: (m, C) float32 encoder features of each level.
      decoded: (m, C) float32 decoder features, from level 0; empty without a decoder.
    """

    coord: np.ndarray
    inverse: np.ndarray
    grids: tuple[np.ndarray, ...]
    parents: tuple[np.ndarray, ...]
    levels: tuple[np.ndarray, ...]
    decoded: tuple[np.ndarray, ...]

    @property
    def voxels(self) -> np.ndarray:
        """(V,) int64: an input point of each voxel of level 0, the first in the input."""
        return np.unique(self.inverse, return_index=True)[1]

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.levels)

    def level(self, i: int) -> FeatureMap:
        """The encoder's features of level i; 0 is the finest, negative numbers count from the end.

        Raises:
          IndexError: no such level.
        """
        return self._map(i, self.levels[self._index(i, self.depth)])

    def decoder(self, i: int = 0) -> FeatureMap:
        """The decoder's features of level i.

        Raises:
          IndexError: no such level, or no decoder.
        """
        return self._map(i, self.decoded[self._index(i, len(self.decoded))])

    def up_cast(self, k: int) -> FeatureMap:
        """The coarsest level's features carried k levels up, each joined to that level's own.

        A level's own channels come first, as in the releases' demos.

        Raises:
          IndexError: k is not from 0 to depth - 1.
        """
        if not 0 <= k < self.depth:
            raise IndexError(f"up_cast({k}): expected 0 to {self.depth - 1}")
        features = self.levels[-1]
        for i in reversed(range(self.depth - 1 - k, self.depth - 1)):
            features = np.concatenate([self.levels[i], features[self.parents[i]]], axis=1)
        return self._map(self.depth - 1 - k, features)

    def at_voxels(self) -> np.ndarray:
        """(V, C): all levels joined, at the voxels of level 0."""
        return self.up_cast(self.depth - 1).at_voxels()

    def at_points(self) -> np.ndarray:
        """(n, C): all levels joined, at the input points."""
        return self.up_cast(self.depth - 1).at_points()

    @cached_property
    def _ancestors(self) -> list[np.ndarray]:
        """(V,) int32 for every level: where each voxel of level 0 is found there."""
        found = [np.arange(len(self.grids[0]), dtype=np.int32)]
        for parent in self.parents:
            found.append(parent[found[-1]])
        return found

    def _index(self, i: int, levels: int) -> int:
        if not -levels <= i < levels:
            raise IndexError(f"level {i}: there are {levels}")
        return i % levels

    def _map(self, i: int, features: np.ndarray) -> FeatureMap:
        i = self._index(i, self.depth)
        ancestor = self._ancestors[i]
        where, voxels = ancestor[self.inverse], len(self.grids[i])
        size = np.maximum(np.bincount(where, minlength=voxels), 1)
        mean = [np.bincount(where, axis, voxels) / size for axis in self.coord.T]
        coord = np.stack(mean, axis=1).astype(np.result_type(self.coord, np.float32))
        return FeatureMap(self.grids[i], coord, features, ancestor, self.inverse)
