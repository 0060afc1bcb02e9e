"""Compiles a training step for devices that are not there: does it fit, what does it cost?

    python -m launch.dryrun --config=configs/sonata.py:base --topology=v5e:4x8
    python -m launch.dryrun --config=configs/concerto.py:large --topology=2*v5e:16x16 \\
        --config.train.batch=512 --json=plan.json

  --topology=NAME   v4, v5e, v5p, v6e and tpu7x by the shape of a slice (v5e:4x8, v5p:4x4x4),
                    several as 2*v5e:16x16; h100:4x8 for four hosts of eight GPUs; cpu:8
  --slices=N        the same as N* before the name
  --config=FILE, --config.any.key=VALUE   what is trained, as for launch.train
  --json=FILE       the same numbers for programs
  --hlo=FILE        the compiled program's text
  --draws=3         how many draws of a furnished room's views tell what is needed; 0: none

Needs no device: libtpu for TPUs (pip install 'point_jax[tpu]'), the compiler's part of JAX's CUDA
plugin for GPUs (pip install 'point_jax[dryrun-cuda]'), each in an environment of its own. The whole
step is compiled, which takes minutes. For config.images.encoder it takes a name as well
(dinov2-with-registers-large, which is also what an empty one stands for): shapes need no weights.
What the numbers are: docs/scaling.md. Exit codes: 0 fits; 3 does not fit; 1 an error, in one line
on stderr.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from launch import command
from launch.objectives import outlined
from point_jax.measure import topology as topologies
from point_jax.measure.dryrun import dry_run, make_step
from point_jax.measure.dryrun_text import record_text, verdict
from point_jax.training.config import ConfigError

FITS, DOES_NOT_FIT = 0, 3


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: own flags, and those of the config."""
    parser = command.Parser("launch.dryrun", add_help=False)
    add = parser.add_argument
    add("--topology", required=True)
    add("--slices", type=int, default=1)
    add("--config", required=True)
    add("--draws", type=int, default=3)
    add("--json", type=Path)
    add("--hlo", type=Path)
    given, rest = parser.parse_known_args(list(argv[1:]))
    for flag in ("json", "hlo"):
        if path := vars(given)[flag]:
            command.check_file(path, f"--{flag}")
    if given.slices < 1:
        raise ConfigError(f"--slices={given.slices}: expected 1 or more")
    if given.draws < 0:
        raise ConfigError(f"--draws={given.draws} is below 0")
    return given, rest


def main(argv: Sequence[str]) -> int:
    """Plans what the command line says; returns the exit code."""
    given, rest = parse(argv)
    config = command.config_alone("dryrun", given.config, rest)
    # The devices of this machine, if it has any, are left alone.
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.parse(given.topology, given.slices)
        step = make_step(outlined(config), config, topology)
    except (ValueError, TypeError) as error:
        if isinstance(error, command.FOR_THE_USER):
            raise
        raise ConfigError(str(error)) from error
    print(f"compiling the training step for {topology}: minutes", flush=True)
    record, text = dry_run(step, given.draws)
    record = {"config": given.config, "overrides": list(rest), **record}
    print(record_text(record))
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    if given.hlo and text:
        given.hlo.write_text(text)
    if record["memory"]["fits"]:
        return FITS
    print(f"error: {verdict(record)}", file=sys.stderr)
    return DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
