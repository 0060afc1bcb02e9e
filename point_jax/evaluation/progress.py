"""The signal inside pretraining: what an encoder's features are worth, every so many steps.

A few labelled scenes, a few thousand of their voxels, closed-form probes: seconds, and the same
numbers whenever the weights are the same. They order the steps of one run; for numbers to state,
evaluate a checkpoint on whole data sets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from point_jax import limits
from point_jax.data.pipeline import build_sources, first_scenes
from point_jax.data.scenes import Scene, SceneError
from point_jax.evaluation.confusion import confusion, scores
from point_jax.evaluation.features import EncoderFeatures, LabelledArrays, extract, voxel_labels
from point_jax.evaluation.knn import collect_neighbours, draw_rows
from point_jax.evaluation.labelled_scenes import check_apart
from point_jax.evaluation.ridge import fit_ridge
from point_jax.evaluation.shortcut import Surface, measure_shortcut, surface
from point_jax.features.encoder import Encoder

PROBE_LIMITS = {
    "every": limits.whole(0),
    "scenes": limits.each(limits.whole(2), "train", "test"),
    "voxels": limits.whole(1),
}


def default_probe() -> ConfigDict:
    """The config section `probe`, for a config file to fill in; locked against misspelt keys."""
    probe = ConfigDict()
    probe.every = 0  # steps between two measurements; 0: none
    probe.train_sources = ()  # labelled scenes that the probes are fitted to, as data.sources
    probe.test_sources = ()  # labelled scenes that they are tested on
    probe.scenes = (8, 4)  # how many of each: the first of every source, then the second, ...
    probe.voxels = 2_048  # of a scene, drawn at random among the labelled ones
    return probe.lock()


@dataclass(frozen=True)
class ProgressProbe:
    """Labelled scenes in memory, and what is measured on them.

    Attributes:
      train, test: at least two scenes each, all with labels.
      voxels: of a scene, at most.
    """

    train: Sequence[Scene]
    test: Sequence[Scene]
    voxels: int

    @property
    def classes(self) -> int:
        """K, one more than the highest label of any scene."""
        return 1 + max(
            int(scene.segment.max())
            for scene in (*self.train, *self.test)
            if scene.segment is not None
        )

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """Probes an encoder, all its levels joined.

        Returns:
          probe_ridge_mIoU, probe_knn_mIoU: at voxels of the test scenes, 0 to 1.
          probe_shortcut: `Shortcut.explained` of the test scenes.

        Raises:
          ValueError: the encoder's `inputs` is None.
          FloatingPointError: features that are not finite.
        """
        train = LabelledArrays([labelled for labelled, _ in self._drawn(encoder, self.train, 0)])
        test = list(self._drawn(encoder, self.test, 1))
        probes = {
            "ridge": fit_ridge(train, self.classes).scores,
            "knn": collect_neighbours(train, self.classes),
        }
        truth = np.concatenate([labels for (_, labels), _ in test])
        names = [str(i) for i in range(self.classes)]
        found = {}
        for name, probe in probes.items():
            predicted = np.concatenate([probe(features).argmax(1) for (features, _), _ in test])
            counts = confusion(predicted, truth, self.classes)
            found[f"probe_{name}_mIoU"] = scores(counts, names).mIoU
        found["probe_shortcut"] = measure_shortcut(piece for _, piece in test).explained
        return found

    def _drawn(
        self, encoder: Encoder, scenes: Sequence[Scene], key: int
    ) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], Surface]]:
        """(features, labels) of some voxels of each scene, and their surfaces."""
        if encoder.inputs is None:
            raise ValueError("the encoder's `inputs` is not known, so scenes cannot be encoded")
        extracted = extract(
            EncoderFeatures(encoder), scenes, encoder.grid_size, encoder.inputs, encoder.scale
        )
        for place, (scene, cloud, features) in enumerate(extracted):
            labels = voxel_labels(scene, cloud)
            rows = draw_rows(np.flatnonzero(labels >= 0), self.voxels, (key, place))
            yield (features[rows], labels[rows]), surface(scene, cloud, features, rows)


def load_probe(probe: Any) -> ProgressProbe | None:
    """Loads the scenes of a config section as `default_probe` makes it; None if it is off.

    Raises:
      ValueError: a wrong setting or source, or fewer than two scenes, or scenes on both
        sides.
      SceneError: a scene that cannot be used, or has no labels.
    """
    limits.check(probe, PROBE_LIMITS, "config.probe.")
    if probe.every == 0:
        return None
    sides, sources = [], []
    for side, count in zip(("train_sources", "test_sources"), probe.scenes, strict=True):
        sources.append(build_sources(probe[side], f"probe.{side}"))
        scenes = first_scenes(sources[-1], count)
        for scene in scenes:
            if scene.segment is None or not (scene.segment >= 0).any():
                raise SceneError(f"config.probe.{side}: {scene.name} has no labels")
        if len(scenes) < 2:
            raise ValueError(f"config.probe.{side} has {len(scenes)} scene, expected at least 2")
        sides.append(scenes)
    train, test = sources
    check_apart(train, test, ("probe.train_sources", "probe.test_sources"))
    return ProgressProbe(sides[0], sides[1], probe.voxels)
