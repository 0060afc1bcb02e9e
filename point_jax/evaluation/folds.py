"""The six-fold summary of S3DIS from six evaluations, each of a network tested on another area."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from point_jax.evaluation import confusion
from point_jax.evaluation.classes import S3DIS_AREAS
from point_jax.evaluation.report import HEADLINE, RESOLUTIONS
from point_jax.evaluation.results import Found, Row, Setting, without
from point_jax.training.config import ConfigError

SIX_FOLD = "s3dis, six folds"


def six_fold(rows: Iterable[Row]) -> list[Row]:
    """S3DIS: six results, each tested on another area, become one of the summed confusion matrices.

    Args:
      rows: of data s3dis-1 to s3dis-6 (s3dis is s3dis-5); any number of encoders, protocols, seeds.

    Raises:
      ConfigError: other data, an area that is missing or there twice, or a file without its
        confusion matrix.
    """
    folds: dict[tuple[Setting, int], dict[str, Row]] = {}
    for row in rows:
        area = _area(row)
        setting = replace(
            row.setting,
            data=SIX_FOLD,
            config=without(row.setting.config, "data"),
            train_scenes=(),
            test_scenes=(),
            classes=(),  # compared by `_folded`, which says whose differ
        )
        areas = folds.setdefault((setting, row.seed), {})
        if area in areas:
            raise ConfigError(
                f"{areas[area].files[0]} and {row.files[0]} are both of {area}, "
                f"{setting.encoder}, {setting.protocol}, seed {row.seed}; give one of them"
            )
        areas[area] = row
    return [_folded(setting, seed, areas) for (setting, seed), areas in folds.items()]


def _area(row: Row) -> str:
    name, _, number = row.setting.data.partition("-")
    area = f"Area_{number or 5}"
    if name != "s3dis" or area not in S3DIS_AREAS:
        raise ConfigError(
            f"{row.files[0]}: data is {row.setting.data!r}, expected s3dis-1 to s3dis-6 with "
            "--six_fold"
        )
    return area


def _folded(setting: Setting, seed: int, areas: Mapping[str, Row]) -> Row:
    what = f"{setting.encoder}, {setting.protocol}, seed {seed}"
    missing = [area for area in S3DIS_AREAS if area not in areas]
    if missing:
        raise ConfigError(f"--six_fold: {what} lacks {', '.join(missing)}")
    rows = [areas[area] for area in S3DIS_AREAS]
    for row in rows[1:]:
        if row.setting.classes != rows[0].setting.classes:
            raise ConfigError(
                f"{row.files[0]} and {rows[0].files[0]} have other classes, or in another order: "
                f"{', '.join(row.setting.classes)}; {', '.join(rows[0].setting.classes)}"
            )
    tested: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = tested.setdefault(row.setting.test_scenes, row)
        if other is not row:
            raise ConfigError(
                f"{other.files[0]} and {row.files[0]} are of two areas, but tested on scenes of "
                "the same names: did all of them have one --config.test.sources?"
            )
    # Areas have rooms of the same name.
    scenes = tuple(f"{a}/{scene}" for a in S3DIS_AREAS for scene in areas[a].setting.test_scenes)
    found = {}
    parts: Mapping[str, confusion.Scores] = {}
    for resolution in (name for name in RESOLUTIONS if any(name in row.found for row in rows)):
        folds = confusion.six_fold(
            {area: _matrix(areas[area], resolution) for area in S3DIS_AREAS},
            rows[0].found[resolution].classes,
        )
        found[resolution] = _as_found(folds.summed)
        parts = folds.folds if resolution == HEADLINE else parts
    return Row(
        replace(setting, test_scenes=scenes, classes=rows[0].setting.classes),
        seed,
        found,
        None,
        tuple(file for row in rows for file in row.files),
        {area: _as_found(part) for area, part in parts.items()},
    )


def _matrix(row: Row, resolution: str) -> np.ndarray:
    found = row.found.get(resolution)
    if found is None or found.confusion is None:
        raise ConfigError(
            f"{row.files[0]}: resolution.{resolution}.confusion is missing, which --six_fold sums; "
            "evaluate all six areas in the same way again"
        )
    return np.array(found.confusion, np.int64)


def _as_found(scores: confusion.Scores) -> Found:
    names = tuple(scores.per_class)
    return Found(scores.mIoU, scores.mAcc, scores.allAcc, names, scores.confusion)
