"""What a benchmark runs on: rooms of a chosen size, or clouds from files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from point_jax.data.checks import SceneError
from point_jax.data.formats import load_npz, npz_names
from point_jax.data.readers import read_cloud
from point_jax.features.voxels import LARGEST, voxelize
from point_jax.measure.room import furnished_room

_ARRAYS = ("coord", "color", "normal", "grid_coord")


@dataclass(frozen=True)
class Input:
    """A cloud of n points, V voxels.

    Attributes:
      name: for people.
      grid: (V, 3) int32 voxels from 0.
      features: (V, 9) float32: coordinates (metres), colours 0 to 1, normals.
      coord: (n, 3) float32 metres.
      color: (n, 3) uint8.
      normal: (n, 3) float32.
    """

    name: str
    grid: np.ndarray
    features: np.ndarray
    coord: np.ndarray
    color: np.ndarray
    normal: np.ndarray


def room_input(points: int, grid_size: float) -> Input:
    """A furnished room of so many voxels of `grid_size` metres; the same every time."""
    grid, coord, color, normal = furnished_room(points, grid_size)
    return _as_it_is(f"room of {points:,}", grid, coord, color, normal)


def file_input(path: Path, grid_size: float) -> Input:
    """A cloud from a file.

    An NPZ with coord, color, normal and grid_coord is taken as it is; everything else that
    `readers.read_cloud` reads is voxelised as an encoder does it, missing colours and normals zero.

    Raises:
      SceneError: it cannot be read, or its arrays do not fit together.
    """
    if path.suffix.lower() == ".npz" and path.is_file() and {*_ARRAYS} <= {*npz_names(path)}:
        arrays = load_npz(path, _ARRAYS)
        coord, color, normal, grid = (arrays[name] for name in _ARRAYS)
        for name, array in arrays.items():
            if array.shape != (len(grid), 3) or array.dtype.kind not in "fiu":
                raise SceneError(
                    f"{path}: {name} is {array.dtype} of shape {array.shape}, expected numbers of "
                    f"shape ({len(grid)}, 3)"
                )
        if not len(grid) or grid.dtype.kind not in "iu" or grid.min() < 0 or grid.max() >= LARGEST:
            raise SceneError(f"{path}: grid_coord must be integers from 0, at least one")
        return _as_it_is(path.stem, grid.astype(np.int32), coord, color, normal)
    scene = read_cloud(path)
    voxels = voxelize(scene, grid_size)
    nothing = np.zeros(scene.coord.shape, np.float32)
    return Input(
        path.stem,
        voxels.grid,
        voxels.features,
        scene.coord.astype(np.float32),
        (nothing if scene.color is None else scene.color).astype(np.uint8),
        nothing if scene.normal is None else scene.normal.astype(np.float32),
    )


def _as_it_is(
    name: str, grid: np.ndarray, coord: np.ndarray, color: np.ndarray, normal: np.ndarray
) -> Input:
    features = np.concatenate([coord, color.astype(np.float32) / 255, normal], axis=1)
    coord, normal = coord.astype(np.float32), normal.astype(np.float32)
    return Input(name, grid, features.astype(np.float32), coord, color.astype(np.uint8), normal)
