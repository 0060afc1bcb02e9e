"""What an encoder's features are worth in semantic segmentation.

    python -m launch.evaluate --encoder=runs/quickstart --workdir=runs/linear \\
        --config=configs/segmentation.py:data=rooms,protocol=linear,encoder=tiny

--encoder is a run's folder, what launch.convert wrote, `random` (untrained), or `raw` (height,
normal and colour, no network). `lifted:weights/dinov2` is an image encoder that launch.convert
wrote, its features lifted to the points that the scenes' images see; `runs/quickstart+lifted:DIR`
joins both. The config's header lists data and protocols; --config.any.key=VALUE overrides a value.
Trains what the protocol trains, in --workdir, where the same command goes on if it was stopped;
then writes results.json and results.md there. Exit codes as of launch.train.

  --config.test.votes=True        also Pointcept's precise protocol: every point predicted, over
                                  rotations, scales and flips
  --config.test.robustness=True   also without colours, with few labels, on single frames
  --config.test.submission=True   also files for the ScanNet benchmark, in submission/
  --config.test.floors=False      without the rows of raw input and untrained encoder
  --config.labels.share=0.1       with a tenth of the labels
  --config.images.height=37       of lifted images, in patches, and --config.images.width
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from launch import command
from point_jax import limits, storage
from point_jax.data.scenes import Scene
from point_jax.evaluation.candidates import Candidate, find, floors, parse, untrained
from point_jax.evaluation.features import Extractor
from point_jax.evaluation.labelled_scenes import (
    check_apart,
    check_labels,
    check_names,
    check_once,
    class_names,
    labelled_scenes,
    scene_names,
)
from point_jax.evaluation.learned import refuse_taught, seen
from point_jax.evaluation.lifting import unseen_share
from point_jax.evaluation.modalities import thin_labels
from point_jax.evaluation.predict import Predictor
from point_jax.evaluation.protocols import (
    FITTED,
    FLOORS_OF_TRAINED,
    SCRATCH,
    TRAINED,
    Stopped,
    check_head,
    check_lifted,
    fitted,
    trained,
)
from point_jax.evaluation.report import Condition, Report, Result, as_markdown, write_results
from point_jax.evaluation.robustness import robustness
from point_jax.evaluation.scoring import score
from point_jax.evaluation.shortcut import measure_shortcut, surfaces
from point_jax.training import checkpoint, mesh
from point_jax.training import config as config_lib
from point_jax.training.config import Config, ConfigError

FLAG = "--encoder="
SECTION_LIMITS = {
    "test.first_grid": limits.number(0),
    "labels.share": limits.number(above=0, most=1),
    "crops.grid_size": limits.number(0),
}
# What a result does not depend on, or what it says in other words.
NOT_SETTINGS = (
    *("about", "seed", "protocol", "encoder", "init_from", "checkpoint", "test", "tree"),
    *("dataset", "mesh"),
)
NOT_OF_SOURCES = ("root", "splits", "seeds", "weight")  # which scenes: results name them


class Evaluation:
    """One command: the scenes, and what is done with each candidate."""

    def __init__(self, config: Config, images: bool = False, source: str = ""):
        """For a config of configs/segmentation.py.

        Args:
          config: as the command line left it.
          images: whether image features are lifted, so that scenes must have images.
          source: file and argument that the config is from, for the results.
        """
        self.config, self.source = config, source
        if "protocol" not in config:
            raise ConfigError("the config is none of configs/segmentation.py's: it has no protocol")
        config_lib.check_config(config)
        if config.protocol not in TRAINED + FITTED:
            known = ", ".join(TRAINED + FITTED)
            raise ConfigError(f"config.protocol is {config.protocol!r}, expected one of {known}")
        for place, limit in SECTION_LIMITS.items():
            section, key = place.split(".")
            limits.check({key: config[section][key]}, {key: limit}, f"config.{section}.")
        check_head(config.head, config.protocol)
        if images:
            check_lifted(config.protocol, config.test.votes, config.test.robustness)
        self.train = labelled_scenes(config.data.sources, "data.sources", images)
        self.test = labelled_scenes(config.test.sources, "test.sources", images)
        train, test = self.train.sources, self.test.sources
        check_once(train, "data.sources")
        check_once(test, "test.sources")
        check_apart(train, test, ("data.sources", "test.sources"))
        if config.test.submission:
            check_names(test)
        if config.test.floors and config.protocol in TRAINED and len(self.train) < 2:
            raise ConfigError(
                f"config.data.sources has 1 scene, and the floors beside {config.protocol} are "
                f"fitted by {FLOORS_OF_TRAINED}, which holds scenes out: give more scenes, or "
                "--config.test.floors=False"
            )
        self.classes = class_names((*train, *test), config.labels.classes)
        self.train = self.train.with_change(self.change)
        self.test = self.test.with_change(self._as_tested)
        self.say = print if jax.process_index() == 0 else _quiet

    def _checked(self, scene: Scene) -> Scene:
        return check_labels(scene, len(self.classes))

    def _as_tested(self, scene: Scene) -> Scene:
        unlabelled = self.config.test.submission and scene.segment is None
        return scene if unlabelled else self._checked(scene)

    def change(self, scene: Scene) -> Scene:
        """A training scene with as many of its labels as are to be learned from."""
        scene, share = self._checked(scene), self.config.labels.share
        return scene if share == 1 else thin_labels(scene, share, self.config.seed)

    def predictor(self, candidate: Candidate, protocol: str, workdir: Path) -> Predictor:
        """What the protocol makes of a candidate and the training labels."""
        if protocol in FITTED:
            return fitted(protocol, candidate, self.train, len(self.classes), self.config.seed)
        config = self.settled(candidate)
        return trained(protocol, candidate, config, self.train, self.classes, workdir, self.change)

    def settled(self, candidate: Candidate) -> Config:
        """The config with what depends on the candidate: its voxels, where its weights are from."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.crops.grid_size = candidate.grid_size
            config.encoder = candidate.name
            config.init_from = str(candidate.checkpoint or "")
        return config

    def digest(self, candidate: Candidate, protocol: str) -> str:
        """Of everything that decides a result of a candidate, but for the seed and the scenes.

        So the folds of a data set have the same, and so have runs on machines that keep it in
        different places.
        """
        config = self.settled(candidate).to_dict()
        told = {name: part for name, part in config.items() if name not in NOT_SETTINGS}
        not_read = ("train", "optim", "crops", "objective", "decoder", "data", "head")
        for name in ("network", "images", *(not_read if protocol in FITTED else ())):
            told.pop(name, None)
        for key in (*config_lib.HARMLESS, "data.sources", "data.images"):  # none trains on images
            section, _, name = key.partition(".")
            told.get(section, {}).pop(name, None)
        entries = (*self.config.data.sources, *self.config.test.sources)
        told["read as"] = sorted({_how_read(entry) for entry in entries})
        if protocol in TRAINED and len(weights := [one.weight for one in self.train.sources]) > 1:
            told["weights"] = [weight / sum(weights) for weight in weights]
        if self.config.test.votes and self.config.test.first_grid:
            told["first_grid"] = self.config.test.first_grid
        if candidate.lifted is not None:
            lifted = candidate.lifted
            told["images"] = repr((lifted.encoder, lifted.height, lifted.width))
        network = candidate.network and replace(candidate.network, remat=False)
        told |= {"network": repr(network), "grid_size": candidate.grid_size}
        return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:8]

    def result(
        self, candidate: Candidate, protocol: str, workdir: Path, main: bool
    ) -> Result | None:
        """A row of the table; None if no test scene has labels.

        Args:
          candidate: what is evaluated.
          protocol: how.
          workdir: where it trains.
          main: whether it is the row that the command is about.
        """
        test, seed = self.config.test, self.config.seed
        self.say(f"{protocol}, {candidate.name}")
        predict = self.predictor(candidate, protocol, workdir)
        submission = workdir / "submission" if test.submission and main else None
        if submission is not None:
            self._empty(submission)
        found = score(
            predict,
            self.test,
            self.classes,
            candidate.grid_size,
            votes=test.votes,
            first_grid=test.first_grid,
            submission=submission,
            say=self.say if test.votes else _quiet,
        )
        if not found:
            return None
        return Result(
            encoder=candidate.name,
            protocol=protocol,
            seed=seed,
            scores=found,
            config=self.source,
            data=self.config.dataset,
            train_scenes=scene_names(self.train.sources),
            test_scenes=self.scored(),
            checkpoint=None if candidate.checkpoint is None else str(candidate.checkpoint),
            steps=candidate.steps,
            label_share=self.config.labels.share,
            train_steps=None if protocol in FITTED else self.config.train.steps,
            grid_size=candidate.grid_size,
            tree=self.config.tree if candidate.checkpoint and candidate.points else None,
            settings=self.digest(candidate, protocol),
            shortcut=self.shortcut(predict.extractor, candidate),
            unseen=self.unseen(candidate),
            seen=seen(candidate, self.test.sources),
        )

    def _empty(self, submission: Path) -> None:
        """Removes the files of an earlier evaluation, perhaps of other scenes."""
        if jax.process_index() == 0:
            for file in submission.glob("*.txt"):
                file.unlink()
        multihost_utils.sync_global_devices("no old submission")

    def scored(self) -> list[str]:
        """Names of the test scenes that have labels."""
        names = scene_names(self.test.sources)
        if not self.config.test.submission:
            return names
        pairs = zip(names, self.test, strict=True)
        return [name for name, scene in pairs if scene.segment is not None]

    def robustness(self, candidate: Candidate) -> Iterator[Condition]:
        """A candidate's rows of the robustness table."""
        return robustness(
            candidate,
            self.train,
            self.test,
            self.config.test.sources,
            self.classes,
            self.config.seed,
            self.config.labels.share,
            self.say,
        )

    def shortcut(self, extractor: Extractor, candidate: Candidate) -> dict[str, float] | None:
        """How far height and normals alone explain the features; needs two scenes."""
        if len(self.test) < 2:
            return None
        pieces = surfaces(extractor, self.test, candidate.grid_size, seed=self.config.seed)
        return vars(measure_shortcut(pieces, seed=self.config.seed)).copy()

    def unseen(self, candidate: Candidate) -> float | None:
        """The share of the test scenes' voxels that no image sees; None if none is lifted."""
        if candidate.lifted is None:
            return None
        return unseen_share(self.test, candidate.grid_size, candidate.lifted.size)


def main(argv: Sequence[str]) -> int:
    """Evaluates what the command line says; returns the exit code."""
    argv, job = command.split_job(argv)
    names = [arg[len(FLAG) :] for arg in argv if arg.startswith(FLAG)]
    config, workdir = config_lib.parse_command_line([a for a in argv if not a.startswith(FLAG)])
    if len(names) != 1 or not names[0]:
        raise ConfigError("give one --encoder=DIR, --encoder=random or --encoder=raw")
    command.keep_compiled()
    mesh.start_processes(job)
    try:
        source = f"{_config_file(argv)}:{config.about}"
        return _evaluate(config, storage.local(workdir, "--workdir"), names[0], source)
    except (ValueError, TypeError) as error:
        if isinstance(error, command.FOR_THE_USER):
            raise
        raise ConfigError(str(error)) from error


def _evaluate(config: Config, workdir: Path, name: str, source: str) -> int:
    evaluation = Evaluation(config, parse(name).images is not None, source)
    candidate, protocol = find(name, config), config.protocol
    if protocol == SCRATCH:
        candidate = untrained(candidate)
    refuse_taught(candidate, evaluation.test.sources)
    command.make_folder(workdir, "--workdir")
    writes = jax.process_index() == 0
    if protocol in FITTED and writes:
        _bind(evaluation.settled(candidate), workdir)
    try:
        row = evaluation.result(candidate, protocol, workdir, main=True)
    except Stopped as stopped:
        return stopped.code
    if row is None:
        if not config.test.submission:
            raise ConfigError("config.test.sources: no point of any test scene has a label")
        print(f"the test scenes have no labels: written is {workdir / 'submission'} alone")
        return 0
    report = Report(row, versions=config_lib.package_versions())
    for grown in _stages(evaluation, candidate, report, workdir):
        report = grown
        if writes:
            write_results(workdir, report)
    if writes:
        print(as_markdown(report))
        print(f"written: {workdir / 'results.json'}, {workdir / 'results.md'}")
    return 0


def _stages(
    evaluation: Evaluation, candidate: Candidate, report: Report, workdir: Path
) -> Iterator[Report]:
    """The report as it grows: what is found is written, whatever happens to the rest."""
    yield report
    config, protocol = evaluation.config, evaluation.config.protocol
    floor_protocol = protocol if protocol in FITTED else FLOORS_OF_TRAINED
    rows = floors(candidate, config) if config.test.floors else ()
    for floor in rows:
        if (floor.name, floor_protocol) != (candidate.name, protocol):
            folder = workdir / "floors" / floor.name
            row = evaluation.result(floor, floor_protocol, folder, main=False)
            assert row is not None  # the main row is there: there are labels
            report = replace(report, floors=[*report.floors, row])
            yield report
    if config.test.robustness:
        others = [floor for floor in rows if floor.name != candidate.name]
        for one in (candidate, *others):
            for condition in evaluation.robustness(one):
                report = replace(report, robustness=[*report.robustness, condition])
            yield report


def _bind(config: Config, workdir: Path) -> None:
    """Keeps results of two configs out of one folder, as the trainer does for what it trains."""
    done = (workdir / "results.json").exists() or checkpoint.any_saved(workdir)
    for remark in config_lib.compare_config(config, workdir, binding=done):
        print(remark)
    config_lib.settle_config(config, workdir)


def _how_read(entry: Mapping[str, Any]) -> str:
    """What a source says beside which scenes they are: labels, units, image splits."""
    return repr(sorted((k, v) for k, v in entry.items() if k not in NOT_OF_SOURCES))


def _config_file(argv: Sequence[str]) -> str:
    """The file that --config=FILE:ARGUMENT or --config FILE:ARGUMENT names."""
    place = next(i for i, arg in enumerate(argv) if re.fullmatch("--?config(=.*)?", arg))
    _, equals, value = argv[place].partition("=")
    return (value if equals else argv[place + 1]).partition(":")[0]


def _quiet(text: str) -> None:
    del text


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
