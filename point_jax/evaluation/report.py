"""What an evaluation found, as `results.json` for programs and `results.md` for people.

Fractions from 0 to 1 in the JSON, per cent with one decimal in the tables.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from point_jax.evaluation.confusion import Scores
from point_jax.training.config import write_atomically

# At the voxels; at every original point, each with its voxel's prediction; at every original point
# after votes (see `voting`). In the order of the columns.
RESOLUTIONS = ("voxel", "full", "voted")
HEADLINE = "full"


@dataclass(frozen=True)
class Result:
    """One encoder under one protocol.

    Attributes:
      encoder: "raw", "random", or what else names it.
      protocol: how the labels were used: "linear", "ridge", "knn", ...
      seed: of everything random in it.
      scores: resolution -> scores, of `RESOLUTIONS`; "full" must be there.
      config: the config that was run, with its argument.
      checkpoint: where the encoder's weights are from; None for none.
      steps: of pretraining that they had; None where unknown or none.
      label_share: of the labels of the training scenes, how many were learned from.
      train_steps: for which the protocol trained; None for a closed form.
      grid_size: edge of a voxel, metres.
      tree: which network of a pretraining, "teacher" or "student"; None where there is but one.
      settings: a digest of all settings that the result depends on, but for the seed.
      data: name of the data set.
      train_scenes: names of the scenes whose labels were learned from.
      test_scenes: names of the scenes that the scores are of.
      shortcut: what height and normals alone explain of the features, see `shortcut`; None where
        not measured.
      unseen: share of the test scenes' voxels that no image sees; None without lifted features.
      seen: test scenes that the encoder was pretrained on, without their labels; None where that is
        not known.
    """

    encoder: str
    protocol: str
    seed: int
    scores: Mapping[str, Scores]
    config: str
    data: str
    train_scenes: Sequence[str]
    test_scenes: Sequence[str]
    checkpoint: str | None = None
    steps: int | None = None
    label_share: float = 1.0
    train_steps: int | None = None
    grid_size: float | None = None
    tree: str | None = None
    settings: str | None = None
    shortcut: Mapping[str, float] | None = None
    unseen: float | None = None
    seen: int | None = None

    def __post_init__(self) -> None:
        if HEADLINE not in self.scores or not set(self.scores) <= set(RESOLUTIONS):
            raise ValueError(
                f"scores are of {list(self.scores)}, expected {HEADLINE!r} and possibly others of "
                f"{RESOLUTIONS}"
            )

    @property
    def headline(self) -> Scores:
        """The scores at every original point."""
        return self.scores[HEADLINE]


@dataclass(frozen=True)
class Condition:
    """The same encoder with less to go by; scores at every original point.

    Attributes:
      condition: what is missing, as "no colour", "5 % of the labels", "one frame, camera axes".
      encoder, protocol, seed: as in `Result`.
      scores: at every original point of the condition's clouds.
    """

    condition: str
    encoder: str
    protocol: str
    seed: int
    scores: Scores


@dataclass(frozen=True)
class Report:
    """All that one command found.

    Attributes:
      main: the encoder that was asked for.
      floors: what it has to beat: raw input and its untrained network, by the same closed form,
        or by a linear probe beside whatever was trained.
      robustness: what is left of the main result and of the floors under harder conditions.
      versions: package -> version.
    """

    main: Result
    floors: Sequence[Result] = ()
    robustness: Sequence[Condition] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def write_results(folder: Path, report: Report) -> None:
    """Writes `results.md` and then `results.json`, each replaced at once or not at all.

    Raises:
      ValueError: a number that is not finite.
    """
    content = dumps(as_json(report))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.md", as_markdown(report))
    write_atomically(folder / "results.json", content)


def dumps(content: Any) -> str:
    """JSON for people, too: indented, with lists of whole numbers on one line each.

    Raises:
      ValueError: a number that is not finite.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    # Strings hold no line breaks (JSON writes them as \\n): only the lists themselves match.
    rows = re.compile(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]")
    return rows.sub(lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The main result's entries, then `floors`, `robustness` (lists of such) and `versions`.

    A result's confusion matrices are told once, with the scores under `resolution`.
    """
    return {
        **_entries(report.main),
        "floors": [_entries(result) for result in report.floors],
        "robustness": [_condition(one) for one in report.robustness],
        "versions": dict(report.versions),
    }


def as_markdown(report: Report) -> str:
    """One table with a row for each encoder, one of classes, one of conditions if there are any."""
    main, rows = report.main, [report.main, *report.floors]
    lines = [
        f"# {main.protocol} on {main.data}",
        "",
        f"{len(main.test_scenes)} test scenes, {len(main.train_scenes)} training scenes. Per cent. "
        "voxel: at the voxels; full: at every original point; voted: at every original point, "
        "summed over votes. Means are over the classes that occur in the labels.",
        "",
        *_how(main),
        *markdown_table(*_results(rows)),
        "",
        "## IoU of each class, full",
        "",
        *markdown_table(*_classes(rows)),
    ]
    if report.robustness:
        head = ["condition", "encoder", "protocol", "seed", "mIoU", "mAcc", "allAcc"]
        cells = [
            [one.condition, one.encoder, one.protocol, str(one.seed), *_means(one.scores)]
            for one in report.robustness
        ]
        lines += ["", "## Robustness, full", "", *markdown_table(head, cells, text=3)]
    return "\n".join(lines) + "\n"


def _entries(result: Result) -> dict[str, Any]:
    return {
        **_scores(result.headline),
        "protocol": result.protocol,
        "encoder": result.encoder,
        "seed": result.seed,
        "resolution": {
            name: _scores(result.scores[name]) | {"confusion": _rows(result.scores[name])}
            for name in RESOLUTIONS
            if name in result.scores
        },
        "config": result.config,
        "checkpoint": result.checkpoint,
        "steps": result.steps,
        "data": result.data,
        "label_share": result.label_share,
        "train_steps": result.train_steps,
        "grid_size": result.grid_size,
        "tree": result.tree,
        "settings": result.settings,
        "train_scenes": list(result.train_scenes),
        "test_scenes": list(result.test_scenes),
        "shortcut": None if result.shortcut is None else dict(result.shortcut),
        "unseen": result.unseen,
        "seen": result.seen,
    }


def _how(result: Result) -> Iterator[str]:
    """What decided the main result beside its row: voxels, labels, steps; and what to beware of."""
    told = [] if result.grid_size is None else [f"Voxels of {result.grid_size:g} m"]
    told.append(f"{100 * result.label_share:g} % of the training labels")
    if result.train_steps is not None:
        told.append(f"{result.train_steps:,} steps of training")
    yield f"{', '.join(told)}."
    if result.unseen is not None:
        share = percent(result.unseen)
        yield f"No image sees {share} % of the voxels: they have the nearest seen one's features."
    if result.seen:
        yield f"The encoder was pretrained on {result.seen} of the test scenes, without labels."
    yield ""


def _condition(one: Condition) -> dict[str, Any]:
    return {
        "condition": one.condition,
        **_scores(one.scores),
        "protocol": one.protocol,
        "encoder": one.encoder,
        "seed": one.seed,
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {
        "mIoU": scores.mIoU,
        "mAcc": scores.mAcc,
        "allAcc": scores.allAcc,
        "per_class": dict(scores.per_class),
        "counts": dict(scores.counts),
    }


def _rows(scores: Scores) -> list[list[int]]:
    return [list(row) for row in scores.confusion]


def _means(scores: Scores) -> list[str]:
    return [percent(x) for x in (scores.mIoU, scores.mAcc, scores.allAcc)]


def _results(rows: Sequence[Result]) -> tuple[list[str], list[list[str]], int]:
    """Head, cells and number of text columns; columns that no row has are left out."""
    computed = [name for name in RESOLUTIONS if any(name in row.scores for row in rows)]
    head = ["encoder", "protocol", "config", "checkpoint", "steps", "seed"]
    text = 4
    head += [f"mIoU {name}" for name in computed] + [f"mAcc {HEADLINE}", f"allAcc {HEADLINE}"]
    shortcut = any(row.shortcut is not None for row in rows)
    head += ["explained by height and normals"] if shortcut else []
    cells = []
    for row in rows:
        steps = or_dash(None if row.steps is None else f"{row.steps:,}")
        cells.append([row.encoder, row.protocol, row.config, or_dash(row.checkpoint), steps])
        cells[-1].append(str(row.seed))
        for name in computed:
            cells[-1].append(percent(row.scores[name].mIoU if name in row.scores else None))
        cells[-1] += _means(row.headline)[1:]
        if shortcut:
            cells[-1].append(percent((row.shortcut or {}).get("explained")))
    return head, cells, text


def _classes(rows: Sequence[Result]) -> tuple[list[str], list[list[str]], int]:
    main = rows[0].headline
    cells = [
        [name, f"{count:,}", *(percent(row.headline.per_class.get(name)) for row in rows)]
        for name, count in main.counts.items()
    ]
    return ["class", "labelled points", *(row.encoder for row in rows)], cells, 1


def markdown_table(head: Sequence[str], cells: Sequence[Sequence[str]], text: int) -> Iterator[str]:
    """Lines of a Markdown table: the first `text` columns to the left, numbers to the right."""
    marks = [":--" if i < text else "--:" for i in range(len(head))]
    for row in (head, marks, *cells):
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def or_dash(value: str | None) -> str:
    """The value; a dash for None."""
    return "–" if value is None else value


def percent(share: float | None) -> str:
    """A share from 0 to 1 in per cent with one decimal; a dash for None."""
    return or_dash(None if share is None else f"{100 * share:.1f}")
