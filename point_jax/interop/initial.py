"""Weights that a new run starts from: of another run, or converted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from point_jax.interop.store import MANIFEST, load_weights
from point_jax.training import checkpoint
from point_jax.training.checkpoint import CheckpointError

Tree = Any  # nested dicts of arrays


def initial_weights(source: Path, template: Mapping[str, Tree]) -> dict[str, Tree]:
    """The parts of a new run's state that a checkpoint gives it.

    Args:
      source: a run's folder, its checkpoint, or what `launch.convert` wrote. A pretraining gives
        student and teacher whole; an encoder becomes the backbone of both, and heads start afresh.
      template: `student` and `teacher`, trees of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      Trees like the template's, or parts of them.

    Raises:
      CheckpointError: nothing there, damaged, or of another network: all missing, extra and
        misshapen keys are named.
    """
    if not (source / MANIFEST).is_file():
        return checkpoint.load_weights(source, template)
    weights = load_weights(source)
    if weights.kind == "pretraining":
        given, wanted = weights.params, dict(template)
    elif "backbone" in weights.params:
        encoder = {"backbone": weights.params["backbone"]}
        given = dict.fromkeys(template, encoder)
        wanted = {part: {"backbone": tree["backbone"]} for part, tree in template.items()}
    else:
        raise CheckpointError(f"{source} holds one {weights.kind}; a run starts from an encoder")
    checkpoint.compare_trees(source, given, wanted)
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), given, wanted)
