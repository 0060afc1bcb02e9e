"""Weights that a new run starts from: of another run, or converted."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from point_jax.interop.store import MANIFEST, Weights, load_weights
from point_jax.training import checkpoint
from point_jax.training.checkpoint import CheckpointError

Tree = Any  # nested dicts of arrays


def initial_weights(
    source: Path,
    template: Mapping[str, Tree],
    optional: Collection[str] = (),
    apart: Collection[str] = (),
) -> dict[str, Tree]:
    """The parts of a new run's state that a checkpoint gives it.

    Args:
      source: a run's folder, its checkpoint, or what `launch.convert` wrote. A pretraining gives
        student and teacher whole; an encoder becomes the backbone of both, and heads start afresh.
      template: `student` and `teacher`, trees of `jax.ShapeDtypeStruct` with shardings.
      optional: names directly below those that start afresh where the source lacks them, as
        Concerto's projection does when it starts from Sonata, and stay behind where the run does.
      apart: those of them that the run has from elsewhere, whatever the source holds.

    Returns:
      Trees like the template's, or parts of them.

    Raises:
      CheckpointError: nothing there, damaged, or of another network: all missing, extra and
        misshapen keys are named.
    """
    template = {
        part: {name: leaf for name, leaf in tree.items() if name not in apart}
        for part, tree in template.items()
    }
    if not (source / MANIFEST).is_file():
        return _from_run(source, template, optional)
    weights = load_weights(source)
    if weights.kind == "pretraining":
        given = _with_projection(weights, template)
        wanted = _without_new(template, given, optional)
    elif "backbone" in weights.params:
        encoder = {"backbone": weights.params["backbone"]}
        given = dict.fromkeys(template, encoder)
        wanted = {part: {"backbone": tree["backbone"]} for part, tree in template.items()}
    else:
        raise CheckpointError(f"{source} holds one {weights.kind}; a run starts from an encoder")
    checkpoint.compare_trees(source, given, wanted)
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), given, wanted)


def _from_run(
    source: Path, template: Mapping[str, Tree], optional: Collection[str]
) -> dict[str, Tree]:
    saved = checkpoint.saved_shapes(source)
    wanted = _without_new(template, saved, optional)
    # What stays behind is read, too: a sum is over a whole part.
    whole = next(x.sharding for x in jax.tree.leaves(wanted) if x.sharding.is_fully_replicated)
    surplus = {
        part: {
            name: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), of_part
            )
            for name, of_part in saved.get(part, {}).items()
            if name in optional and name not in tree
        }
        for part, tree in wanted.items()
    }
    read = checkpoint.load_weights(
        source, {part: tree | surplus[part] for part, tree in wanted.items()}
    )
    return {part: {name: read[part][name] for name in tree} for part, tree in wanted.items()}


def _without_new(
    template: Mapping[str, Tree], there: Mapping[str, Collection[str]], optional: Collection[str]
) -> dict[str, Tree]:
    """The template without the optional names that a source lacks."""
    return {
        part: {
            name: leaf
            for name, leaf in tree.items()
            if name not in optional or name in there.get(part, ())
        }
        for part, tree in template.items()
    }


def _with_projection(weights: Weights, template: Mapping[str, Tree]) -> dict[str, Tree]:
    """A pretraining's trees, with Concerto's projection if it was carried along and is wanted."""
    kernel, bias = (weights.extra.get(f"patch_proj.{name}") for name in ("weight", "bias"))
    if kernel is None or bias is None or "patch_proj" not in template["student"]:
        return dict(weights.params)
    projection = {"kernel": np.ascontiguousarray(kernel.T), "bias": bias}
    return weights.params | {"student": weights.params["student"] | {"patch_proj": projection}}
