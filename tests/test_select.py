"""Choosing, sorting and grid sampling of rows equal their definitions in numpy."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_files import shared

from point_jax.geometry import select
from point_jax.geometry.curves import z_code
from point_jax.geometry.sampling import bounds, floor_divide, grid_sample, voxel_grid
from point_jax.geometry.select import compact, member, smallest, uniform_below
from point_jax.geometry.sorting import sort_words

ROWS = 700


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smallest_by_sorting(values, valid, k):
    """The first k valid rows of a stable argsort."""
    rows = np.flatnonzero(valid)
    chosen = np.zeros(len(values), bool)
    chosen[rows[np.argsort(values[rows], kind="stable")[: max(k, 0)]]] = True
    return chosen


@pytest.mark.parametrize("search", [select.by_halves, select.by_digits])  # CPUs, accelerators
@pytest.mark.parametrize("distinct", [3, 50, None])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_the_k_smallest_are_those_of_a_stable_sort(rng, monkeypatch, search, distinct, dtype):
    monkeypatch.setattr(select, "by_halves", search)
    values = rng.integers(0, distinct or 2**31 - 1, ROWS).astype(dtype)
    values[::7] = 0
    valid = rng.random(ROWS) < 0.8
    if dtype is np.float32:
        values[~valid] = np.nan
        values[np.flatnonzero(valid)[:3]] = [np.inf, 1e-45, 3e38]
    sizes = np.array([-1, 0, 1, 2, 60, 333, valid.sum() - 1, valid.sum(), ROWS, ROWS + 5])
    choose = jax.jit(jax.vmap(lambda *a: smallest(*a), (None, None, 0)))  # traced anew
    for k, chosen in zip(sizes, choose(values, valid, sizes), strict=True):
        np.testing.assert_array_equal(chosen, smallest_by_sorting(values, valid, k))


def test_members_and_their_compaction(rng):
    masks = np.stack([rng.random(ROWS) < share for share in (0.0, 0.01, 0.4, 0.9, 1.0)])
    masks[1, -1] = True
    capacity = 300
    rows, counts = jax.jit(jax.vmap(lambda mask: compact(mask, capacity)))(masks)
    ranks = np.array([-3, 0, 1, 5, 255, 256, 299, 698, 699])
    found = jax.jit(jax.vmap(jax.vmap(member, (None, 0)), (0, None)))(masks, ranks)
    for mask, row, count, of_rank in zip(masks, rows, counts, found, strict=True):
        expected = np.flatnonzero(mask)
        assert count == min(len(expected), capacity)
        np.testing.assert_array_equal(row[:count], expected[:capacity])
        assert not np.any(row[count:])
        for rank, result in zip(np.maximum(ranks, 0), of_rank, strict=True):
            assert result == (expected[rank] if rank < len(expected) else ROWS)


def test_uniform_integers_stay_below_their_bound():
    largest = np.float32(1 - 2**-24)
    bound = np.array([0, 1, 2, 3, 1000, 2**20 + 1, 2**23 - 1], np.int32)
    np.testing.assert_array_equal(uniform_below(np.full(7, largest), bound), bound.clip(1) - 1)
    draws = uniform_below(np.arange(1200, dtype=np.float32) / 1200, np.full(1200, 3))
    np.testing.assert_array_equal(np.bincount(draws), [400, 400, 400])


@pytest.mark.parametrize(("upper", "lower"), [(1, 5), (3, 2**32), (2**16, 2**32), (1, 1)])
def test_sorting_by_words_is_stable_and_lexicographic(rng, upper, lower):
    words = (
        rng.integers(0, upper, ROWS).astype(np.uint32),
        rng.integers(0, lower, ROWS).astype(np.uint32),
    )
    in_order, order = jax.jit(sort_words)(words)
    expected = np.lexsort((np.arange(ROWS), words[1], words[0]))
    np.testing.assert_array_equal(order, expected)
    for word, result in zip(words, in_order, strict=True):
        np.testing.assert_array_equal(result, word[expected])


@pytest.mark.parametrize("size", [0.02, 0.1, 0.2, 0.4, 0.8, 1 / 3, 1.0])
def test_floor_division_is_that_of_the_exact_quotient(rng, size):
    size = np.float32(size)
    # Multiples and their neighbours, where a rounded quotient would be an integer too large.
    multiples = (np.arange(-300, 300) * size).astype(np.float32)
    values = np.concatenate(
        [multiples]
        + [np.nextafter(multiples, np.float32(side)) for side in (-1e9, 1e9)]
        + [rng.uniform(-50, 50, 600).astype(np.float32)]
    )
    values = values[np.abs(values) > 1e-30]  # XLA reads subnormal numbers as 0
    exact = [math.floor(Fraction(float(value)) / Fraction(float(size))) for value in values]
    np.testing.assert_array_equal(jax.jit(floor_divide)(values, size), exact)


def test_bounds_see_valid_points_only(rng):
    coord = rng.normal(size=(50, 3)).astype(np.float32)
    valid = rng.random(50) < 0.5
    low, high = bounds(np.where(valid[:, None], coord, np.nan), valid)
    np.testing.assert_array_equal(low, coord[valid].min(0))
    np.testing.assert_array_equal(high, coord[valid].max(0))
    low, high = bounds(np.full((5, 3), np.nan), np.zeros(5, bool))
    assert not np.any(low) and not np.any(high)


class TestGridSampling:
    """One random point per voxel, in the order of the z curve."""

    sample = staticmethod(jax.jit(grid_sample, static_argnames="capacity"))

    def test_voxels_equal_the_originals(self):
        golden = np.load(shared("golden/i_transforms.npz"))
        coord, valid = golden["coord"], np.ones(len(golden["coord"]), bool)
        grid, fits = voxel_grid(coord, valid, 0.1)
        assert np.all(fits)
        np.testing.assert_array_equal(grid, golden["gs_grid_coord_all"])
        index, count, overflow = self.sample(jax.random.key(0), coord, valid, 0.1, len(coord))
        chosen = np.asarray(grid)[np.asarray(index)[:count]]
        assert (count, overflow) == (len(golden["gs_train_fnv_selected"]), 0)
        np.testing.assert_array_equal(
            np.unique(chosen, axis=0), np.unique(golden["gs_train_fnv_grid_coord"], axis=0)
        )

    @pytest.fixture
    def cloud(self, rng):
        """500 points in 64 voxels of 0.1 metres, some on negative coordinates."""
        coord = rng.uniform(-0.2, 0.2, (500, 3)).astype(np.float32)
        return coord, np.floor(coord / np.float32(0.1)).astype(int) + 2

    def test_every_voxel_once_sorted_by_code(self, cloud):
        coord, voxel = cloud
        padded = np.concatenate([coord, np.full((100, 3), np.nan, np.float32)])
        index, count, overflow = self.sample(
            jax.random.key(1), padded, np.arange(600) < 500, 0.1, 600
        )
        voxels = np.unique(voxel, axis=0)
        assert (count, overflow) == (len(voxels), 0)
        _, low = z_code(jnp.asarray(voxels))
        np.testing.assert_array_equal(voxel[index[:count]], voxels[np.argsort(low)])
        assert not np.any(index[count:])

    def test_neither_padding_nor_capacity_changes_the_choice(self, cloud):
        coord, _ = cloud
        long = np.concatenate([coord, np.full((100, 3), np.nan, np.float32)])
        index, count, _ = self.sample(jax.random.key(2), coord, np.ones(500, bool), 0.1, 500)
        other, same_count, _ = self.sample(jax.random.key(2), long, np.arange(600) < 500, 0.1, 600)
        assert count == same_count
        np.testing.assert_array_equal(index[:count], other[:count])

    def test_each_point_of_a_voxel_is_equally_likely(self):
        coord = np.array([[0.05], [0.15], [0.18], [0.25], [0.22], [0.27]]).repeat(3, axis=1)
        keys = jax.random.split(jax.random.key(0), 6000)
        draw = jax.vmap(lambda key: grid_sample(key, coord, np.ones(6, bool), 0.1, 6)[0][:3])
        chosen = np.asarray(jax.jit(draw)(keys))
        share = np.bincount(chosen.ravel(), minlength=6) / len(keys)
        np.testing.assert_allclose(share, [1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
        # Voxels choose independently.
        assert abs(np.corrcoef(chosen[:, 1] == 1, chosen[:, 2] == 3)[0, 1]) < 0.05

    def test_what_does_not_fit_is_counted(self, cloud):
        coord, voxel = cloud
        voxels = len(np.unique(voxel, axis=0))
        index, count, overflow = self.sample(jax.random.key(0), coord, np.ones(500, bool), 0.1, 40)
        assert (count, overflow) == (40, voxels - 40)
        assert len(np.unique(voxel[index], axis=0)) == 40
        # More than 16 bits of voxels along an axis.
        coord = np.array([[0, 0, 0], [65534, 0, 0], [65535, 0, 0], [5, 0, 1e6]], np.float32)
        index, count, overflow = self.sample(
            jax.random.key(0), coord + np.float32(0.5), np.ones(4, bool), 1.0, 4
        )
        assert (count, overflow) == (2, 2)
        np.testing.assert_array_equal(index[:2], [0, 1])

    def test_an_empty_cloud_has_no_voxels(self):
        index, count, overflow = self.sample(
            jax.random.key(0), np.full((600, 3), np.nan), np.zeros(600, bool), 0.1, 600
        )
        assert (count, overflow) == (0, 0) and not np.any(index)
