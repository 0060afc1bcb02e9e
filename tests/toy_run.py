"""A run of the real training loop that takes seconds: a least-squares toy in the objective's place.

python tests/toy_run.py --config=tests/toy_run.py --workdir=DIR [--config.key=VALUE ...]
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import command
from point_jax import storage
from point_jax.data.patience import Patient
from point_jax.data.scenes import SceneError
from point_jax.objectives.teacher import move_teacher
from point_jax.training import optimizer
from point_jax.training.config import default_config, parse_command_line
from point_jax.training.loop import train
from point_jax.training.mesh import start_processes
from point_jax.training.schedules import sonata_schedule

SELF = str(Path(__file__).resolve())


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps, config.train.batch, config.train.log_every = 12, 2, 1
    config.train.max_bad_steps = 3
    config.checkpoint.every = 4
    config.data = ConfigDict({"seconds": 0.0, "nan": (-1, -1), "points": 5, "threads": 1})
    # (process, batch) in which a scene cannot be read, or is never read to its end
    config.data.fails = config.data.hangs = (-1, -1)
    config.data.lost = (-1, -1)  # likewise, at which an object store is gone
    config.data.patience = 600.0
    return config


class Toy:
    """Two stacked blocks and a head."""

    scenes_per_row = 1

    def init(self, key: jax.Array) -> Any:
        blocks = 0.3 * jax.random.normal(key, (2, 3, 3))
        student = {
            "backbone": {"enc": {"stage0": {"blocks": {"weight": blocks}}}},
            "head": {"weight": jnp.ones((3,))},
        }
        return student, jax.tree.map(jnp.copy, student)


def make_step(objective: Toy, config: ConfigDict, mesh: Mesh):
    def loss_of(params, coord):
        blocks = params["backbone"]["enc"]["stage0"]["blocks"]["weight"]
        hidden = jnp.tanh(jnp.tanh(coord @ blocks[0]) @ blocks[1])
        return jnp.mean((hidden @ params["head"]["weight"] - jnp.sin(coord[..., 0])) ** 2)

    def step(state, batch, schedule, key):
        loss, grads = jax.value_and_grad(loss_of)(state["student"], batch["coord"])
        grads, norm = optimizer.clip_by_global_norm(grads, config.optim.clip)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = dict(state)
        new["student"], new["mu"], new["nu"], _ = optimizer.adamw(
            *(state["student"], grads, state["mu"], state["nu"]),
            count=state["step"] - state["bad_steps"]["total"] + 1,
            lr=schedule["lr"],
            beta1=schedule["beta1"],
            wd=schedule["wd"],
            scales=optimizer.layer_scales(state["student"], config.optim.lr_decay),
        )
        new["teacher"] = move_teacher(state["teacher"], new["student"], schedule["momentum"])
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        new["step"] = state["step"] + 1
        bad = jnp.where(good, 0, 1)
        new["bad_steps"] = {
            "total": state["bad_steps"]["total"] + bad,
            "in_a_row": jnp.where(good, 0, state["bad_steps"]["in_a_row"] + 1),
        }
        values = {
            "loss": loss,
            "grad_norm": norm,
            "points": jnp.sum(batch["count"]),
            "bad_steps": new["bad_steps"]["total"],
            "bad_steps_in_a_row": new["bad_steps"]["in_a_row"],
        }
        return new, jax.tree.map(lambda value: value.astype(jnp.float32), values)

    return jax.jit(step, donate_argnums=0)


def make_batches(
    data: Any, seed: int, scenes: int, start: int, process: int, processes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batch k is a function of (seed, k); batches in `data.nan` hold NaN."""
    batches = generate(data, seed, scenes, start, process, processes)
    return Patient(batches, data.patience, lambda: "being read: scene_7")


def generate(
    data: Any, seed: int, scenes: int, start: int, process: int, processes: int
) -> Iterator[dict[str, np.ndarray]]:
    local = scenes // processes
    while True:
        if tuple(data.fails) == (process, start):
            raise SceneError("scene_7: coord.npy is cut off")
        if tuple(data.lost) == (process, start):
            raise storage.LostError("s3://bucket cannot be used any more")
        if tuple(data.hangs) == (process, start):
            threading.Event().wait()
        rng = np.random.default_rng((seed, start))
        coord = rng.normal(size=(scenes, 5, 3)).astype(np.float32)
        if data.nan[0] <= start < data.nan[1]:
            coord[0, 0, 0] = np.nan
        time.sleep(data.seconds)
        part = slice(process * local, (process + 1) * local)
        yield {"coord": coord[part], "count": np.full(local, data.points, np.int32)}
        start += 1


def main(argv: Sequence[str]) -> int:
    argv, job = command.split_job(argv)
    config, workdir = parse_command_line(argv)
    start_processes(job)
    return run(config, storage.place(workdir))


def run(
    config: ConfigDict, workdir: Path, prepare_pictures: Any = None, prepare_measure: Any = None
) -> int:
    return train(
        config,
        workdir,
        objective=Toy(),
        make_step=make_step,
        make_schedule=sonata_schedule,
        make_batches=make_batches,
        prepare_pictures=prepare_pictures,
        prepare_measure=prepare_measure,
    )


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
