"""Orders of a row's points along the space-filling curves, of every level, with one small sort.

Along a curve the children of a voxel follow one another. So the order of a level is that of the
next coarser one with every voxel replaced by its children, these by their places in it: the last
three bits of their codes. Only the coarsest level, which holds a percent of the points, is sorted.

That is so where a cloud's depth falls by one from level to level. By the originals' rule it may
stay, once on the way: within five levels for 3 to 12 % of extents from 128 to 1,000 voxels, for
most below 64. Then the coarser code begins with a zero, which turns a Hilbert curve by exchanging
axes (REFERENCE quirk 3); three turns make none. So there are up to three families of orders, those
of depths that fall by one from the finest level's plus 0, 1 or 2, and a cloud takes at each level
the one that its depth there says. All but the first are made only if a cloud of the row needs them,
and never for the finest level, which turns nothing.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from point_jax.geometry.curves import Curve, along_curves, encode, place_in_parent
from point_jax.geometry.loops import planned
from point_jax.geometry.neighbours import sort_key
from point_jax.geometry.running import running_sum

FAMILIES = 3

Part = Mapping[str, jax.Array]


def build_orders(
    levels: Sequence[Part], depths: jax.Array, curves: Sequence[Curve]
) -> list[tuple[jax.Array, jax.Array]]:
    """The points of every level along every curve: by (cloud, code), ties in the row's order.

    Where voxels overflow a level, points without a parent keep their place in the row, along every
    curve, and so the points of all finer levels below them keep theirs as a whole: codes order only
    what has a place on all levels.

    Args:
      levels: `grid`, `cloud`, `starts`, `parent`, `first_child` and `voxel` of every level, as
        `hierarchy.Level` has them, finest first.
      depths: (levels, G) int32, bits an axis of each cloud's curves.
      curves: the curves (O of them).

    Returns:
      For every level (orders, positions), each (O, N) int32: the row at each position, and the
      position of each row. Padding keeps its place.
    """
    rest: list[Curve] = [curve for curve in dict.fromkeys(curves) if curve != "z"]
    positions = _positions(levels, depths, rest) if rest else [None] * len(levels)
    orders = []
    for level, found in zip(levels, positions, strict=True):
        # A row is sorted by its z-order code.
        index = jnp.arange(len(level["cloud"]), dtype=jnp.int32)
        position, order = {"z": index}, {"z": index}
        if found is not None:
            position |= zip(rest, found, strict=True)
            order |= zip(rest, jax.vmap(_inverse)(found), strict=True)
        orders.append(
            (
                jnp.stack([order[curve] for curve in curves]),
                jnp.stack([position[curve] for curve in curves]),
            )
        )
    return orders


def _positions(
    levels: Sequence[Part], depths: jax.Array, curves: Sequence[Curve]
) -> list[jax.Array]:
    """(O, N) positions of the rows of every level."""
    last = len(levels) - 1
    if last == 0:
        return [_by_sorting(levels[0], depths[0], curves)]

    def family(which: jax.Array | int) -> list[jax.Array]:
        """Of all levels but the finest."""
        found = [_by_sorting(levels[last], depths[0] - last + which, curves)]
        for at in reversed(range(1, last)):
            depth = depths[0] - at + which
            found.append(_by_parents(found[-1], levels[at], levels[at + 1], depth, curves))
        return found[::-1]

    if any(curve.startswith("hilbert") for curve in curves):
        # A lone voxel has no order to turn.
        turns = [
            jnp.where(jnp.diff(level["starts"]) > 1, (depths[at] - depths[0] + at) % FAMILIES, 0)
            for at, level in enumerate(levels[1:], start=1)
        ]
        families = [
            jnp.zeros((FAMILIES, len(curves), len(level["cloud"])), jnp.int32)
            for level in levels[1:]
        ]

        def add(which: jax.Array, families: list[jax.Array]) -> list[jax.Array]:
            found = zip(families, family(which), strict=True)
            return [whole.at[which].set(part) for whole, part in found]

        with planned(2):  # a third only for depths that are given
            needed = jnp.stack(turns).max() + 1
            families = jax.lax.fori_loop(0, needed, add, families)
        straight = families[0][0]
        coarser = []
        for level, turn, found in zip(levels[1:], turns, families, strict=True):
            turn = jnp.append(turn, 0)[level["cloud"]]
            turned = jnp.where(turn == 1, found[1], found[2])
            coarser.append(jnp.where(turn == 0, found[0], turned))
    else:
        coarser = family(0)
        straight = coarser[0]
    return [_by_parents(straight, levels[0], levels[1], depths[0], curves), *coarser]


def _by_sorting(level: Part, depth: jax.Array, curves: Sequence[Curve]) -> jax.Array:
    """(O, N) positions of the rows of a level."""
    cloud, clouds = level["cloud"], len(depth)
    depth = jnp.append(depth, 1)[cloud]
    high, low = along_curves(encode, level["grid"], curves, depth)
    cloud = jnp.broadcast_to(cloud, high.shape)
    high, low = sort_key((high, low), cloud, cloud < clouds)
    index = jax.lax.broadcasted_iota(jnp.int32, high.shape, 1)
    order = jax.lax.sort((high, low, index), num_keys=2, is_stable=True)[2]
    return jax.vmap(_inverse)(order)


def _by_parents(
    coarser: jax.Array, level: Part, parents: Part, depth: jax.Array, curves: Sequence[Curve]
) -> jax.Array:
    """(O, N) positions of a level's rows from those of the next coarser level's, `coarser` (O, M).

    A row comes after the rows of all clusters before its own, those of its own with a lower place,
    and those of its voxel that are before it.
    """
    parent, clusters = level["parent"], coarser.shape[1]
    rows = jnp.arange(len(parent), dtype=jnp.int32)
    depth = jnp.append(depth, 1)[level["cloud"]]
    places = along_curves(place_in_parent, level["grid"], curves, depth)
    sizes = jnp.diff(parents["first_child"])

    def along(position: jax.Array, place: jax.Array) -> jax.Array:
        sizes_along = jnp.zeros_like(sizes).at[position].set(sizes, unique_indices=True)
        start = (running_sum(sizes_along) - sizes_along)[position]
        slot = jnp.where(parent < clusters, place * clusters + parent, 8 * clusters)
        count = jnp.zeros(8 * clusters, jnp.int32).at[slot].add(1, mode="drop")
        count = count.reshape(8, clusters)
        before = start[None] + jnp.cumsum(count, axis=0) - count
        return jnp.take(before.reshape(-1), slot, mode="clip") + rows - level["voxel"]

    return jnp.where((parent < clusters)[None], jax.vmap(along)(coarser, places), rows[None])


def _inverse(permutation: jax.Array) -> jax.Array:
    """(N,) where each number is in a permutation of 0 to N - 1."""
    index = jnp.arange(len(permutation), dtype=jnp.int32)
    return jnp.zeros_like(index).at[permutation].set(index, unique_indices=True)
