"""Converts weights: PyTorch files into this project's checkpoints, and back.

    python -m launch.convert --input=sonata.pth --output=weights/sonata
    python -m launch.convert --input=runs/mine --output=mine.pth

Input, found from its content: a release's .pth (encoder or linear head), a folder with
model.safetensors and config.json, a Pointcept checkpoint (pretraining or segmentor), a converted
checkpoint, or a run's folder. Image encoders, in only: transformers' folder of DINOv2 with
registers, SigLIP or SigLIP 2, and HED's .h5 of VGG16.

  --input=PATH    what to read
  --output=PATH   what to write; must not exist
  --to=FORMAT     checkpoint (this project's), pth (a release's), safetensors, or pointcept; needed
                  where --output does not tell
  --network=NAME  the network of a file without a config: a published name, or a JSON file with the
                  arguments of its constructor
  --tree=TREE     of a pretraining: take the encoder of the teacher or of the student alone

docs/weights.md says more. .pth files need PyTorch: pip install 'point_jax[torch]'.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch import command
from point_jax import storage
from point_jax.interop.atomic import must_be_free
from point_jax.interop.convert import TREES, encoder_of, to_pointcept, to_release, to_weights
from point_jax.interop.files import (
    CONFIG,
    TENSORS,
    has_tensors,
    read_file,
    write_pth,
    write_safetensors,
)
from point_jax.interop.image_encoders import is_image_encoder, to_image_encoder
from point_jax.interop.store import MANIFEST, Weights, count, leaves, load_weights, save_weights
from point_jax.interop.workdir import is_workdir, read_workdir
from point_jax.training.checkpoint import FOLDER, CheckpointError
from point_jax.training.config import ConfigError

FORMATS = ("checkpoint", "pth", "safetensors", "pointcept")
TREE = "teacher"  # whose encoder a release of a pretraining gets, unless --tree says


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ConfigError: a flag that does not exist, or a missing one.
    """
    parser = command.Parser("launch.convert", add_help=False)
    parser.add_argument("--input", required=True, type=storage.place)
    parser.add_argument("--output", required=True, type=partial(storage.local, what="--output"))
    parser.add_argument("--to", choices=FORMATS)
    parser.add_argument("--network")
    parser.add_argument("--tree", choices=TREES)
    return parser.parse_args(argv[1:])


def read(path: Path, network: str | None, tree: str | None) -> tuple[Weights, list[str]]:
    """Weights of anything that can be converted, and remarks on what was left out."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (path / MANIFEST).is_file() or is_workdir(path):
        converted = (path / MANIFEST).is_file()
        weights = load_weights(path) if converted else read_workdir(path)
        remarks = [] if converted else ["left out: the optimizer's state, which stays in the run"]
        if network is not None:
            raise ConfigError(f"--network is for files without a config, and {path} has one")
        if tree is not None and weights.kind != "pretraining":
            raise ConfigError(f"--tree is for a pretraining, and {path} is one {weights.kind}")
        return (weights if tree is None else encoder_of(weights, tree)), remarks
    if path.is_dir() and not has_tensors(path):
        raise CheckpointError(
            f"{path} is no folder of weights: expected {MANIFEST} (a converted checkpoint), "
            f"{CONFIG} and {FOLDER} (a run), or {TENSORS} and {CONFIG}"
        )
    foreign = read_file(path)
    if is_image_encoder(foreign):
        if network is not None or tree is not None:
            raise ConfigError(f"{path} holds an image encoder: no --network or --tree with it")
        weights, left_out = to_image_encoder(foreign)
        return weights, [f"left out: {what}" for what in left_out]
    return to_weights(foreign, network, tree), [f"left out: {what}" for what in foreign.left_out]


def target(source: Path, output: Path, kind: str) -> str:
    """The format that the output's name and the kind tell.

    Raises:
      ConfigError: they do not.
    """
    if output.suffix in (".pth", ".pt", ".ckpt"):
        if kind == "image_encoder":
            raise ConfigError(f"{source} is one {kind}, which becomes a checkpoint: a folder")
        if kind in ("encoder", "linear_head"):
            return "pth"
        raise ConfigError(
            f"{source} is one {kind}: give --to=pth for its encoder as a release's file, or "
            "--to=pointcept for all of it as Pointcept's checkpoint"
        )
    if (source / MANIFEST).is_file():
        raise ConfigError(f"{source} is converted already: give --to={'|'.join(FORMATS)}")
    return "checkpoint"


def write(path: Path, to: str, weights: Weights) -> list[str]:
    """Writes weights in a format; returns remarks on what was left out."""
    if to == "checkpoint":
        save_weights(path, weights)
        return []
    size = weights.source.get("grid_size")
    unsaid = [f"voxels of {size} m: this format does not say so, keep it in mind"] if size else []
    if to == "pointcept":
        write_pth(path, to_pointcept(weights))
        return [
            "Pointcept starts from this file (weight=FILE); without an optimizer's state it does "
            "not resume (resume=True)",
            *unsaid,
        ]
    remarks = []
    if weights.kind in ("pretraining", "segmentor"):
        remarks = [
            f"took the {TREE}'s encoder (--tree={TREES[0]} takes the other); the heads are left out"
            if weights.kind == "pretraining"
            else "took the network without its head (--to=pointcept keeps it)"
        ]
        weights = encoder_of(weights, TREE)
    content: dict[str, Any] = to_release(weights)
    if to == "pth":
        write_pth(path, content)
    else:
        write_safetensors(path, content["config"], content["state_dict"])
    return remarks + unsaid


def describe(weights: Weights) -> str:
    """Kind, variant, size and origin of weights in a line."""
    arrays = f"{count(weights.params) / 1e6:.2f} M parameters"
    if "keys" in weights.source:
        arrays += f" under {weights.source['keys']} keys"
    if weights.extra:
        arrays += f", {len(weights.extra)} arrays carried along"
    name = f"{weights.kind} {weights.variant}".strip()
    tree = f", the {weights.source['tree']}'s" if "tree" in weights.source else ""
    return f"{name}{tree}: {arrays}, sha256 {weights.source.get('sha256', 'unknown')[:16]}"


def main(argv: Sequence[str]) -> int:
    """Converts what the command line says; returns the exit code."""
    options = parse(argv)
    must_be_free(options.output)
    weights, remarks = read(options.input, options.network, options.tree)
    to = options.to or target(options.input, options.output, weights.kind)
    print(f"read {options.input}: {describe(weights)}")
    bad = [name for name, array in leaves(weights.params) if not np.isfinite(array).all()]
    if bad:
        remarks.append(f"NaN or infinity in {len(bad)} arrays: {', '.join(bad[:5])}")
    remarks += write(options.output, to, weights)
    for remark in remarks:
        print(remark)
    print(f"wrote {options.output}: {to}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
