"""Pretrains an encoder.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/sonata.py:base --workdir=DIR --config.optim.lr=1e-3

`--config.any.key=VALUE` overrides a value of the config file. The same command again goes on where
the run stopped, or prints the result of a finished run. Exit codes: 0 finished; 1 an error, in one
line on stderr; 143 (SIGTERM) and 130 (Ctrl-C) stopped and saved.

Several processes find one another under SLURM, Open MPI and Kubernetes and on TPU slices; elsewhere
each is given --coordinator=HOST:PORT --processes=N --process=I (docs/scaling.md).
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from launch import command
from launch.objectives import make_objective
from point_jax import storage
from point_jax.data.pipeline import held_out, make_batches
from point_jax.data.scenes import Scene
from point_jax.evaluation.progress import load_probe
from point_jax.features.encoder import Encoder
from point_jax.interop.initial import initial_weights
from point_jax.interop.workdir import OTHERS
from point_jax.objectives.concerto import Concerto, point_losses
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.sonata_spec import SonataSpec
from point_jax.training import config as config_lib
from point_jax.training import loop, mesh, metrics, programs, schedules
from point_jax.training.step import make_train_step
from point_jax.visual.pictures import FeatureScene, curves, feature_picture

CURVES = [
    "loss",
    ["mask_loss", "roll_loss", "unmask_loss"],
    ["teacher_entropy", "student_entropy"],
    ["teacher_use", "student_use"],
    "feature_std",
    "grad_norm",
]


def main(argv: Sequence[str]) -> int:
    """Trains what the command line says; returns the exit code."""
    argv, job = command.split_job(argv)
    config, workdir = config_lib.parse_command_line(argv)
    command.keep_compiled()
    mesh.start_processes(job)
    try:
        objective, frozen = make_objective(config)
    except (ValueError, TypeError) as error:
        if isinstance(error, command.FOR_THE_USER):
            raise
        raise config_lib.ConfigError(str(error)) from error

    points = point_losses(objective).spec
    drawn = [*CURVES, "image_loss"] if "images" in config else CURVES
    return loop.train(
        config,
        storage.place(workdir),
        objective=objective,
        make_step=make_step,
        make_schedule=schedules.sonata_schedule,
        make_batches=make_batches,
        load_initial=partial(initial_weights, optional=OTHERS, apart=set(frozen)),
        load_frozen=partial(place_frozen, frozen) if frozen else None,
        prepare_pictures=lambda: Pictures(points, held_out(config.data), drawn),
        prepare_measure=lambda: Probe(points, config.probe),
        measure_every=config.probe.every,
    )


def place_frozen(params: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of parts of the teacher that stay as they are, placed as the template says."""
    parts = {name: template["teacher"][name] for name in params}
    placed = jax.tree.map(lambda leaf, x: jax.device_put(x, leaf.sharding), parts, dict(params))
    return {"teacher": placed}


def make_step(objective: Sonata | Concerto, config: config_lib.Config, devices: Mesh) -> Any:
    """The training step; on CPUs its program is kept for the next start."""
    step = make_train_step(objective, config, devices)
    settings = config.optim.copy_and_resolve_references().to_dict(), config.mesh.to_dict()
    return programs.keep(step, objective, *settings, dict(devices.shape))


def _on_this_process(params: Any) -> Any:
    """Whole parameters as one device has them: what one process runs alone must be its own."""
    return jax.tree.map(lambda x: x.addressable_data(0), params)


class Probe:
    """Measures how well the teacher's features separate classes, every so many steps."""

    def __init__(self, spec: SonataSpec, section: Any) -> None:
        self._probe = load_probe(section)
        self._network, self._grid_size = spec.network, spec.views.grid_size
        self._encoder: Encoder | None = None

    def __call__(self, step: int, teacher: Any) -> Mapping[str, float]:
        """The probes' scores."""
        if self._probe is None:
            return {}
        params = _on_this_process(teacher["backbone"])
        if self._encoder is None:  # it keeps no weights: they would outlive the step
            encoder = Encoder(self._network, params, self._grid_size)
            self._encoder = encoder.with_params({})
        try:
            return self._probe.measure(self._encoder.with_params(params))
        except (FloatingPointError, ValueError) as error:  # a probe must not end a pretraining
            print(f"no probe after step {step}: {error}", flush=True)
            return {}


class Pictures:
    """Draws the curves of a run, and PCA of the teacher's features on held-out scenes."""

    def __init__(
        self, spec: SonataSpec, scenes: Sequence[Scene], drawn: Sequence[str | Sequence[str]]
    ) -> None:
        self._spec, self._scenes, self._drawn = spec, scenes, drawn

    def __call__(self, untrained: Any, trained: Any, folder: Path) -> None:
        """Writes curves.png and, if there are scenes, pca.png."""
        curves(folder.parent / metrics.FILE, self._drawn, folder / "curves.png")
        if not self._scenes:
            return
        spec = self._spec
        encoder = Encoder(spec.network, untrained["backbone"], spec.views.grid_size)
        columns = {
            "untrained teacher, PCA": encoder,
            "trained teacher, PCA": encoder.with_params(_on_this_process(trained["backbone"])),
        }
        maps = {name: encode(self._scenes) for name, encode in columns.items()}
        rows = []
        for i, scene in enumerate(self._scenes):
            shown = maps["trained teacher, PCA"][i].voxels
            rows.append(
                FeatureScene(
                    scene.name,
                    scene.coord[shown],
                    None if scene.color is None else scene.color[shown],
                    None if scene.normal is None else scene.normal[shown],
                    {name: of[i].up_cast(spec.up_cast).at_voxels() for name, of in maps.items()},
                )
            )
        feature_picture(rows).save(folder / "pca.png")


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
