"""Encoders as `jax.export` programs, for machines without this project.

    manifest.json        what the network reads and gives, buckets, versions, digests
    parameters.npz       arrays by slashed name, shared by all buckets; `head/` is a segmentation's
    encoder_<V>.bin      the program of a bucket of V voxels, for all platforms
    encoder.py           `standalone.Encoder`, which reads the rest

The folder is written beside its place and renamed into it, so it is whole or absent.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from point_jax.features import standalone
from point_jax.features.encoder import Encoder, row_function
from point_jax.features.head import SegmentationHead
from point_jax.interop.atomic import new_folder
from point_jax.interop.store import count, leaves
from point_jax.models.spec import PTv3Spec

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
ROUND = 64  # coarser levels' capacities are multiples of it, or that of level 0
# Attention's kernel on CUDA. JAX does not promise that a later version reads this call.
TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def bucket_capacities(voxels: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Capacities of all levels of a bucket.

    Args:
      voxels: of level 0.
      shares: for every level, which part of that it has room for; the first is 1.
    """
    coarser = (min(-(-int(np.ceil(voxels * s)) // ROUND) * ROUND, voxels) for s in shares[1:])
    return (voxels, *coarser)


def default_shares(levels: int) -> tuple[float, ...]:
    """Half the voxels of the level before, at every level.

    On scans a level has a quarter to a third of the voxels of the level before.
    """
    return tuple(0.5**level for level in range(levels))


def export_bucket(
    spec: PTv3Spec, params: dict[str, Any], capacities: tuple[int, ...], platforms: Sequence[str]
) -> jax.export.Exported:
    """Lowers an encoder for clouds of these capacities.

    Args:
      spec: the network.
      params: its parameters, or their shapes.
      capacities: of every level.
      platforms: some of `PLATFORMS`. None of them needs to be here.

    Returns:
      A program (arrays by slashed name, {"grid": (N, 3) int32, "features": (N, channels) float32,
      "count": () int32, and with rotary positions "coord": (N, 3) float32}) -> (order (N,) int32,
      grids, encoder features and decoder features of every level), see `encoder.row_function`.
    """
    run = row_function(spec)
    tree = jax.tree.structure(params)
    names = [name for name, _ in leaves(params)]

    def encode(arrays, inputs):
        own = jax.tree.unflatten(tree, [arrays[name] for name in names])
        cloud = inputs["grid"], inputs["features"], inputs.get("coord")
        order, grids, out = run(own, *cloud, None, inputs["count"], None, capacities)
        return order, grids, out.levels, out.decoded

    points = capacities[0]
    inputs = {
        "grid": jax.ShapeDtypeStruct((points, 3), jnp.int32),
        "features": jax.ShapeDtypeStruct((points, spec.inputs), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    if spec.rotary:
        inputs["coord"] = jax.ShapeDtypeStruct((points, 3), jnp.float32)
    arrays = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves(params)}
    program = jax.export.export(jax.jit(encode), platforms=platforms, disabled_checks=[TRITON])
    return program(arrays, inputs)


def write_export(
    folder: Path,
    encoder: Encoder,
    head: SegmentationHead | None,
    buckets: Sequence[tuple[int, ...]],
    platforms: Sequence[str],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Writes an encoder into a new folder.

    Args:
      folder: where nothing is yet.
      encoder: whose `inputs` are known.
      head: the segmentation's layer on its features; None without.
      buckets: capacities of every level, smallest bucket first.
      platforms: some of `PLATFORMS`.
      origin: JSON values on where the weights are from, for the manifest.

    Returns:
      The manifest.

    Raises:
      CheckpointError: something is at `folder`, or it cannot be written.
    """
    assert encoder.inputs is not None
    spec, params = encoder.spec, jax.device_get(encoder.params)
    arrays = dict(leaves(params))
    if head is not None:
        arrays |= {"head/kernel": head.kernel, "head/bias": head.bias}
    with new_folder(folder) as temporary:
        np.savez(temporary / standalone.PARAMETERS, allow_pickle=False, **arrays)
        files = []
        programs = []
        for capacities in buckets:
            program = export_bucket(spec, params, capacities, platforms)
            files.append(temporary / f"encoder_{capacities[0]}.bin")
            files[-1].write_bytes(program.serialize())
            programs.append(program)
        manifest = {
            "format": standalone.FORMAT,
            "version": standalone.VERSION,
            "origin": origin,
            "grid_size": encoder.grid_size,
            "scale": encoder.scale,
            "inputs": list(encoder.inputs),
            "positions": spec.rotary is not None,
            "dtype": jnp.dtype(spec.dtype).name,
            "levels": [stage.channels for stage in spec.encoder],
            "decoder": [stage.channels for stage in spec.decoder],
            "classes": None if head is None else list(head.classes),
            "platforms": list(platforms),
            "calling_convention_version": programs[0].calling_convention_version,
            "versions": {name: version(name) for name in ("point_jax", "jax", "jaxlib")},
            "buckets": [
                {"capacities": list(capacities), **_describe(file)}
                for capacities, file in zip(buckets, files, strict=True)
            ],
            "parameters": {
                "count": count(params),
                **_describe(temporary / standalone.PARAMETERS),
            },
        }
        shutil.copyfile(str(standalone.__file__), temporary / "encoder.py")
        (temporary / standalone.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {
        "file": file.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
