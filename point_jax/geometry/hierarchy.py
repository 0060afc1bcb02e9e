"""Integer structure of a row: voxels of every level, their orders, patches, parents, neighbours.

Computed once per row from voxel coordinates, without gradients; networks take
`(features, hierarchy)`. A row is sorted by (cloud, z-order code) and stays so at every level: the
children of a cluster are contiguous, and a coarser level comes out sorted without sorting again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from point_jax.geometry.curves import CURVES, Curve, curve_depth, encode, z_code
from point_jax.geometry.neighbours import refine_neighbours, search_neighbours, sort_key
from point_jax.geometry.pairs import Pairs, find_pairs
from point_jax.geometry.patches import PatchLayout, build_patches

MAX_CLOUDS = 255  # the cloud shares a 32-bit sort key with 24 bits of the code


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
      orders: (O, N) int32, points along each curve; padding keeps its place.
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
    high, low = sort_key(z_code(grid), cloud, valid)
    index = jnp.arange(points, dtype=jnp.int32)
    order = jax.lax.sort((high, low, index), num_keys=2, is_stable=True)[2]
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

    # Bottom-up: voxels, parents, orders.
    parts: list[dict] = []
    orders = _sorted_orders(grid, cloud, depths[0], spec.curves)
    first_child = jnp.zeros(spec.capacities[0] + 1, jnp.int32)
    overflow = jnp.zeros((), jnp.int32)
    for level, capacity in enumerate(spec.capacities):
        part = dict(grid=grid, cloud=cloud, count=count, orders=orders, overflow=overflow)
        part.update(first_child=first_child, voxel=_representatives(grid, cloud, count))
        if level + 1 == len(spec.capacities):
            parts.append(part | dict(parent=jnp.zeros(capacity, jnp.int32)))
            break
        coarser = spec.capacities[level + 1]
        grid, cloud, count, parent, first_child, overflow = _coarsen(
            grid, cloud, count, coarser, spec.clouds
        )
        orders = _coarser_orders(
            orders, parent, grid, cloud, depths[level : level + 2], spec.curves
        )
        parts.append(part | dict(parent=parent))

    # Top-down: neighbours. Patches need only the sizes.
    levels: list[Level] = []
    neighbours = None
    for level in reversed(range(len(parts))):
        part = parts[level]
        wide = None
        if level == 0 and spec.stem_radius:
            wide = _neighbours(part, neighbours, spec.stem_radius)
        neighbours = _neighbours(part, neighbours, 1)
        # Of so few clouds; a search row by row is a loop of its own, which costs accelerators more.
        before = part["cloud"][None] < jnp.arange(spec.clouds + 1)[:, None]
        starts = before.sum(1, dtype=jnp.int32)
        inverses = _inverse(part["orders"])
        patches = {
            size: build_patches(part["orders"], inverses, part["cloud"], starts, size)
            for size in sorted(set(spec.patch_sizes[level]))
        }
        part |= dict(neighbours=neighbours, pairs=find_pairs(neighbours), stem_neighbours=wide)
        levels.append(Level(**part, starts=starts, patches=patches))
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
    rows = jnp.arange(len(cloud), dtype=jnp.int32)
    first = _first_of_voxel(grid, cloud, count)
    return jnp.where(rows < count, jax.lax.cummax(jnp.where(first, rows, 0)), len(cloud))


def _coarsen(grid: jax.Array, cloud: jax.Array, count: jax.Array, capacity: int, clouds: int):
    """Voxels of the next level, the parent of each row, and where each cluster's children start."""
    starts_cluster = _first_of_voxel(grid >> 1, cloud, count)
    rank = jnp.cumsum(starts_cluster, dtype=jnp.int32) - 1
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


def _sorted_orders(
    grid: jax.Array, cloud: jax.Array, depth: jax.Array, curves: Sequence[Curve]
) -> jax.Array:
    """(O, N) orders of a row along each curve by sorting; along "z" the row is sorted already."""
    index = jnp.arange(len(cloud), dtype=jnp.int32)
    orders: dict[Curve, jax.Array] = {"z": index}
    rest: list[Curve] = [curve for curve in curves if curve != "z"]
    if rest:
        depth = jnp.append(depth, 1)
        valid = cloud < len(depth) - 1
        keys = [sort_key(encode(grid, curve, depth[cloud]), cloud, valid) for curve in rest]
        high, low = (jnp.stack(part) for part in zip(*keys, strict=True))
        indices = jnp.broadcast_to(index, high.shape)
        found = jax.lax.sort((high, low, indices), num_keys=2, is_stable=True)[2]
        orders.update(zip(rest, found, strict=True))
    return jnp.stack([orders[curve] for curve in curves])


def _coarser_orders(
    orders: jax.Array,
    parent: jax.Array,
    grid: jax.Array,
    cloud: jax.Array,
    depths: jax.Array,
    curves: Sequence[Curve],
) -> jax.Array:
    """Orders of the next level: clusters by first appearance along each finer order.

    This holds while every cloud's depth falls by one, since then its codes only lose their last
    three bits. Where a depth stays, Hilbert codes turn (REFERENCE quirk 3), and the level is
    sorted.
    """
    capacity = len(cloud)

    def by_appearance():
        along = parent[orders]  # (O, N)
        new = jnp.pad(along[:, 1:] != along[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        new &= along < capacity
        rank = jnp.where(new, jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1, capacity)
        start = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (len(curves), capacity))
        return jax.vmap(lambda order, at, row: order.at[at].set(row, mode="drop"))(
            start, rank, along
        )

    def by_sorting():
        return _sorted_orders(grid, cloud, depths[1], curves)

    if not any(curve.startswith("hilbert") for curve in curves):
        return by_appearance()
    points = jax.ops.segment_sum(
        jnp.ones_like(cloud), cloud, depths.shape[1], indices_are_sorted=True
    )
    turns = ((points > 1) & (depths[1] != depths[0] - 1)).any()
    return jax.lax.cond(turns, by_sorting, by_appearance)


def _inverse(orders: jax.Array) -> jax.Array:
    """(O, N) position of each point in each order."""
    position = jnp.arange(orders.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda order: jnp.zeros_like(order).at[order].set(position))(orders)
