"""Scores of a predictor on test scenes: at voxels, at every point, and voted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from point_jax.data.scenes import Scene
from point_jax.evaluation.classes import Classes
from point_jax.evaluation.confusion import Scores, confusion, scores, sum_over_processes
from point_jax.evaluation.features import voxel_labels
from point_jax.evaluation.predict import Predictor
from point_jax.evaluation.submission import write_submission
from point_jax.evaluation.voting import vote
from point_jax.features.voxels import Voxels, voxelize

GROUP = 16  # scenes made voxels together: an encoder then compiles for the largest of them once


def score(
    predict: Predictor,
    scenes: Sequence[Scene],
    classes: Classes,
    grid_size: float,
    *,
    votes: bool = False,
    first_grid: float = 0.0,
    submission: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Scores]:
    """Scores of all scenes together; the processes of a job share them.

    Args:
      predict: what is scored.
      scenes: what is predicted; those with labels are counted.
      classes: of the labels.
      grid_size: edge of the predictor's voxels, metres.
      votes: also by the precise protocol, see `voting.vote`.
      first_grid: see `voting.vote`; 0 for none.
      submission: gets the benchmark's files, voted if `votes`; None for none.
      say: told of every scene.

    Returns:
      resolution -> scores: "voxel", "full" (every original point), with votes "voted". {} if no
      scene has labels, as those of which a benchmark takes the submission.

    Raises:
      SceneError: a scene that cannot be used.
    """
    size = len(classes)
    names = ["voxel", "full", *(["voted"] if votes else [])]
    counts = {name: np.zeros((size, size), np.int64) for name in names}
    places = range(jax.process_index(), len(scenes), jax.process_count())
    for place, (scene, cloud, probability) in zip(
        places, _predicted(predict, (scenes[i] for i in places), grid_size), strict=True
    ):
        voxels = probability.argmax(1)
        found = {"full": voxels[cloud.inverse]}
        if votes:
            summed = vote(predict, scene, grid_size, first_grid=first_grid or None)
            found["voted"] = summed.argmax(1)
        points = list(found.values())[-1]
        if scene.segment is not None:
            counts["voxel"] += confusion(voxels, voxel_labels(scene, cloud), size)
            for name, predicted in found.items():
                counts[name] += confusion(predicted, scene.segment, size)
        if submission is not None:
            write_submission(submission, scene, points, classes)
        say(f"{place + 1}/{len(scenes)} {scene.name}")
    total = {name: sum_over_processes(count) for name, count in counts.items()}
    if not total["full"].any():
        return {}
    return {name: scores(count, classes.names) for name, count in total.items()}


def _predicted(
    predict: Predictor, scenes: Iterable[Scene], grid_size: float
) -> Iterator[tuple[Scene, Voxels, np.ndarray]]:
    """Scene, voxels and probabilities (V, K), one after the other."""
    group: list[tuple[Scene, Voxels]] = []
    for scene in scenes:
        group.append((scene, voxelize(scene, grid_size)))
        if len(group) == GROUP:
            yield from _group(predict, group)
            group = []
    yield from _group(predict, group)


def _group(
    predict: Predictor, group: Sequence[tuple[Scene, Voxels]]
) -> Iterator[tuple[Scene, Voxels, np.ndarray]]:
    found = predict([cloud for _, cloud in group]) if group else ()
    for (scene, cloud), probability in zip(group, found, strict=True):
        yield scene, cloud, probability
