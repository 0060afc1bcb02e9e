"""A teacher that stays as it is: its targets, what a run keeps and leaves, and who may teach."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import test_concerto
from small import Step, get_config, schedule, small_batch, small_config

import point_jax
from launch import command, train
from launch.objectives import make_objective
from point_jax.interop.initial import initial_weights
from point_jax.interop.offline import offline_teacher
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, save_weights
from point_jax.interop.workdir import data_sources, label_sources, read_workdir
from point_jax.objectives.settings import make_sonata
from point_jax.objectives.sonata import OFFLINE
from point_jax.objectives.sonata_spec import OfflineTeacher
from point_jax.training.checkpoint import CheckpointError, Checkpoints, load_weights, saved_shapes
from point_jax.training.mesh import arrange, put_batch
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


@pytest.mark.devices(2)
def test_it_gives_the_targets_that_an_average_of_its_weights_would():
    """Also where two devices share a copy of it. The run's own average takes no part."""
    config, shared = small_config(), small_config()
    online = Step(config, arrange(jax.devices()[:1]))
    shared.mesh.fsdp, shared.mesh.smallest = 2, 0
    spec = online.objective.spec
    teacher = OfflineTeacher(spec.network, spec.hidden, spec.embed)
    objective = make_sonata(shared, teacher)
    offline = Step(shared, arrange(jax.devices()[:2], 2), objective)
    average = jax.tree.map(np.asarray, online.make()["teacher"])
    half = jax.tree.map(lambda x: x / 2, average)

    def advance(given, own):
        """From the start with these weights for the teacher that stays, and for the average."""
        state = offline.make()
        parts = own | {OFFLINE: given}
        placed = jax.tree.map(
            lambda leaf, x: jax.device_put(x, leaf.sharding), state["teacher"], parts
        )
        batch = put_batch(offline.mesh, small_batch(), 8)
        state, metrics = offline.step(state | {"teacher": placed}, batch, schedule(), offline.key)
        metrics = {name: float(value) for name, value in metrics.items()}
        return jax.tree.map(np.asarray, state), metrics

    want, expected = online(small_batch())
    state, metrics = advance(average, average)
    assert metrics == pytest.approx(expected, rel=2e-5, abs=1e-6)
    for x, y in zip(*map(jax.tree.leaves, (state["mu"], want["mu"])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(1e-3, np.abs(y).max()))
    kept = state["teacher"].pop(OFFLINE)
    jax.tree.map(np.testing.assert_array_equal, kept, average)
    jax.tree.map(
        lambda a, t, s: np.testing.assert_allclose(a, 0.9 * t + 0.1 * s, atol=1e-6),
        *(state["teacher"], average, state["student"]),
    )
    _, same = advance(average, half)
    assert same["loss"] == metrics["loss"]
    _, other = advance(jax.tree.map(np.negative, average), average)
    assert abs(other["loss"] - metrics["loss"]) > 1e-3


def test_of_a_checkpoint_the_average_teaches():
    weights = pretraining(wider())
    teacher, params = offline_teacher(weights, make_sonata(small_config()).spec)
    assert [stage.channels for stage in teacher.network.encoder] == [12, 24]
    assert (teacher.hidden, teacher.embed) == (24, 12)
    jax.tree.map(np.testing.assert_array_equal, params, weights.params["teacher"])


def test_concerto_keeps_its_image_encoder_and_the_teacher_of_whose_heads_it_needs_one(tmp_path):
    weights = pretraining(wider())
    del weights.params["teacher"]["unmask_head"]
    save_weights(tmp_path / "w", weights)
    config = test_concerto.config_of()
    config.teacher = str(tmp_path / "w")
    objective, frozen = make_objective(config)
    assert set(frozen) == {OFFLINE}  # the image encoder is the untrained one
    assert set(frozen[OFFLINE]) == {"backbone", "mask_head"}

    def step(batch):
        student, teacher = objective.init(jax.random.key(0))
        key, given = jax.random.key(1), schedule()
        row, _ = objective.prepare({k: v[:1] for k, v in batch.items()}, key, given)
        targets = objective.targets(teacher, jax.tree.map(lambda x: x[None], row), key, given)
        piece = jax.tree.map(lambda x: x[0], targets.pieces)
        loss, _ = objective.loss(student, piece, targets.shared, key, given)
        return loss, teacher, objective.follow(teacher, student, {}, given, np.bool_(True))

    loss, teacher, followed = jax.eval_shape(step, test_concerto.batch_of())
    assert loss.shape == () and followed == teacher and {"image", OFFLINE} < set(teacher)
    wide = jax.eval_shape(lambda: frozen[OFFLINE])
    assert teacher[OFFLINE] == wide
    del weights.params["teacher"]["mask_head"]
    with pytest.raises(ValueError, match="has no mask_head"):
        offline_teacher(weights, objective.points.spec)


def test_a_start_from_another_run_leaves_the_teacher_to_its_checkpoint(tmp_path):
    """Of whatever size the other's was."""
    whole = pretraining(small_config())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), whole.params
    )
    teacher = shapes["teacher"] | {OFFLINE: jax.ShapeDtypeStruct((3,), np.float32)}
    state = whole.params | {"teacher": whole.params["teacher"] | {OFFLINE: np.zeros(4)}}
    saved = Checkpoints(tmp_path, 1)
    saved.save(1, jax.tree.map(jax.numpy.asarray, state), {"scenes": 1})
    saved.close()
    template = {"student": shapes["student"], "teacher": teacher}
    got = initial_weights(tmp_path, template, (OFFLINE,), {OFFLINE})
    jax.tree.map(np.testing.assert_array_equal, got, whole.params)


def test_what_a_run_knows_is_from_all_that_taught_it(tmp_path):
    def run(name, **config):
        (tmp_path / name / "checkpoints" / "1").mkdir(parents=True)
        content = {"config": {"data": {"sources": [{"kind": name}]}} | config}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    first = run("first", init_from="", teacher="online")
    second = run("second", init_from=first, teacher="online")
    third = run("third", init_from=second, teacher=f"{first}/checkpoints/1")
    kinds = [source["kind"] for source in data_sources(Path(third)) or ()]
    assert kinds == ["third", "second", "first", "first"]
    assert label_sources(Path(third)) == []
    # A segmentation has learned labels, and so has what starts from it.
    labelled = run("labelled", protocol="full", init_from=third)
    sixth = label_sources(Path(run("sixth", init_from=labelled)))
    assert [source["kind"] for source in sixth] == ["labelled"]
    assert data_sources(Path(run("fourth", teacher="/gone"))) is None
    fifth = run("fifth", init_from=run("emptied"))
    (tmp_path / "emptied" / "checkpoints" / "1").rmdir()
    assert data_sources(Path(fifth)) is None


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
        (wider(), {"objective.up_cast": 0}, "for 36 channels.*give config.objective.up_cast=1"),
        (
            wider(**{"network.depths": (1, 1, 1), "network.channels": (12, 12, 24),
                     "network.heads": (2, 2, 4), "objective.shares": (1.0, 0.5, 0.2)}),
            {},
            "config.teacher: .*w offline has 3 levels, the student 2",
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
