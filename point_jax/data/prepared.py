"""Prepared clouds: NPZ files with a network's own input, which skips the default transform."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from point_jax.data.checks import SceneError
from point_jax.data.formats import load_npz, npz_names


@dataclass(frozen=True)
class Prepared:
    """A network's input as a file has it; `Encoder.encode_prepared` checks it.

    Attributes:
        grid: (n, 3) integers, voxels of all clouds end to end.
        features: (n, channels).
        offset: (clouds,) where each cloud ends, or None for one cloud.
        mask: (n,) bool, or None.
        depth: (levels,) bits of the curves for all clouds, or None.
        coord: (n, 3) metres, or None.
    """

    grid: np.ndarray
    features: np.ndarray
    offset: np.ndarray | None = None
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None
    coord: np.ndarray | None = None


def is_prepared(path: Path) -> bool:
    """Whether a file is an NPZ with `grid_coord` and `feat`; False for what is not an NPZ.

    Raises:
        SceneError: one of the two without the other.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        names = set(npz_names(path))
    except SceneError:
        return False  # whoever reads it says what is wrong
    if len(names & {"grid_coord", "feat"}) == 1:
        raise SceneError(
            f"{path}: has {', '.join(sorted(names))}; a prepared cloud needs both grid_coord and "
            "feat, any other has neither"
        )
    return {"grid_coord", "feat"} <= names


def read_prepared(path: Path) -> Prepared:
    """Reads `grid_coord`, `feat` and what there is of `offset`, `mask`, `depth`, `coord`.

    Raises:
        SceneError: for a damaged file, or arrays that do not hold numbers.
    """
    names = {"grid_coord": "grid", "feat": "features"}
    names |= {name: name for name in ("offset", "mask", "depth", "coord")}
    arrays = load_npz(path, tuple(names))
    return Prepared(**{names[name]: array for name, array in arrays.items()})
