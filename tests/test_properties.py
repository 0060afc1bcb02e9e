"""What the originals lack: features that depend on nothing but the cloud."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point_jax.geometry.hierarchy import build_hierarchy, sort_row
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec, Rotary, StageSpec
from point_jax.ops.gather import take_rows

STAGES = tuple(StageSpec(1, *numbers, 48) for numbers in ((6, 1), (12, 2), (18, 3)))
SPEC = PTv3Spec(
    STAGES,
    (StageSpec(1, 6, 1, 48), StageSpec(1, 12, 2, 32)),
    inputs=4,
    drop_path=0.5,
    relative_bias=True,
    rotary=Rotary(shift=0.5, jitter=1.5, rescale=1.5),
)
INIT, APPLY = functional(lambda rngs: PTv3(SPEC, rngs=rngs))
KEYS = jax.random.split(jax.random.key(7), 8)


@pytest.fixture(scope="module")
def params():
    """Random parameters, biases and norms included."""
    start = INIT(jax.random.key(0))
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in pairs])


def make_cloud(seed, points):
    """Distinct voxels of a wavy surface, in random order, with features."""
    rng = np.random.default_rng(seed)
    grid = np.unique(rng.integers(0, 40, (points, 3)) // [1, 1, 8], axis=0).astype(np.int32)
    return rng.permutation(grid), rng.normal(size=(len(grid), 4)).astype(np.float32)


CLOUDS = [make_cloud(seed, points) for seed, points in enumerate((150, 130, 20, 1))]


@jax.jit
def _run_small(*args):
    return _run((512, 400, 256), *args)


@jax.jit
def _run_large(*args):
    return _run((640, 448, 300), *args)


def _run(capacities, params, grid, cloud, valid, features, noise_keys):
    order, count, _ = sort_row(grid, cloud, valid, capacities[0])
    spec = SPEC.hierarchy(capacities, clouds=4)
    hierarchy = build_hierarchy(take_rows(grid, order), take_rows(cloud, order), count, spec)
    # The row's padding gets what the features' padding holds.
    x = features[jnp.where(jnp.arange(len(order)) < count, order, len(features) - 1)]
    coord = 0.1 * take_rows(grid, order)
    out = APPLY(params, x, hierarchy, mask=x[:, 0] > 1, coord=coord, noise_keys=noise_keys)
    at_points = []
    for level, features in enumerate(out.levels):
        for finer in reversed(hierarchy[:level]):
            features = take_rows(features, finer.parent)
        at_points.append(features)
    joined = jnp.concatenate([*at_points, out.decoded[0]], axis=1)
    return jnp.zeros((len(features), joined.shape[1])).at[order].set(joined, mode="drop"), hierarchy


def encode(params, chosen, *, run=_run_small, slots=512, padding=0.0, keys=None):
    """Features of every point of the chosen clouds (numbers of `CLOUDS` or clouds), in order."""
    clouds = [CLOUDS[c] if isinstance(c, int) else c for c in chosen]
    sizes = [len(grid) for grid, _ in clouds]
    total = sum(sizes)

    def fill(parts, value):
        joined = np.concatenate(parts)
        rest = np.full((slots - total, *joined.shape[1:]), value, joined.dtype)
        return jnp.asarray(np.concatenate([joined, rest]))

    out, hierarchy = run(
        params,
        fill([grid for grid, _ in clouds], 0),
        fill([np.full(n, i, np.int32) for i, n in enumerate(sizes)], 0),
        jnp.arange(slots) < total,
        fill([features for _, features in clouds], padding),
        None if keys is None else keys,
    )
    assert not any(int(level.overflow) for level in hierarchy)
    return np.split(np.asarray(out)[:total], np.cumsum(sizes)[:-1])


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("chosen", [(0, 1), (1, 0), (3, 2, 0, 1), (2, 3, 1, 0)])
def test_a_cloud_has_the_same_features_alone_and_in_any_batch(params, chosen):
    for c, features in zip(chosen, encode(params, chosen), strict=True):
        same(features, encode(params, (c,))[0])


def test_padding_does_not_matter(params):
    for c in range(4):
        (alone,) = encode(params, (c,))
        same(encode(params, (c,), run=_run_large, slots=600)[0], alone)


def test_nan_in_padding_reaches_nothing(params):
    clean = encode(params, (0, 2))
    for features, want in zip(encode(params, (0, 2), padding=np.nan), clean, strict=True):
        np.testing.assert_array_equal(features, want)


def test_nan_in_padding_reaches_no_gradient(params):
    grid, x = CLOUDS[2]
    pad = 512 - len(grid)

    def loss(params, features):
        cloud = jnp.zeros(512, jnp.int32)
        valid = jnp.arange(512) < len(grid)
        padded = jnp.asarray(np.pad(grid, ((0, pad), (0, 0))))
        out, _ = _run_small(params, padded, cloud, valid, features, None)
        return (out[: len(grid)] ** 2).sum()

    features = jnp.asarray(np.pad(x, ((0, pad), (0, 0)), constant_values=np.nan))
    grads, grad_x = jax.grad(loss, (0, 1))(params, features)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert bool((grad_x[len(grid) :] == 0).all())
    assert float(jnp.abs(grad_x[: len(grid)]).max()) > 0


def test_permuting_the_points_permutes_the_features(params):
    grid, x = CLOUDS[0]
    order = np.random.default_rng(3).permutation(len(grid))
    (permuted,) = encode(params, ((grid[order], x[order]),))
    same(permuted, encode(params, (0,))[0][order])


def test_drop_path_of_a_cloud_depends_on_its_key_alone(params):
    first = encode(params, (0, 1), keys=KEYS[:4])
    swapped = encode(params, (1, 0), keys=KEYS[jnp.array([1, 0, 2, 3])])
    same(swapped[1], first[0])
    same(swapped[0], first[1])
    assert np.abs(encode(params, (0, 1), keys=KEYS[4:])[0] - first[0]).max() > 1e-3


def test_drop_path_keeps_the_mean_of_a_branch():
    from point_jax.models.block import _keep

    grid = np.stack(np.meshgrid(*[np.arange(12)] * 3), -1).reshape(-1, 3).astype(np.int32)
    spec = SPEC.hierarchy((1728,) * 3, clouds=1)
    order, count, _ = sort_row(
        jnp.asarray(grid), jnp.zeros(1728, jnp.int32), jnp.ones(1728, bool), 1728
    )
    level = build_hierarchy(jnp.asarray(grid)[order], jnp.zeros(1728, jnp.int32), count, spec)[0]
    for rate in (0.1, 0.5):
        keep = np.stack(_keep(jnp.array([0.0, rate]), level, KEYS[:1]))
        assert (keep[:, 0] == 1).all()
        np.testing.assert_allclose(np.unique(keep[:, 1]), [0, 1 / (1 - rate)], rtol=1e-6)
        np.testing.assert_allclose((keep[:, 1] == 0).mean(1), rate, atol=4 * (rate / 1728) ** 0.5)
        assert 0.01 < abs(np.corrcoef(keep[0, 1], keep[1, 1])[0, 1]) + 0.01 < 0.12  # independent


def test_orders_are_shuffled_by_key_and_only_by_key(params):
    from point_jax.models.ptv3 import _turns

    np.testing.assert_array_equal(_turns(None, 3, 4), [[0, 1, 2, 3]] * 3)
    shuffled = np.stack([_turns(k, 5, 4) for k in KEYS])
    assert (np.sort(shuffled, -1) == np.arange(4)).all()
    assert len(np.unique(shuffled.reshape(-1, 4), axis=0)) > 12
    np.testing.assert_array_equal(_turns(KEYS[0], 5, 4), shuffled[0])


def test_layer_scale_and_rematerialisation():
    """A scale of 0 leaves only the convolutions; remat changes memory, not numbers."""
    grid, x = CLOUDS[2]

    def grads(**changes):
        spec = PTv3Spec(STAGES[:1], inputs=4, **changes)
        init, apply = functional(lambda rngs: PTv3(spec, rngs=rngs))
        grid_, cloud = jnp.asarray(grid), jnp.zeros(len(grid), jnp.int32)
        order, count, _ = sort_row(grid_, cloud, cloud == 0, 32)
        at = take_rows(grid_, order), take_rows(cloud, order)
        hierarchy = build_hierarchy(*at, count, spec.hierarchy((32,), clouds=1))
        features = take_rows(jnp.asarray(x), order)

        def loss(params):
            return (apply(params, features, hierarchy).levels[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(init(jax.random.key(0)))

    for remat in (True, ("all",)):
        jax.tree.map(same, grads(), grads(remat=remat))
    block = grads(layer_scale=0.0)["enc"]["stage0"]["blocks"]
    assert float(jnp.abs(block["qkv"]["kernel"]).max()) == 0
    assert float(jnp.abs(block["scale2"]).max()) > 0
