"""Times of the encoder and of a training step, their memory, and where the time goes.

    python -m launch.benchmark
    python -m launch.benchmark --what=train --input=room.npz --json=result.json

  --what=forward       the encoder on one cloud, geometry included, as launch.infer runs it;
                       train: a training step of the config, as launch.train runs it; geometry: the
                       integer structure of a cloud alone; views: the views of a scene alone
  --points=N[,N...]    a furnished room of N voxels (2 cm as the network's), always the same;
                       default 20000,50000,100000, for train and views data.scene_points
  --input=FILE[,FILE]  clouds from files instead, any that launch.infer reads; an NPZ with coord,
                       color, normal and grid_coord keeps its voxels
  --config=configs/sonata.py:base, --config.any.key=VALUE   the network, and for train and views
                       everything else; the images of Concerto are made for the cloud
  --dtype=float32      or bfloat16: of the arithmetic, whatever the config says
  --batch=1            scenes of a training step, over all devices
  --warmup=1           calls before the timed ones
  --repeats=5          timed calls; a training step goes on from the state of the one before
  --json=FILE          the same numbers for programs
  --profile=DIR        keeps the profile of one call of each program, for TensorBoard or Perfetto
  --cache_dir=DIR      keeps compiled programs, so that another run compiles nothing (and cannot
                       tell how long that takes)

What is done with each input, in this order: its arrays are put on the device; the program is
traced, lowered and compiled into an empty cache; JAX forgets it and starts it again from the cache;
the first warm-up call runs, with its peak memory taken: what the device's allocator says, or else
the growth of the process's resident set, which starts with parameters and inputs in place; the
other warm-up calls and the timed ones run, each until its results are ready (median, min); one more
runs under the profiler, for the parts. GFLOP needed are those of real points, without padding. A
product of two matrices of 2,048 x 2,048 (accelerators: 8,192) is timed before and after all, and
between the timed calls; on CPUs between these also how fast the cores pass on what they wrote,
which changes when a virtual machine's are moved.
docs/benchmark.md says what every number means.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from launch import command
from launch.objectives import outlined
from point_jax.data.scenes import SceneError
from point_jax.measure import programs
from point_jax.measure.inputs import Input, file_input, room_input
from point_jax.measure.report import calibration_text, record_text
from point_jax.measure.room import SMALLEST
from point_jax.measure.runs import measure
from point_jax.measure.timing import machine_speed
from point_jax.objectives.settings import sonata_spec
from point_jax.training import config as config_lib
from point_jax.training.config import Config, ConfigError

KINDS = ("forward", "train", "views", "geometry")
CONFIG = "configs/sonata.py:base"
POINTS = (20_000, 50_000, 100_000)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: own flags, and those of the config."""
    parser = command.Parser("launch.benchmark", add_help=False)
    add = parser.add_argument
    add("--what", choices=KINDS, default="forward")
    add("--points", type=_points)
    add("--input", type=_files, default=())
    add("--config", default=CONFIG)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    for flag, default in (("batch", 1), ("warmup", 1), ("repeats", 5)):
        add(f"--{flag}", type=_count, default=default)
    for flag in ("json", "profile", "cache_dir"):
        add(f"--{flag}", type=Path)
    given, rest = parser.parse_known_args(list(argv[1:]))
    if given.points and given.input:
        raise ConfigError("--points and --input are both given; choose one")
    for path in given.input:
        if not path.exists():
            raise SceneError(f"{path}: no such file or folder")
    if given.json:
        command.check_file(given.json, "--json")
    for flag in ("profile", "cache_dir"):
        if folder := vars(given)[flag]:
            command.make_folder(folder, f"--{flag}")
    return given, rest


def _points(text: str) -> tuple[int, ...]:
    try:
        points = tuple(int(part) for part in text.split(","))
    except ValueError:
        points = (0,)
    if min(points) < SMALLEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers of at least {SMALLEST} points")
    return points


def _files(text: str) -> tuple[Path, ...]:
    files = tuple(Path(part) for part in text.split(",") if part)
    if not files:
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return files


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def read_config(given: argparse.Namespace, rest: Sequence[str]) -> Config:
    """The config with its overrides and the dtype of the command line."""
    config = command.config_alone("benchmark", given.config, rest)
    network: Any = config.network
    network.dtype = given.dtype
    if "images" in config:
        config.images.dtype = given.dtype
    return config


def inputs(given: argparse.Namespace, config: Config) -> Iterator[Input]:
    """The clouds, one by one."""
    for path in given.input:
        yield file_input(path, config.views.grid_size)
    if not given.input:
        scene = (config.data.scene_points,)
        default = scene if given.what in ("train", "views") else POINTS
        for points in given.points or default:
            yield room_input(points, config.views.grid_size)


def builder(given: argparse.Namespace, config: Config) -> Callable[[Input], programs.Program]:
    """What makes the program for an input."""
    try:
        if given.what == "train":
            return partial(programs.train, outlined(config), config, given.batch)
        spec = sonata_spec(config)
    except (ValueError, TypeError) as error:
        if isinstance(error, command.FOR_THE_USER):
            raise
        raise ConfigError(str(error)) from error
    match given.what:
        case "forward":
            return partial(programs.forward, spec.network)
        case "geometry":
            return partial(programs.geometry, spec.network)
        case _:
            return partial(programs.views, spec)


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "machine": platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": config_lib.package_versions(),
        "calibration": {},
    }


def main(argv: Sequence[str]) -> int:
    """Measures what the command line says; returns the exit code."""
    given, rest = parse(argv)
    config = read_config(given, rest)
    build = builder(given, config)
    about = environment()
    dtypes = list(dict.fromkeys(("float32", given.dtype)))

    def calibration(when: str) -> None:
        about["calibration"][when] = {dtype: machine_speed(dtype)() for dtype in dtypes}
        print(calibration_text(when, about), flush=True)

    calibration("before")
    records = []
    for number, cloud in enumerate(inputs(given, config)):
        folder = given.profile and given.profile / f"{given.what}_{number}"
        try:
            program = build(cloud)
        except ValueError as error:
            raise ConfigError(f"{cloud.name}: {error}") from error
        found = measure(program, given.warmup, given.repeats, given.cache_dir, folder)
        found = {"what": given.what, "input": cloud.name, "dtype": given.dtype, **found}
        found["profile"] = str(folder) if folder else None
        records.append(found)
        print(record_text(found), flush=True)
        del program
    calibration("after")
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key != "json"}
        settings["overrides"] = list(rest)
        content = {"environment": about, "settings": settings, "records": records}
        given.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
        print(f"written: {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
