"""Every primitive against its definition, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hierarchy import random_row

from point_jax.geometry.neighbours import TAPS
from point_jax.ops.attention import patch_attention
from point_jax.ops.conv import submanifold_conv
from point_jax.ops.gather import from_slots, take_rows, to_children, to_slots
from point_jax.ops.pool import cluster_max, cluster_mean
from point_jax.ops.rotary import rotate


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(ours, reference, *args, weight_seed=9, tolerance=2e-5):
    """Equal values and equal gradients of a random projection for every argument."""
    out, want = jax.jit(ours)(*args), jax.jit(reference)(*args)
    np.testing.assert_allclose(out, want, atol=tolerance * float(jnp.abs(want).max()))
    weight = normal(weight_seed, *out.shape)
    every = tuple(range(len(args)))
    got = jax.jit(jax.grad(lambda *a: (ours(*a) * weight).sum(), every))(*args)
    truth = jax.jit(jax.grad(lambda *a: (reference(*a) * weight).sum(), every))(*args)
    for g, t in zip(got, truth, strict=True):
        assert float(jnp.abs(t).max()) > 0
        np.testing.assert_allclose(g, t, atol=tolerance * float(jnp.abs(t).max()))


def pad(x):
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])


@pytest.mark.parametrize("form", ["pair by pair", "side by side"])
@pytest.mark.parametrize("duplicates", [False, True])
def test_convolution_reads_the_representatives_around_and_itself(duplicates, form):
    level = random_row(3, duplicates)[0]
    pairs = level.pairs if form == "pair by pair" else None

    def reference(x, weight):
        out = jnp.einsum("tnc,tcf->nf", pad(x)[level.neighbours], weight)
        return out

    def ours(x, weight):
        return submanifold_conv(x, weight, level.neighbours, level.voxel, level.count, pairs)

    assert_same(ours, reference, normal(0, 512, 6), normal(1, 27, 6, 5))


def test_convolution_of_a_single_voxel_is_the_centre_tap():
    neighbours = jnp.full((27, 1), 1, jnp.int32).at[TAPS // 2].set(0)
    x, weight = normal(0, 1, 4), normal(1, 27, 4, 3)
    out = submanifold_conv(x, weight, neighbours, jnp.zeros(1, jnp.int32), jnp.int32(1))
    np.testing.assert_allclose(out, x @ weight[TAPS // 2], rtol=1e-6)


def test_convolution_skips_blocks_of_padding_even_with_nan():
    level = random_row(3, False)[0]
    x = jnp.where(level.valid[:, None], normal(0, 512, 6), jnp.nan)
    for pairs in (level.pairs, None):
        out = submanifold_conv(
            x, normal(1, 27, 6, 5), level.neighbours, level.voxel, level.count, pairs
        )
        assert bool(jnp.isfinite(out).all())


def test_pairs_are_the_entries_of_the_table():
    level = random_row(3, True)[0]
    for tap, table in enumerate(np.asarray(level.neighbours)):
        count = int(level.pairs.counts[tap])
        rows = np.flatnonzero(table < 512)
        np.testing.assert_array_equal(level.pairs.rows[tap, :count], rows)
        np.testing.assert_array_equal(level.pairs.reads[tap, :count], table[rows])
        assert count == len(rows)


@pytest.mark.parametrize("order", [0, 1])
def test_slots_hold_their_points_and_give_them_back(order):
    level = random_row(0, False)[0]
    layout = level.patches[48]
    slots, own, borrowed = (
        layout.slot_point[order],
        layout.point_slot[order],
        layout.point_borrowed[order],
    )
    assert_same(
        lambda x: to_slots(x, slots, own, borrowed), lambda x: pad(x)[slots], normal(0, 512, 3)
    )
    assert_same(
        lambda y: from_slots(y, slots, own), lambda y: pad(y)[own], normal(0, len(slots), 3)
    )


def test_children_copy_their_cluster():
    fine, coarse = random_row(1, True)[:2]
    assert_same(
        lambda x: to_children(x, fine.parent, coarse.first_child),
        lambda x: pad(x)[fine.parent],
        normal(0, 400, 3),
    )


def test_maximum_over_clusters_sends_its_gradient_to_one_point():
    fine, coarse = random_row(1, True)[:2]
    used = (jnp.arange(400) < coarse.count)[:, None]

    def reference(x):
        return jnp.where(used, jax.ops.segment_max(x, fine.parent, 400), 0)

    assert_same(
        lambda x: cluster_max(x, fine.parent, coarse.first_child), reference, normal(0, 512, 3)
    )
    # equal values: the first point of the cluster
    grad = jax.grad(lambda x: cluster_max(x, fine.parent, coarse.first_child).sum())(
        jnp.ones((512, 1))
    )
    first = np.asarray(coarse.first_child)[: int(coarse.count)]
    np.testing.assert_array_equal(np.flatnonzero(grad), first)


def test_mean_over_clusters():
    fine, coarse = random_row(1, True)[:2]

    def reference(x):
        total = jax.ops.segment_sum(x, fine.parent, 400)
        return total / jnp.maximum(jnp.diff(coarse.first_child), 1)[:, None]

    x = normal(0, 512, 3)
    np.testing.assert_allclose(cluster_mean(x, coarse.first_child), reference(x), atol=1e-6)


def naive_attention(q, k, v, segment, bias=0.0):
    scores = jnp.einsum("phqd,phkd->phqk", q, k) * q.shape[-1] ** -0.5 + bias
    same = segment[:, None, :, None] == segment[:, None, None, :]
    return jnp.einsum("phqk,phkd->phqd", jax.nn.softmax(jnp.where(same, scores, -1e30), -1), v)


@pytest.mark.parametrize("clouds", [5, 250])
def test_attention_is_softmax_within_a_segment_of_a_patch(clouds):
    layout = random_row(0, False)[0].patches[48]
    patches, width = layout.segment.shape
    used = (jnp.arange(patches) < layout.used)[:, None, None, None]
    assert int(layout.used) < patches
    segment = jnp.where(layout.segment < 0, -1, layout.segment * (clouds // 5))

    def ours(q, k, v):
        return patch_attention(clouds, q, k, v, segment, layout.used)

    def reference(q, k, v):
        return jnp.where(used, naive_attention(q, k, v, segment), 0)

    shape = patches, 2, width, 8
    assert_same(ours, reference, normal(0, *shape), normal(1, *shape), normal(2, *shape))


def test_relative_bias_is_read_by_the_clipped_voxel_difference_of_each_axis():
    level = random_row(0, False)[0]
    layout = level.patches[48]
    patches, width = layout.segment.shape
    used = (jnp.arange(patches) < layout.used)[:, None, None, None]
    grid = take_rows(level.grid, layout.slot_point[1]).reshape(patches, width, 3)
    apart = grid[:, :, None] - grid[:, None]  # query minus key
    bound = 4
    assert (jnp.abs(apart) > bound).any()

    def ours(q, k, v, table):
        return patch_attention(5, q, k, v, layout.segment, layout.used, grid, table)

    def reference(q, k, v, table):
        index = jnp.clip(apart, -bound, bound) + bound
        bias = sum(table[axis][index[..., axis]] for axis in range(3)).transpose(0, 3, 1, 2)
        return jnp.where(used, naive_attention(q, k, v, layout.segment, bias), 0)

    shape = patches, 2, width, 8
    table = normal(3, 3, 2 * bound + 1, 2)
    assert_same(ours, reference, normal(0, *shape), normal(1, *shape), normal(2, *shape), table)


def test_rotated_scores_depend_on_relative_positions_alone():
    q, k, coord = normal(0, 2, 3, 16, 12), normal(1, 2, 3, 16, 12), normal(2, 2, 16, 3)

    def scores(coord):
        return jnp.einsum("phqd,phkd->phqk", rotate(q, coord, 10.0), rotate(k, coord, 10.0))

    moved = coord + jnp.array([3.0, -2.0, 0.5])[None, None]
    np.testing.assert_allclose(scores(moved), scores(coord), atol=1e-4)
    assert np.abs(scores(2 * coord) - scores(coord)).max() > 0.1
    lengths = [np.linalg.norm(x, axis=-1) for x in (rotate(q, coord, 10.0), q)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    with pytest.raises(ValueError, match="multiple of 6, got 8"):
        rotate(normal(0, 1, 1, 4, 8), coord[:1, :4], 10.0)
