"""Voxels, orders, patches, clusters and neighbours of every level."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build_hierarchy_jit, clouds_of, level_key, load, make_row, voxel_key

from point_jax.geometry.curves import CURVES, curve_depth, encode
from point_jax.geometry.hierarchy import HierarchySpec, sort_row
from point_jax.geometry.neighbours import offsets
from point_jax.geometry.patches import build_patches

encode_jit = jax.jit(encode, static_argnames="curve")

GOLDEN = [
    "b1_ptv3m2_enc_noflash",
    "b3_ptv3m2_enc_varlen",
    "c3_ptv3m2_encdec_varlen",
    "e1_ptv3m1_encdec_noflash",
    "e3_ptv3m1_encdec_varlen",
]


def golden_row(arrays, config):
    depths = np.stack([arrays[f"enc{s}.serialized_depth"] for s in range(5)])
    cloud = clouds_of(arrays["in.offset"])
    return make_row(arrays["in.grid_coord"], cloud, config, depths, (1536, 1300, 850, 500, 300))


@pytest.mark.parametrize("name", GOLDEN)
def test_levels_equal_the_originals(name):
    arrays, about = load(name)
    row = golden_row(arrays, about["config"])
    for s, level in enumerate(row.hierarchy):
        cloud = clouds_of(arrays[f"enc{s}.offset"])
        want = voxel_key(cloud, arrays[f"enc{s}.grid_coord"])
        assert int(level.overflow) == 0 and int(level.count) == len(want)
        key = level_key(level)
        for o in range(4):  # the points along every curve
            along = np.asarray(level.orders[o])[: len(want)]
            np.testing.assert_array_equal(key[along], want[arrays[f"enc{s}.serialized_order"][o]])
        if s:  # every finer point falls into the same cluster
            parent = np.asarray(row.hierarchy[s - 1].parent)[: int(row.hierarchy[s - 1].count)]
            fine = voxel_key(
                clouds_of(arrays[f"enc{s - 1}.offset"]), arrays[f"enc{s - 1}.grid_coord"]
            )
            by_key = dict(zip(fine, want[arrays[f"enc{s}.pooling_inverse"]], strict=True))
            np.testing.assert_array_equal(
                key[parent], [by_key[k] for k in level_key(row.hierarchy[s - 1])]
            )


@pytest.mark.parametrize("name", GOLDEN)
def test_patches_hold_the_same_points_in_the_same_slots_as_the_originals(name):
    arrays, about = load(name)
    row = golden_row(arrays, about["config"])
    for s, level in enumerate(row.hierarchy):
        key, layout = level_key(level), level.patches[64]
        want_key = voxel_key(clouds_of(arrays[f"enc{s}.offset"]), arrays[f"enc{s}.grid_coord"])
        narrow = layout.narrow is not None and bool(layout.narrow)
        width = layout.width // 4 if narrow else layout.width
        segment = np.asarray(layout.segment).reshape(-1, width)
        for o in range(4):
            want_slots = want_key[arrays[f"enc{s}.serialized_order"][o][arrays[f"enc{s}.pad"]]]
            want = {tuple(w) for w in np.split(want_slots, arrays[f"enc{s}.cu_seqlens_key"][1:-1])}
            slot_point = np.asarray(layout.slot_point[o]).reshape(segment.shape)
            got = {
                tuple(key[slot_point[p][segment[p] == c]])
                for p in range(int(layout.used))
                for c in np.unique(segment[p][segment[p] >= 0])
            }
            assert got == want
            # and every point is read back from a slot that it owns
            slot = np.asarray(layout.point_slot[o])[: len(key)]
            np.testing.assert_array_equal(slot_point.reshape(-1)[slot], np.arange(len(key)))
            borrowed = np.asarray(layout.point_borrowed[o])[: len(key)]
            lent = borrowed < segment.size
            np.testing.assert_array_equal(
                slot_point.reshape(-1)[borrowed[lent]], np.flatnonzero(lent)
            )
            owned = np.concatenate([slot, borrowed[lent]])
            assert len(np.unique(owned)) == len(owned) == (segment >= 0).sum()


SPEC = HierarchySpec(
    capacities=(512, 400, 300),
    clouds=5,
    patch_sizes=((48,), (48,), (48, 16)),
    curves=("z", "hilbert"),
    stem_radius=2,
)


def random_row(seed, duplicates, spec=SPEC, depths=None):
    """Surfaces of random clouds of 0 to 200 points, two of them tiny."""
    rng = np.random.default_rng(seed)
    sizes = rng.permutation([1, 3, 200, 120, 0])
    cloud = np.repeat(np.arange(5), sizes).astype(np.int32)
    grid = rng.integers(0, rng.integers(4, 60), (len(cloud), 3)).astype(np.int32)
    grid[:, 2] = (grid[:, 0] + grid[:, 1]) // 3
    if not duplicates:
        _, keep = np.unique(voxel_key(cloud, grid), return_index=True)
        cloud, grid = cloud[keep], grid[keep]
    order, count, overflow = sort_row(
        jnp.asarray(grid), jnp.asarray(cloud), jnp.ones(len(cloud), bool), spec.capacities[0]
    )
    at = jnp.minimum(order, len(cloud) - 1)
    assert int(overflow) == max(0, len(cloud) - spec.capacities[0])
    row = jnp.asarray(grid)[at], jnp.asarray(cloud)[at], count
    return build_hierarchy_jit(*row, spec=spec, depths=depths)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("duplicates", [False, True])
def test_neighbours_are_the_first_rows_of_the_voxels_around(seed, duplicates):
    hierarchy = random_row(seed, duplicates)
    tables = [(level, level.neighbours, offsets(1)) for level in hierarchy]
    tables.append((hierarchy[0], hierarchy[0].stem_neighbours, offsets(2)))
    assert all(level.stem_neighbours is None for level in hierarchy[1:])
    for level, neighbours, around in tables:
        used = int(level.count)
        grid, cloud = np.asarray(level.grid)[:used], np.asarray(level.cloud)[:used]
        first_row = {}
        for i in range(used):
            first_row.setdefault((cloud[i], *grid[i]), i)
        representative = [first_row[(cloud[i], *grid[i])] for i in range(used)]
        np.testing.assert_array_equal(np.asarray(level.voxel)[:used], representative)
        for tap, offset in enumerate(around):
            want = [
                i
                if tap == len(around) // 2
                else first_row.get((cloud[i], *(grid[i] + offset)), len(level.cloud))
                for i in range(used)
            ]
            np.testing.assert_array_equal(np.asarray(neighbours[tap])[:used], want)
        assert (np.asarray(neighbours)[:, used:] == len(level.cloud)).all()


@pytest.mark.parametrize("seed", range(4))
def test_children_of_a_cluster_are_contiguous(seed):
    hierarchy = random_row(seed, duplicates=True)
    for fine, coarse in itertools.pairwise(hierarchy):
        bounds, parent = np.asarray(coarse.first_child), np.asarray(fine.parent)
        for j in range(int(coarse.count)):
            np.testing.assert_array_equal(
                np.flatnonzero(parent == j), range(bounds[j], bounds[j + 1])
            )
            children = slice(bounds[j], bounds[j + 1])
            assert (np.asarray(fine.grid)[children] >> 1 == np.asarray(coarse.grid)[j]).all()
            assert (np.asarray(fine.cloud)[children] == np.asarray(coarse.cloud)[j]).all()


@pytest.mark.parametrize("seed", range(4))
def test_orders_are_permutations_that_keep_clouds_together(seed):
    for level in random_row(seed, duplicates=True):
        for order in np.asarray(level.orders):
            np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
            np.testing.assert_array_equal(np.asarray(level.cloud)[order], np.asarray(level.cloud))


ALONG = HierarchySpec((512, 400, 300, 200), 5, ((48,),) * 4, CURVES)


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_orders_are_those_of_sorting_every_level_by_its_codes(seed, duplicates):
    """By (cloud, code, row), at the depth that each cloud has on each level."""
    expect_sorted(random_row(seed, duplicates, ALONG), default_depths)


def test_orders_may_take_any_depths_that_hold_the_voxels():
    """Some depths stay several times and some fall by two: a curve turns up to twice on the way."""
    given = jnp.array([[9, 7, 6, 8, 7], [8, 7, 7, 6, 6], [7, 7, 6, 6, 4], [7, 7, 3, 5, 4]])
    hierarchy = random_row(7, True, ALONG, given)
    expect_sorted(hierarchy, lambda index, level: given[index])


def test_orders_hold_up_to_the_largest_coordinate_and_depth():
    """65,535 needs 17 bits by the originals' rule; a curve may turn from 16 bits on."""
    rng = np.random.default_rng(0)
    grid = np.concatenate([rng.integers(0, 1 << 16, (60, 3)), [[65535, 3, 9]]]).astype(np.int32)
    cloud = np.repeat([0, 2], [40, 21]).astype(np.int32)
    order, count, _ = sort_row(grid, cloud, np.ones(61, bool), ALONG.capacities[0])
    at = np.minimum(order, 60)
    row = jnp.asarray(grid)[at], jnp.asarray(cloud)[at], count
    expect_sorted(build_hierarchy_jit(*row, spec=ALONG, depths=None), default_depths)
    given = jnp.array(
        [[16, 9, 16, 8, 16], [14, 9, 16, 8, 17], [14, 9, 15, 8, 16], [14, 9, 15, 8, 3]]
    )
    expect_sorted(random_row(7, True, ALONG, given), lambda index, level: given[index])


def default_depths(index, level):
    """Bits an axis of every cloud by the rule of grid pooling."""
    del index
    grid, cloud = np.asarray(level.grid), np.asarray(level.cloud)
    largest = [grid[cloud == c].max(initial=0) for c in range(5)]
    return curve_depth(jnp.array(largest, jnp.int32))


def expect_sorted(hierarchy, depths):
    for index, level in enumerate(hierarchy):
        used = int(level.count)
        cloud = np.asarray(level.cloud)[:used]
        for curve, order in zip(CURVES, np.asarray(level.orders), strict=True):
            depth = jnp.append(depths(index, level), 1)[level.cloud]
            high, low = (np.asarray(part)[:used] for part in encode_jit(level.grid, curve, depth))
            np.testing.assert_array_equal(order[:used], np.lexsort((low, high, cloud)))
            np.testing.assert_array_equal(order[used:], np.arange(used, len(order)))


def test_depths_that_fall_by_one_never_turn_a_hilbert_curve():
    """A largest coordinate of 2^d - 2 keeps its depth under the rule of grid pooling."""
    rng = np.random.default_rng(0)
    grid = np.unique(rng.integers(0, 15, (200, 3)), axis=0).astype(np.int32)  # 14 needs 4 bits
    grid = np.concatenate([grid, [[14, 14, 14]]]).astype(np.int32)
    cloud = np.zeros(len(grid), np.int32)
    order, count, _ = sort_row(grid, cloud, np.ones(len(grid), bool), 256)
    at = np.minimum(order, len(grid) - 1)
    for refit, depths in ((True, (4, 4)), (False, (4, 3))):
        spec = HierarchySpec((256, 200), 1, ((48,), (48,)), ("hilbert",), refit_depths=refit)
        ours = build_hierarchy_jit(grid[at], cloud[at], count, spec=spec)
        given = build_hierarchy_jit(
            grid[at], cloud[at], count, spec=spec, depths=jnp.array(depths, jnp.int32)[:, None]
        )
        np.testing.assert_array_equal(ours[1].orders, given[1].orders)


def test_overflow_is_counted_and_what_fits_is_kept():
    tight = HierarchySpec((300, 100, 20), 5, ((48,), (48,), (48,)), ("z", "hilbert"))
    full, cut = random_row(2, False), random_row(2, False, tight)
    missing = [int(level.overflow) for level in cut]
    assert missing[1] > 0 and missing[2] > 0
    assert int(cut[1].count) == 100
    kept = np.asarray(cut[1].grid)
    np.testing.assert_array_equal(kept, np.asarray(full[1].grid)[:100])
    assert (np.asarray(cut[0].parent)[np.asarray(full[0].parent)[:300] >= 100] == 100).all()
    for level, coarser in itertools.pairwise(cut):
        # What has no place on the next level keeps its own along every curve.
        left = np.flatnonzero(np.asarray(level.parent) == len(coarser.cloud))
        assert len(left) and (np.asarray(level.orders)[:, left] == left).all()


def test_a_row_of_clouds_longer_than_a_patch_borrows_and_short_ones_share():
    level = random_row(0, duplicates=False)[0]
    layout = level.patches[48]
    sizes = np.diff(np.asarray(level.starts))
    long = sizes > 48
    assert int(layout.used) < sum(-(-sizes[long] // 48)) + (~long & (sizes > 0)).sum()
    full = sum(-(-sizes[long] // 48))
    assert full < int(layout.used)
    for p in np.asarray(layout.segment).reshape(-1, 48)[:full]:
        assert len(set(p)) == 1 and p[0] >= 0


def placed_by_hand(sizes, width):
    """Cloud of every slot: long ones in patches of their own, then the short ones in turn."""
    slots = [c for c, n in enumerate(sizes) if n > width for _ in range(-(-n // width) * width)]
    for c, n in enumerate(sizes):
        if n <= width:
            left = -len(slots) % width
            slots += [-1] * (left if n > left else 0) + [c] * n
    return slots + [-1] * (-len(slots) % width)


@pytest.mark.parametrize("clouds", [1, 2, 6, 20])  # 20: in a loop
def test_clouds_are_placed_in_turn_and_narrowly_if_all_are_short(clouds):
    capacity, wide = 80, 16
    order = jnp.arange(capacity, dtype=jnp.int32)[None]
    build = jax.jit(lambda cloud, starts: build_patches(order, order, cloud, starts, wide))
    rng, kinds = np.random.default_rng(clouds), set()
    for _ in range(100):
        sizes = rng.integers(0, rng.choice([wide // 4 + 1, wide, wide + 1, capacity]), clouds)
        sizes *= rng.random(clouds) < rng.choice([0.1, 1.0])
        while sizes.sum() > capacity:
            sizes[sizes.argmax()] //= 2
        cloud = np.repeat(np.arange(clouds + 1), [*sizes, capacity - sizes.sum()])
        starts = np.append(0, np.cumsum(sizes))
        layout = build(jnp.asarray(cloud, jnp.int32), jnp.asarray(starts, jnp.int32))
        few = placed_by_hand(sizes, wide // 4)
        narrow = layout.narrow is not None and max(sizes) <= wide // 4
        narrow = narrow and len(few) <= len(layout.segment)
        want = few if narrow else placed_by_hand(sizes, wide)
        assert layout.narrow is None or bool(layout.narrow) == narrow
        assert int(layout.used_slots) == len(want)
        segment = np.asarray(layout.segment)
        np.testing.assert_array_equal(segment, want + [-1] * (len(segment) - len(want)))
        kinds.add((narrow, bool((sizes > wide).any())))
    assert len(kinds) == (2 if clouds == 1 or capacity >= 2 * clouds * wide else 3)


def test_a_spec_with_too_many_clouds_says_so():
    with pytest.raises(ValueError, match="1 to 255 clouds, got clouds=256"):
        HierarchySpec((8,), 256, ((8,),))
