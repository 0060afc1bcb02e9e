"""The training step: the same on every layout, exactly repeatable, unharmed by bad batches."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import Step, small_batch, small_config


def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1e-3, np.abs(y).max()))


@pytest.mark.devices(8)
def test_one_device_and_eight_give_the_same_step():
    config, batch = small_config(), small_batch()
    eight = Mesh(np.array(jax.devices()), ("data",))
    assert eight.size == 8
    one_state, one = Step(config, one_device())(batch)
    state, metrics = Step(config, eight)(batch)
    assert one.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # Before Adam divides by them, gradients are equal to rounding; Adam turns rounding of a
    # gradient that is nearly 0 into a step of either sign, so the moments are compared.
    assert_close(state["mu"], one_state["mu"], 1e-4)
    assert_close(state["nu"], one_state["nu"], 1e-4)


@pytest.fixture(scope="module")
def step():
    return Step(small_config(), one_device())


def test_a_step_is_a_pure_function(step):
    batch = small_batch()
    (state, metrics), (again, metrics_again) = step(batch), step(batch)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert metrics == metrics_again
    assert metrics["overflow_row"] == metrics["overflow_grid"] == 0
    assert 0 < metrics["matched"] <= 1 and 0 < metrics["padding"] < 1
    assert state["step"] == 1 and metrics["empty_scenes"] == 0


def test_student_and_teacher_move(step):
    state, _ = step(small_batch())
    start = jax.tree.map(np.asarray, step.make())
    for name in ("student", "teacher"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state[name], start[name])
        assert all(m > 0 for m in jax.tree.leaves(moved)), moved
    jax.tree.map(
        lambda t, s, b: np.testing.assert_allclose(t, 0.9 * b + 0.1 * s, atol=1e-6),
        *(state["teacher"], state["student"], start["student"]),
    )


@pytest.mark.parametrize("name", ["teacher_temp", "mask_size"])
def test_a_step_that_is_not_finite_changes_only_the_counters(step, name):
    state, metrics = step(small_batch(), **{name: np.nan})
    start = jax.tree.map(np.asarray, step.make())
    if name == "mask_size":  # no mask: an ordinary step
        assert metrics["bad_steps"] == 0
        return
    for part in ("student", "teacher", "mu", "nu"):
        jax.tree.map(np.testing.assert_array_equal, state[part], start[part])
    assert state["step"] == 1
    assert metrics["bad_steps"] == metrics["bad_steps_in_a_row"] == 1


def test_an_empty_scene_takes_no_part(step):
    batch = small_batch()
    batch["count"][3:] = 0
    state, metrics = step(batch)
    assert metrics["empty_scenes"] == 5
    assert np.isfinite(metrics["loss"]) and metrics["bad_steps"] == 0
    for name in ("coord", "normal"):
        batch[name][3:] = np.nan
    again, _ = step(batch)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_a_single_point_and_a_single_voxel_do_no_harm(step):
    batch = small_batch()
    batch["count"][0] = 1
    batch["coord"][1] = 0.01
    _, metrics = step(batch)
    assert metrics["bad_steps"] == 0 and np.isfinite(metrics["loss"])


def test_overflow_of_a_row_is_reported(step):
    """Points so far apart that hardly two of them share a voxel of the next level."""
    _, metrics = step(small_batch(size=60.0))
    assert metrics["overflow_row"] > 50 and metrics["bad_steps"] == 0
