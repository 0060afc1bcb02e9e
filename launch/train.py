"""Pretrains an encoder.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/sonata.py:base --workdir=DIR --config.optim.lr=1e-3

`--config.any.key=VALUE` overrides a value of the config file. The same command again goes on where
the run stopped, or prints the result of a finished run. Exit codes: 0 finished; 1 an error, in one
line on stderr; 143 (SIGTERM) and 130 (Ctrl-C) stopped and saved.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch import command
from point_jax.data.pipeline import make_batches
from point_jax.objectives.sonata import Sonata
from point_jax.training import config as config_lib
from point_jax.training import loop, mesh, schedules
from point_jax.training.step import make_train_step


def main(argv: Sequence[str]) -> int:
    """Trains what the command line says; returns the exit code."""
    config, workdir = config_lib.parse_command_line(argv)
    mesh.start_processes()
    return loop.train(
        config,
        Path(workdir),
        objective=Sonata(config.objective),
        make_step=make_train_step,
        make_schedule=schedules.sonata_schedule,
        make_batches=make_batches,
    )


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
