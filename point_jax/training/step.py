"""The training step: one jitted `shard_map` from scenes to new parameters.

Each device makes the rows of its scenes, the targets are settled across devices (Sinkhorn's sums,
how many points have a label), the loss is differentiated piece by piece, and one sum over the mesh
joins gradients and statistics. Each row is a micro-batch: gradients accumulate from piece to piece,
in place, so that a device has one copy of the gradient and the activations of one piece, however
many scenes it has.

Where devices share a copy of the state (`sharding`), a step gathers the teacher before the targets
and the student before the first piece, and adds the gradient up into slices at the end: whole
arrays live as long as they are read, and what stays between steps, the optimizer's work and the
moving average are on slices. Gathering for every piece instead would move as much again for each
of them, and save a copy of the student and of its gradient: little beside a piece's activations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from point_jax.objectives.interface import Objective
from point_jax.training import sharding
from point_jax.training.config import Config
from point_jax.training.optimizer import adamw, clip_by_global_norm, layer_scales
from point_jax.training.state import State


def make_train_step(
    objective: Objective, config: Config, mesh: Mesh
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The step function of a run.

    Args:
      objective: what to learn.
      config: read are `optim` (lr_decay, block_lr, clip, beta2, eps) and `mesh`.
      mesh: scenes are split over all of its axes; those along `fsdp`, if there is one, share a copy
        of the state.

    Returns:
      `step(state, batch, schedule, key) -> (state, metrics)`, jitted; the state is donated and lies
      as `sharding.shardings` says. `batch` has a leading axis of the scenes of all devices,
      `schedule` float32 scalars, `key` is the run's (an argument: another seed compiles nothing
      anew), `metrics` are () float32. A step whose loss or gradient is not finite, or without any
      scene, changes nothing but the counters.
    """
    optim = config.optim.copy_and_resolve_references()
    section = config.mesh.copy_and_resolve_references()
    axes = tuple(mesh.axis_names)

    def gradients(student, teacher, batch, key, schedule, cut):
        """Sums over the rows of the global batch: of the gradient, of ones, for the metrics."""
        count = batch["count"].shape[0] // objective.scenes_per_row
        batch = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        slot = jax.lax.axis_index(axes) * count + jnp.arange(count)
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 0), slot)
        pass_key = jax.random.fold_in(key, 1)

        def prepare(this):
            return objective.prepare(this[0], this[1], schedule)

        rows, stats = jax.lax.map(prepare, (batch, row_keys))
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        teacher = sharding.gather(teacher, cut["teacher"], objective.read_as)
        targets = objective.targets(teacher, rows, pass_key, schedule, axes)
        student = sharding.gather(student, cut["student"], objective.read_as)

        # A block adds its part of the gradient to these as soon as it has it. (JAX 0.10 fails while
        # tracing if a loss takes a plain slice of a parameter.)
        total = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), student)

        def add_piece(_, piece):
            def loss(student):
                return objective.loss(student, piece, targets.shared, pass_key, schedule)

            back: Any  # pyright knows no methods of it
            value, back, sums = jax.vjp(loss, student, has_aux=True)
            back.with_refs(total)(jnp.ones_like(value))
            return None, sums

        _, sums = jax.lax.scan(add_piece, None, targets.pieces)
        grads = jax.tree.map(jax.freeze, total)
        count, loss_stats = jax.tree.map(lambda x: x.sum(0), sums)

        sums = count, {**stats, **targets.stats, **loss_stats}
        grads, (count, stats) = sharding.reduce(grads, cut["student"], sums, axes)
        return grads, count, stats

    @jax.named_scope("optimizer")
    def update(state, grads, count, stats, schedule, cut):
        """The state after a step, of what this device has of it and of the gradient."""

        def total(scalars):
            return sharding.total(scalars, cut["student"])

        metrics = objective.metrics(stats)
        clipped, norm = clip_by_global_norm(grads, optim.clip, total, jnp.maximum(count, 1.0))
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & (count > 0)
        bad = state["bad_steps"]
        student, mu, nu, length = adamw(
            state["student"],
            clipped,
            state["mu"],
            state["nu"],
            count=state["step"] - bad["total"] + 1,
            lr=schedule["lr"],
            beta1=schedule["beta1"],
            wd=schedule["wd"],
            scales=layer_scales(state["student"], optim.lr_decay, optim.block_lr),
            beta2=optim.beta2,
            eps=optim.eps,
            good=good,
            total=total,
        )
        teacher = objective.follow(state["teacher"], student, stats, schedule, good)
        new: State = {"student": student, "teacher": teacher, "mu": mu, "nu": nu}
        failed = jnp.where(good, 0, 1).astype(jnp.int32)
        new["step"] = state["step"] + 1
        new["bad_steps"] = {
            "total": bad["total"] + failed,
            "in_a_row": jnp.where(good, 0, bad["in_a_row"] + 1).astype(jnp.int32),
        }
        metrics["grad_norm"] = norm
        metrics["update_norm"] = length
        metrics["bad_steps"] = new["bad_steps"]["total"].astype(jnp.float32)
        metrics["bad_steps_in_a_row"] = new["bad_steps"]["in_a_row"].astype(jnp.float32)
        return new, {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()}

    def step(
        state: State, batch: dict[str, jax.Array], schedule: dict[str, jax.Array], key: jax.Array
    ):
        trees = {name: state[name] for name in sharding.TREES}
        cut = sharding.cuts(trees, section, sharding.fsdp_size(mesh))
        lie = sharding.specs(state, section, mesh)

        def on_device(state, batch, schedule, key):
            key = jax.random.fold_in(key, state["step"])
            student, teacher = state["student"], state["teacher"]
            found = gradients(student, teacher, batch, key, schedule, cut)
            return update(state, *found, schedule, cut)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(lie, P(axes), P(), P()),
            out_specs=(lie, P()),
            check_vma=False,
        )(state, batch, schedule, key)

    return jax.jit(step, donate_argnums=0)
