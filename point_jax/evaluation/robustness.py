"""The robustness table: what is left with less to go by.

Every row is a ridge probe (seconds, nothing to tune) of the same frozen encoder. Without colours or
normals it is fitted anew and tested without them; with few labels it is fitted to those; single
frames are seen by the probe of whole scenes, as a robot would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from point_jax.data.scenes import Scene
from point_jax.evaluation.candidates import Candidate
from point_jax.evaluation.classes import Classes
from point_jax.evaluation.confusion import scores
from point_jax.evaluation.labelled_scenes import LabelledScenes, framed_scenes
from point_jax.evaluation.modalities import thin_labels, without
from point_jax.evaluation.partial import Axes, views
from point_jax.evaluation.predict import Predictor
from point_jax.evaluation.protocols import fitted
from point_jax.evaluation.report import HEADLINE, Condition
from point_jax.evaluation.scoring import score

PROTOCOL = "ridge"
MISSING: dict[str, tuple[Any, ...]] = {
    "no colour": ("color",),
    "no normals": ("normal",),
    "neither": ("color", "normal"),
}
SHARES = (0.01, 0.05, 0.1, 0.2)
FRAMES: dict[str, Axes] = {
    "one frame, scene axes": "scene",
    "one frame, camera's place and heading, gravity down": "upright",
    "one frame, camera axes": "camera",
}


def robustness(
    candidate: Candidate,
    train: LabelledScenes,
    test: LabelledScenes,
    test_entries: Sequence[Mapping[str, Any]],
    classes: Classes,
    seed: int,
    label_share: float = 1.0,
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[Condition]:
    """The rows, one after the other; frames only where test folders say what their images see.

    Args:
      candidate: the encoder.
      train, test: the scenes.
      test_entries: the config's sources of the test scenes.
      classes: of the labels.
      seed: of an untrained encoder, and of which labels are kept.
      label_share: of the labels that `train` has left already.
      say: told of every condition.
    """

    def fit(scenes: Sequence[Scene]) -> Predictor:
        return fitted(PROTOCOL, candidate, scenes, len(classes), seed)

    def counts(predict: Predictor, scenes: Sequence[Scene]) -> np.ndarray:
        found = score(predict, scenes, classes, candidate.grid_size).get(HEADLINE)
        return none if found is None else np.array(found.confusion)

    def row(condition: str, matrix: np.ndarray) -> Iterator[Condition]:
        say(f"{condition}{'' if matrix.any() else ': no labelled points, no row'}")
        if matrix.any():
            found = scores(matrix, classes.names)
            yield Condition(condition, candidate.name, PROTOCOL, seed, found)

    none = np.zeros((len(classes), len(classes)), np.int64)
    whole = fit(train)
    yield from row("everything", counts(whole, test))
    for name, missing in MISSING.items():
        drop = partial(_without, missing)
        yield from row(name, counts(fit(train.with_change(drop)), test.with_change(drop)))
        yield from row(f"{name}, in the test alone", counts(whole, test.with_change(drop)))
    for share in SHARES:
        if share >= label_share:
            continue
        thin = partial(thin_labels, share=share / label_share, seed=seed)
        yield from row(f"{share:.0%} of the labels", counts(fit(train.with_change(thin)), test))
    framed = dict.fromkeys(FRAMES, none)
    for scene, frames in framed_scenes(test_entries):  # all frames of a data set are too many
        for name, axes in FRAMES.items():
            framed[name] = framed[name] + counts(whole, list(views(scene, frames, axes)))
    for name, matrix in framed.items():
        yield from row(name, matrix)


def _without(names: tuple[Any, ...], scene: Scene) -> Scene:
    return without(scene, *names)
