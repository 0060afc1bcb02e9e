"""Safetensors of one network in several files, with an index of which array is where."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from point_jax.training.checkpoint import CheckpointError

INDEX = "model.safetensors.index.json"


def shard_files(index: Path, content: Mapping[str, Any]) -> dict[Path, set[str]]:
    """The files that an index names, sorted, and the keys of each; all lie beside the index.

    Args:
      index: the file.
      content: what it holds.

    Raises:
      CheckpointError: it is no index, or a file is missing.
    """
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} holds no weight_map")
    files: dict[Path, set[str]] = {}
    for name in sorted({str(place) for place in places.values()}):
        file = index.with_name(name) if name and Path(name).name == name else None
        if file is None or not file.is_file():
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it")
        files[file] = {key for key, place in places.items() if place == name}
    return files


def read_shards(
    index: Path,
    files: Mapping[Path, set[str]],
    read: Callable[[Path], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """All arrays; each must be in the file that the index says, and no other.

    Args:
      index: the file.
      files: of `shard_files`.
      read: reads one of them.

    Raises:
      CheckpointError: a file holds other arrays.
    """
    state: dict[str, np.ndarray] = {}
    for file, named in files.items():
        found = read(file)
        faults = [f"missing {key}" for key in sorted(named - found.keys())]
        faults += [f"extra {key}" for key in sorted(found.keys() - named)]
        if faults:
            raise CheckpointError(f"{file} is not what {index.name} says: {'; '.join(faults)}")
        state |= found
    return state
