"""Arrays of an HDF5 file, such as the .h5 that Keras writes."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from point_jax.training.checkpoint import CheckpointError

MAGIC = b"\x89HDF\r\n\x1a\n"


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """All arrays by their slashed places.

    Only what lies in the file as it is: links into other files are not followed, and arrays that
    are compressed or elsewhere are refused.

    Raises:
      CheckpointError: h5py is missing, or the file is damaged.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise CheckpointError("an .h5 file needs h5py: pip install 'point_jax[hdf5]'") from error
    found: dict[str, np.ndarray] = {}

    def take(place: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset):
            return
        if node.dtype.kind not in "fiu":
            raise ValueError(f"{place} is no array of numbers but of {node.dtype}")
        if node.external or node.is_virtual or node.id.get_storage_size() != node.nbytes:
            raise ValueError(f"{place} is compressed, incomplete or in another file")
        found[place] = node[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(take)
    except Exception as error:  # whatever damaged bytes make of the library
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    return found
