"""What launch.infer is given: the command line, and which files are to be made from which."""

import argparse
import difflib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from launch import command
from point_jax import storage
from point_jax.data.arrays import ReadOptions
from point_jax.data.checks import UNITS
from point_jax.data.readers import KIND, find_clouds
from point_jax.data.scenes import UP
from point_jax.training.config import ConfigError
from point_jax.visual.files import whole

FORMATS = ("npz", "ply", "png", "html")
RECORD = "infer.json"
# What may differ between runs into one folder: it does not change what a file holds.
HARMLESS = (
    *("input", "output", "format", "pattern", "overwrite", "skip_bad", "batch"),
    *("drop_invalid", "any_size"),
)
INPUTS = ("coord", "color", "normal")
NEEDED = ("checkpoint", "input", "output")


@dataclass(frozen=True)
class Options:
    """The command line, checked as far as it can be without the network and the clouds.

    Attributes:
        given: every flag and its value.
        formats: what to write.
        read: how to read clouds.
        inputs: properties that the network reads, or None for what the checkpoint says.
        towards: where estimated normals are turned to: "up", "middle", or (x, y, z).
    """

    given: argparse.Namespace
    formats: tuple[str, ...]
    read: ReadOptions
    inputs: tuple[str, ...] | None
    towards: str | tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """A cloud and the files that are still to be made of it: format -> path."""

    path: Path
    name: str
    files: dict[str, Path]


def parse(argv: Sequence[str]) -> Options:
    """The command line.

    Raises:
        ConfigError: a flag that does not exist (with the nearest name), a missing one, or a value
            that cannot be.
    """
    parser = command.Parser("launch.infer", add_help=False)
    add = parser.add_argument
    add("--checkpoint", type=storage.place)
    add("--input", type=Path)
    add("--output", type=partial(storage.local, what="--output"))
    add("--format", default="npz")
    add("--up_cast", type=int)
    add("--tree", choices=("teacher", "student"), default="teacher")
    add("--grid_size", type=_positive)
    add("--scale", type=_positive, default=1.0)
    add("--inputs")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--max_voxels", type=_count)
    add("--batch", type=_count, default=16)
    add("--pattern", default="*")
    for flag in ("levels", "overwrite", "skip_bad", "estimate_normals", "wo_color", "wo_normal"):
        add(f"--{flag}", action="store_true")
    add("--neighbours", type=_count, default=24)
    add("--radius", type=_positive, default=float("inf"))
    add("--normals_towards", default="up")
    add("--units", choices=tuple(UNITS), default="")
    add("--up", choices=tuple(UP), default="")
    add("--color_range", type=int, choices=(1, 255, 65535), default=0)
    add("--columns", default="")
    add("--drop_invalid", action="store_true")
    add("--any_size", action="store_true")
    add("--mesh", choices=("sample", "vertices"), default="sample")
    add("--density", type=_positive, default=ReadOptions.density)
    add("--count", type=_count, default=0)
    add("--seed", type=int, default=0)
    given, unknown = parser.parse_known_args(list(argv[1:]))
    for word in unknown:
        flag = word.split("=")[0]
        near = difflib.get_close_matches(flag, [f"--{name}" for name in vars(given)], 1)
        raise ConfigError(f"not a flag: {word}" + (f"; did you mean {near[0]}?" if near else ""))
    if missing := [f"--{name}" for name in NEEDED if getattr(given, name) is None]:
        raise ConfigError(f"missing: {', '.join(missing)}")
    formats = tuple(dict.fromkeys(given.format.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--format has {name!r}; expected some of {','.join(FORMATS)}")
    if given.up_cast is not None and given.up_cast < 0:
        raise ConfigError(f"--up_cast is {given.up_cast}; expected 0 or more")
    if given.neighbours < 3:
        raise ConfigError(f"--neighbours is {given.neighbours}; a plane needs 3")
    inputs = None if given.inputs is None else tuple(given.inputs.split(","))
    if inputs is not None and not set(inputs) <= set(INPUTS):
        raise ConfigError(f"--inputs is {given.inputs}; expected some of {','.join(INPUTS)}")
    read = {f.name: getattr(given, f.name) for f in fields(ReadOptions) if hasattr(given, f.name)}
    read |= {"color": not given.wo_color, "normal": not given.wo_normal}
    return Options(given, formats, ReadOptions(**read), inputs, _towards(given.normals_towards))


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _towards(text: str) -> str | tuple[float, ...]:
    if text in ("up", "middle"):
        return text
    try:
        place = tuple(float(number) for number in text.split(","))
    except ValueError:
        place = ()
    if len(place) != 3 or not all(map(math.isfinite, place)):
        raise ConfigError(f"--normals_towards is {text!r}; expected up, middle, or X,Y,Z")
    return place


class Record:
    """What a folder of results was made from and with, in its infer.json.

    Attributes:
        file: infer.json.
        settings: flags that change results, as they are now.
        weights: digest of the network's parameters, once `bind` has told it.
        inputs: name of a result -> the input that it was made from.
    """

    def __init__(self, options: Options):
        """Reads the record of --output, if there is one.

        Raises:
            ConfigError: it is damaged; or, without --overwrite, results there were made with
                other settings.
        """
        given = options.given
        self.file = given.output / RECORD
        self.settings: dict[str, Any] = {
            key: str(value.resolve()) if isinstance(value, Path) else value
            for key, value in vars(given).items()
            if key not in HARMLESS
        }
        if storage.is_remote(given.checkpoint):
            self.settings["checkpoint"] = str(given.checkpoint)
        self.settings["radius"] = str(given.radius)  # JSON has no infinity
        self.inputs: dict[str, str] = {}
        self.weights = ""
        self._overwrite = given.overwrite
        if not self.file.exists():
            return
        try:
            record = json.loads(self.file.read_text())
            before, self.inputs = dict(record["settings"]), dict(record["inputs"])
            self.weights = str(record["weights"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.file}: not what this command writes ({error}); remove it or the folder"
            ) from error
        other = [key for key, value in self.settings.items() if before.get(key) != value]
        if other and not given.overwrite:
            told = ", ".join(f"--{key}={before.get(key)}" for key in other)
            raise ConfigError(
                f"{given.output} holds results made with {told}; choose another --output, or "
                f"--overwrite them"
            )

    def bind(self, weights: str) -> None:
        """Raises ConfigError if results there were made with other weights than these."""
        if self.weights not in ("", weights) and not self._overwrite:
            raise ConfigError(
                f"{self.file.parent} holds results of other weights from the same place (trained "
                "on, or converted again); choose another --output, or --overwrite them"
            )
        self.weights = weights

    def check(self, name: str, path: Path, result: Path) -> None:
        """Raises ConfigError if the result of that name was made from another input."""
        made_from = self.inputs.get(name)
        if made_from is not None and made_from != str(path.resolve()):
            raise ConfigError(
                f"{result}: made from {made_from}, not from {path}; choose another --output, or "
                f"--overwrite it"
            )

    def add(self, name: str, path: Path) -> None:
        """Notes that there is a result of that name, made with the settings from that input."""
        self.inputs[name] = str(path.resolve())
        with whole(self.file) as part:
            content = {
                "settings": self.settings,
                "weights": self.weights,
                "inputs": self.inputs,
            }
            part.write_text(json.dumps(content, indent=1) + "\n")


def plan(options: Options, record: Record) -> tuple[list[Job], int]:
    """Clouds with files to be made, and the number of clouds that have all of theirs.

    Outputs lie in --output as the inputs lie in --input. They are called like their input without
    its suffix, or with it where two inputs would share a name.

    Raises:
        SceneError: nothing to read.
        ConfigError: an output would replace an input, be taken for one by the next run, or is
            there and was made from another input.
    """
    given = options.given
    root, output = given.input.resolve(), given.output.resolve()
    paths = find_clouds(given.input, given.pattern)
    single = len(paths) == 1 and paths[0] == given.input
    if not single and root in (output, *output.parents):
        raise ConfigError(
            f"--output={given.output} lies in --input={given.input}: the next run would take the "
            f"results for clouds; choose another place"
        )
    taken = {path.resolve() for path in paths}
    below = [Path(root.name)] if single else [path.relative_to(given.input) for path in paths]
    jobs, done = [], 0
    for path, name in zip(paths, names(below), strict=True):
        files = {kind: given.output / f"{name}.{kind}" for kind in options.formats}
        for file in files.values():
            if file.resolve() in taken:
                raise ConfigError(f"{file} is an input and would be replaced; choose --output")
        if not given.overwrite:
            for file in filter(Path.exists, files.values()):
                record.check(name, path, file)
            files = {kind: file for kind, file in files.items() if not file.exists()}
        done += not files
        jobs += [Job(path, name, files)] if files else []
    return jobs, done


def names(paths: Sequence[Path]) -> list[str]:
    """Names of the outputs of inputs: their paths without suffix where that tells them apart.

    Upper and lower case do not tell them apart: on some file systems it does not.
    """
    full = [path.as_posix() for path in paths]
    short = [
        path.with_suffix("").as_posix() if path.suffix.lower() in KIND else path.as_posix()
        for path in paths
    ]
    while True:
        count = Counter(name.lower() for name in short)
        longer = [
            whole if count[name.lower()] > 1 else name
            for whole, name in zip(full, short, strict=True)
        ]
        if longer == short:
            return short
        short = longer
