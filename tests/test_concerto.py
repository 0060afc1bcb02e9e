"""Concerto equals the original, and what its image side is by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import load
from golden_step import GoldenStep, golden_network, run_step, weights_of
from jax.sharding import Mesh
from small import Step, small_batch, small_config
from test_ptv3 import close

from configs import concerto
from point_jax.data.views import ViewSpec
from point_jax.interop.pointcept import to_state_dict
from point_jax.objectives.concerto import Concerto, ConcertoRow, ConcertoSpec
from point_jax.objectives.rows import LOSSES
from point_jax.objectives.settings import encoded_images, make_concerto
from point_jax.objectives.sonata import SonataSpec

HEIGHT, WIDTH, CHANNELS, IMAGES = 4, 5, 24, 3


class Given:
    """Features that come with the images."""

    height, width, channels = HEIGHT, WIDTH, CHANNELS

    def init(self, key):
        return {}

    def prepare(self, scene, key):
        return scene["features"], scene["places"]

    def features(self, params, images):
        return images


class GoldenConcerto:
    """The original's step: views of f3, its own weights, correspondences and image features."""

    def __init__(self):
        views = GoldenStep("f3_sonata_step_nodup")
        self.arrays, about = load("g2_concerto_step")
        self.grad_names, self.schedule = about["grad_param_names"], views.schedule
        network = golden_network(about["config"])
        points = SonataSpec(
            network, ViewSpec(max_size=512), views.objective.spec.shares, hidden=64, embed=32,
            prototypes=64, weights=(1 / 8, 1 / 8, 2 / 8), shared_head=True,
        )  # fmt: skip
        self.objective = Concerto(ConcertoSpec(points), Given())
        weights = load(about["weights_file"].removesuffix(".npz"))[0]
        student, teacher = jax.eval_shape(self.objective.init, jax.random.key(0))
        student.pop("patch_proj")
        self.student = weights_of(weights, student, "student.") | {
            "patch_proj": {
                "kernel": jnp.asarray(weights["patch_proj.weight"].T),
                "bias": jnp.asarray(weights["patch_proj.bias"]),
            }
        }
        self.teacher = weights_of(weights, teacher, "teacher.")
        ends = np.cumsum(self.arrays["in.img_num"])
        places = jnp.asarray(self.arrays["in.global_correspondence"])
        rows = []
        for scene in range(2):
            row = jax.tree.map(lambda x, i=scene: x[i], views.rows)
            images = self.arrays["in.feature2d"][ends[scene] - self.arrays["in.img_num"][scene] :]
            images = images[: self.arrays["in.img_num"][scene]]
            images = np.pad(images, ((0, IMAGES - len(images)), (0, 0), (0, 0)))
            patch = jax.jit(self.objective.patches_of)(row, places)
            rows.append(ConcertoRow(row, jnp.asarray(images), patch))
        self.rows = jax.tree.map(lambda *part: jnp.stack(part), *rows)


def test_a_step_equals_the_original():
    golden = GoldenConcerto()
    pairs = (np.asarray(golden.rows.patch) < HEIGHT * WIDTH).sum()
    assert pairs == len(golden.arrays["enc2d.patch_index"])
    total, stats, grads = run_step(
        golden.objective, golden.student, golden.teacher, golden.rows, golden.schedule
    )
    assert stats["image"]["patches"] == len(np.unique(golden.arrays["enc2d.patch_index"]))
    found = {f"{name}_loss": float(stats[name]["loss"]) / 2 for name in LOSSES}
    found["roll_mask_loss"] = found.pop("roll_loss")
    found["enc2d_loss"] = float(stats["image"]["loss"] / stats["image"]["patches"])
    found["loss"] = total
    for name, value in found.items():
        np.testing.assert_allclose(value, golden.arrays[f"loss.{name}"], rtol=1e-4, err_msg=name)
    projection = grads.pop("patch_proj")
    close(projection["kernel"].T, golden.arrays["grad.patch_proj.weight"], 1e-2)
    close(projection["bias"], golden.arrays["grad.patch_proj.bias"], 1e-2)
    named = {}
    for part, tree in grads.items():
        named |= to_state_dict(tree, f"student.{part}.")
    for key, want in golden.arrays.items():
        if key.startswith("grad.student"):
            close(named[key.removeprefix("grad.")], want, 0.15)  # see test_sonata


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
    from small import put_batch, schedule

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
