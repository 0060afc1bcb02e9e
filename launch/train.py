"""Pretrains an encoder.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/sonata.py:base --workdir=DIR --config.optim.lr=1e-3

`--config.any.key=VALUE` overrides a value of the config file. The same command again goes on where
the run stopped, or prints the result of a finished run. Exit codes: 0 finished; 1 an error, in one
line on stderr; 143 (SIGTERM) and 130 (Ctrl-C) stopped and saved.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from launch import command
from point_jax.data.pipeline import held_out, make_batches
from point_jax.features.encoder import Encoder
from point_jax.objectives.settings import make_sonata
from point_jax.training import config as config_lib
from point_jax.training import loop, mesh, metrics, schedules
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
    config, workdir = config_lib.parse_command_line(argv)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # A run that is resumed compiles nothing; JAX_COMPILATION_CACHE_DIR chooses another place.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "point_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    mesh.start_processes()
    try:
        objective = make_sonata(config)
    except (ValueError, TypeError) as error:
        raise config_lib.ConfigError(str(error)) from error

    def pictures(untrained: Any, trained: Any, folder: Path) -> None:
        curves(folder.parent / metrics.FILE, CURVES, folder / "curves.png")
        scenes = held_out(config.data)
        if not scenes:
            return
        spec = objective.spec
        encoder = Encoder(spec.network, untrained["backbone"], spec.views.grid_size)
        columns = {
            "untrained teacher, PCA": encoder,
            "trained teacher, PCA": encoder.with_params(trained["backbone"]),
        }
        maps = {name: encode(scenes) for name, encode in columns.items()}
        rows = []
        for i, scene in enumerate(scenes):
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

    return loop.train(
        config,
        Path(workdir),
        objective=objective,
        make_step=make_train_step,
        make_schedule=schedules.sonata_schedule,
        make_batches=make_batches,
        write_pictures=pictures,
    )


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
