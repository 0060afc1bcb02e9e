"""Batch norms in supervised training: by the points of the row, running statistics by PyTorch."""

import dataclasses
import functools
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_row
from small import small_config
from test_evaluate import get_config
from test_segmentation import CLASSES, QUIET, Run, labelled_batch

from point_jax.evaluation import protocols
from point_jax.evaluation.candidates import Candidate
from point_jax.evaluation.labelled_scenes import CLASSES as KNOWN
from point_jax.models import statistics
from point_jax.models.functional import functional
from point_jax.models.layers import BatchNorm
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import STEM_RADIUS, StageSpec
from point_jax.objectives.segmentation import Segmentation, SegmentationSpec, decoder, everything
from point_jax.objectives.settings import make_sonata, network_spec
from point_jax.objectives.trunks import PTv3Trunk
from point_jax.training import checkpoint
from point_jax.training.mesh import replicated

EPSILON, MOMENTUM = 1e-3, 0.01
PARTS = ("embedding", "enc", "dec")
FIRST = {"stem": "conv", "norm": "batch", "pooling": "serialized", "rotary_base": 0.0}
ENCODER = network_spec(small_config().network.to_dict() | FIRST)
NETWORK = dataclasses.replace(ENCODER, decoder=(StageSpec(1, 6, 1, 32),))
_, NORM = functional(lambda rngs: BatchNorm(4))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normalized(scale, bias, x):
    """The definition, float64."""
    mean, var = x.mean(0), x.var(0)
    return scale * (x - mean) / np.sqrt(var + EPSILON) + bias


@pytest.fixture(params=[(24, 17), (40, 17), (24, 1), (24, 24)], ids=lambda p: f"{p[1]} of {p[0]}")
def row(request):
    """Points in a row with NaN in its padding, and a slope of the output, NaN there, too."""
    capacity, count = request.param
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, [0.05, 1, 2, 5], (capacity, 4)).astype(np.float32).astype(float)
    slope = rng.normal(size=x.shape)
    x[count:] = slope[count:] = np.nan
    params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}
    return params, x, slope, count


def normalize(params, x, count):
    running = {"mean": jnp.full(4, 7.0), "var": jnp.full(4, 7.0)}  # must not be read
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params) | running
    return NORM(params, jnp.asarray(x, jnp.float32), jnp.int32(count), method="over_row")


def test_a_row_is_normalised_by_the_points_in_use(row):
    params, x, _, count = row
    y, moments = normalize(params, x, count)
    used = x[:count]
    np.testing.assert_allclose(y[:count], normalized(**params, x=used), atol=1e-5)
    assert (y[count:] == 0).all()
    np.testing.assert_allclose(moments["mean"], used.mean(0), rtol=1e-6)
    unbiased = used.var(0, ddof=1) if count > 1 else np.zeros(4)
    np.testing.assert_allclose(moments["var"], unbiased, rtol=1e-5)


def test_gradients_are_those_of_finite_differences(row):
    params, x, slope, count = row

    def ours(params, x):
        return jnp.vdot(normalize(params, x, count)[0], jnp.asarray(slope, jnp.float32))

    def definition(params, x):
        return (normalized(**params, x=x) * slope[:count]).sum()

    # With NaN in its padding the sum is NaN, but no gradient may be.
    of_params, of_x = jax.grad(ours, argnums=(0, 1))(params, x)
    assert (of_x[count:] == 0).all()
    point = params | {"x": x[:count]}
    for name, grad in {**of_params, "x": of_x[:count]}.items():
        expected = np.empty(point[name].shape)
        for i in np.ndindex(expected.shape):
            moved = []
            for step in (1e-5, -1e-5):
                there = {key: value.copy() for key, value in point.items()}
                there[name][i] += step
                moved.append(definition({k: there[k] for k in params}, there["x"]))
            expected[i] = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(grad, expected, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.fixture(scope="module")
def network():
    """A whole PT-v3m1: parameters, and a function of a row's capacities."""
    rng = np.random.default_rng(3)
    grid = np.unique(rng.integers(0, [14, 14, 4], (200, 3)), axis=0)
    cloud = np.sort(rng.integers(0, 2, len(grid))).astype(np.int32)
    features = rng.normal(size=(len(grid), 9)).astype(np.float32)
    config = {"enc_patch_size": (32, 32), "dec_patch_size": (32,), "order": NETWORK.curves}
    init, apply = functional(lambda rngs: PTv3(NETWORK, rngs=rngs))
    params = init(jax.random.key(0))

    def run(capacities, padding, parts=PARTS):
        """Decoded features, and moments."""
        row = make_row(grid, cloud, config, None, capacities, 2, STEM_RADIUS)
        used = np.arange(capacities[0]) < row.count
        x = np.where(used[:, None], row.put(features), padding)
        out = jax.jit(functools.partial(apply, row_statistics=parts))(params, x, row.hierarchy)
        return row.take(out.decoded[0]), jax.tree.map(np.asarray, out.moments)

    return params, run


def test_padding_and_capacity_do_not_matter(network):
    small, moments = network[1]((256, 200), 0.0)
    large, same = network[1]((320, 256), np.nan)
    np.testing.assert_allclose(large, small, rtol=0, atol=2e-5 * np.abs(small).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, moments)


def test_moments_have_the_places_of_running_statistics(network):
    params, run = network
    running = statistics.split(params)[1]
    for parts in ((), ("dec",), PARTS):
        moments = run((256, 200), 0.0, parts)[1]
        expected = {part: running[part] for part in parts}
        assert jax.tree.map(np.shape, moments) == jax.tree.map(np.shape, expected)


def test_parameters_part_and_join():
    params = jax.eval_shape(PTv3Trunk(NETWORK).init, jax.random.key(0))
    moved, running = statistics.split(params)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(running)} == {"mean", "var"}
    assert len(jax.tree.leaves(running)) == 8  # stem, down, up twice
    assert statistics.join(moved, running) == statistics.join(running, moved) == params
    assert statistics.among(params, running) == running


def segmentation(divide, **changes):
    spec = SegmentationSpec(CLASSES, QUIET, shares=(1.0, 0.6), **changes)
    return Segmentation(spec, PTv3Trunk(NETWORK), divide)


@pytest.fixture(scope="module")
def run():
    return Run(segmentation(everything))


def moments_of(run, state, batch):
    """The mean over the labelled rows of the rows' moments in the step after a state."""
    objective, step = run.objective, int(state["step"])
    key = jax.random.fold_in(run.key, step)

    @jax.jit
    def one(scenes, slot):
        row_key = jax.random.fold_in(jax.random.fold_in(key, 0), slot)
        row, _ = objective.prepare(scenes, row_key, {})
        pass_key = jax.random.fold_in(key, 1)
        moments = objective.logits(state["student"], state["teacher"], row, pass_key)[1]
        return moments, (row.labels >= 0).any()

    rows = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in range(0, 8, 2)]
    found = [one(scenes, slot) for slot, scenes in enumerate(rows)]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *(m for m, labelled in found if labelled))


def test_running_statistics_follow_the_rows_by_pytorchs_rule(run):
    """Neither weight decay nor the learning rate reaches them; a row without labels is left out."""
    batch = labelled_batch()
    batch["segment"][4:6] = -1
    state = jax.tree.map(np.asarray, run.make())
    assert all(path[-1].key not in statistics.LEAVES
               for path, _ in jax.tree.leaves_with_path(state["student"]))  # fmt: skip
    for _ in range(2):
        expected = jax.tree.map(
            lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new,
            state["teacher"]["backbone"],
            moments_of(run, state, batch),
        )
        state, metrics = run(batch, jax.device_put(state, replicated(run.mesh)))
        assert metrics["bad_steps"] == 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            state["teacher"]["backbone"],
            expected,
        )


def test_many_steps_have_the_closed_form():
    start = {"norm": {"mean": np.float32([0, 5]), "var": np.float32([1, 2])}, "other": {}}
    moments = {"norm": {"mean": np.float32([3, -1]), "var": np.float32([0.5, 4])}}
    running = start
    for _ in range(20):
        running = statistics.follow(running, moments, jnp.array(True))
    for name in statistics.LEAVES:
        new, old = moments["norm"][name], start["norm"][name]
        expected = new + (1 - MOMENTUM) ** 20 * (old - new)
        np.testing.assert_allclose(running["norm"][name], expected, rtol=1e-5)


def test_a_bad_step_moves_nothing(run):
    broken, unlabelled = labelled_batch(), labelled_batch()
    broken["normal"][3] = np.nan
    unlabelled["segment"][:] = -1
    start = jax.tree.map(np.asarray, run.make())
    for batch in (broken, unlabelled):
        state, metrics = run(batch)
        assert metrics["bad_steps"] == 1
        for part in ("student", "teacher"):
            jax.tree.map(np.testing.assert_array_equal, state[part], start[part])


def test_the_loss_falls_by_the_rows_statistics(run):
    state, before = run(labelled_batch())
    for _ in range(25):
        state, after = run(labelled_batch(), jax.device_put(state, replicated(run.mesh)))
    assert after["loss"] < 0.6 * before["loss"]


@pytest.mark.devices(2)
def test_one_device_and_two_give_the_same_step():
    batch = labelled_batch()
    batch["segment"][2:4] = -1
    one_state, one = Run(segmentation(everything))(batch)
    state, metrics = Run(segmentation(everything), devices=2)(batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for part, tolerance in (("mu", 1e-4), ("teacher", 1e-6)):
        for x, y in zip(*map(jax.tree.leaves, (state[part], one_state[part])), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1e-3, np.abs(y).max()))


def test_a_frozen_encoder_keeps_its_running_statistics():
    run = Run(segmentation(decoder))
    start = jax.tree.map(np.asarray, run.make())
    state, metrics = run(labelled_batch())
    assert metrics["bad_steps"] == 0 and set(state["student"]["backbone"]) == {"dec"}
    old, new = start["teacher"]["backbone"], state["teacher"]["backbone"]
    for part in ("embedding", "enc"):
        jax.tree.map(np.testing.assert_array_equal, new[part], old[part])
    moved = jax.tree.map(lambda a, b: (a != b).all(), new["dec"], old["dec"])
    assert len(jax.tree.leaves(moved)) == 4 and all(jax.tree.leaves(moved))


def test_a_stopped_training_ends_alike_and_is_evaluated_by_its_running_statistics(
    tmp_path, monkeypatch
):
    config = get_config("protocol=scratch")
    for name, value in FIRST.items():
        config.network[name] = value
    candidate = Candidate("random", network_spec(config.network), 0.1)

    def train(workdir):
        classes = KNOWN["rooms"]
        return protocols.trained(
            "scratch", candidate, config, (), classes, workdir, lambda scene: scene
        )

    whole = train(tmp_path / "whole")
    original = protocols.make_batches

    def stops(*arguments, **more):
        for number, batch in enumerate(original(*arguments, **more)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(protocols, "make_batches", stops)
    with pytest.raises(protocols.Stopped):
        train(tmp_path / "broken")
    monkeypatch.undo()
    broken = train(tmp_path / "broken")
    first, second = (found.extractor.encoder.params for found in (whole, broken))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_array_equal(whole.kernel, broken.kernel)
    # What predicts has the statistics that the run has learned.
    shape = {"backbone": jax.eval_shape(lambda p: statistics.split(p)[1], first)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shape)
    teacher = checkpoint.load_weights(tmp_path / "whole", {"teacher": template})["teacher"]
    running = statistics.split(first)[1]
    jax.tree.map(np.testing.assert_array_equal, running, teacher["backbone"])
    assert all((x != 0).all() and (x != 1).all() for x in jax.tree.leaves(running))


def test_an_encoder_gives_its_running_statistics_to_the_teacher():
    objective = segmentation(everything)
    start = dict(zip(("student", "teacher"), objective.init(jax.random.key(0)), strict=True))
    encoder = jax.tree.map(lambda x: x + 1.0, PTv3Trunk(ENCODER).init(jax.random.key(1)))
    given = protocols._initial(encoder, Path("encoder"), start)
    state = {part: statistics.join(start[part], given[part]) for part in start}
    whole = objective.whole(**state)
    jax.tree.map(np.testing.assert_array_equal, {name: whole[name] for name in encoder}, encoder)
    assert statistics.split(state["student"])[1] == {}
    del encoder["enc"]["stage1"]["down"]["norm"]["var"]
    with pytest.raises(checkpoint.CheckpointError, match=r"missing enc.stage1.down.norm.var"):
        protocols._initial(encoder, Path("encoder"), start)


def test_pretraining_and_unknown_norms_are_refused():
    config = small_config()
    for name, value in FIRST.items():
        config.network[name] = value
    with pytest.raises(ValueError, match="pretraining needs"):
        make_sonata(config)
    config.network.norm = "group"
    with pytest.raises(ValueError, match=r"config.network.norm is 'group', expected 'layer' or"):
        network_spec(config.network)
