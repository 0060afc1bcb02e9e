"""From a cloud as users hold it to the voxels that an encoder reads.

The default transform is the releases': centre x and y at the middle of the bounding box and put the
lowest point at z = 0, sample a grid, and give every voxel one of its points. They draw that point
at random; here it is the first, so that the same cloud always gives the same features.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from point_jax.data.checks import SceneError, check_color, check_normal
from point_jax.data.images import Images
from point_jax.data.scenes import Scene

Input = Literal["coord", "color", "normal"]
INPUTS: tuple[Input, ...] = ("coord", "color", "normal")
Cloud = Scene | Mapping[str, Any] | np.ndarray
LARGEST = 1 << 20  # voxels along an axis


class Voxels(NamedTuple):
    """A cloud as an encoder reads it; V voxels, n points.

    Attributes:
      grid: (V, 3) int32, voxel coordinates from 0.
      features: (V, channels) float32, the network's input.
      coord: (V, 3) float32, position in metres for rotary positions; None if not known.
      mask: (V,) bool, voxels whose embedding is the mask token; None for none.
      points: (n, 3) the input points as given.
      inverse: (n,) int32, the voxel of each point.
      images: what sees the n points; None for a scene without.
    """

    grid: np.ndarray
    features: np.ndarray
    coord: np.ndarray | None
    mask: np.ndarray | None
    points: np.ndarray
    inverse: np.ndarray
    images: Images | None = None


def as_scene(cloud: Cloud, name: str) -> Scene:
    """A cloud in any of the accepted forms, checked.

    Args:
      cloud: a `Scene`; an array (n, 3) of metres; or a mapping with `coord` (n, 3) metres and
        optionally `color` (n, 3) whole numbers 0 to 255 and `normal` (n, 3) of unit length or zero.
        Other entries are not looked at, unless their names are nearly one of these. Coordinates
        keep their dtype.
      name: what errors call it.

    Raises:
      SceneError: what is wrong, and what was expected.
    """
    if isinstance(cloud, Scene):
        return cloud
    if cloud is None:
        raise SceneError(f"{name}: is None, expected a Scene, an array or a mapping")
    parts = dict(cloud) if isinstance(cloud, Mapping) else {"coord": cloud}
    for key in parts.keys() - set(INPUTS):
        if near := difflib.get_close_matches(str(key).lower(), INPUTS, 1, 0.8):
            raise SceneError(f"{name}: has {key!r}; is it {near[0]!r}?")
    if parts.get("coord") is None:
        raise SceneError(f"{name}: has no 'coord', only {sorted(parts)}")
    coord = np.asarray(parts["coord"])
    if coord.ndim != 2 or coord.shape[1] != 3 or coord.dtype.kind not in "fiu":
        raise SceneError(
            f"{name}: coord is {coord.dtype} of shape {coord.shape}, expected numbers of shape "
            "(points, 3), in metres"
        )
    if not len(coord):
        raise SceneError(f"{name}: has no points")
    bad = np.asarray(~np.isfinite(coord).all(1))
    if bad.any():
        raise SceneError(
            f"{name}: {bad.sum()} of {len(bad)} points are NaN or infinite, the first is "
            f"{bad.argmax()}; remove them"
        )
    checked = {}
    for key, check in (("color", check_color), ("normal", check_normal)):
        if parts.get(key) is not None:
            array = np.asarray(parts[key])
            if len(array) != len(coord):
                raise SceneError(f"{name}: {len(array)} rows of {key} for {len(coord)} points")
            checked[key] = check(array, Path(f"{name}.{key}"))
    return Scene(name, coord, **checked)


def voxelize(
    scene: Scene, grid_size: float, scale: float = 1.0, inputs: Sequence[Input] = INPUTS
) -> Voxels:
    """The default transform.

    Args:
      scene: a checked cloud.
      grid_size: edge of a voxel, metres.
      scale: what coordinates are multiplied by first (Utonia's way to other kinds of scenes).
      inputs: which of a point's properties are the network's input, in their order; colours as 0 to
        1. What the scene lacks is zero, as the releases' `--wo_color` and `--wo_normal`.

    Raises:
      SceneError: more than a million voxels along an axis.
    """
    coord = scene.coord.astype(np.float64) * scale
    low, high = coord.min(0), coord.max(0)
    coord -= np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    coord = coord.astype(np.float32)
    steps = np.floor(coord / np.float64(grid_size))
    steps -= steps.min(0)
    if steps.max() >= LARGEST:
        raise SceneError(
            f"{scene.name}: {(high - low).max():.6g} m are {steps.max():.0f} voxels of {grid_size} "
            f"m; at most {LARGEST} fit along an axis: is it in metres? Or give a larger grid_size"
        )
    grid = steps.astype(np.int32)
    _, first, inverse = np.unique(grid_key(grid), return_index=True, return_inverse=True)
    nothing = np.zeros((len(coord), 3), np.float32)
    color = nothing if scene.color is None else scene.color.astype(np.float32) / 255
    normal = nothing if scene.normal is None else scene.normal
    columns = {"coord": coord, "color": color, "normal": normal}
    features = np.concatenate([columns[name][first] for name in inputs], axis=1)
    return Voxels(
        grid[first],
        features.astype(np.float32),
        coord[first],
        None,
        scene.coord,
        inverse.reshape(-1).astype(np.int32),
        scene.images,
    )


def grid_key(grid: np.ndarray) -> np.ndarray:
    """(V,) int64, one number for each voxel (V, 3) of 0 <= x, y, z < `LARGEST`."""
    grid = grid.astype(np.int64)
    return (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]
