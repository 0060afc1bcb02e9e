"""Integer structure of a row: voxels of every level, their orders, patches, parents, neighbours.

Computed once per row from voxel coordinates, without gradients; networks take
`(features, hierarchy)`. A row is sorted by (cloud, z-order code) and stays so at every level: the
children of a cluster are contiguous, and a coarser level comes out sorted without sorting again.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from point_jax.geometry.curves import CURVES, Curve, curve_depth, z_code
from point_jax.geometry.neighbours import refine_neighbours, search_neighbours
from point_jax.geometry.orders import build_orders
from point_jax.geometry.pairs import Pairs, find_pairs
from point_jax.geometry.patches import PatchLayout, build_patches
from point_jax.geometry.running import running_sum
from point_jax.geometry.select import compact
from point_jax.geometry.sorting import sort_words

MAX_CLOUDS = 255  # the cloud shares a 32-bit sort key with 24 bits of the code (`sort_key`)


@dataclass(frozen=True)
class HierarchySpec:
    """The static shape of a hierarchy.

    Attributes:
      capacities: slots of a row at every level, finest first.
      clouds: most clouds in a row (G).
      patch_sizes: per level, the patch sizes K that the network's blocks of that level use.
      curves: the space-filling curves, in the order in which blocks take their turn.
      refit_depths: whether a cloud's curves take as many bits as its voxels need anew at every
        level (the originals' GridPooling), or one less than on the level before
        (SerializedPooling). It matters for Hilbert curves only.
      stem_radius: of the kernel of a convolutional stem, whose table level 0 then has; 0 for none.
    """

    capacities: tuple[int, ...]
    clouds: int
    patch_sizes: tuple[tuple[int, ...], ...]
    curves: tuple[Curve, ...] = CURVES
    refit_depths: bool = True
    stem_radius: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.clouds <= MAX_CLOUDS:
            raise ValueError(f"a row holds 1 to {MAX_CLOUDS} clouds, got clouds={self.clouds}")
        if len(self.patch_sizes) != len(self.capacities):
            raise ValueError(
                f"patch_sizes has {len(self.patch_sizes)} levels, capacities {len(self.capacities)}"
            )
        if any(n < 1 for n in self.capacities):
            raise ValueError(f"capacities must be positive, got {self.capacities}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Level:
    """One level of a row with N slots; M is the next level's capacity, G the number of clouds.

    Attributes:
      grid: (N, 3) int32 voxel coordinates; 0 in padding.
      cloud: (N,) int32, ascending; G in padding.
      count: () int32, slots in use.
      starts: (G + 1,) int32, where each cloud starts; the last entry is `count`.
      orders: (O, N) int32, points along each curve; padding keeps its place, and so does what
        overflows, see `build_orders`.
      parent: (N,) int32, row of the next level; M for none (padding, overflow, coarsest level).
      first_child: (N + 1,) int32, where each cluster starts on the level before; zeros at level 0.
      neighbours: (T, N) int32, representative of the voxel at each tap, the row itself at the
        centre; N for none.
      pairs: the entries of `neighbours` that are not none.
      stem_neighbours: a table for the larger kernel of a stem; None where there is none.
      voxel: (N,) int32, the row that represents the row's voxel: itself but for duplicates, which
        only level 0 has; N in padding.
      patches: by patch size K.
      overflow: () int32, voxels that did not fit this level's capacity.
    """

    grid: jax.Array
    cloud: jax.Array
    count: jax.Array
    starts: jax.Array
    orders: jax.Array
    parent: jax.Array
    first_child: jax.Array
    neighbours: jax.Array
    pairs: Pairs
    stem_neighbours: jax.Array | None
    voxel: jax.Array
    patches: dict[int, PatchLayout]
    overflow: jax.Array

    @property
    def valid(self) -> jax.Array:
        """(N,) bool, whether a slot is in use."""
        return jnp.arange(self.cloud.shape[0]) < self.count


Hierarchy = tuple[Level, ...]


def sort_row(
    grid: jax.Array, cloud: jax.Array, valid: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts points into a row: by (cloud, z-order code), ties by their place in the input.

    Args:
      grid: (A, 3) int32 in [0, 65536), any order.
      cloud: (A,) int32 in [0, 255).
      valid: (A,) bool.
      capacity: N, slots of the row.

    Returns:
      order: (N,) int32, the input point in each slot; A in padding.
      count: () int32.
      overflow: () int32, points that did not fit; the last ones of the sort.
    """
    points = grid.shape[0]
    high, low = z_code(grid)
    upper = (cloud.astype(jnp.uint32) << 16) | (high >> 8)
    # As few bits as the row needs; what is not valid is one above all that is.
    beyond = jnp.max(upper, where=valid, initial=0) + 1
    upper = jnp.where(valid, upper, beyond)
    _, order = sort_words((upper, jnp.where(valid, (high << 24) | low, 0)))
    order = jnp.pad(order, (0, max(0, capacity - points)))[:capacity]
    total = valid.sum(dtype=jnp.int32)
    count = jnp.minimum(total, capacity)
    order = jnp.where(jnp.arange(capacity) < count, order, points)
    return order, count, total - count


def build_hierarchy(
    grid: jax.Array,
    cloud: jax.Array,
    count: jax.Array,
    spec: HierarchySpec,
    depths: jax.Array | None = None,
) -> Hierarchy:
    """Builds every level of a row.

    Args:
      grid: (N, 3) int32 in [0, 65536), sorted by (cloud, z-order code), see `sort_row`. Voxels may
        repeat: the first row of a voxel represents it (REFERENCE quirk 5).
      cloud: (N,) int32, ascending.
      count: () int32, slots in use; what the others hold does not matter.
      spec: static shapes.
      depths: (levels, G) int32, bits an axis of each cloud's curves, for comparison with the
        originals which take one depth for a whole batch. By default
        bit_length(largest coordinate + 1), and further as `spec.refit_depths` says.

    Returns:
      One `Level` per entry of `spec.capacities`.
    """
    valid = jnp.arange(spec.capacities[0]) < count
    grid = jnp.where(valid[:, None], grid, 0).astype(jnp.int32)
    cloud = jnp.where(valid, cloud, spec.clouds).astype(jnp.int32)
    if depths is None:
        largest = jax.ops.segment_max(grid.max(-1), cloud, spec.clouds, indices_are_sorted=True)
        largest = jnp.maximum(largest, 0)
        steps = range(len(spec.capacities))
        if spec.refit_depths:
            depths = jnp.stack([curve_depth(largest >> level) for level in steps])
        else:
            depths = jnp.stack([jnp.maximum(curve_depth(largest) - level, 1) for level in steps])

    # Bottom-up: voxels and parents.
    parts: list[dict] = []
    first_child = jnp.zeros(spec.capacities[0] + 1, jnp.int32)
    overflow = jnp.zeros((), jnp.int32)
    for level, capacity in enumerate(spec.capacities):
        part = dict(grid=grid, cloud=cloud, count=count, overflow=overflow)
        part["first_child"] = first_child
        if level == 0:
            part["voxel"] = _representatives(grid, cloud, count)
        else:
            rows = jnp.arange(capacity, dtype=jnp.int32)
            part["voxel"] = jnp.where(rows < count, rows, capacity)
        # Of so few clouds; a search row by row is a loop of its own, which costs accelerators more.
        before = cloud[None] < jnp.arange(spec.clouds + 1)[:, None]
        part["starts"] = before.sum(1, dtype=jnp.int32)
        if level + 1 == len(spec.capacities):
            parts.append(part | dict(parent=jnp.zeros(capacity, jnp.int32)))
            break
        coarser = spec.capacities[level + 1]
        grid, cloud, count, parent, first_child, overflow = _coarsen(
            grid, cloud, count, coarser, spec.clouds
        )
        parts.append(part | dict(parent=parent))

    # Top-down: orders and neighbours. Patches need only the sizes.
    orders = build_orders(parts, depths, spec.curves)
    levels: list[Level] = []
    neighbours = None
    for level in reversed(range(len(parts))):
        part = parts[level]
        wide = None
        if level == 0 and spec.stem_radius:
            wide = _neighbours(part, neighbours, spec.stem_radius)
        neighbours = _neighbours(part, neighbours, 1)
        order, position = orders[level]
        patches = {
            size: build_patches(order, position, part["cloud"], part["starts"], size)
            for size in sorted(set(spec.patch_sizes[level]))
        }
        part |= dict(neighbours=neighbours, pairs=find_pairs(neighbours), stem_neighbours=wide)
        levels.append(Level(**part, orders=order, patches=patches))
    return tuple(reversed(levels))


def _neighbours(part: dict, coarser: jax.Array | None, radius: int) -> jax.Array:
    """(T, N) table of a level from that of the next one, if any; the centre is the row itself."""
    grid, count, rows = part["grid"], part["count"], jnp.arange(len(part["grid"]))
    if coarser is None:
        found = search_neighbours(grid, part["cloud"], count, radius)
    else:
        first = part["voxel"] == rows
        found = refine_neighbours(coarser, grid, part["parent"], first, radius)
    return found.at[len(found) // 2].set(jnp.where(rows < count, rows, len(rows)))


def _first_of_voxel(grid: jax.Array, cloud: jax.Array, count: jax.Array) -> jax.Array:
    """(N,) bool: whether a row is the first of its (cloud, voxel)."""
    differs = (grid[1:] != grid[:-1]).any(-1) | (cloud[1:] != cloud[:-1])
    return jnp.pad(differs, (1, 0), constant_values=True) & (jnp.arange(len(cloud)) < count)


def _representatives(grid: jax.Array, cloud: jax.Array, count: jax.Array) -> jax.Array:
    """(N,) int32: the first row of each row's voxel; N in padding."""
    size = len(cloud)
    rows = jnp.arange(size, dtype=jnp.int32)
    first = _first_of_voxel(grid, cloud, count)
    begin, _ = compact(first, size)
    return jnp.where(rows < count, begin[running_sum(first) - 1], size)


def _coarsen(grid: jax.Array, cloud: jax.Array, count: jax.Array, capacity: int, clouds: int):
    """Voxels of the next level, the parent of each row, and where each cluster's children start."""
    starts_cluster = _first_of_voxel(grid >> 1, cloud, count)
    rank = running_sum(starts_cluster) - 1
    total = starts_cluster.sum(dtype=jnp.int32)
    coarse_count = jnp.minimum(total, capacity)
    valid = jnp.arange(len(cloud)) < count
    parent = jnp.where(valid, jnp.minimum(rank, capacity), capacity)
    # One more entry than clusters: the first cluster that overflows ends the last one that fits.
    slot = jnp.where(starts_cluster, rank, capacity + 1)
    first_child = jnp.full((capacity + 1,), count, jnp.int32)
    first_child = first_child.at[slot].set(jnp.arange(len(cloud), dtype=jnp.int32), mode="drop")
    used = jnp.arange(capacity) < coarse_count
    head = jnp.minimum(first_child[:capacity], len(cloud) - 1)
    coarse_grid = jnp.where(used[:, None], grid[head] >> 1, 0)
    coarse_cloud = jnp.where(used, cloud[head], clouds)
    return coarse_grid, coarse_cloud, coarse_count, parent, first_child, total - coarse_count
