"""An encoder for clouds of any size: ragged list in, ragged list out.

Each cloud is a row of its own, so its features depend on nothing else. Rows have bucketed shapes,
compiled once each; a cloud larger than `max_voxels` is encoded in overlapping chunks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene
from point_jax.features.chunks import AXIS, Chunk, split
from point_jax.features.maps import PointFeatures
from point_jax.features.shapes import Shapes
from point_jax.features.voxels import (
    INPUTS,
    LARGEST,
    Cloud,
    Input,
    Voxels,
    as_scene,
    grid_key,
    voxelize,
)
from point_jax.geometry.hierarchy import (
    Hierarchy,
    HierarchySpec,
    build_hierarchy,
    sort_row,
)
from point_jax.models.functional import Params, functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.ops.gather import take_rows


@dataclass(frozen=True)
class Encoder:
    """A network with its weights; call it with a list of clouds.

    Attributes:
      spec: the network.
      params: its parameters, nested dicts of arrays.
      grid_size: edge of a voxel, metres.
      scale: what coordinates are multiplied by before anything else.
      inputs: the properties of a point that make up the network's input; None where that is not
        known, and then only prepared arrays can be encoded.
      max_voxels: voxels of a row at most; larger clouds are encoded in chunks. The base network
        needs about 10 kB a voxel.
      margin: surroundings of a chunk, in cells of the coarsest level (16 voxels for five levels).
    """

    spec: PTv3Spec
    params: Params
    grid_size: float = 0.02
    scale: float = 1.0
    inputs: tuple[Input, ...] | None = INPUTS
    max_voxels: int = 400_000
    margin: int = 4
    _shapes: Shapes = field(default_factory=Shapes, repr=False, compare=False)
    _run: Callable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.inputs is not None and (
            3 * len(set(self.inputs) & set(INPUTS)) != self.spec.inputs
            or len(set(self.inputs)) != len(self.inputs)
        ):
            raise ValueError(f"inputs={self.inputs}: {self._which_inputs()}")
        positive = all(0 < x < float("inf") for x in (self.grid_size, self.scale))
        if not positive or self.max_voxels < 1 or self.margin < 0:
            raise ValueError(
                "grid_size, scale and max_voxels must be positive and margin at least 0, got "
                f"{self.grid_size}, {self.scale}, {self.max_voxels}, {self.margin}"
            )
        object.__setattr__(self, "_run", row_function(self.spec))

    def _which_inputs(self) -> str:
        return (
            f"the network reads {self.spec.inputs} channels a point: say which of "
            f"{', '.join(INPUTS)} (3 channels each) they are, in their order"
        )

    def with_params(self, params: Params) -> "Encoder":
        """The same encoder with other weights; what is compiled stays compiled."""
        other = replace(self, params=params)
        object.__setattr__(other, "_run", self._run)
        return other

    def __call__(self, clouds: Sequence[Cloud]) -> list[PointFeatures]:
        """Encodes clouds by the default transform, see `voxels.voxelize`.

        Args:
          clouds: each a `Scene`, an array (n, 3) of metres, or a mapping with `coord` and
            optionally `color` (0 to 255) and `normal`, see `voxels.as_scene`.

        Returns:
          One `PointFeatures` a cloud, in their order.

        Raises:
          SceneError: a cloud that cannot be used, and why.
          ValueError: `inputs` is None.
          FloatingPointError: features that are not finite.
        """
        return list(self.stream(clouds))

    def stream(self, clouds: Sequence[Cloud]) -> Iterator[PointFeatures]:
        """The same one by one, for lists whose features do not fit in memory together."""
        single = isinstance(clouds, np.ndarray) and clouds.ndim < 3
        if single or isinstance(clouds, (Mapping, Scene)):
            raise SceneError("expected a list of clouds; put a single one in a list")
        if not len(clouds):
            return
        if self.inputs is None:
            raise ValueError(f"inputs is not known: {self._which_inputs()}")
        inputs = self.inputs
        scenes = [as_scene(cloud, f"clouds[{i}]") for i, cloud in enumerate(clouds)]
        yield from self.encode_voxels(
            [voxelize(scene, self.grid_size, self.scale, inputs) for scene in scenes]
        )

    def encode_prepared(
        self,
        grid: np.ndarray,
        features: np.ndarray,
        offset: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        depth: np.ndarray | None = None,
        coord: np.ndarray | None = None,
    ) -> list[PointFeatures]:
        """Encodes arrays as they are, without the default transform.

        Args:
          grid: (n, 3) integers from 0, voxels of all clouds end to end. Voxels may repeat.
          features: (n, channels) the network's input.
          offset: (clouds,) where each cloud ends; None for a single cloud.
          mask: (n,) bool, points whose embedding is the mask token.
          depth: (levels,) bits of the curves, for all clouds, as the originals took them over a
            batch; None for each cloud's own.
          coord: (n, 3) metres, for rotary positions and for the maps' `coord`.

        Returns:
          One `PointFeatures` a cloud; its points are the rows given.

        Raises:
          SceneError: arrays of wrong shapes, types or values.
        """
        arrays = _check_prepared(self.spec, grid, features, offset, mask, depth, coord)
        grid, features, ends, mask, depth, coord = arrays
        starts = [0, *ends[:-1]]
        clouds = []
        for start, end in zip(starts, ends, strict=True):
            part = slice(start, end)
            clouds.append(
                Voxels(
                    grid[part],
                    features[part],
                    None if coord is None else coord[part],
                    None if mask is None else mask[part],
                    grid[part].astype(np.float32) if coord is None else coord[part],
                    np.arange(end - start, dtype=np.int32),
                )
            )
        return list(self.encode_voxels(clouds, depth))

    def encode_voxels(
        self, clouds: Sequence[Voxels], depth: np.ndarray | None = None
    ) -> Iterator[PointFeatures]:
        """Encodes clouds that are voxels already; lazily, one by one.

        Args:
          clouds: see `voxels.voxelize`; of the channels that the network reads.
          depth: (levels,) bits of the curves; None for each cloud's own.
        """
        levels = len(self.spec.encoder)
        plans = []
        for cloud in clouds:
            chunks = split(cloud.grid, levels, self.max_voxels, self.margin)
            grids, parents = _grids(cloud.grid, levels)
            counts = [tuple(map(len, grids))]  # of a cloud that is its only chunk
            if len(chunks) > 1:
                parts = (cloud.grid[chunk.rows] - chunk.origin for chunk in chunks)
                counts = [tuple(map(len, _grids(part, levels)[0])) for part in parts]
            self._shapes.grow(counts)
            plans.append((chunks, counts, grids, parents))
        for cloud, (chunks, counts, grids, parents) in zip(clouds, plans, strict=True):
            yield self._encode_one(cloud, chunks, counts, grids, parents, depth)

    def _encode_one(
        self,
        cloud: Voxels,
        chunks: Sequence[Chunk],
        counts: Sequence[tuple[int, ...]],
        grids: tuple[np.ndarray, ...],
        parents: tuple[np.ndarray, ...],
        depth: np.ndarray | None,
    ) -> PointFeatures:
        spec, levels = self.spec, len(self.spec.encoder)
        keys = [grid_key(grid) for grid in grids]
        encoded = [
            np.empty((len(g), s.channels), np.float32) for g, s in _pairs(grids, spec.encoder)
        ]
        decoded = [
            np.empty((len(g), s.channels), np.float32) for g, s in _pairs(grids, spec.decoder)
        ]
        for chunk, count in zip(chunks, counts, strict=True):
            capacities = self._shapes.find(count)
            order, found, out = self._row(cloud, chunk, capacities, depth)
            for i in range(levels):
                rows = count[i]
                grid = np.asarray(found[i][:rows]) + (chunk.origin >> i)
                own = chunk.inside(grid, levels - 1 - i)
                if i == 0:
                    at = chunk.rows[np.asarray(order[:rows])]
                else:
                    at = np.searchsorted(keys[i], grid_key(grid))
                for full, part in ((encoded, out.levels), (decoded, out.decoded)):
                    if i < len(full):
                        full[i][at[own]] = np.asarray(part[i][:rows], np.float32)[own]
        if not all(np.isfinite(features).all() for features in (*encoded, *decoded)):
            raise FloatingPointError(
                "features are not finite: weights that are not, or too large for the dtype"
            )
        return PointFeatures(
            cloud.points, cloud.inverse, grids, parents, tuple(encoded), tuple(decoded)
        )

    def _row(
        self,
        cloud: Voxels,
        chunk: Chunk,
        capacities: tuple[int, ...],
        depth: np.ndarray | None,
    ) -> tuple[Any, Any, Any]:
        count = len(chunk.rows)
        padding = capacities[0] - count

        def pad(x: np.ndarray | None) -> np.ndarray | None:
            if x is None:
                return None
            return np.pad(x[chunk.rows], ((0, padding), *(((0, 0),) * (x.ndim - 1))))

        grid = pad(cloud.grid - chunk.origin)
        return self._run(
            self.params,
            grid,
            pad(cloud.features),
            pad(cloud.coord) if self.spec.rotary else None,
            pad(cloud.mask),
            np.int32(count),
            depth,
            capacities,
        )


def _pairs(grids: Sequence[np.ndarray], stages: Sequence[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    return zip(grids, stages, strict=False)  # a decoder has a stage less


@jax.named_scope("geometry")
def single_cloud(
    grid: jax.Array, count: jax.Array, spec: HierarchySpec, depth: jax.Array | None = None
) -> tuple[jax.Array, Hierarchy]:
    """Sorts a cloud alone in its row and builds its structure.

    Args:
      grid: (N, 3) int32, any order.
      count: () int32, voxels in use, the first ones.
      spec: the row's shape.
      depth: (levels,) int32, bits of the curves, see `build_hierarchy`.

    Returns:
      order: (N,) int32, see `sort_row`; and the hierarchy.
    """
    points = len(grid)
    cloud = jnp.zeros(points, jnp.int32)
    order, count, _ = sort_row(grid, cloud, jnp.arange(points) < count, points)
    depths = None if depth is None else depth[:, None]
    return order, build_hierarchy(take_rows(grid, order), cloud, count, spec, depths)


def row_function(spec: PTv3Spec) -> Callable:
    """What runs on the device for a cloud: jitted, compiled once for each tuple of capacities."""
    _, apply = functional(lambda rngs: PTv3(spec, rngs=rngs))

    def run(params, grid, features, coord, mask, count, depth, capacities):
        order, hierarchy = single_cloud(grid, count, spec.hierarchy(capacities, clouds=1), depth)
        out = apply(
            params,
            take_rows(features, order),
            hierarchy,
            mask=None if mask is None else take_rows(mask, order),
            coord=None if coord is None else take_rows(coord, order),
        )
        return order, tuple(level.grid for level in hierarchy), out

    return jax.jit(run, static_argnames="capacities")


def _grids(grid: np.ndarray, levels: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Voxels of every level and the parents between them.

    Level 0 is `grid` as given, the others are sorted by x, y, z.
    """
    grids, parents = [grid], []
    for _ in range(levels - 1):
        grid = grid >> 1
        _, first, inverse = np.unique(grid_key(grid), return_index=True, return_inverse=True)
        grid = grid[first]
        grids.append(grid)
        parents.append(inverse.reshape(-1).astype(np.int32))
    return tuple(grids), tuple(parents)


def _check_prepared(
    spec: PTv3Spec,
    grid: np.ndarray,
    features: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
    depth: np.ndarray | None,
    coord: np.ndarray | None,
) -> tuple[Any, ...]:
    grid, features = np.asarray(grid), np.asarray(features)
    points = len(grid)
    if grid.shape != (points, 3) or grid.dtype.kind not in "iu" or not points:
        raise SceneError(
            f"grid_coord is {grid.dtype} of shape {grid.shape}, expected integers of shape "
            "(points, 3), at least one point"
        )
    if grid.min() < 0 or grid.max() >= LARGEST:
        raise SceneError(
            f"grid_coord is from {grid.min()} to {grid.max()}, expected 0 to {LARGEST - 1}"
        )
    for name, array, width in (("feat", features, spec.inputs), ("coord", coord, 3)):
        if array is None:
            continue
        array = np.asarray(array)
        if array.shape != (points, width) or array.dtype.kind not in "fiu":
            raise SceneError(
                f"{name} is {array.dtype} of shape {array.shape}, expected numbers of shape "
                f"({points}, {width})"
            )
        if not np.isfinite(array).all():
            raise SceneError(f"{name} holds NaN or infinity")
    if spec.rotary and coord is None:
        raise SceneError("a network with rotary positions needs coord, in metres")
    ends = np.array([points]) if offset is None else np.asarray(offset)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not len(ends) or ends[-1] != points:
        raise SceneError(f"offset must be where each cloud ends, the last {points}; got {ends}")
    if (np.diff(ends, prepend=0) < 1).any():
        raise SceneError(f"offset has an empty cloud or does not ascend: {ends}")
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != (points,) or mask.dtype != bool:
            raise SceneError(
                f"mask is {mask.dtype} of shape {mask.shape}, expected ({points},) bool"
            )
        if not spec.mask_token:
            raise SceneError("mask is given and the network has no mask token")
    if depth is not None:
        levels = len(spec.encoder)
        depth = np.asarray(depth)
        if depth.shape != (levels,) or depth.dtype.kind not in "iu":
            raise SceneError(f"depth must be {levels} integers, one a level; got {depth}")
        largest = [int(grid.max()) >> level for level in range(levels)]
        if any(
            not most < 1 << int(bits) <= AXIS for most, bits in zip(largest, depth, strict=True)
        ):
            raise SceneError(f"depth={depth} does not hold voxels up to {largest}, or exceeds 16")
        depth = depth.astype(np.int32)
    coord = None if coord is None else np.asarray(coord, np.float32)
    return grid.astype(np.int32), features.astype(np.float32), ends.tolist(), mask, depth, coord
