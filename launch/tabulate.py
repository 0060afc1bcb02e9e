"""Puts the results of several evaluations together: mean and spread over seeds.

    python -m launch.tabulate runs/eval/*
    python -m launch.tabulate runs/eval --output=table.md --json=table.json --curve=steps.png
    python -m launch.tabulate runs/s3dis --six_fold

The paths are workdirs of launch.evaluate, or folders of such; one without results.json is skipped,
and said so. The floors in a results.json are rows like any other. Rows that differ in nothing but
the seed become one; the same row in several files counts once.

  --output=FILE.md   also writes the table there
  --json=FILE        the same for programs, with the value of every seed
  --curve=FILE.png   mIoU at full resolution over steps of pretraining: a line for each protocol,
                     with the range of its seeds; raw and random encoders as horizontal lines
  --six_fold         S3DIS: the paths are of data s3dis-1 to s3dis-6, whose confusion matrices are
                     summed for every encoder, protocol and seed
  --wo_floors        without what stands under `floors` in the files
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from launch import command
from point_jax import storage
from point_jax.evaluation.candidates import RANDOM, RAW
from point_jax.evaluation.folds import six_fold
from point_jax.evaluation.report import HEADLINE, dumps
from point_jax.evaluation.results import find_results, merge, read_rows
from point_jax.evaluation.table import (
    Group,
    Spread,
    as_json,
    as_markdown,
    group,
    names_of,
)
from point_jax.training.config import ConfigError, write_atomically
from point_jax.visual.spread import Level, Line, spread_chart


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ConfigError: a flag that does not exist, or no path.
    """
    parser = command.Parser("launch.tabulate", add_help=False)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--output", type=partial(storage.local, what="--output"))
    parser.add_argument("--json", type=partial(storage.local, what="--json"))
    parser.add_argument("--curve", type=partial(storage.local, what="--curve"))
    parser.add_argument("--six_fold", action="store_true")
    parser.add_argument("--wo_floors", action="store_true")
    given = parser.parse_args(argv[1:])
    if given.curve is not None and given.curve.suffix.lower() != ".png":
        raise ConfigError(f"--curve={given.curve}: expected FILE.png")
    return given


def curve(groups: Sequence[Group]) -> Image.Image:
    """The chart of --curve.

    Raises:
      ConfigError: no result says how long its encoder was trained.
    """
    runs: dict[object, list[Group]] = {}
    for one in groups:
        if one.setting.steps is not None:
            runs.setdefault(replace(one.setting, steps=None), []).append(one)
    if not runs:
        raise ConfigError("--curve: no result has `steps`; expected some of encoders of a run")
    settings = [replace(found[0].setting, steps=None) for found in runs.values()]
    lines = []
    for name, found in zip(names_of(settings, ("protocol",)), runs.values(), strict=True):
        found.sort(key=lambda one: one.setting.steps or 0)
        points = [(one.setting.steps, *_percents(_headline(one))) for one in found]
        lines.append(Line(name, np.array(points, np.float64)))
    still = [one for one in groups if one.setting.steps is None]
    still = [one for one in still if one.setting.encoder in (RAW, RANDOM)]
    names = names_of([one.setting for one in still], ("encoder", "protocol"))
    protocols = [setting.protocol for setting in settings]
    levels = []
    for name, one in zip(names, still, strict=True):
        protocol = one.setting.protocol
        line = protocols.index(protocol) if protocol in protocols else None
        raw = one.setting.encoder == RAW
        levels.append(Level(name, *_percents(_headline(one)), line=line, dash=int(raw)))
    return spread_chart(
        lines,
        levels,
        title="mIoU at every original point, per cent: mean and range over seeds",
        below="steps of pretraining",
    )


def main(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code."""
    given = parse(argv)
    files, empty = find_results(given.paths)
    for path in empty:
        print(f"skipped: no results.json in {path}", file=sys.stderr)
    read = [read_rows(file) for file in files]
    rows = merge(row for rows in read for row in (rows[:1] if given.wo_floors else rows))
    groups = group(six_fold(rows) if given.six_fold else rows)
    text = as_markdown(groups)
    print(text)
    if given.output is not None:
        _write(given.output, "--output", text)
    if given.json is not None:
        _write(given.json, "--json", dumps(as_json(groups)))
    if given.curve is not None:
        picture = curve(groups)
        command.make_folder(given.curve.parent, "--curve")
        try:
            picture.save(given.curve)
        except OSError as error:
            raise _unwritable(given.curve, "--curve", error) from error
    return 0


def _headline(one: Group) -> Spread:
    spread = one.spread(HEADLINE, "mIoU")
    assert spread is not None  # every row has it
    return spread


def _percents(spread: Spread) -> tuple[float, float, float]:
    return 100 * spread.mean, 100 * spread.least, 100 * spread.most


def _write(file: Path, flag: str, text: str) -> None:
    command.make_folder(file.parent, flag)
    try:
        write_atomically(file, text)
    except OSError as error:
        raise _unwritable(file, flag, error) from error


def _unwritable(file: Path, flag: str, error: OSError) -> ConfigError:
    return ConfigError(f"{flag}={file}: cannot be written ({error.strerror})")


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
