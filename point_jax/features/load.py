"""An encoder from a checkpoint, and the segmentation layer that belongs to it."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from point_jax import storage
from point_jax.features.encoder import Encoder
from point_jax.features.head import SegmentationHead
from point_jax.features.voxels import INPUTS, Input
from point_jax.interop.release import spec_of
from point_jax.interop.store import MANIFEST, SEGMENTOR, Weights, load_weights
from point_jax.interop.workdir import find_run, read_workdir
from point_jax.training.checkpoint import CheckpointError

# Edge of a voxel, metres, in each release's default transform.
GRID_SIZE = {"PT-v3m1": 0.02, "PT-v3m2": 0.02, "PT-v3m3": 0.01}


def load(
    path: str | Path,
    *,
    weights: Weights | None = None,
    tree: Literal["teacher", "student"] = "teacher",
    grid_size: float | None = None,
    inputs: tuple[Input, ...] | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Encoder:
    """Loads an encoder.

    Args:
      path: a folder that `launch.convert` wrote, one in which `launch.train` trained, of such a
        one `checkpoints/<step>`, or one in which `launch.evaluate` trained a segmentation.
      weights: what `read_checkpoint` said of it, where that was asked already.
      tree: of a pretraining, which of the two networks.
      grid_size: edge of a voxel, metres; None for the one that the network was trained with.
      inputs: the properties of a point that the network reads; needed for raw clouds where they
        are not coordinates, colour and normal.
      dtype: of the arithmetic: `jnp.float32` or `jnp.bfloat16`.
      options: others of `Encoder`: scale, max_voxels, margin.

    Raises:
      CheckpointError: nothing there, damaged, or no encoder.
      ValueError: an option that does not fit the network.
    """
    path = storage.place(path)
    if tree not in ("teacher", "student"):
        raise ValueError(f"tree is {tree!r}; expected teacher or student")
    weights = weights or read_checkpoint(path)
    params = weights.params[tree] if weights.kind == "pretraining" else weights.params
    if "backbone" not in params:
        raise CheckpointError(f"{path}: holds one {weights.kind}, not an encoder of points")
    spec = spec_of(weights.config, weights.variant, dtype)
    if inputs is None and spec.inputs == 3 * len(INPUTS):
        inputs = INPUTS
    return Encoder(
        spec,
        jax.tree.map(jnp.asarray, params["backbone"]),
        grid_size=trained_grid_size(weights) if grid_size is None else grid_size,
        inputs=inputs,
        **options,
    )


def trained_grid_size(weights: Weights) -> float:
    """Edge of a voxel that a network was trained with, metres; a release's where none is stored."""
    return weights.source.get("grid_size") or GRID_SIZE[weights.variant]


def load_head(path: str | Path, *, weights: Weights | None = None) -> SegmentationHead | None:
    """The segmentation layer that belongs to the encoder of a checkpoint; None if it has none.

    Args:
      path, weights: as for `load`.

    Raises:
      CheckpointError: nothing there, or damaged.
    """
    weights = weights or read_checkpoint(path)
    head = weights.params.get("seg_head")
    if head is None:
        return None
    bias = np.asarray(head["bias"])
    classes = weights.source.get("classes") or [str(i) for i in range(len(bias))]
    return SegmentationHead(np.asarray(head["kernel"]), bias, tuple(classes))


def read_checkpoint(path: str | Path) -> Weights:
    """What is at a path that `load` takes.

    Raises:
      CheckpointError: nothing there, or damaged.
    """
    path = storage.place(path)
    if (path / SEGMENTOR / MANIFEST).is_file():
        return load_weights(path / SEGMENTOR)
    if find_run(path):
        return read_workdir(path)
    if (path / MANIFEST).is_file():
        return load_weights(path)
    what = "no such folder" if not path.exists() else "neither a run nor converted weights"
    raise CheckpointError(
        f"{path}: {what}; expected the --workdir of launch.train with a checkpoint in it, or what "
        "launch.convert made of a PyTorch file"
    )
