"""Converted weights on disk: a folder with a manifest and an Orbax checkpoint.

    manifest.json   format, version, kind, variant, config, source, names of the extra arrays,
                    number of parameters, digest of all of it
    arrays/         Orbax: `params`, and `extra` by number

The folder is written beside its place and renamed into it, so it is whole or absent.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from point_jax import storage
from point_jax.interop.atomic import new_folder
from point_jax.interop.files import json_values, read_json
from point_jax.training.checkpoint import CheckpointError

MANIFEST, ARRAYS = "manifest.json", "arrays"
FORMAT, VERSION = "point_jax weights", 1
SEGMENTOR = "segmentor"  # folder of weights in that of an evaluation that trained one
KINDS = ("encoder", "pretraining", SEGMENTOR, "linear_head", "image_encoder")


@dataclass(frozen=True)
class Weights:
    """Weights in this project's names.

    Attributes:
      kind: one of `KINDS`.
      variant: "PT-v3m1", "PT-v3m2" or "PT-v3m3"; "" for a linear head; of an image encoder one of
        `image_encoders.VARIANTS`.
      config: constructor arguments of the release's network, as its checkpoint has them (JSON
        values).
      params: nested dicts of arrays: {"backbone": ...}, with a segmentor's or linear head's
        "seg_head": {"kernel": (inputs, classes), "bias": (classes,)}; of a pretraining
        {"student": {"backbone", "mask_head", "unmask_head"}, "teacher": {...}}; of an image encoder
        {"image_encoder": ...}.
      extra: arrays of the source without a place in `params`, under their own names, for the way
        back: Concerto's image branch, counters of batch norms.
      source: where they come from: `file`, `format`, `sha256`, and what the way back needs:
        `prefix` of Pointcept's keys, `dtypes` (name -> keys) other than float32, `numbers`; and
        how many `keys` there were. Of what was trained here `grid_size` in metres, and of a
        segmentor `classes` and `learned`: the `sources` of its labels, and what it started `from`.
    """

    kind: str
    variant: str
    config: dict[str, Any]
    params: dict[str, Any]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Slashed name and array of every leaf, sorted."""
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from leaves(tree[name], f"{place}{name}/")
        else:
            yield place + name, tree[name]


def count(params: Mapping[str, Any]) -> int:
    """How many numbers the arrays of a tree hold."""
    return sum(int(np.size(array)) for _, array in leaves(params))


def digest(weights: Weights) -> str:
    """Hexadecimal sha256 over kind, config, source, and all arrays' names, dtypes, shapes, bits."""
    about = [weights.kind, weights.variant, weights.config, weights.source]
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in leaves({"params": weights.params, "extra": weights.extra}):
        array = np.asarray(array)
        total.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        total.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def save_weights(folder: Path | str, weights: Weights) -> None:
    """Writes weights into a new folder.

    Raises:
      CheckpointError: something is there already, it cannot be written, or the weights have an
        empty array or a config without JSON form.
    """
    folder = Path(folder)
    if weights.kind not in KINDS:
        raise CheckpointError(f"kind is {weights.kind!r}, expected one of {', '.join(KINDS)}")
    names = sorted(weights.extra)
    tree: dict[str, Any] = {"params": jax.tree.map(np.asarray, weights.params)}
    if names:
        tree["extra"] = {str(i): np.asarray(weights.extra[name]) for i, name in enumerate(names)}
    empty = [name for name, array in leaves(tree) if array.size == 0]
    if empty:
        raise CheckpointError(f"cannot store arrays without elements: {', '.join(empty)}")
    about = {"config": weights.config, "source": weights.source}
    weights = dataclasses.replace(weights, **json_values(about, "the config or source"))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": weights.kind,
        "variant": weights.variant,
        "config": weights.config,
        "source": weights.source,
        "parameters": count(weights.params),
        "extra": names,
        "digest": digest(weights),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    with new_folder(folder) as temporary:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                writer.save(temporary / ARRAYS, args=ocp.args.PyTreeSave(tree))
        except Exception as error:  # whatever a full disk makes the libraries raise
            text = (str(error).splitlines() or [""])[0][:200]
            raise CheckpointError(f"cannot write {folder}: {text}") from error
        (temporary / MANIFEST).write_text(text)


def load_weights(folder: Path | str) -> Weights:
    """Reads what `save_weights` wrote; every bit is checked.

    Returns:
      Weights with numpy arrays.

    Raises:
      CheckpointError: it is no such folder, was written by a newer program, or is damaged.
    """
    folder = storage.place(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no converted weights: no {MANIFEST} in it")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has version {manifest.get('version')}, this program reads {VERSION}: "
            "update point_jax, or convert the original again"
        )
    try:
        tree = _read(folder / ARRAYS)
        names = manifest["extra"]
        weights = Weights(
            kind=manifest["kind"],
            variant=manifest["variant"],
            config=manifest["config"],
            params=tree["params"],
            extra={name: tree["extra"][str(i)] for i, name in enumerate(names)},
            source=manifest["source"],
        )
        same = digest(weights) == manifest["digest"]
    except Exception as error:  # whatever a damaged file makes the libraries raise
        text = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{folder} is damaged ({type(error).__name__}: {text}); convert the original again"
        ) from error
    if not same:
        raise CheckpointError(
            f"{folder} is damaged: its arrays are not those that were saved; "
            "convert the original again"
        )
    return weights


def _read(folder: Path) -> dict[str, Any]:
    handler = ocp.PyTreeCheckpointHandler()
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # Orbax warns of arrays restored without shardings: meant so
    try:
        tree = handler.metadata(epath.Path(storage.absolute(folder))).tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        with ocp.Checkpointer(handler) as reader:
            return reader.restore(
                storage.absolute(folder), args=ocp.args.PyTreeRestore(item=tree, restore_args=numpy)
            )
    finally:
        log.setLevel(level)
