"""The optimizer against PyTorch's rules: the golden path, and definitions written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_files import shared

from point_jax.objectives.teacher import move_teacher
from point_jax.training import optimizer
from point_jax.training.config import default_config
from point_jax.training.schedules import sonata_schedule

DEPTHS = (3, 3, 3, 12, 3)


def base_params(depths=DEPTHS):
    """The shape of a student: stacked blocks, and some of everything else."""
    enc = {f"stage{s}": {"blocks": {"w": jnp.ones((d, 4, 2))}} for s, d in enumerate(depths)}
    enc["stage1"]["down"] = {"w": jnp.ones((4, 2))}
    return {"backbone": {"embedding": {"b": jnp.ones(3)}, "enc": enc}, "head": {"b": jnp.ones(5)}}


def test_all_blocks_share_a_factor_and_nothing_else_does():
    params = base_params((2, 1))
    params["backbone"]["dec"] = {"stage0": {"blocks": {"w": jnp.ones((2, 4))}, "up": jnp.ones(3)}}
    params["lora"] = {"stage0": {"a": jnp.ones((2, 4, 8))}}
    scales = optimizer.layer_scales(params, 0.5, blocks=0.1)
    backbone = scales["backbone"]
    np.testing.assert_allclose(backbone["enc"]["stage0"]["blocks"]["w"].ravel(), [0.025, 0.05])
    np.testing.assert_allclose(backbone["enc"]["stage1"]["blocks"]["w"].ravel(), [0.1])
    np.testing.assert_allclose(backbone["dec"]["stage0"]["blocks"]["w"], 0.1)
    np.testing.assert_allclose(scales["lora"]["stage0"]["a"], 0.1)
    others = backbone["dec"]["stage0"]["up"], backbone["enc"]["stage1"]["down"], scales["head"]
    assert all((leaf == 1).all() for leaf in jax.tree.leaves((others, backbone["embedding"])))


def test_layer_wise_rates_equal_golden():
    golden = np.load(shared("golden/j_schedules.npz"))["lr"]
    scales = optimizer.layer_scales(base_params(), 0.9)
    blocks = [scales["backbone"]["enc"][f"stage{s}"]["blocks"]["w"].ravel() for s in range(5)]
    schedule = sonata_schedule(default_config(), 1000)
    rates = np.array([schedule(step)["lr"] for step in range(1000)])
    np.testing.assert_allclose(rates[:, None] * np.concatenate(blocks), golden[:, 1:], rtol=1e-6)


def test_everything_but_the_blocks_has_the_full_rate():
    scales = optimizer.layer_scales(base_params(), 0.9)
    for leaf in (
        scales["backbone"]["embedding"]["b"],
        scales["backbone"]["enc"]["stage1"]["down"]["w"],
        scales["head"]["b"],
    ):
        assert leaf == 1.0
    shapes = jax.eval_shape(base_params)
    same = jax.tree.map(
        lambda s, p: np.broadcast_shapes(s.shape, p.shape) == p.shape, scales, shapes
    )
    assert all(jax.tree.leaves(same))


def test_adamw_follows_the_golden_path_in_float64():
    golden = np.load(shared("golden/j_schedules.npz"))
    with jax.enable_x64(True):
        path = run_golden(golden, jnp.float64)
    np.testing.assert_allclose(path, golden["adamw_traj"], rtol=1e-6)


def test_adamw_in_float32_stays_close_to_the_golden_path():
    """Its first update is exact to float32 rounding: no bias correction of `1 - 0.999`."""
    golden = np.load(shared("golden/j_schedules.npz"))
    path = run_golden(golden, jnp.float32)
    np.testing.assert_allclose(path, golden["adamw_traj"], rtol=2e-5, atol=2e-6)
    first, exact = path[0] - golden["adamw_w0"], golden["adamw_traj"][0] - golden["adamw_w0"]
    np.testing.assert_allclose(first, exact, atol=2e-7)


def run_golden(golden, dtype):
    """1,000 updates of w on 0.5 |w - target|^2 + sum(sin 3w), scheduled as in the base recipe."""
    schedule = sonata_schedule(default_config(), 1000)
    rows = [schedule(step) for step in range(1000)]
    table = {name: jnp.array([row[name] for row in rows], dtype) for name in ("lr", "beta1", "wd")}
    target = jnp.asarray(golden["adamw_target"], dtype)
    scales = {"w": np.ones(1, np.float32)}

    def step(carry, row):
        params, mu, nu, count = carry
        grads = {"w": params["w"] - target + 3 * jnp.cos(3 * params["w"])}
        params, mu, nu, _ = optimizer.adamw(
            params, grads, mu, nu, count=count, scales=scales, **row
        )
        return (params, mu, nu, count + 1), params["w"]

    params = {"w": jnp.asarray(golden["adamw_w0"], dtype)}
    zeros = {"w": jnp.zeros(7, dtype)}
    return np.asarray(jax.lax.scan(step, (params, zeros, zeros, jnp.int32(1)), table)[1])


def test_adamw_is_its_definition_for_each_leaf():
    rng = np.random.default_rng(0)
    shapes = base_params((2, 1))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    grads, mu, nu = (jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(3))
    nu = jax.tree.map(np.square, nu)
    lr, beta1, wd, count = 0.01, 0.9, 0.1, 7
    scales = optimizer.layer_scales(shapes, 0.5)
    with jax.enable_x64(True):
        rule = functools.partial(optimizer.adamw, scales=scales, eps=1e-3)
        new = jax.jit(rule)(params, grads, mu, nu, count=count, lr=lr, beta1=beta1, wd=wd)

    def check(p, g, m, v, scale, new_p, new_m, new_v):
        m, v = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g * g
        root = np.sqrt(v / (1 - 0.999**count)) + 1e-3
        p = p * (1 - lr * scale * wd) - lr * scale * m / (1 - beta1**count) / root
        for ours, theirs in ((new_p, p), (new_m, m), (new_v, v)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)

    jax.tree.map(check, params, grads, mu, nu, scales, *new[:3])
    steps = jax.tree.map(
        lambda m, v, scale: (
            (lr * scale * m / (1 - beta1**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-3)) ** 2
        ).sum(),
        *new[1:3],
        scales,
    )
    np.testing.assert_allclose(new[3], np.sqrt(sum(jax.tree.leaves(steps))), rtol=1e-6)


def test_a_bad_step_changes_nothing():
    params = {"a": jnp.ones((3, 4)), "b": jnp.zeros(5)}
    grads = jax.tree.map(lambda p: p.at[0].set(jnp.nan), params)
    rule = functools.partial(optimizer.adamw, scales={"a": np.ones((1, 1)), "b": np.ones(1)})
    hyper = dict(count=3, lr=0.1, beta1=0.9, wd=0.1, good=False)
    new = jax.jit(rule)(params, grads, params, params, **hyper)[:3]
    jax.tree.map(np.testing.assert_array_equal, new, (params,) * 3)


@pytest.mark.parametrize("size", [0.0, 1e-3, 2.999, 3.0, 50.0, 1e6])
def test_clipping_is_pytorchs(size):
    direction = np.array([3.0, -4.0, 12.0], np.float32) / 13
    grads = {"a": jnp.asarray(size * direction[:2]), "b": {"c": jnp.asarray(size * direction[2:])}}
    sums = jax.tree.map(lambda grad: 5.0 * grad, grads)
    mean = jax.jit(optimizer.clip_by_global_norm)(sums, 3.0, count=5.0)
    clipped, norm = jax.jit(optimizer.clip_by_global_norm)(grads, 3.0)
    np.testing.assert_allclose(mean[1], norm, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), mean[0], clipped)
    assert norm == pytest.approx(size, rel=1e-6)
    factor = min(1.0, 3.0 / (size + 1e-6))
    ours = np.concatenate([clipped["a"], clipped["b"]["c"]])
    np.testing.assert_allclose(ours, factor * size * direction, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_norm_shows_any_gradient_that_is_not_finite(value):
    grads = {"a": jnp.ones((4, 4)), "b": jnp.zeros(9).at[5].set(value)}
    assert not np.isfinite(optimizer.clip_by_global_norm(grads, 3.0)[1])


def test_the_teacher_follows_the_student():
    teacher, student = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([2.0, 2.0])}
    np.testing.assert_allclose(move_teacher(teacher, student, 0.75)["w"], [1.25, 2.0])
    for momentum, same in ((1.0, teacher), (0.0, student)):
        moved = move_teacher(teacher, student, momentum)
        np.testing.assert_array_equal(moved["w"], same["w"])
