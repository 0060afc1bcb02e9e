"""The training step: exactly repeatable, unharmed by bad batches. Layouts: `test_layouts.py`."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import Step, schedule, small_batch, small_config

from point_jax.objectives.settings import make_sonata
from point_jax.training.mesh import put_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


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


def test_means_are_over_the_scenes_that_are_there(step):
    """The same scene four times, alone or beside empty ones: no mean notices them."""
    batch = small_batch()
    batch["cut"][:] = 0.5
    _, whole = step(batch)
    batch["count"][4:] = 0
    batch["cut"][4:] = 0
    _, half = step(batch)
    assert (whole["empty_scenes"], half["empty_scenes"]) == (0, 4)
    assert whole["cut"] == half["cut"] == 0.5
    for name in ("padding", "masked", "matched"):
        np.testing.assert_allclose(half[name], whole[name], rtol=0.1, err_msg=name)


def test_a_step_without_any_scene_is_a_bad_one(step):
    batch = small_batch()
    batch["count"][:] = 0
    state, metrics = step(batch)
    assert metrics["bad_steps"] == metrics["bad_steps_in_a_row"] == 1
    assert (metrics["empty_scenes"], metrics["points"], metrics["matched"]) == (8, 0, 0)
    assert np.isnan(metrics["loss"]) and metrics["grad_norm"] == metrics["update_norm"] == 0
    start = jax.tree.map(np.asarray, step.make())
    for part in ("student", "teacher", "mu", "nu"):  # not even weight decay
        jax.tree.map(np.testing.assert_array_equal, state[part], start[part])


def test_another_seed_is_another_argument_of_the_same_program(step):
    batch = put_batch(step.mesh, small_batch(), 8)
    keys = [jax.device_put(jax.random.key(seed), step.key.sharding) for seed in (0, 1)]
    losses = [step.step(step.make(), batch, schedule(), key)[1]["loss"] for key in keys]
    assert losses[0] != losses[1]
    assert step.step._cache_size() == 1


def test_a_step_in_bfloat16_is_finite():
    config = small_config()
    config.network.dtype, config.network.rotary_base = "bfloat16", 0.0
    made = Step(config, one_device())
    arguments = made.make(), put_batch(made.mesh, small_batch(1), 1), schedule(), made.key
    fast = made.step.lower(*arguments).compile({"xla_backend_optimization_level": 0})
    state, metrics = fast(*arguments)
    assert metrics["bad_steps"] == 0 and np.isfinite(metrics["loss"])
    for leaf in jax.tree.leaves({name: state[name] for name in ("student", "mu", "nu")}):
        assert leaf.dtype == np.float32 and np.isfinite(leaf).all()


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


@pytest.mark.parametrize("views", [(2, 4), (1, 6)])
@pytest.mark.parametrize("share", [0.8, 1.0])
def test_the_three_rows_of_a_scene_have_one_shape(share, views):
    """Whichever side has more slots, and where capacities cut either."""
    config = small_config()
    config.objective.shares = (share, 0.5)
    config.views.global_count, config.views.local_count = views
    config.objective.weights = (0.25, 0.0, 0.5)
    scene = {name: value[0] for name, value in small_batch(1).items()}
    maker = make_sonata(config).rows
    row, _ = jax.eval_shape(maker.make, scene, jax.random.key(0), schedule())
    slots = max(views[0] * 128, views[1] * 52)
    assert row.teacher.mask.shape == (-(-int(slots * share) // 8) * 8,)
    assert row.students.mask.shape == (2, *row.teacher.mask.shape)
