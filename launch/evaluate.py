"""What an encoder's features are worth in semantic segmentation.

    python -m launch.evaluate --encoder=runs/quickstart --workdir=runs/linear \\
        --config=configs/segmentation.py:data=rooms,protocol=linear,encoder=tiny

--encoder is a run's folder, what launch.convert wrote, `random` (untrained), or `raw` (height,
normal and colour, no network). The config's header lists data and protocols; --config.any.key=VALUE
overrides a value. Trains what the protocol trains, in --workdir, where the same command goes on if
it was stopped; then writes results.json and results.md there. Exit codes as of launch.train.

  --config.test.votes=True        also Pointcept's precise protocol: every point predicted, over
                                  rotations, scales and flips
  --config.test.robustness=True   also without colours, with few labels, on single frames
  --config.test.submission=True   also files for the ScanNet benchmark, in submission/
  --config.test.floors=False      without the rows of raw input and untrained encoder
  --config.labels.share=0.1       with a tenth of the labels
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from launch import command
from point_jax import limits
from point_jax.data.scenes import Scene
from point_jax.evaluation.candidates import Candidate, find, floors
from point_jax.evaluation.features import Extractor
from point_jax.evaluation.labelled_scenes import LabelledScenes, class_names, labelled_scenes
from point_jax.evaluation.modalities import thin_labels
from point_jax.evaluation.predict import Predictor
from point_jax.evaluation.protocols import (
    CLOSED_FORMS,
    SCRATCH,
    TRAINED,
    Stopped,
    closed_form,
    trained,
    with_grid,
)
from point_jax.evaluation.report import Condition, Report, Result, as_markdown, write_results
from point_jax.evaluation.robustness import robustness
from point_jax.evaluation.scoring import score
from point_jax.evaluation.shortcut import measure_shortcut, surfaces
from point_jax.training import config as config_lib
from point_jax.training import mesh
from point_jax.training.config import Config, ConfigError

FLAG = "--encoder="
SECTION_LIMITS = {
    "test.first_grid": limits.number(0),
    "labels.share": limits.number(above=0, most=1),
}


class Evaluation:
    """One command: the scenes, and what is done with each candidate."""

    def __init__(self, config: Config, workdir: Path):
        self.config, self.workdir = config, workdir
        self.protocol = config.protocol
        if self.protocol not in TRAINED + CLOSED_FORMS:
            known = ", ".join(TRAINED + CLOSED_FORMS)
            raise ConfigError(f"config.protocol is {self.protocol!r}, expected one of {known}")
        limits.check(
            {"test.first_grid": config.test.first_grid, "labels.share": config.labels.share},
            SECTION_LIMITS,
            "config.",
        )
        self.data = dict(part.split("=") for part in config.about.split(","))["data"]
        self.classes = class_names(config.data.sources, config.labels.classes)
        thin = functools.partial(thin_labels, share=config.labels.share, seed=config.seed)
        self.change = thin if config.labels.share < 1 else _unchanged
        self.train = labelled_scenes(config.data.sources, "data.sources").with_change(self.change)
        self.test = labelled_scenes(config.test.sources, "test.sources")
        self.say = print if jax.process_index() == 0 else _quiet

    def predictor(self, candidate: Candidate, protocol: str, workdir: Path) -> Predictor:
        """What the protocol makes of a candidate and the training labels."""
        if protocol in CLOSED_FORMS:
            return closed_form(protocol, candidate, self.train, len(self.classes), self.config.seed)
        config = with_grid(self.config, candidate.grid_size)
        if protocol != SCRATCH and candidate.checkpoint is not None:
            with config.unlocked():
                config.init_from = str(candidate.checkpoint)
        classes = len(self.classes)
        return trained(protocol, candidate, config, classes, workdir, self.change)

    def result(self, candidate: Candidate, protocol: str, workdir: Path, main: bool) -> Result:
        """A row of the table.

        Args:
          candidate: what is evaluated.
          protocol: how.
          workdir: where it trains.
          main: whether it is the row that the command is about.
        """
        test = self.config.test
        self.say(f"{protocol}, {candidate.name}")
        predict = self.predictor(candidate, protocol, workdir)
        found = score(
            predict,
            self.test,
            self.classes,
            candidate.grid_size,
            votes=test.votes,
            first_grid=test.first_grid,
            submission=workdir / "submission" if test.submission and main else None,
        )
        seed = self.config.seed
        extractor = getattr(predict, "extractor", None) or candidate.extractor(seed)
        return Result(
            encoder=candidate.name,
            protocol=protocol,
            seed=seed,
            scores=found,
            config=f"configs/segmentation.py:{self.config.about}",
            data=self.data,
            train_scenes=_names(self.train),
            test_scenes=_names(self.test),
            checkpoint=None if candidate.checkpoint is None else str(candidate.checkpoint),
            steps=candidate.steps,
            label_share=self.config.labels.share,
            train_steps=None if protocol in CLOSED_FORMS else self.config.train.steps,
            shortcut=self.shortcut(extractor, candidate),
        )

    def robustness(self, candidate: Candidate) -> Iterator[Condition]:
        """The robustness table."""
        return robustness(
            candidate,
            self.train,
            self.test,
            self.config.test.sources,
            self.classes,
            self.config.seed,
            self.say,
        )

    def shortcut(self, extractor: Extractor, candidate: Candidate) -> dict[str, float] | None:
        """How far height and normals alone explain the features; needs two scenes."""
        if len(self.test) < 2:
            return None
        pieces = surfaces(extractor, self.test, candidate.grid_size, seed=self.config.seed)
        return vars(measure_shortcut(pieces, seed=self.config.seed)).copy()


def main(argv: Sequence[str]) -> int:
    """Evaluates what the command line says; returns the exit code."""
    names = [arg[len(FLAG) :] for arg in argv if arg.startswith(FLAG)]
    config, workdir = config_lib.parse_command_line([a for a in argv if not a.startswith(FLAG)])
    if len(names) != 1 or not names[0]:
        raise ConfigError("give one --encoder=DIR, --encoder=random or --encoder=raw")
    command.keep_compiled()
    mesh.start_processes()
    try:
        return _evaluate(config, Path(workdir), names[0])
    except (ValueError, TypeError) as error:
        if isinstance(error, command.FOR_THE_USER):
            raise
        raise ConfigError(str(error)) from error


def _evaluate(config: Config, workdir: Path, name: str) -> int:
    evaluation = Evaluation(config, workdir)
    candidate = find(name, config)
    command.make_folder(workdir, "--workdir")
    protocol = config.protocol
    rows = []
    try:
        row = evaluation.result(candidate, protocol, workdir, main=True)
        floor_protocol = protocol if protocol in CLOSED_FORMS else "linear"
        for floor in floors(candidate, config) if config.test.floors else ():
            if (floor.name, floor_protocol) != (candidate.name, protocol):
                folder = workdir / "floors" / floor.name
                rows.append(evaluation.result(floor, floor_protocol, folder, main=False))
    except Stopped as stopped:
        return stopped.code
    conditions = list(evaluation.robustness(candidate)) if config.test.robustness else []
    report = Report(row, rows, conditions, config_lib.package_versions())
    if jax.process_index() == 0:
        write_results(workdir, report)
        print(as_markdown(report))
        print(f"written: {workdir / 'results.json'}, {workdir / 'results.md'}")
    return 0


def _names(scenes: LabelledScenes) -> list[str]:
    return [scenes[i].name for i in range(len(scenes))]


def _unchanged(scene: Scene) -> Scene:
    return scene


def _quiet(text: str) -> None:
    del text


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
