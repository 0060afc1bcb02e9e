"""Features of whole scenes by a trained backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.data.scenes import Scene
from point_jax.geometry.hierarchy import build_hierarchy, sort_row
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3, PTv3Spec, up_cast
from point_jax.ops.gather import take_rows, to_children

Params = dict[str, Any]


@dataclass(frozen=True)
class Voxels:
    """A scene on the grid, one point a voxel (the first), its input transform applied.

    Attributes:
      index: (n,) int64, the scene's point of each voxel.
      grid: (n, 3) int32.
      features: (n, 9) float32: coordinates with the middle of the floor at the origin (metres),
        colour 0 to 1, normal; zeros for what the scene lacks.
    """

    index: np.ndarray
    grid: np.ndarray
    features: np.ndarray


def voxelize(scene: Scene, grid_size: float) -> Voxels:
    """Grid-samples a scene, deterministically."""
    low, high = scene.coord.min(0), scene.coord.max(0)
    grid = np.floor((scene.coord - low) / grid_size).astype(np.int32)
    index = np.unique(grid, axis=0, return_index=True)[1]
    centred = scene.coord - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    nothing = np.zeros_like(scene.coord)
    color = nothing if scene.color is None else scene.color.astype(np.float32) / 255
    normal = nothing if scene.normal is None else scene.normal
    features = np.concatenate([centred, color, normal], axis=1).astype(np.float32)
    return Voxels(index, grid[index], features[index])


def make_encoder(
    spec: PTv3Spec, scenes: Sequence[Voxels], times: int
) -> Callable[[Params, Voxels], np.ndarray]:
    """An encoder with capacities that hold any of the given scenes, so that all compile once.

    Args:
      spec: the backbone.
      scenes: what will be encoded.
      times: levels that the coarsest features are carried up and joined to the finer ones.

    Returns:
      `encode(backbone, voxels) -> (n, channels)`: the features that each voxel's cluster has at the
      level reached, without drop path and with the orders in their places.
    """
    levels = len(spec.encoder)
    counts = [[len(np.unique(v.grid >> level, axis=0)) for v in scenes] for level in range(levels)]
    capacities = tuple(-(-max(count) // 64) * 64 for count in counts)
    shape = spec.hierarchy(capacities, clouds=1)
    _, apply = functional(lambda rngs: PTv3(spec, rngs=rngs))

    @jax.jit
    def encode(backbone, grid, features, count):
        points = len(grid)
        cloud = jnp.zeros(points, jnp.int32)
        order, count, _ = sort_row(grid, cloud, jnp.arange(points) < count, points)
        hierarchy = build_hierarchy(take_rows(grid, order), take_rows(cloud, order), count, shape)
        out = apply(backbone, take_rows(features, order), hierarchy)
        x = up_cast(out.levels, hierarchy, times)
        for level in reversed(range(levels - 1 - times)):
            coarse = hierarchy[level + 1]
            x = to_children(x, hierarchy[level].parent, coarse.first_child)
        return jnp.zeros_like(x).at[order].set(x, mode="drop")

    def run(backbone: Params, voxels: Voxels) -> np.ndarray:
        count = len(voxels.grid)
        pad = ((0, capacities[0] - count), (0, 0))
        grid, features = np.pad(voxels.grid, pad), np.pad(voxels.features, pad)
        return np.asarray(encode(backbone, grid, features, np.int32(count)))[:count]

    return run
