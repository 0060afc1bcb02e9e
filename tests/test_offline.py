"""A teacher that stays as it is: its targets, what a run keeps and leaves, and who may teach."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import Step, get_config, schedule, small_batch, small_config

import point_jax
from configs import concerto
from launch import command, train
from launch.objectives import make_objective
from point_jax.interop.offline import offline_teacher
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, save_weights
from point_jax.interop.workdir import read_workdir
from point_jax.objectives.settings import make_sonata
from point_jax.objectives.sonata import OFFLINE
from point_jax.objectives.sonata_spec import OfflineTeacher
from point_jax.training.checkpoint import CheckpointError, load_weights, saved_shapes
from point_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[1]


def wider(**changes):
    """A teacher's config: another width, depth and patch size, other heads."""
    config = small_config()
    config.network.channels, config.network.heads = (12, 24), (2, 4)
    config.network.depths, config.network.patch_size = (1, 2), 16
    config.objective.hidden, config.objective.embed = 24, 12
    config.update_from_flattened_dict(changes)
    return config


def pretraining(config, seed=7):
    """Random weights of both networks of a config, and different ones."""
    objective = make_sonata(config)
    keys = jax.random.split(jax.random.key(seed))
    trees = (jax.jit(lambda key: objective.init(key)[0])(key) for key in keys)
    params = dict(zip(("student", "teacher"), jax.device_get(list(trees)), strict=True))
    return Weights("pretraining", *config_of(objective.spec.network), params)


@pytest.fixture(scope="module")
def online():
    return Step(small_config(), Mesh(np.array(jax.devices()[:1]), ("data",)))


@pytest.fixture(scope="module")
def offline(online):
    """The same, with a teacher of the student's size beside its average."""
    spec = online.objective.spec
    config = small_config()
    teacher = OfflineTeacher(spec.network, spec.hidden, spec.embed)
    return Step(config, online.mesh, make_sonata(config, teacher))


def with_teacher(step, params):
    """The step's start, with these weights for the teacher that stays."""
    state = step.make()
    return state | {"teacher": state["teacher"] | {OFFLINE: jax.tree.map(np.array, params)}}


def advance(step, state, **changes):
    placed = small_batch()
    new, metrics = step.step(state, placed, schedule(**changes), step.key)
    return jax.tree.map(np.asarray, new), {k: float(v) for k, v in metrics.items()}


def test_it_gives_the_targets_that_an_average_of_its_weights_would(online, offline):
    """And the run's own average follows the student as if it taught."""
    shared = jax.tree.map(np.asarray, online.make()["teacher"])
    want, expected = advance(online, online.make())
    state, metrics = advance(offline, with_teacher(offline, shared))
    assert metrics == pytest.approx(expected, rel=1e-5)
    for name in ("student", "mu", "teacher"):
        got = {key: part for key, part in state[name].items() if key != OFFLINE}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want[name]
        )
    jax.tree.map(np.testing.assert_array_equal, state["teacher"][OFFLINE], shared)


def test_the_student_learns_from_it_and_not_from_the_average(offline):
    """Another teacher gives another loss; another average gives the same."""
    start = jax.tree.map(np.asarray, offline.make())["teacher"]
    first, others = start[OFFLINE], jax.tree.map(np.negative, start[OFFLINE])
    _, one = advance(offline, with_teacher(offline, first))
    _, other = advance(offline, with_teacher(offline, others))
    assert abs(one["loss"] - other["loss"]) > 1e-3
    state = with_teacher(offline, first)
    halved = {k: v if k == OFFLINE else jax.tree.map(lambda x: x / 2, v) for k, v in start.items()}
    _, same = advance(offline, state | {"teacher": halved | {OFFLINE: first}})
    assert same["loss"] == one["loss"]


def test_of_a_checkpoint_the_average_teaches():
    weights = pretraining(wider())
    teacher, params = offline_teacher(weights, prototypes=16, up_cast=1)
    assert [stage.channels for stage in teacher.network.encoder] == [12, 24]
    assert (teacher.hidden, teacher.embed) == (24, 12)
    jax.tree.map(np.testing.assert_array_equal, params, weights.params["teacher"])


def test_concerto_has_both_what_its_images_need_and_the_teacher(tmp_path):
    save_weights(tmp_path / "w", pretraining(wider(**{"network.rotary_base": 0.0})))
    config = small_config(concerto)
    config.images.up_cast, config.teacher = 1, str(tmp_path / "w")
    config.network.rotary_base = 0.0
    objective, frozen = make_objective(config)
    assert set(frozen) == {OFFLINE}  # the image encoder is the untrained one
    student, teacher = jax.eval_shape(objective.init, jax.random.key(0))
    kept = jax.eval_shape(
        objective.follow, teacher, student, {}, schedule(), jax.ShapeDtypeStruct((), bool)
    )
    assert kept == teacher and {"image", OFFLINE} < set(teacher)


def run(workdir, *arguments):
    argv = ["train", "--config=tests/small.py", f"--workdir={workdir}", *arguments]
    return command.run(train.main, argv, None)


def test_a_run_learns_from_a_larger_one_goes_on_alike_and_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights = pretraining(wider())
    save_weights(tmp_path / "large", weights)
    flags = f"--config.teacher={tmp_path / 'large'}", "--config.data.held_out.scenes=0"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, *flags) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:2]))
    assert run(broken, *flags) == 0
    digests = [read_metrics(path)[-1]["params_digest"] for path in (whole, broken)]
    assert digests[0] == digests[1]
    # It has stayed as it was, and what is read of the run are the student and its average.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        saved_shapes(whole)["teacher"],
    )
    saved = load_weights(whole, {"teacher": template})["teacher"][OFFLINE]
    jax.tree.map(np.testing.assert_array_equal, saved, weights.params["teacher"])
    assert set(read_workdir(whole).params["teacher"]) == {"backbone", "mask_head", "unmask_head"}
    spec = make_sonata(get_config()).spec.network
    assert point_jax.load(whole).spec == spec
    # Without it the run would be another one; a new run may start from this one without it.
    assert run(whole, flags[1]) == 1
    assert run(tmp_path / "next", flags[1], f"--config.init_from={whole}") == 0


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (wider(), {"objective.prototypes": 8}, "has 16 prototypes: give config.objective.prot"),
        (wider(), {"objective.up_cast": 0}, "heads for 36 channels.*give config.objective.up_cast"),
        (
            wider(**{"network.depths": (1, 1, 1), "network.channels": (12, 12, 24),
                     "network.heads": (2, 2, 4), "objective.shares": (1.0, 0.5, 0.2)}),
            {},
            "the offline teacher has 3 levels, the encoder 2",
        ),
        (None, {}, "holds one encoder, expected a pretraining"),
        ("missing", {}, "no such folder"),
    ],
)  # fmt: skip
def test_who_cannot_teach_is_told_why(tmp_path, weights, changes, message):
    folder = tmp_path / "w"
    if weights is None:
        whole = pretraining(wider())
        backbone = {"backbone": whole.params["teacher"]["backbone"]}
        save_weights(folder, dataclasses.replace(whole, kind="encoder", params=backbone))
    elif weights != "missing":
        save_weights(folder, pretraining(weights))
    config = small_config()
    config.teacher = str(folder)
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, CheckpointError), match=message):
        make_objective(config)
