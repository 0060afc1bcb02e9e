"""Every primitive against its definition, values and gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hierarchy import random_row

from point_jax.geometry.loops import blank
from point_jax.geometry.neighbours import TAPS
from point_jax.geometry.pairs import find_pairs
from point_jax.geometry.patches import build_patches
from point_jax.models.layers import gelu
from point_jax.ops import conv, pool
from point_jax.ops.attention import patch_attention
from point_jax.ops.conv import submanifold_conv
from point_jax.ops.conv_pairs import Kernel
from point_jax.ops.gather import from_slots, take_rows, to_children, to_slots
from point_jax.ops.pool import cluster_max, cluster_mean
from point_jax.ops.rotary import rotate
from point_jax.ops.rowwise import by_rows, update_rows


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


@pytest.mark.parametrize("form", ["pair by pair", "side by side", "tap after tap"])
@pytest.mark.parametrize("duplicates", [False, True])
def test_convolution_reads_the_representatives_around_and_itself(duplicates, form, monkeypatch):
    axes = "tsc" if form == "tap after tap" else "stc"
    monkeypatch.setattr(conv, "_CPU", conv.Blocks(100 * 27 * 6 * 4, axes))  # several blocks
    level = random_row(3, duplicates)[0]
    pairs = level.pairs if form == "pair by pair" else None

    def reference(x, weight):
        out = jnp.einsum("tnc,tcf->nf", pad(x)[level.neighbours], weight)
        return out

    def ours(x, weight):
        return submanifold_conv(x, weight, level.neighbours, level.voxel, level.count, pairs)

    assert_same(ours, reference, normal(0, 512, 6), normal(1, 27, 6, 5))


def test_a_kernel_read_from_its_stack_is_the_same():
    level = random_row(3, True)[0]
    table = level.neighbours, level.voxel, level.count, level.pairs
    stack = normal(1, 3, 27, 6, 5)

    def plain(x, stack):
        return submanifold_conv(x, stack[1], *table)

    def stacked(x, stack):
        kernel = Kernel(jax.lax.stop_gradient(stack), jnp.int32(1))
        return submanifold_conv(x, stack[1], *table, kernel)

    assert_same(stacked, plain, normal(0, 512, 6), stack)
    # features in half precision, a kernel that is not
    half = normal(0, 512, 6).astype(jnp.bfloat16)
    slopes = jax.grad(lambda x, stack: stacked(x, stack).astype(jnp.float32).sum(), (0, 1))
    assert [x.dtype for x in jax.eval_shape(slopes, half, stack)] == [jnp.bfloat16, jnp.float32]


def test_what_is_not_a_number_reaches_its_neighbours_alone():
    """Loops start from zeros that hang on the first number of what they read."""
    level = random_row(3, False)[0]
    x = normal(0, 512, 6).at[0].set(jnp.nan)
    out = submanifold_conv(
        x, normal(1, 27, 6, 5), level.neighbours, level.voxel, level.count, level.pairs
    )
    reads = (np.asarray(level.neighbours) == 0).any(0)
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).all(1), reads)
    assert 1 <= reads.sum() < 28
    assert blank((2, 3), jnp.float32, jnp.zeros((0, 4))).shape == (2, 3)


def test_convolution_of_a_single_voxel_is_the_centre_tap():
    neighbours = jnp.full((27, 1), 1, jnp.int32).at[TAPS // 2].set(0)
    x, weight = normal(0, 1, 4), normal(1, 27, 4, 3)
    out = submanifold_conv(x, weight, neighbours, jnp.zeros(1, jnp.int32), jnp.int32(1))
    np.testing.assert_allclose(out, x @ weight[TAPS // 2], rtol=1e-6)


def test_taps_without_pairs_have_no_gradient():
    level = random_row(3, False)[0]
    apart = (jnp.arange(27) % 3 == 1)[:, None]  # a flat cloud: a third of the taps
    neighbours = jnp.where(apart, level.neighbours, 512)
    pairs = find_pairs(neighbours)
    assert (np.asarray(pairs.counts) == 0).sum() == 18

    def ours(x, weight):
        return submanifold_conv(x, weight, neighbours, level.voxel, level.count, pairs)

    def reference(x, weight):
        return jnp.einsum("tnc,tcf->nf", pad(x)[neighbours], weight)

    assert_same(ours, reference, normal(0, 512, 6), normal(1, 27, 6, 5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_the_originals_and_rounded_once(dtype):
    x = jnp.linspace(-8, 8, 4001).astype(dtype)
    exact = np.asarray(x, np.float64)
    exact = exact / 2 * np.array([1 + math.erf(value / 2**0.5) for value in exact])
    error = np.abs(np.asarray(gelu(x), np.float64) - exact)
    # in bfloat16 at most half a step of its 8 bits
    bound = 1e-6 if dtype == jnp.float32 else 2.0**-9 * 2 ** np.ceil(np.log2(np.abs(exact) + 1e-9))
    assert np.all(error <= bound + 1e-6)


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


@pytest.fixture(params=[0, 8])
def unrolled(monkeypatch, request):
    """Points of a cluster that are no loop, on CPUs and on GPUs."""
    monkeypatch.setattr(pool, "_over_children", partial(pool.fold_children, unrolled=request.param))


@pytest.mark.usefixtures("unrolled")
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


@pytest.mark.usefixtures("unrolled")
def test_mean_over_clusters():
    fine, coarse = random_row(1, True)[:2]

    def reference(x):
        total = jax.ops.segment_sum(x, fine.parent, 400)
        return total / jnp.maximum(jnp.diff(coarse.first_child), 1)[:, None]

    x = normal(0, 512, 3)
    np.testing.assert_allclose(cluster_mean(x, coarse.first_child), reference(x), atol=1e-6)


def naive_attention(qkv, segment, width, bias=0.0):
    q, k, v = jnp.moveaxis(qkv.reshape(-1, width, *qkv.shape[1:]), 2, 0)
    segment = segment.reshape(-1, width)
    scores = jnp.einsum("pqhd,pkhd->phqk", q, k) * q.shape[-1] ** -0.5 + bias
    same = segment[:, None, :, None] == segment[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(same, scores, -1e30), -1)
    return jnp.einsum("phqk,pkhd->pqhd", weights, v).reshape(-1, *v.shape[2:])


def in_use(layout):
    return (jnp.arange(len(layout.segment)) < layout.used_slots)[:, None, None]


@pytest.mark.parametrize("clouds", [5, 250])
def test_attention_is_softmax_within_a_segment_of_a_patch(clouds):
    layout = random_row(0, False)[0].patches[48]
    assert int(layout.used_slots) < len(layout.segment) and layout.narrow is None
    segment = jnp.where(layout.segment < 0, -1, layout.segment * (clouds // 5))

    def ours(qkv):
        return patch_attention(clouds, 48, qkv, segment, None, layout.used)

    def reference(qkv):
        return jnp.where(in_use(layout), naive_attention(qkv, segment, 48), 0)

    assert_same(ours, reference, normal(0, len(segment), 3, 2, 8))


@pytest.mark.parametrize("longest", [12, 13])
def test_a_row_of_short_clouds_has_narrow_patches(longest):
    sizes = np.array([longest, 3, 0, 5, 12, 9])
    cloud = np.full(64, len(sizes), np.int32)
    cloud[: sizes.sum()] = np.repeat(np.arange(len(sizes)), sizes)
    starts = jnp.asarray(np.append(0, np.cumsum(sizes)), jnp.int32)
    order = jnp.arange(64, dtype=jnp.int32)[None]
    layout = build_patches(order, order, jnp.asarray(cloud), starts, 48)
    assert bool(layout.narrow) == (longest == 12)
    width = 12 if longest == 12 else 48

    def ours(qkv):
        out = patch_attention(6, 48, qkv, layout.segment, layout.narrow, layout.used)
        return jnp.where(layout.segment[:, None, None] >= 0, out, 0)

    def reference(qkv):
        # Whatever the patches: each cloud attends to itself alone.
        out = naive_attention(qkv, layout.segment, len(layout.segment))
        return jnp.where(layout.segment[:, None, None] >= 0, out, 0)

    for patch in np.asarray(layout.segment).reshape(-1, width)[int(layout.used) :]:
        assert (patch < 0).all()
    assert sorted(layout.slot_point[0, : int(layout.used_slots)]) == sorted(
        [*range(sizes.sum()), *[64] * (int(layout.used_slots) - sizes.sum())]
    )
    assert_same(ours, reference, normal(0, len(layout.segment), 3, 2, 8))


def test_relative_bias_is_read_by_the_clipped_voxel_difference_of_each_axis():
    level = random_row(0, False)[0]
    layout = level.patches[48]
    grid = take_rows(level.grid, layout.slot_point[1])
    at = grid.reshape(-1, 48, 3)
    apart = at[:, :, None] - at[:, None]  # query minus key
    bound = 4
    assert (jnp.abs(apart) > bound).any()

    def ours(qkv, table):
        return patch_attention(5, 48, qkv, layout.segment, None, layout.used, grid, table)

    def reference(qkv, table):
        index = jnp.clip(apart, -bound, bound) + bound
        bias = sum(table[axis][index[..., axis]] for axis in range(3)).transpose(0, 3, 1, 2)
        return jnp.where(in_use(layout), naive_attention(qkv, layout.segment, 48, bias), 0)

    table = normal(3, 3, 2 * bound + 1, 2)
    assert_same(ours, reference, normal(0, len(layout.segment), 3, 2, 8), table)


def test_rotated_scores_depend_on_relative_positions_alone():
    qk, coord = normal(0, 16, 2, 3, 12), normal(2, 16, 3)

    def scores(coord):
        q, k = jnp.moveaxis(rotate(qk, coord, 10.0), 1, 0)
        return jnp.einsum("qhd,khd->hqk", q, k)

    moved = coord + jnp.array([3.0, -2.0, 0.5])[None]
    np.testing.assert_allclose(scores(moved), scores(coord), atol=1e-4)
    assert np.abs(scores(2 * coord) - scores(coord)).max() > 0.1
    lengths = [np.linalg.norm(x, axis=-1) for x in (rotate(qk, coord, 10.0), qk)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    with pytest.raises(ValueError, match="multiple of 6, got 8"):
        rotate(normal(0, 4, 1, 1, 8), coord[:4], 10.0)


@pytest.mark.parametrize("count", [512, 130, 1])
def test_rows_in_use_are_as_if_all_were_done_at_once(count):
    params = normal(1, 6, 20), normal(2, 20, 5)

    def mlp(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def used(y):
        return jnp.where((jnp.arange(512) < count)[:, None], y, 0)

    assert_same(
        lambda a, b, x: used(by_rows(mlp, (a, b), x, jnp.int32(count))),
        lambda a, b, x: used(mlp((a, b), x)),
        *params,
        normal(3, 512, 6),
    )


def test_rows_that_are_not_in_use_reach_no_gradient():
    weight, x = normal(1, 6, 5), normal(0, 500, 6).at[200:].set(jnp.nan)

    def total(weight, x):
        y = by_rows(lambda weight, x: x @ weight, weight, x, jnp.int32(200))
        return jnp.where((jnp.arange(500) < 200)[:, None], y, 0).sum()

    of_weight, of_x = jax.grad(total, (0, 1))(weight, x)
    np.testing.assert_allclose(of_weight, jnp.tile(x[:200].sum(0)[:, None], (1, 5)), rtol=1e-4)
    assert not of_x[200:].any()


@pytest.mark.parametrize("at_once", [False, True])  # CPUs, accelerators
@pytest.mark.parametrize(("slots", "count"), [(500, 500), (500, 400), (500, 130), (40, 1)])
def test_rows_in_use_are_updated_as_if_they_were_alone(slots, count, at_once, monkeypatch):
    """The last block of 500 rows begins inside the one before; rows not in use hold NaN."""
    if at_once:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *, default, cpu: default())
    weight, slope = normal(1, 5, 6), normal(2, count, 6)
    arrays = normal(3, slots, 6), normal(4, slots, 5), normal(5, slots)
    x, y, fixed = (array.at[count:].set(jnp.nan) for array in arrays)

    def layer(weight, x, more, fixed):
        return jnp.tanh(x + (more[0] @ weight) * fixed[:, None]) * x

    def updated(weight, x, y):
        out = update_rows(layer, weight, x, (y,), fixed, jnp.int32(count))[:count]
        return (out * slope).sum(), out

    def alone(weight, x, y):
        out = layer(weight, x[:count], (y[:count],), fixed[:count])
        return (out * slope).sum(), out

    (grads, out), (wanted, of_all) = (
        jax.grad(function, (0, 1, 2), has_aux=True)(weight, x, y) for function in (updated, alone)
    )
    np.testing.assert_allclose(out, of_all, rtol=1e-4, atol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):  # zeros in the rows that are not in use
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)
