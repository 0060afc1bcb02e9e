"""Test scenes that an encoder, or what it goes back to, has learned from."""

from collections.abc import Mapping, Sequence
from typing import Any

from point_jax.data.scenes import SceneError
from point_jax.data.sources import Source, build_sources
from point_jax.evaluation.candidates import Candidate
from point_jax.evaluation.labelled_scenes import identities
from point_jax.interop.workdir import data_sources, label_sources


def seen(candidate: Candidate, test: Sequence[Source]) -> int | None:
    """How many test scenes the encoder was pretrained on; None where that is not known."""
    if candidate.checkpoint is None or not candidate.points:
        return None
    entries = data_sources(candidate.checkpoint)
    known = [_scenes(entry) for entry in entries or ()]
    if not known or any(scenes is None for scenes in known):
        return None
    return len(set[str]().union(*(scenes or () for scenes in known)) & set(identities(test)))


def refuse_taught(candidate: Candidate, test: Sequence[Source]) -> None:
    """Raises ValueError where the encoder is known to have learned labels of test scenes."""
    if candidate.checkpoint is None or not candidate.points:
        return
    known = [_scenes(entry) or () for entry in label_sources(candidate.checkpoint)]
    both = set[str]().union(*known) & set(identities(test))
    if both:
        raise ValueError(
            f"{candidate.name} has learned the labels of {len(both)} scenes of "
            f"config.test.sources, such as {min(both)}: nothing would be measured; give other "
            "scenes or splits"
        )


def _scenes(entry: Mapping[str, Any]) -> set[str] | None:
    """What scenes a source has; None where it is not here, or of another program."""
    try:
        return set(identities(build_sources((entry,))))
    except (SceneError, ValueError):
        return None
