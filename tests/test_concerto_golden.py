"""Concerto's step equals the original's: losses and gradients, images included."""

import jax
import jax.numpy as jnp
import numpy as np
from golden import load
from golden_step import GoldenStep, golden_network, run_step, weights_of
from test_ptv3 import close

from point_jax.data.views import ViewSpec
from point_jax.interop.pointcept import to_state_dict
from point_jax.objectives.concerto import Concerto, ConcertoRow, ConcertoSpec
from point_jax.objectives.rows import LOSSES
from point_jax.objectives.sonata_spec import SonataSpec

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
            seen = jax.jit(self.objective.sightings)(row, places)
            rows.append(ConcertoRow(row, jnp.asarray(images), seen))
        self.rows = jax.tree.map(lambda *part: jnp.stack(part), *rows)


def test_a_step_equals_the_original():
    golden = GoldenConcerto()
    pairs = (np.asarray(golden.rows.seen.patch) < HEIGHT * WIDTH).sum()
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
