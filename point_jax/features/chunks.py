"""Clouds too large for one row, cut into boxes that overlap.

Boxes are made of whole cells of the coarsest level, so that a cluster of any level lies in one box
alone. A box is encoded together with a margin around it; what the network computes for the margin
only serves as surroundings.
"""

from dataclasses import dataclass

import numpy as np

from point_jax.data.checks import SceneError

AXIS = 1 << 16  # voxels along an axis that a row can hold


@dataclass(frozen=True)
class Chunk:
    """A part of a cloud.

    Attributes:
      rows: (c,) int64, voxels of the box and its margin.
      origin: (3,) int32, voxel that becomes 0; a multiple of the coarsest cell.
      low, high: (3,) int32, cells of the coarsest level that the box itself covers, high excluded.
    """

    rows: np.ndarray
    origin: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def inside(self, grid: np.ndarray, shift: int) -> np.ndarray:
        """(m,) bool: whether voxels (m, 3), `shift` levels finer than the coarsest, are its own."""
        cell = grid >> shift
        return np.asarray(((cell >= self.low) & (cell < self.high)).all(1))


def split(grid: np.ndarray, levels: int, most: int, margin: int) -> list[Chunk]:
    """Cuts a cloud along its longest axis, again and again, until every part fits.

    Args:
      grid: (V, 3) int32, voxels of the cloud.
      levels: of the network.
      most: voxels that a row may hold.
      margin: cells of the coarsest level around a box.

    Raises:
      SceneError: a single cell with its margin holds more than `most` voxels.
    """
    shift = levels - 1
    cell = grid >> shift
    done: list[Chunk] = []
    boxes = [(cell.min(0), cell.max(0) + 1)]
    while boxes:
        low, high = boxes.pop()
        within = ((cell >= low - margin) & (cell < high + margin)).all(1)
        rows = np.flatnonzero(within)
        extent = int((np.ptp(cell[rows], axis=0).max() + 1) << shift) if len(rows) else 0
        if len(rows) <= most and extent <= AXIS:
            if ((cell[rows] >= low) & (cell[rows] < high)).all(1).any():
                done.append(Chunk(rows, (cell[rows].min(0) << shift).astype(np.int32), low, high))
            continue
        size = high - low
        axis = int(size.argmax())
        if size[axis] == 1:
            raise SceneError(
                f"{len(rows)} voxels lie within {margin} cells of a single one of {1 << shift} "
                f"voxels an edge, and a row may hold {most}: raise max_voxels or lower the margin"
            )
        own = ((cell >= low) & (cell < high)).all(1)
        at = int(np.median(cell[own, axis])) if own.any() else low[axis]
        cut = np.clip(at, low[axis] + 1, high[axis] - 1)
        left, right = high.copy(), low.copy()
        left[axis] = right[axis] = cut
        boxes += [(right, high), (low, left)]
    return done
