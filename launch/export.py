"""Exports an encoder as programs that run without this project, on CPU, GPU and TPU.

    python -m launch.export --checkpoint=DIR --output=DIR --buckets=16384,65536

--checkpoint is what launch.infer takes: a run's folder, what launch.convert wrote, or the --workdir
of launch.evaluate, whose segmentation layer comes along. --output gets encoder.py, which needs
numpy, jax and flatbuffers; docs/features.md shows how it is called.

  --checkpoint=DIR       see above
  --output=DIR           must not exist
  --buckets=16384,65536  most voxels of a cloud: one program each, compiled when first used
  --shares=1,0.5,...     room at every level, as a share of the bucket; default: halves
  --platforms=cpu,cuda,tpu  that the programs run on; also rocm
  --tree=teacher         of a pretraining, which of the two networks: teacher or student
  --grid_size=0.02       edge of a voxel in metres; default: the checkpoint's
  --scale=1              factor on the coordinates
  --inputs=coord,color,normal   what the network reads, where the checkpoint does not say
  --dtype=float32        of the arithmetic: float32 or bfloat16
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax.numpy as jnp

from launch import command
from point_jax import storage
from point_jax.features.exported import (
    PLATFORMS,
    bucket_capacities,
    default_shares,
    write_export,
)
from point_jax.features.load import load, load_head, read_checkpoint
from point_jax.interop.atomic import must_be_free
from point_jax.training.config import ConfigError

T = TypeVar("T")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ConfigError: a flag that does not exist, a missing one, or a value that cannot be.
    """
    parser = command.Parser("launch.export", add_help=False)
    parser.add_argument("--checkpoint", required=True, type=storage.place)
    parser.add_argument("--output", required=True, type=partial(storage.local, what="--output"))
    parser.add_argument("--buckets", default="16384,65536")
    parser.add_argument("--shares", default="")
    parser.add_argument("--platforms", default="cpu,cuda,tpu")
    parser.add_argument("--tree", choices=("teacher", "student"))
    parser.add_argument("--grid_size", type=float)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--inputs", default="")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(argv[1:])
    given.buckets = sorted(set(_list("buckets", given.buckets, int, lambda n: n >= 1)))
    given.shares = _list("shares", given.shares, float, lambda s: 0 < s <= 1)
    given.platforms = _list("platforms", given.platforms, str, PLATFORMS.__contains__)
    given.inputs = tuple(_list("inputs", given.inputs, str, lambda _: True)) or None
    if not given.buckets or not given.platforms:
        raise ConfigError("--buckets and --platforms must list at least one")
    if given.shares and given.shares[0] != 1:
        raise ConfigError(f"--shares starts with {given.shares[0]:g}; level 0 has all: 1")
    return given


def _list(flag: str, text: str, kind: Callable[[str], T], good: Callable[[T], Any]) -> list[T]:
    expected = {
        "buckets": "numbers of voxels, 1 or more",
        "shares": "numbers above 0 and up to 1",
        "platforms": f"some of {', '.join(PLATFORMS)}",
    }.get(flag, "names")
    try:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--{flag}={text}: expected {expected} apart by commas") from error
    if bad := [value for value in values if not good(value)]:
        raise ConfigError(f"--{flag}={text}: {bad[0]!r}, expected {expected}")
    return values


def main(argv: Sequence[str]) -> int:
    """Exports what the command line says; returns the exit code."""
    given = parse(argv)
    must_be_free(given.output)
    weights = read_checkpoint(given.checkpoint)
    if given.tree is not None and weights.kind != "pretraining":
        raise ConfigError(f"--tree is for a pretraining; {given.checkpoint} is one {weights.kind}")
    tree = given.tree or "teacher"
    try:
        encoder = load(
            given.checkpoint,
            weights=weights,
            tree=tree,
            grid_size=given.grid_size,
            inputs=given.inputs,
            dtype=jnp.dtype(given.dtype),
            scale=given.scale,
        )
    except ValueError as error:
        raise ConfigError(f"{given.checkpoint}: {error} (--inputs, --grid_size)") from error
    if encoder.inputs is None:
        raise ConfigError(
            f"the network reads {encoder.spec.inputs} channels a point, and its checkpoint does "
            "not say which: give them in their order, for instance --inputs=color,normal"
        )
    levels = len(encoder.spec.encoder)
    shares = given.shares or default_shares(levels)
    if len(shares) != levels:
        raise ConfigError(f"--shares has {len(shares)} numbers, the network {levels} levels")
    origin = {"kind": weights.kind, "variant": weights.variant, "config": weights.config}
    origin |= {name: weights.source.get(name) for name in ("file", "sha256", "numbers")}
    if weights.kind == "pretraining":
        origin["tree"] = tree
    start = time.monotonic()
    manifest = write_export(
        given.output,
        encoder,
        load_head(given.checkpoint, weights=weights),
        [bucket_capacities(voxels, shares) for voxels in given.buckets],
        given.platforms,
        origin,
    )
    parameters = manifest["parameters"]
    print(f"{parameters['count'] / 1e6:.2f} M parameters: {parameters['bytes'] / 1e6:.1f} MB")
    for bucket in manifest["buckets"]:
        capacities = ", ".join(map(str, bucket["capacities"]))
        print(f"{bucket['file']}: {bucket['bytes'] / 1e6:.2f} MB, levels of {capacities} voxels")
    print(
        f"wrote {given.output} for {', '.join(manifest['platforms'])} in "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
