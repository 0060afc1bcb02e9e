"""Concerto on tiny scenes: what its image side is by definition, runs, one device and two."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import Step, put_batch, schedule, small_batch, small_config

import point_jax
from configs import concerto
from launch import command, train
from launch.objectives import make_objective
from point_jax.interop.store import Weights, save_weights
from point_jax.interop.workdir import read_workdir
from point_jax.models.image_encoder import NetworkEncoder
from point_jax.models.vgg import VGGSpec
from point_jax.objectives.settings import encoded_images, make_concerto
from point_jax.training.checkpoint import load_weights
from point_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

# ---- The joint step on tiny scenes and images.

ROWS, COLUMNS, STRIDE = 2, 3, 16


def config_of(**changes):
    config = small_config(concerto)
    config.network.rotary_base = 0.0
    config.views.drop_color = config.views.drop_normal = ()
    config.images.height, config.images.width = ROWS, COLUMNS
    config.images.up_cast = 1
    config.data.images.height, config.data.images.width = ROWS * STRIDE, COLUMNS * STRIDE
    config.update_from_flattened_dict(changes)
    return config


def objective_of(config):
    return make_concerto(config, encoded_images(config, None))


def batch_of(scenes=2, images=2, seed=0):
    """Tiny scenes whose images look down on them: row and column are x and y."""
    batch = small_batch(scenes=scenes, seed=seed)
    draw = np.random.default_rng(seed)
    pixels = batch["coord"][:, :, :2] / 1.2 * [ROWS * STRIDE, COLUMNS * STRIDE]
    pixels = np.repeat(pixels[:, :, None], images, axis=2).astype(np.float32)
    pixels[draw.random(pixels.shape[:3]) < 0.3] = -1
    shape = (scenes, images, ROWS * STRIDE, COLUMNS * STRIDE, 3)
    return batch | {
        "images": draw.integers(0, 256, shape, np.uint8),
        "pixels": pixels,
        "image_count": np.full(scenes, images, np.int32),
    }


def without_images(batch, scenes):
    """The same batch, some of whose scenes have no image."""
    pixels, count = batch["pixels"].copy(), batch["image_count"].copy()
    pixels[scenes], count[scenes] = -1, 0
    return batch | {"pixels": pixels, "image_count": count}


@pytest.fixture(scope="module")
def step():
    config = config_of()
    return Step(config, Mesh(np.array(jax.devices()[:1]), ("data",)), objective_of(config))


def test_a_step_moves_the_points_and_leaves_the_image_encoder(step):
    start = jax.tree.map(np.asarray, step.make())
    state, metrics = step(batch_of())
    assert metrics["bad_steps"] == 0 and metrics["image_patches"] > 0
    parts = ("mask_loss", "roll_loss", "unmask_loss", "image_loss")
    weights = (1 / 8, 1 / 8, 2 / 8, 4 / 8)
    want = sum(w * metrics[name] for w, name in zip(weights, parts, strict=True))
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)
    assert 0 < metrics["image_loss"] < 20
    jax.tree.map(
        np.testing.assert_array_equal, state["teacher"]["image"], start["teacher"]["image"]
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state["student"], start["student"])
    assert moved["patch_proj"]["kernel"] > 0
    assert moved["backbone"]["embedding"]["linear"]["kernel"] > 0
    assert "patch_proj" not in state["teacher"]


def test_what_no_image_sees_is_learned_from_points_alone(step):
    batch = batch_of()
    _, both = step(batch)
    _, first = step(without_images(batch, [1]))
    _, none = step(without_images(batch, [0, 1]))
    assert 0 < first["image_patches"] < both["image_patches"]
    assert none["image_patches"] == 0 and none["bad_steps"] == 0
    mean = np.mean([none[name] for name in ("mask_loss", "roll_loss", "unmask_loss")])
    assert none["image_loss"] == pytest.approx(mean, rel=1e-5)  # the original's fallback
    assert none["grad_norm"] > 0
    # Pixels of images that are not there are not looked at.
    noise = batch["images"].copy()
    noise[1] = 255 - noise[1]
    _, again = step(without_images(batch | {"images": noise}, [1]))
    assert again["image_loss"] == first["image_loss"]


def test_the_image_loss_falls_when_the_same_scenes_come_again(step):
    state, batch, key = step.make(), batch_of(), step.key
    losses = []
    for _ in range(12):
        placed = put_batch(step.mesh, batch, 2)
        state, metrics = step.step(state, placed, schedule(lr=3e-3), key)
        losses.append(float(metrics["image_loss"]))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.devices(2)
def test_one_device_and_two_give_the_same_step():
    config, batch = config_of(), without_images(batch_of(), [1])
    found = []
    for devices in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        found.append(Step(config, mesh, objective_of(config))(batch))
    (one_state, one), (two_state, two) = found
    for name, value in two.items():
        np.testing.assert_allclose(value, one[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for x, y in zip(*map(jax.tree.leaves, (two_state["mu"], one_state["mu"])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * max(1e-3, np.abs(y).max()))


# ---- The command.


def get_config():
    """For `--config=tests/test_concerto.py`: two steps on tiny rooms and their views."""
    config = config_of()
    config.train.batch, config.train.steps, config.train.log_every = 2, 2, 1
    config.checkpoint.every = 1
    spec = {"frames": 3, "width": 48, "height": 32, "voxel": 0.1}
    config.data.sources = ({"kind": "rooms", "seeds": (0, 4), "spec": spec},)
    config.data.held_out.scenes = 0
    return config


def test_a_run_has_its_encoder_s_weights_goes_on_alike_and_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    vgg = NetworkEncoder(VGGSpec())
    weights = jax.tree.map(np.asarray, vgg.init(jax.random.key(1)))
    encoder = tmp_path / "vgg16"
    save_weights(encoder, Weights("image_encoder", "vgg16", {}, {"image_encoder": weights}))

    def start(workdir):
        argv = ["train", "--config=tests/test_concerto.py", f"--workdir={workdir}"]
        argv += [f"--config.images.encoder={encoder}", "--config.images.layers=('conv5_3',)"]
        return command.run(train.main, argv, None)

    def digest(workdir):
        return read_metrics(workdir)[-1]["params_digest"]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole) == 0
    # As if it had been killed after its first step.
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "2")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text(lines[0])
    assert start(broken) == 0 and digest(broken) == digest(whole)
    assert read_metrics(whole)[0]["image_patches"] > 0
    # The teacher has the weights that were given; features come from the points alone.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    objective = make_objective(get_config_with(encoder))[0]
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    student, teacher = (
        load_weights(whole, {part: tree})[part]
        for part, tree in zip(("student", "teacher"), template, strict=True)
    )
    jax.tree.map(np.testing.assert_array_equal, teacher["image"], weights)
    read = read_workdir(whole)
    assert set(read.params["teacher"]) == {"backbone", "mask_head", "unmask_head"}
    kernel = read.extra["patch_proj.weight"].T
    np.testing.assert_array_equal(kernel, student["patch_proj"]["kernel"])
    # Pointcept's loader finds the heads that nothing reads, at the sizes of its own.
    hidden = student["mask_head"]["mlp"]["fc1"]["kernel"].shape[1]
    prototypes = len(student["mask_head"]["prototypes"])
    heads = {name: array.shape for name, array in read.extra.items() if "head" in name}
    channels = kernel.shape[1]
    mlp = "enc2d_head_student.mlp."
    assert heads == {
        f"{mlp}0.weight": (hidden, channels), f"{mlp}0.bias": (hidden,),
        f"{mlp}2.weight": (channels, hidden), f"{mlp}2.bias": (channels,),
    } | {
        f"enc2d_head_{tree}.prototype.parametrizations.weight.original{i}": (prototypes, width)
        for tree in ("student", "teacher") for i, width in ((0, 1), (1, channels))
    }  # fmt: skip
    assert point_jax.load(whole).grid_size == 0.1


def get_config_with(encoder):
    config = get_config()
    config.images.encoder, config.images.layers = str(encoder), ("conv5_3",)
    return config
