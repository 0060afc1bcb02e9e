"""Reads what evaluations wrote: rows of any number of results.json, checked key by key."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from point_jax import limits
from point_jax.evaluation.candidates import LIFTED
from point_jax.evaluation.confusion import scores
from point_jax.evaluation.report import HEADLINE, RESOLUTIONS
from point_jax.training.checkpoint import FOLDER
from point_jax.training.config import ConfigError

NAME = "results.json"
MEANS = ("mIoU", "mAcc", "allAcc")

_TEXT, _COUNT = limits.text(empty=False), limits.whole(0)
_KEYS = {
    "encoder": _TEXT,
    "protocol": _TEXT,
    "seed": _COUNT,
    "resolution": limits.MAPPING,
    "config": limits.text(),
    "data": _TEXT,
    "train_scenes": limits.each(limits.text()),
    "test_scenes": limits.each(limits.text()),
}
# What files may lack: written since, or only where it applies.
_OPTIONAL = {
    "checkpoint": limits.either(_TEXT, limits.NOTHING),
    "steps": limits.either(_COUNT, limits.NOTHING),
    "label_share": limits.number(above=0, most=1),
    "train_steps": limits.either(_COUNT, limits.NOTHING),
    "grid_size": limits.either(limits.number(above=0), limits.NOTHING),
    "tree": limits.either(_TEXT, limits.NOTHING),
    "settings": limits.either(_TEXT, limits.NOTHING),
    "shortcut": limits.either(limits.MAPPING, limits.NOTHING),
    "unseen": limits.either(limits.PROBABILITY, limits.NOTHING),
    "floors": limits.each(limits.MAPPING),
}
_SCORES = dict.fromkeys(MEANS, limits.PROBABILITY) | {"per_class": limits.MAPPING}
_MATRIX = limits.each(limits.each(_COUNT))


@dataclass(frozen=True)
class Setting:
    """All that a results.json says of how a result came about, but for the seed.

    Attributes:
      encoder: as in `Result`; of `<run>/checkpoints/<step>`, joined with image features or not,
        the run, since `steps` says the rest.
      checkpoint: likewise.
      config: without its protocol, which floors do not always share with the row they are beside.
      protocol, data, label_share, steps, train_steps, train_scenes, test_scenes, grid_size, tree,
        settings: as in `Result`.
      classes: names of the classes, in the order of the matrices.
    """

    encoder: str
    protocol: str
    data: str
    config: str
    checkpoint: str | None
    steps: int | None
    label_share: float
    train_steps: int | None
    train_scenes: tuple[str, ...]
    test_scenes: tuple[str, ...]
    grid_size: float | None = None
    tree: str | None = None
    settings: str | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Scores at one resolution.

    Attributes:
      mIoU, mAcc, allAcc: from 0 to 1, see `Scores`.
      classes: names, in the order of the matrix.
      confusion: (K, K), see `Scores`; None in files of an older program.
    """

    mIoU: float
    mAcc: float
    allAcc: float
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
      setting: what decided it,
      seed: besides the seed.
      found: resolution -> scores; "full" is there.
      shortcut: share of the features explained by height and normals; None where not measured.
      files: where it was read from.
      areas: of a six-fold summary, the scores of each area at full resolution.
    """

    setting: Setting
    seed: int
    found: Mapping[str, Found]
    shortcut: float | None
    files: tuple[Path, ...]
    areas: Mapping[str, Found] = field(default_factory=dict)


def find_results(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The results.json that some paths mean.

    Args:
      paths: such files, folders that hold one, or folders of such folders.

    Returns:
      The files, each once, and the paths that hold none, as those of evaluations that still run.

    Raises:
      ConfigError: a path does not exist, or there is not one results.json.
    """
    found: dict[Path, Path] = {}
    empty = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; expected a folder with {NAME}")
        if _is(path):
            there = [path]
        else:
            there = [file for file in (path / NAME, *sorted(path.glob(f"*/{NAME}"))) if _is(file)]
        found.update((file.resolve(), file) for file in there)
        empty += [] if there else [path]
    if not found:
        raise ConfigError(
            f"no {NAME} in {', '.join(map(str, empty)) or 'no folder'}, nor in the folders there; "
            "expected workdirs of launch.evaluate"
        )
    return list(found.values()), empty


def read_rows(file: Path) -> list[Row]:
    """The rows of a results.json: the main one, then the floors.

    Raises:
      ConfigError: it cannot be read, or a value is missing or not what it should be: file and key.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, expected a JSON object")
    try:
        main = _row(content, file, "")
        return [main, *(_row(x, file, f"floors[{i}].") for i, x in enumerate(_floors(content)))]
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{file}: {error}") from error


def merge(rows: Iterable[Row]) -> list[Row]:
    """Each result once: the same setting and seed in several files must mean the same scores.

    A resolution that only one of them has, or a matrix, is kept.

    Raises:
      ConfigError: scores that differ, naming both files.
    """
    kept: dict[tuple[Setting, int], Row] = {}
    for row in rows:
        key = (row.setting, row.seed)
        kept[key] = _joined(kept[key], row) if key in kept else row
    return list(kept.values())


def without(config: str, name: str) -> str:
    """A config's file and argument without the argument's part `name=...`."""
    file, colon, argument = config.partition(":")
    parts = [part for part in argument.split(",") if not part.startswith(f"{name}=")]
    return f"{file}{colon if parts else ''}{','.join(parts)}"


def _is(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a path through a folder that may not be read
        return False


def _floors(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return content.get("floors", ())


def _check(values: Mapping[str, Any], table: Mapping[str, limits.Limit], place: str) -> None:
    """Raises ValueError where a key is missing or its value does not fit."""
    for name in table:
        if name not in values:
            raise ValueError(f"{place}{name} is missing, expected {table[name].words}")
    limits.check(values, table, place)


def _row(content: Mapping[str, Any], file: Path, place: str) -> Row:
    _check(content, _KEYS, place)
    limits.check(content, _OPTIONAL, place)
    resolution = content["resolution"]
    if HEADLINE not in resolution or not set(resolution) <= set(RESOLUTIONS):
        raise ValueError(
            f"{place}resolution has {', '.join(resolution) or 'nothing'}, expected {HEADLINE} and "
            f"possibly others of {', '.join(RESOLUTIONS)}"
        )
    shortcut = content.get("shortcut") or {}
    _check(shortcut, {"explained": limits.number()} if shortcut else {}, f"{place}shortcut.")
    told: dict[str, Any] = {f.name: content.get(f.name) for f in fields(Setting)}
    told |= {name: tuple(content[name]) for name in ("train_scenes", "test_scenes")}
    told |= {name: _run(told[name]) for name in ("encoder", "checkpoint")}
    told["config"] = without(content["config"], "protocol")
    told["label_share"] = float(content.get("label_share", 1.0))
    found = {
        name: _found(resolution[name], f"{place}resolution.{name}.")
        for name in RESOLUTIONS
        if name in resolution
    }
    told["classes"] = found[HEADLINE].classes
    for name, one in found.items():
        if one.classes != told["classes"]:
            raise ValueError(f"{place}resolution.{name}.per_class: other names than {HEADLINE}'s")
    return Row(
        Setting(**told),
        content["seed"],
        found,
        shortcut.get("explained"),
        (file,),
    )


def _found(content: Any, place: str) -> Found:
    if not isinstance(content, Mapping):
        raise ValueError(f"{place[:-1]} is {content!r}, expected {limits.MAPPING.words}")
    _check(content, _SCORES, place)
    names = tuple(content["per_class"])
    mIoU, mAcc, allAcc = means = tuple(float(content[name]) for name in MEANS)
    if content.get("confusion") is None:
        return Found(mIoU, mAcc, allAcc, names)
    rows = content["confusion"]
    if not _MATRIX.holds(rows) or {len(names)} != {len(row) for row in rows} | {len(rows)}:
        raise ValueError(
            f"{place}confusion does not fit, expected {len(names)} rows of {len(names)} whole "
            "numbers at least 0: one for each name in per_class"
        )
    again = scores(np.array(rows, np.int64), names)
    for name, value in zip(MEANS, means, strict=True):
        if abs(value - getattr(again, name)) > 1e-6:
            raise ValueError(
                f"{place}{name} is {value}, but its confusion matrix gives {getattr(again, name)}"
            )
    return Found(mIoU, mAcc, allAcc, names, again.confusion)


def _run(name: str | None) -> str | None:
    """The run's folder of `<run>/checkpoints/<step>`; any other name as it is."""
    if name is None:
        return None
    points, joined, images = name.partition(f"+{LIFTED}")
    path = Path(points)
    numbered = path.parent.name == FOLDER and path.name.isdigit()
    return f"{path.parent.parent if numbered else path}{joined}{images}"


def _joined(one: Row, two: Row) -> Row:
    found = dict(one.found)
    for name, other in two.found.items():
        same = found.setdefault(name, other)
        known = same.confusion is not None and other.confusion is not None
        if same != (other if known else replace(other, confusion=same.confusion)):
            setting = one.setting
            raise ConfigError(
                f"{one.files[0]} and {two.files[0]} both hold {setting.encoder}, "
                f"{setting.protocol}, seed {one.seed}, but {name} mIoU {same.mIoU:.6f} and "
                f"{other.mIoU:.6f}: they differ in something that they do not say, as an override "
                "on the command line or the network of an untrained encoder; leave one of them "
                "out, or what stands under floors with --wo_floors"
            )
        if same.confusion is None:
            found[name] = other
    shortcut = two.shortcut if one.shortcut is None else one.shortcut
    ordered = {name: found[name] for name in RESOLUTIONS if name in found}
    return Row(one.setting, one.seed, ordered, shortcut, one.files + two.files)
