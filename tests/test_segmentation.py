"""Segmentation: labels stay with their points, only what should train trains, on every layout."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from small import small_batch, small_config

from point_jax.data.augment import GeometrySpec
from point_jax.features.encoder import Encoder
from point_jax.models.lora import add_lora, start_lora
from point_jax.models.ptv3 import up_cast
from point_jax.models.spec import StageSpec
from point_jax.objectives.labelled import CropSpec, LabelledRowMaker
from point_jax.objectives.segmentation import (
    Segmentation,
    SegmentationSpec,
    decoder,
    everything,
    lora,
    only_head,
)
from point_jax.objectives.settings import network_spec
from point_jax.objectives.trunks import PTv3Trunk, RawTrunk
from point_jax.training.mesh import put_batch, replicated
from point_jax.training.state import init_state
from point_jax.training.step import make_train_step

CLASSES = 3
SCHEDULE = {"lr": np.float32(5e-2), "beta1": np.float32(0.9), "wd": np.float32(0.02)}
QUIET = CropSpec(
    grid_size=0.1,
    max_size=128,
    drop=0.0,
    stretch_probability=0.0,
    translation=0.0,
    noise=0.0,
    geometry=GeometrySpec(elastic=(), rotation_probability=1.0),
)
ENCODER = dataclasses.replace(network_spec(small_config().network), rotary=None)
BOTH = dataclasses.replace(ENCODER, decoder=(StageSpec(1, 6, 1, 32),))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def labelled_batch(**changes):
    """Little boxes; a point's label is the channel of its colour."""
    batch = small_batch(**changes)
    labels = np.where(batch["coord"][..., 2] == 0, 1, np.where(batch["coord"][..., 0] == 0, 2, 0))
    batch["color"] = (255 * np.eye(3)[labels]).astype(np.uint8)
    return batch | {"segment": labels.astype(np.int32)}


def segmentation(trunk, divide, **changes):
    spec = SegmentationSpec(CLASSES, QUIET, shares=(1.0, 0.6), **changes)
    return Segmentation(spec, trunk, divide)


class Run:
    """A compiled step of an objective on a mesh, from one start."""

    def __init__(self, objective, devices=1):
        self.objective = objective
        self.mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        everywhere = replicated(self.mesh)
        self.key = jax.device_put(jax.random.key(0), everywhere)
        make = jax.jit(lambda key: init_state(objective, key), out_shardings=everywhere)
        self.make = lambda: make(self.key)
        self.step = make_train_step(objective, small_config(), self.mesh)

    def __call__(self, batch, state=None):
        placed = put_batch(self.mesh, batch, len(batch["count"]))
        state, metrics = self.step(state or self.make(), placed, SCHEDULE, self.key)
        return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def make():
    """A function: the probability of mixing -> a function: seed -> a row and its stats."""
    shape = RawTrunk().shape((256,), 2)

    def build(mix):
        maker = LabelledRowMaker(dataclasses.replace(QUIET, mix=mix), 2, (1.0,))
        made = jax.jit(lambda scenes, key: maker.make(scenes, key, shape))
        batch = labelled_batch(scenes=2)
        return lambda key: made(batch, jax.random.key(key))

    return build


class TestRows:
    def test_labels_stay_with_their_points(self, make):
        row, stats = make(0.0)(3)
        used = np.arange(256) < row.used
        channel = np.asarray(row.features[:, 3:6]).argmax(1)
        np.testing.assert_array_equal(row.labels[used], channel[used])
        assert (row.labels[~used] == -1).all()
        assert stats["labelled"] == stats["points"] == used.sum() > 50
        assert stats["overflow_row"] == 0

    def test_mixed_scenes_are_one_cloud_about_one_middle(self, make):
        apart, together = make(0.0)(5)[0], make(1.0)(5)[0]
        counts = np.bincount(apart.cloud[: apart.used], minlength=2)
        assert (counts > 0).all()
        assert together.used == counts.sum() and not together.cloud[: together.used].any()
        # The same points, wherever they stand in the row.
        rows = [np.asarray(row.features)[: counts.sum()] for row in (apart, together)]
        first, second = (rows[i][np.lexsort(rows[i].T)] for i in range(2))
        np.testing.assert_array_equal(first, second)
        # In the row and in metres they lie alike: to a voxel's rounding of either cloud's place.
        grid = np.asarray(together.grid)[: counts.sum()]
        place = rows[1][:, :2] / QUIET.grid_size
        offset = grid[:, :2] - place
        assert np.ptp(offset, axis=0).max() < 2.01

    def test_a_crop_keeps_the_nearest_points(self):
        spec = dataclasses.replace(QUIET, max_size=40)
        maker = LabelledRowMaker(spec, 1, (1.0,))
        scene = {name: x[0] for name, x in labelled_batch(scenes=1).items()}
        crop, _ = jax.jit(maker.crop)(scene, jax.random.key(0))
        assert crop.used == 40
        middle = np.asarray(crop.features[:40, :3])
        low, high = middle[:, :2].min(0), middle[:, :2].max(0)
        np.testing.assert_allclose(low + high, 0, atol=1e-5)

    def test_dropped_points_are_a_share_of_the_scene(self):
        maker = LabelledRowMaker(dataclasses.replace(QUIET, drop=0.5, grid_size=1e-3), 1, (1.0,))
        scene = {name: x[0] for name, x in labelled_batch(scenes=1).items()}
        crop, _ = jax.jit(maker.crop)(scene, jax.random.key(0))
        assert crop.used == 128  # half of 256, all in voxels of their own


@pytest.fixture(scope="module")
def raw():
    return Run(segmentation(RawTrunk(), only_head))


def test_the_loss_falls_and_the_labels_are_learned(raw):
    state, before = raw(labelled_batch())
    for _ in range(60):
        state, after = raw(labelled_batch(), jax.device_put(state, replicated(raw.mesh)))
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.9 and 0 < before["batch_mIoU"] < after["batch_mIoU"] <= 1
    assert state["step"] == 61


def test_points_without_labels_take_no_part(raw):
    batch = labelled_batch()
    some = batch["segment"].copy()
    some[:, ::3] = -1
    state, metrics = raw(batch | {"segment": some})
    assert metrics["labelled"] == pytest.approx(2 / 3, abs=0.1)
    none, without = raw(batch | {"segment": np.full_like(some, -1)})
    assert np.isnan(without["loss"]) and without["bad_steps"] == 1
    start = jax.tree.map(np.asarray, raw.make())
    jax.tree.map(np.testing.assert_array_equal, none["student"], start["student"])
    assert state["bad_steps"]["total"] == 0


def test_a_row_without_labels_leaves_the_mean_to_the_others(raw):
    batch = labelled_batch(scenes=4)
    fewer = batch["segment"].copy()
    fewer[2:] = -1
    _, metrics = raw(batch | {"segment": fewer})
    _, whole = raw(batch)
    assert metrics["entropy_loss"] == pytest.approx(whole["entropy_loss"], rel=0.2)
    assert metrics["bad_steps"] == 0


def test_class_weights_weigh_the_cross_entropy():
    objective = segmentation(RawTrunk(), only_head, class_weights=(0.0, 2.0, 0.0), lovasz=0.0)
    batch = labelled_batch()
    state, metrics = Run(objective)(batch)
    only = np.where(batch["segment"] == 1, 1, -1)
    _, expected = Run(segmentation(RawTrunk(), only_head, lovasz=0.0))(batch | {"segment": only})
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    del state


class TestLinearLayer:
    def test_level_by_level_is_the_layer_on_joined_features(self):
        objective = segmentation(PTv3Trunk(ENCODER), only_head)
        rows = objective.rows
        shape = objective.trunk.shape(rows.capacities, 2)
        row, _ = jax.jit(lambda b, k: rows.make(b, k, shape))(
            labelled_batch(scenes=2), jax.random.key(0)
        )
        keys = jax.random.split(jax.random.key(1), 3)
        hierarchy = row.structure(shape)
        levels = tuple(
            jax.random.normal(key, (len(level.cloud), channels))
            for key, level, channels in zip(keys, hierarchy, objective.trunk.channels, strict=False)
        )
        head = objective.init(keys[2])[0]["head"]
        joined = up_cast(levels, hierarchy, len(levels) - 1)
        expected = joined @ head["kernel"] + head["bias"][None]
        used = int(row.used)
        found = objective._linear(head, levels, hierarchy)
        np.testing.assert_allclose(found[:used], expected[:used], atol=1e-5)


@pytest.fixture(scope="module")
def parts():
    """A backbone, and changes of rank 2 before they are trained."""
    backbone = jax.jit(PTv3Trunk(ENCODER).init)(jax.random.key(0))
    return backbone, start_lora(jax.random.key(1), backbone, rank=2)


class TestLora:
    def test_it_starts_without_any_change(self, parts):
        backbone, change = parts
        jax.tree.map(np.testing.assert_array_equal, add_lora(backbone, change), backbone)

    def test_it_changes_qkv_alone_by_the_scaled_product(self, parts):
        backbone, change = parts
        change = jax.tree.map(lambda x: x + 0.1, change)
        changed = add_lora(backbone, change, alpha=6.0)
        for stage in backbone["enc"]:
            old, new = (tree["enc"][stage]["blocks"] for tree in (backbone, changed))
            product = np.asarray(change[stage]["a"]) @ np.asarray(change[stage]["b"])
            difference = np.asarray(new["qkv"].pop("kernel") - old["qkv"]["kernel"])
            np.testing.assert_allclose(difference, 3.0 * product, atol=1e-6)
            rest = old | {"qkv": {k: v for k, v in old["qkv"].items() if k != "kernel"}}
            jax.tree.map(np.testing.assert_array_equal, new, rest)


@pytest.mark.parametrize(
    ("trunk", "divide", "trained", "frozen"),
    [
        (ENCODER, lora, {"head", "lora"}, {"embedding", "enc"}),
        (BOTH, decoder, {"head", "backbone/dec"}, {"embedding", "enc"}),
    ],
    ids=["lora", "decoder"],
)
def test_what_should_train_trains_and_the_rest_stays(trunk, divide, trained, frozen):
    run = Run(segmentation(PTv3Trunk(trunk), divide))
    start = jax.tree.map(np.asarray, run.make())
    names = {name for name in start["student"] if name != "backbone"}
    names |= {f"backbone/{name}" for name in start["student"].get("backbone", {})}
    assert names == trained and set(start["teacher"]["backbone"]) == frozen
    state, _ = run(labelled_batch())
    state, metrics = run(labelled_batch(seed=1), jax.device_put(state, replicated(run.mesh)))
    assert metrics["bad_steps"] == 0 and metrics["overflow_row"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["teacher"], start["teacher"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state["student"], start["student"])
    # The first convolution's and attention's biases cancel in the norms: no gradient but rounding.
    assert np.mean([m > 0 for m in jax.tree.leaves(moved)]) > 0.9


@pytest.mark.devices(4)
def test_one_device_and_four_give_the_same_step():
    objective = segmentation(PTv3Trunk(BOTH), everything)
    batch = labelled_batch()
    batch["segment"][5] = -1  # rows weigh by their labelled points
    one_state, one = Run(objective)(batch)
    state, metrics = Run(objective, devices=4)(batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for x, y in zip(jax.tree.leaves(state["mu"]), jax.tree.leaves(one_state["mu"]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(1e-3, np.abs(y).max()))


def test_encoder_and_training_see_the_same_features():
    """A network in a row of two scenes and the encoder of the features agree on a scene."""
    network = dataclasses.replace(ENCODER, curves=("z",), drop_path=0.0)  # nothing to shuffle
    objective = Segmentation(
        SegmentationSpec(CLASSES, dataclasses.replace(QUIET, mix=0.0), shares=(1.0, 1.0)),
        PTv3Trunk(network),
        only_head,
    )
    student, teacher = objective.init(jax.random.key(0))
    shape = objective.trunk.shape(objective.rows.capacities, 2)
    row, _ = objective.rows.make(labelled_batch(scenes=2), jax.random.key(1), shape)
    logits, _ = jax.jit(objective.logits)(student, teacher, row, jax.random.key(2))
    counts = np.searchsorted(row.cloud, np.arange(3))
    encoder = Encoder(network, teacher["backbone"], grid_size=0.1)
    for first, last in itertools.pairwise(counts):
        grid = np.asarray(row.grid[first:last])
        (found,) = encoder.encode_prepared(grid, np.asarray(row.features[first:last]))
        expected = found.at_voxels() @ np.asarray(student["head"]["kernel"])
        expected = expected + np.asarray(student["head"]["bias"])
        np.testing.assert_allclose(logits[first:last], expected, atol=2e-5)
    assert jnp.isfinite(logits).all()
