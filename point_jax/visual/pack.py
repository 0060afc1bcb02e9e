"""Arrays of a page: coordinates, colours and matches as few bytes, and how to find them there."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

SPACING_SAMPLE = 20_000


@dataclass
class Blob:
    """Arrays one after the other, each at a multiple of four bytes."""

    data: bytearray = field(default_factory=bytearray)

    def add(self, array: NDArray) -> dict[str, Any]:
        """Appends an array; returns its type, place in bytes and number of values."""
        at = len(self.data)
        self.data += np.ascontiguousarray(array).tobytes()
        self.data += bytes(-len(self.data) % 4)
        return {"type": array.dtype.name, "at": at, "length": int(array.size)}


def pack_coord(
    coord: NDArray[np.float32], box: NDArray[np.floating], shift: NDArray[np.floating], blob: Blob
) -> dict[str, Any]:
    """Puts coordinates (n, 3) on a grid of 65,536 steps a side, and tells how to draw them.

    Args:
        coord: (n, 3) metres.
        box: (2, 3) lowest and highest coordinates without strays.
        shift: (3,) added to a coordinate it gives its place on the page.
        blob: where the arrays go.
    """
    low = coord.min(axis=0).astype(np.float64)
    step = np.maximum(np.ptp(coord.astype(np.float64), axis=0), 1e-6) / 65_535
    grid = np.rint((coord - low) / step).astype(np.uint16)
    change = np.diff(grid, axis=0, prepend=np.zeros((1, 3), np.uint16))  # wraps around
    planes = np.stack([change & 255, change >> 8]).astype(np.uint8)  # (2, n, 3)
    inside = np.stack([np.floor((box[0] - low) / step), np.ceil((box[1] - low) / step)])
    return {
        "count": len(coord),
        "low": low.tolist(),
        "step": step.tolist(),
        "place": (low + shift).tolist(),
        "decimals": int(np.clip(np.ceil(-np.log10(step.max())), 1, 3)),
        "radius": disc_radius(coord),
        "floor": float(box[0, 2] - low[2]),
        "ceiling": float(box[1, 2] - low[2]),
        "inside": inside.tolist(),
        "arrays": {"coord": blob.add(planes.transpose(2, 0, 1))},
        "colorings": {},
    }


def pack_color(color: ArrayLike, kept: NDArray[np.int64], blob: Blob) -> dict[str, Any]:
    """Colours (n, 3), uint8 or float in [0, 1], as three planes of bytes.

    Raises:
        ValueError: they are not (n, 3).
    """
    colors = np.asarray(color)
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) <= kept.max():
        raise ValueError(f"a colouring needs one colour (3,) a point, got shape {colors.shape}")
    chosen = colors[kept]
    if chosen.dtype != np.uint8:
        chosen = np.clip(np.rint(chosen.astype(np.float32) * 255), 0, 255).astype(np.uint8)
    return blob.add(chosen.T)


def nearest_shown(
    target: NDArray[np.integer], coord: NDArray[np.floating], kept: NDArray[np.int64]
) -> NDArray[np.int32]:
    """For points of a cloud, the place among its kept points of the same or the nearest one.

    Args:
        target: (k,) points of the cloud, -1 for none.
        coord: (n, 3) all its points.
        kept: ascending, those that are shown.
    """
    place = np.minimum(np.searchsorted(kept, target), len(kept) - 1)
    missing = (kept[place] != target) & (target >= 0)
    if missing.any():
        place[missing] = KDTree(coord[kept]).query(coord[target[missing]])[1]
    return np.where(target < 0, -1, place).astype(np.int32)


def disc_radius(coord: NDArray[np.floating]) -> float:
    """Radius in metres of discs that close the surfaces of a cloud (n, 3)."""
    if len(coord) < 5:
        return 0.02
    sample = coord[:: -(-len(coord) // SPACING_SAMPLE)]
    distance, _ = KDTree(coord).query(sample, k=5)
    return float(max(0.9 * np.median(distance[:, -1]), 1e-5))
