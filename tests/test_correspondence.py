"""Places in images against their definitions, in plain numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point_jax.ops.correspondence import (
    BLOCK,
    patch_means,
    patch_of,
    patch_sums,
    pool_places,
    shifted_cosine,
    sightings,
    sum_by_blocks,
)

HEIGHT, WIDTH, IMAGES, POINTS = 3, 4, 2, 40


def places_of(seed, points=POINTS):
    draw = np.random.default_rng(seed)
    places = draw.uniform(0, [HEIGHT, WIDTH], (points, IMAGES, 2)).astype(np.float32)
    places[draw.random((points, IMAGES)) < 0.4] = -1
    return places


def test_a_cluster_lies_where_its_seen_points_lie_on_average():
    places, first = places_of(0), np.array([0, 3, 3, 10, 11, 11])  # the last slots are padding
    found = np.asarray(pool_places(jnp.asarray(places), jnp.asarray(first)))
    for cluster, (start, end) in enumerate(itertools.pairwise(first)):
        for image in range(IMAGES):
            seen = [p for p in places[start:end, image] if p[0] >= 0]
            want = np.mean(seen, axis=0) if seen else [-1, -1]
            np.testing.assert_allclose(found[cluster, image], want, rtol=1e-6)


def test_a_patch_is_the_whole_part_of_a_place():
    places = np.array([[[0.0, 0.99]], [[2.999, 3.999]], [[1.5, 2.0]], [[-1, -1]], [[3.0, 1.0]],
                       [[1.0, 4.0]], [[-1, 2.0]]], np.float32)  # fmt: skip
    found = np.asarray(patch_of(jnp.asarray(places), HEIGHT, WIDTH))[:, 0]
    np.testing.assert_array_equal(found, [0, 11, 6, 12, 12, 12, 12])


def test_a_patch_has_the_mean_of_the_points_that_it_sees_and_gives_them_its_gradient():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(POINTS, 5)).astype(np.float32)
    patches = HEIGHT * WIDTH
    patch = np.asarray(patch_of(jnp.asarray(places_of(2)), HEIGHT, WIDTH))
    seen = sightings(jnp.asarray(patch), patches)
    means, count = patch_means(jnp.asarray(x), seen)
    assert means.shape == (IMAGES, patches, 5) and count.sum() == (patch < patches).sum()
    for image in range(IMAGES):
        for place in range(patches):
            mine = x[patch[:, image] == place]
            assert count[image, place] == len(mine)
            want = mine.mean(0) if len(mine) else np.zeros(5)
            np.testing.assert_allclose(means[image, place], want, atol=1e-6)
    slope = draw.normal(size=means.shape).astype(np.float32)
    grad = jax.grad(lambda x: (patch_means(x, seen)[0] * slope).sum())(x)
    want = np.zeros_like(x)
    for point, image in zip(*np.nonzero(patch < patches), strict=True):
        place = patch[point, image]
        want[point] += slope[image, place] / count[image, place]
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_a_gradient_of_many_points_is_gathered_block_by_block():
    """More points than a block has, and not a multiple of it."""
    draw = np.random.default_rng(5)
    patch = draw.integers(0, 50, (3 * BLOCK + 7, IMAGES)).astype(np.int32)  # 49: none
    seen = sightings(jnp.asarray(patch), 49)
    slope = draw.normal(size=(IMAGES, 49, 3)).astype(np.float32)
    x = jnp.zeros((len(patch), 3))
    grad = jax.grad(lambda x: (patch_sums(x, seen) * slope).sum())(x)
    padded = np.pad(slope, ((0, 0), (0, 1), (0, 0)))
    want = sum(padded[image, patch[:, image]] for image in range(IMAGES))
    np.testing.assert_allclose(grad, want, atol=1e-6)


BOUNDS = {
    "empty ones at both ends, one over four blocks": [0, 0, 1, 256, 256, 300, 1100, 1180, 1180],
    "starts and ends of blocks": [0, 255, 256, 257, 512, 768, 1024, 1024, 1200],
    "rows before the first": [100, 200, 600, 600, 601, 900, 901, 902, 1000],
    "all rows in one": [0, 0, 0, 0, 0, 0, 0, 1280, 1280],
    "nothing": [0] * 9,
    "nothing, at the end": [1280] * 9,
}


@pytest.mark.parametrize("rows", [1280, 1201])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_clusters_of_any_size_are_summed_by_blocks(bounds, rows):
    first, draw = np.minimum(bounds, rows), np.random.default_rng(4)
    x, order = draw.normal(size=(1300, 4)).astype(np.float32), draw.permutation(1300)[:rows]
    x[np.setdiff1d(np.arange(1300), order[first[0] : first[-1]])] = np.nan
    found = sum_blocks(jnp.asarray(x), jnp.asarray(order), jnp.asarray(first))
    mine = [x[order[start:end]].astype(np.float64) for start, end in itertools.pairwise(first)]
    np.testing.assert_allclose(found, [values.sum(0) for values in mine], atol=2e-5)


def test_blocks_of_many_small_clusters_are_summed():
    """Hundreds of clusters a block, so that windows move far and overlap."""
    draw = np.random.default_rng(6)
    first = np.concatenate([[0], np.sort(draw.integers(0, 1201, 900)), [1201]])
    x, order = draw.normal(size=(1201, 3)).astype(np.float32), draw.permutation(1201)
    found = sum_blocks(jnp.asarray(x), jnp.asarray(order), jnp.asarray(first))
    mine = [x[order[start:end]].astype(np.float64) for start, end in itertools.pairwise(first)]
    np.testing.assert_allclose(found, [values.sum(0) for values in mine], atol=2e-5)


def test_images_side_by_side_have_the_same_sums():
    """The form of GPUs."""
    draw, bounds = np.random.default_rng(7), list(BOUNDS.values())
    x = jnp.asarray(draw.normal(size=(1300, 4)), jnp.float32)
    order = jnp.asarray([draw.permutation(1300)[:1280] for _ in bounds])
    found = jax.vmap(sum_by_blocks, (None, 0, 0))(x, order, jnp.asarray(bounds))
    for sums, *image in zip(found, order, jnp.asarray(bounds), strict=True):
        np.testing.assert_allclose(sums, sum_blocks(x, *image), atol=1e-5)


sum_blocks = jax.jit(sum_by_blocks)


def test_points_that_no_image_sees_reach_nothing():
    patch = np.full((POINTS, IMAGES), HEIGHT * WIDTH)
    patch[0] = 3
    x = np.full((POINTS, 2), np.nan, np.float32)
    x[0] = 1
    means, count = patch_means(jnp.asarray(x), sightings(jnp.asarray(patch), HEIGHT * WIDTH))
    assert np.isfinite(means).all() and count.sum() == IMAGES


def test_the_cosine_knows_no_offset_and_no_length():
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(2, 6, 9))
    want = [1 - np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)]
    found = shifted_cosine(jnp.float32(a) * 7 + 2, jnp.float32(b) * 0.1 - 5)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert shifted_cosine(jnp.float32(a), jnp.float32(a)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_constant_vectors_is_finite():
    flat, other = jnp.ones(4), jnp.arange(4.0)
    value, grad = jax.value_and_grad(shifted_cosine)(flat, other)
    assert value == 1 and np.isfinite(grad).all()
