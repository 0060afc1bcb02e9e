"""The originals' whole steps of a pretraining: inputs as rows, losses and gradients by name."""

import jax
import jax.numpy as jnp
import numpy as np
from golden import clouds_of, load

from point_jax.data.views import ViewSpec
from point_jax.geometry.curves import curve_depth
from point_jax.interop.pointcept import from_state_dict, to_state_dict
from point_jax.interop.release import spec_of
from point_jax.objectives.rows import LOSSES
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.sonata_spec import SonataSpec

CAPACITIES, CLOUDS = (1024, 768, 512, 128, 64), 4


def weights_of(weights, template, prefix):
    """Parameters of the modules named in `template`, found under `prefix`."""
    parts = {
        part: from_state_dict(
            {k: v for k, v in weights.items() if k.startswith(f"{prefix}{part}.")},
            template[part],
            f"{prefix}{part}.",
        )
        for part in template
    }
    return jax.tree.map(jnp.asarray, parts)


def golden_network(config):
    """The network of a golden step's config."""
    backbone = dict(config["backbone"])
    return spec_of(backbone, backbone.pop("type"))


class GoldenStep:
    """The original's inputs of a whole step as two rows, one a scene."""

    def __init__(self, name, rows=True):
        self.arrays, about = load(name)
        self.grad_names = about["grad_param_names"]
        shares = (1.0, 0.75, 0.5, 0.125, 0.0625)
        network = golden_network(about["config"])
        self.objective = Sonata(
            SonataSpec(network, ViewSpec(max_size=512), shares, hidden=64, embed=32, prototypes=64)
        )
        weights = load(about["weights_file"].removesuffix(".npz"))[0]
        template = jax.eval_shape(self.objective.init, jax.random.key(0))[0]
        self.student = weights_of(weights, template, "student.")
        self.teacher = weights_of(weights, template, "teacher.")
        self.schedule = {"teacher_temp": jnp.float32(about["runtime"]["teacher_temp"])}
        self.momentum = about["runtime"]["momentum"]
        if rows:
            parts = [self._row(scene) for scene in range(2)]
            self.rows = jax.tree.map(lambda *part: jnp.stack(part), *parts)

    def _views(self, scene, views, side, points, mask):
        """`side` names the grid, `points` the inputs: (views of a scene) clouds each."""
        arrays = self.arrays
        offset = arrays[f"in.{points}_offset"]
        cloud = clouds_of(offset)
        grid = arrays[f"{side}.grid_coord"]
        shape = self.objective.rows.shape
        assert (shape.capacities, shape.clouds) == (CAPACITIES, CLOUDS)
        # One depth for the whole batch, as the original has it.
        depth = np.array([curve_depth(jnp.int32(grid.max() >> level)) for level in range(5)])
        depths = jnp.broadcast_to(jnp.asarray(depth)[:, None], (5, CLOUDS))
        mine = cloud // views == scene
        pad = CAPACITIES[0] - mine.sum()

        def rows(x):
            return jnp.asarray(np.concatenate([x[mine], np.zeros((pad, *x.shape[1:]), x.dtype)]))

        return jax.jit(self.objective.rows.arrange)(
            rows(grid),
            rows(arrays[f"in.{points}_feat"])[:, :3],
            rows(arrays[f"in.{points}_origin_coord"]),
            rows(arrays[f"in.{points}_feat"]),
            rows(cloud % views),
            jnp.arange(CAPACITIES[0]) < mine.sum(),
            rows(mask),
            rows(np.arange(len(mask), dtype=np.int32)),
            depths,
        )

    def _row(self, scene):
        mask, local = self.arrays["mask"], self.arrays["in.local_offset"][-1]
        students = (
            self._views(scene, 2, "student_mask_global", "global", mask),
            self._views(scene, 4, "student_local", "local", np.zeros(local, bool)),
        )
        return jax.jit(self.objective.rows.assemble)(
            self._views(scene, 2, "teacher_global", "global", np.zeros_like(mask)),
            jax.tree.map(lambda *sides: jnp.stack(sides), *students),
            jax.random.key(0),
            jnp.float32(1),
        )

    def run(self):
        """Losses, and gradients by the original's names."""
        total, stats, grads = run_step(
            self.objective, self.student, self.teacher, self.rows, self.schedule
        )
        losses = {name: float(stats[name]["loss"]) / 2 for name in LOSSES} | {"loss": total}
        named = {}
        for part, tree in grads.items():
            named |= to_state_dict(tree, f"student.{part}.")
        return losses, named


def run_step(objective, student, teacher, rows, schedule):
    """Loss, sums and gradients of a batch of two scenes, the orders in their places."""
    key = jax.random.key(0)

    def step(student, teacher, rows):
        targets = objective.targets(teacher, rows, key, schedule)

        def add(total, piece):
            (value, (count, stats)), grads = jax.value_and_grad(objective.loss, has_aux=True)(
                student, piece, targets.shared, key, schedule
            )
            return total, (value, count, stats, grads)

        parts = jax.lax.scan(add, None, targets.pieces)[1]
        total, count, stats, grads = jax.tree.map(lambda x: x.sum(0), parts)
        return total / 2, stats | {"count": count}, jax.tree.map(lambda g: g / 2, grads)

    with unshuffled():
        total, stats, grads = jax.jit(step)(student, teacher, rows)
    assert float(stats["count"]) == 2
    return float(total), stats, jax.tree.map(np.asarray, grads)


class unshuffled:
    """The golden steps were computed with the orders in their places."""

    def __enter__(self):
        from point_jax.models import ptv3

        self.turns = ptv3._turns
        ptv3._turns = lambda key, levels, orders: self.turns(None, levels, orders)

    def __exit__(self, *_):
        from point_jax.models import ptv3

        ptv3._turns = self.turns
