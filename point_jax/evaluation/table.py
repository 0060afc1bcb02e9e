"""Results of several evaluations in one table: mean and spread over seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from point_jax.evaluation.candidates import RANDOM, RAW
from point_jax.evaluation.classes import S3DIS_AREAS
from point_jax.evaluation.protocols import FITTED, SCRATCH, TRAINED
from point_jax.evaluation.report import HEADLINE, RESOLUTIONS, markdown_table, or_dash, percent
from point_jax.evaluation.results import MEANS, Found, Row, Setting

PROTOCOLS = (*FITTED, *TRAINED)  # in the order of the rows
HEADS = {
    "encoder": "encoder",
    "protocol": "protocol",
    "data": "data",
    "config": "config",
    "checkpoint": "checkpoint",
    "steps": "steps",
    "label_share": "labels",
    "train_steps": "probe steps",
    "grid_size": "voxel size",
    "tree": "tree",
    "settings": "settings",
    "classes": "classes",
    "train_scenes": "training scenes",
    "test_scenes": "test scenes",
}
TEXTS = ("encoder", "protocol", "data", "config", "checkpoint")  # the others are numbers


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
      values: seed -> number; at least one.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The plain mean."""
        return float(np.mean(self._all))

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single seed."""
        return float(np.std(self._all, ddof=1)) if len(self.values) > 1 else None

    @property
    def least(self) -> float:
        """The smallest."""
        return min(self._all)

    @property
    def most(self) -> float:
        """The largest."""
        return max(self._all)

    @property
    def _all(self) -> list[float]:
        return list(self.values.values())


@dataclass(frozen=True)
class Group:
    """Results that differ in nothing but the seed.

    Attributes:
      setting: what they have in common.
      rows: by rising seed, each seed once.
    """

    setting: Setting
    rows: tuple[Row, ...]

    @property
    def floor(self) -> bool:
        """Whether it is what an encoder has to beat: raw input, or untrained features."""
        return self.setting.encoder in (RAW, RANDOM) and self.setting.protocol != SCRATCH

    def spread(self, resolution: str, mean: str) -> Spread | None:
        """One of "mIoU", "mAcc", "allAcc" over the seeds; None where no seed has it."""
        return _spread({row.seed: row.found.get(resolution) for row in self.rows}, mean)

    def area(self, name: str) -> Spread | None:
        """The mIoU, full, of an area of S3DIS; None for a result that is not of six folds."""
        return _spread({row.seed: row.areas.get(name) for row in self.rows}, "mIoU")

    @property
    def shortcut(self) -> Spread | None:
        """Share of the features explained by height and normals."""
        values = {row.seed: row.shortcut for row in self.rows if row.shortcut is not None}
        return Spread(values) if values else None


def group(rows: Iterable[Row]) -> list[Group]:
    """Rows (each setting and seed once, see `merge`) in groups, in the order of the table.

    By data and share of the labels; floors first; then by protocol, and from the lowest mIoU to the
    highest.
    """
    together: dict[Setting, list[Row]] = {}
    for row in rows:
        together.setdefault(row.setting, []).append(row)
    groups = [
        Group(setting, tuple(sorted(found, key=lambda row: row.seed)))
        for setting, found in together.items()
    ]
    return sorted(groups, key=_place)


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """`rows`: settings, seeds, and for each resolution and mean its spread and values by seed."""
    return {"rows": [_entries(one) for one in groups]}


def as_markdown(groups: Sequence[Group]) -> str:
    """A table for each resolution; what all rows have in common stands above them."""
    columns, common = _columns([one.setting for one in groups])
    lines = [
        "# Results",
        "",
        "Per cent: mean ± sample standard deviation (least–most) over the seeds. voxel: at the "
        "voxels; full: at every original point; voted: at every original point, summed over votes.",
        "",
        *(f"- {HEADS[name]}: {text}" for name, text in common.items()),
    ]
    for resolution in (HEADLINE, *(name for name in RESOLUTIONS if name != HEADLINE)):
        there = [one for one in groups if one.spread(resolution, "mIoU")]
        if there:
            lines += ["", f"## {resolution}", "", *_resolution(there, columns, resolution)]
    areas = [one for one in groups if one.area(S3DIS_AREAS[0])]
    if areas:
        lines += ["", f"## mIoU of each area, {HEADLINE}", "", *_areas(areas, columns)]
    return "\n".join(lines) + "\n"


def names_of(settings: Sequence[Setting], first: Sequence[str]) -> list[str]:
    """Short names that tell settings apart.

    Args:
      settings: all different.
      first: attributes that every name starts with; others follow where names are still the same.
    """
    names = [", ".join(_text(one, name) for name in first) for one in settings]
    for attribute in (name for name in HEADS if name not in first):
        shared = [[i for i, other in enumerate(names) if other == name] for name in names]
        texts = [_text(one, attribute) for one in settings]
        label = "" if attribute in TEXTS else f"{HEADS[attribute]} "
        names = [
            f"{name}, {label}{text}" if len({texts[i] for i in same}) > 1 else name
            for name, same, text in zip(names, shared, texts, strict=True)
        ]
    return names


def _spread(found: Mapping[int, Found | None], mean: str) -> Spread | None:
    values = {seed: getattr(one, mean) for seed, one in found.items() if one is not None}
    return Spread(values) if values else None


def _place(one: Group) -> tuple[Any, ...]:
    setting, spread = one.setting, one.spread(HEADLINE, "mIoU")
    protocol = setting.protocol
    rank = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
    mean = spread.mean if spread else 0.0
    return setting.data, -setting.label_share, not one.floor, rank, protocol, mean, setting.encoder


def _text(setting: Setting, name: str) -> str:
    value = getattr(setting, name)
    if name == "label_share":
        return f"{100 * value:g} %"
    if isinstance(value, float):
        return f"{value:g} m"
    if isinstance(value, tuple):
        ends = " … ".join(dict.fromkeys([value[0], value[-1]])) if value else "–"
        return f"{len(value)} ({ends})"
    return or_dash(f"{value:,}" if isinstance(value, int) else value)


def _columns(settings: Sequence[Setting]) -> tuple[list[str], dict[str, str]]:
    """Attributes that are told in every row, texts first, and the texts of those common to all."""
    columns, common = ["encoder", "protocol"], {}
    for name in HEADS:
        values = {getattr(one, name) for one in settings}
        if name in columns or values <= {None, ()}:
            continue
        if name == "checkpoint" and all((s.checkpoint or "") in s.encoder for s in settings):
            continue
        if len(values) > 1:
            columns.append(name)
        else:
            common[name] = _text(settings[0], name)
    return columns, common


def _resolution(groups: Sequence[Group], columns: Sequence[str], name: str) -> Iterator[str]:
    shortcut = name == HEADLINE and any(one.shortcut for one in groups)
    head = [*(HEADS[column] for column in columns), "seeds", *(f"{m} {name}" for m in MEANS)]
    head += ["explained by height and normals"] if shortcut else []
    cells = []
    for one in groups:
        spreads = [one.spread(name, mean) for mean in MEANS]
        seeds = ", ".join(str(seed) for seed in (spreads[0].values if spreads[0] else ()))
        cells.append([*(_text(one.setting, column) for column in columns), seeds])
        cells[-1] += [_cell(spread) for spread in [*spreads, *([one.shortcut] * shortcut)]]
    return markdown_table(head, cells, text=sum(column in TEXTS for column in columns))


def _areas(groups: Sequence[Group], columns: Sequence[str]) -> Iterator[str]:
    head = [*(HEADS[column] for column in columns), *S3DIS_AREAS, "mean of the areas"]
    cells = []
    for one in groups:
        spreads = [one.area(area) for area in S3DIS_AREAS]
        mean = float(np.mean([spread.mean for spread in spreads if spread]))
        cells.append([_text(one.setting, column) for column in columns])
        cells[-1] += [*(_cell(spread) for spread in spreads), percent(mean)]
    return markdown_table(head, cells, text=sum(column in TEXTS for column in columns))


def _cell(spread: Spread | None) -> str:
    if spread is None or spread.std is None:
        return percent(spread.mean if spread else None)
    least, most = percent(spread.least), percent(spread.most)
    return f"{percent(spread.mean)} ± {percent(spread.std)} ({least}–{most})"


def _entries(one: Group) -> dict[str, Any]:
    told = {f.name: getattr(one.setting, f.name) for f in fields(Setting)}
    told = {name: list(x) if isinstance(x, tuple) else x for name, x in told.items()}
    spreads = {
        name: {mean: one.spread(name, mean) for mean in MEANS}
        for name in RESOLUTIONS
        if one.spread(name, MEANS[0])
    }
    return {
        **told,
        "floor": one.floor,
        "seeds": [row.seed for row in one.rows],
        "files": sorted({str(file) for row in one.rows for file in row.files}),
        "resolution": {
            name: {mean: _numbers(spread) for mean, spread in means.items()}
            for name, means in spreads.items()
        },
        "explained": _numbers(one.shortcut),
        "areas": {area: _numbers(one.area(area)) for area in S3DIS_AREAS if one.area(area)},
    }


def _numbers(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    values = {str(seed): value for seed, value in spread.values.items()}
    numbers = {"mean": spread.mean, "std": spread.std, "min": spread.least, "max": spread.most}
    return numbers | {"values": values}
