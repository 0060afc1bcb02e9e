"""Foreign weight files: PyTorch's .pth, Hugging Face folders of safetensors and JSON, Keras' .h5.

A .pth is a pickle, and a pickle is a program. PyTorch reads it here in its weights-only mode, which
builds arrays, containers and numbers and runs nothing else; from 2.10 on, because before that files
were known to break out of the mode (CVE-2025-32434, CVE-2026-24747). PyTorch does not look at the
checksums of the archive around the pickle; this module does.
"""

import hashlib
import importlib
import json
import os
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from point_jax.interop import hdf5, shards
from point_jax.interop.atomic import new_file, new_folder
from point_jax.training.checkpoint import CheckpointError

State = dict[str, np.ndarray]

TENSORS, CONFIG = "model.safetensors", "config.json"
OLDEST_TORCH = (2, 10)
NEEDS_TORCH = "a .pth file needs PyTorch: pip install 'point_jax[torch]'"

# safetensors' names of dtypes, where they differ from NumPy's.
_SAFE = {"F": "float", "I": "int", "U": "uint", "C": "complex"}
_SAFE_ODD = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


@dataclass(frozen=True)
class Foreign:
    """What a foreign file holds.

    Attributes:
      config: arguments of the network's constructor as JSON values; None if the file has none.
      state: arrays by the file's keys, of the file's dtypes, bit for bit.
      format: "pth", "safetensors" or "hdf5".
      file: the file of the arrays; of several, their index.
      shards: the several files.
      numbers: plain numbers beside the state dict, such as Pointcept's `epoch`.
      left_out: what else the file has, in words, such as an optimizer's state.
    """

    config: dict[str, Any] | None
    state: State
    format: str
    file: Path
    numbers: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()


def read_file(path: Path) -> Foreign:
    """Reads a .pth, an .h5, or a .safetensors with its `config.json` beside it or their folder.

    The content decides, not the name. A folder may hold its arrays in several files with an index.

    Raises:
      CheckpointError: it is none of these, is damaged, or holds more than data; or PyTorch or h5py
        is missing.
    """
    if path.is_dir():
        if not has_tensors(path):
            raise CheckpointError(f"{path} holds no weights: no {TENSORS} in it")
        if not (path / TENSORS).is_file():
            return _read_safetensors(path / shards.INDEX)
        path = path / TENSORS
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if head[8:] == b"{":
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pth(path)
    if head.startswith(hdf5.MAGIC):
        return Foreign(None, _not_empty(hdf5.read_hdf5(path), path), "hdf5", path)
    what = f"starts with {head!r}" if head else "empty"
    raise CheckpointError(
        f"{path} is not a checkpoint ({what}); expected .pth, .safetensors or .h5"
    )


def has_tensors(folder: Path) -> bool:
    """Whether a folder holds safetensors, in one file or several."""
    return (folder / TENSORS).is_file() or (folder / shards.INDEX).is_file()


def sha256_of(*files: Path) -> str:
    """Hexadecimal sha256 of a file's bytes; of several, end to end, as `cat` gives them."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                total.update(part)
    return total.hexdigest()


def json_values(value: Any, what: str) -> Any:
    """A value as JSON has it: tuples become lists.

    Raises:
      CheckpointError: it has no JSON form.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} has no JSON form: {error}") from error


def refuse_misfits(file: Path, state: State, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compares keys and shapes of a file with those of a network.

    Raises:
      CheckpointError: names all arrays that are missing, extra or misshapen.
    """
    faults = [f"missing {key} {wanted[key]}" for key in wanted if key not in state]
    faults += [f"extra {key} {array.shape}" for key, array in state.items() if key not in wanted]
    faults += [
        f"{key} has shape {state[key].shape}, expected {shape}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    if faults:
        raise CheckpointError(f"{file} does not fit: {'; '.join(faults)}")


def dtype_of(name: str) -> np.dtype:
    """The dtype of NumPy's or ml_dtypes' name, such as "float32" or "bfloat16"."""
    return np.dtype(getattr(ml_dtypes, name, name))


# safetensors ---------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Foreign:
    """One file, or the several that an index names; with the config beside it."""
    config = read_json(path.with_name(CONFIG)) if path.with_name(CONFIG).exists() else None
    if path.name != shards.INDEX:
        return Foreign(config, _not_empty(_arrays(path), path), "safetensors", path)
    files = shards.shard_files(path, read_json(path))
    state = _not_empty(shards.read_shards(path, files, _arrays), path)
    return Foreign(config, state, "safetensors", path, shards=tuple(files))


def _arrays(path: Path) -> State:
    """The arrays of one .safetensors."""
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except Exception as error:  # SafetensorError, and whatever a damaged header makes of it
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    state = {}
    for key, entry in cast(Any, entries):
        name = entry["dtype"]
        name = _SAFE_ODD.get(name) or _SAFE.get(name[0], "?") + name[1:]
        try:
            state[key] = np.frombuffer(entry["data"], dtype_of(name)).reshape(entry["shape"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {key} has dtype {entry['dtype']}: {error}") from error
    return state


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
      CheckpointError: it cannot be read or holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, expected an object")
    return value


def write_safetensors(folder: Path, config: Mapping[str, Any], state: State) -> None:
    """Writes the folder that `PyTorchModelHubMixin.from_pretrained` reads.

    Raises:
      CheckpointError: there is something at `folder` already.
    """
    with new_folder(folder) as temporary:
        text = json.dumps(json_values(config, "the config"), indent=2) + "\n"
        (temporary / CONFIG).write_text(text)
        plain = {key: np.asarray(array, order="C") for key, array in state.items()}
        try:
            safetensors.numpy.save_file(plain, temporary / TENSORS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"cannot write {folder}: {error}") from error


# .pth ----------------------------------------------------------------------------------------


def _torch() -> ModuleType:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError(NEEDS_TORCH) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise CheckpointError(
            f"PyTorch {torch.__version__} can be made to run code by a .pth file: "
            "pip install --upgrade 'point_jax[torch]'"
        )
    return torch


class _Dtype:
    """Stands for `numpy.dtype` while a file is read; holds the dtype's name."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignores the byte order; PyTorch runs on little-endian machines only."""


def _scalar(dtype: _Dtype, data: bytes) -> float | int:
    """Stands for NumPy's scalars: the metrics that Pointcept keeps in its checkpoints."""
    if not re.fullmatch(r"[iuf][1248]|b1", dtype.name):
        raise ValueError(f"a NumPy scalar of dtype {dtype.name!r}")
    return np.frombuffer(data, dtype.name)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for `codecs.encode`, as which old pickles write bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode(encoding)


_STANDINS: list[Any] = [
    _Dtype,
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_latin1, "_codecs.encode"),
]


def _check_archive(path: Path) -> None:
    """Raises CheckpointError unless the archive is whole and each record has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for record in archive.infolist():
                if record.CRC == 0:  # written with checksums switched off
                    continue
                with archive.open(record) as stream:
                    while stream.read(1 << 22):
                        pass
    except Exception as error:  # whatever damaged bytes make of the reader
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise CheckpointError(f"{path} is a zip archive, but not one that PyTorch wrote")


def _read_pth(path: Path) -> Foreign:
    torch = _torch()
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STANDINS):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        raise CheckpointError(_why(path, error)) from error
    state, others = content, {}
    if isinstance(content, Mapping) and "state_dict" in content:
        state = content["state_dict"]
        others = {key: content[key] for key in content if key not in ("state_dict", "config")}
    tensors = isinstance(state, Mapping) and state and all(isinstance(k, str) for k in state)
    if not tensors or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict: {_describe(content, torch)}")
    config = content.get("config") if state is not content else None
    if config is not None and not isinstance(config, Mapping):
        raise CheckpointError(f"{path}: its config is a {type(config).__name__}, expected a dict")
    arrays = {key: _to_numpy(torch, path, key, tensor) for key, tensor in state.items()}
    numbers: dict[str, float] = {
        key: value
        for key, value in others.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    }
    return Foreign(
        None if config is None else json_values(dict(config), f"{path}: the config"),
        arrays,
        "pth",
        path,
        numbers,
        tuple(
            f"{key} ({_describe(value, torch)})"
            for key, value in others.items()
            if key not in numbers and value is not None and not isinstance(value, float)
        ),
    )


def _why(path: Path, error: Exception) -> str:
    """What to tell the person about a file that PyTorch does not read."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|but got <?class '([\w.]+)'|function: ([\w.]+)", text)
    if found:
        name = next(filter(None, found.groups()))
        return (
            f"{path} holds {name}, not only arrays: such a file could run code, so it is refused. "
            "If you made it yourself, save its state dict alone: "
            "torch.save({'state_dict': ...}, FILE)"
        )
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return f"{path} is truncated, damaged or no checkpoint: {lines[0][:200]}"


def _describe(value: Any, torch: ModuleType) -> str:
    """A few words on what a part of a file is."""
    found: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            found["arrays"] += 1
        elif isinstance(node, Mapping):
            for child in node.values():
                count(child)
        elif isinstance(node, list | tuple):
            for child in node:
                count(child)
        else:
            found["values"] += 1

    count(value)
    keys = ""
    if isinstance(value, Mapping) and len(value) <= 8:
        keys = f" under {', '.join(map(str, value))}"
    return " and ".join(f"{n} {what}" for what, n in found.items()) + keys or "nothing"


def _to_numpy(torch: ModuleType, path: Path, key: str, tensor: Any) -> np.ndarray:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{path}: {key} is not a plain dense array")
    try:
        dtype = dtype_of(str(tensor.dtype).removeprefix("torch."))
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)
    except (TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key} has dtype {tensor.dtype}: {error}") from error


def write_pth(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a .pth; state dicts of arrays become ordered dicts of tensors, bit for bit.

    Args:
      file: a path where nothing is.
      content: plain values, and under "state_dict" the arrays.

    Raises:
      CheckpointError: there is something at `file` already, or PyTorch is missing.
    """
    torch = _torch()

    def tensor(array: np.ndarray) -> Any:
        flat = np.array(array, order="C").reshape(-1).view(np.uint8)  # its own memory, writable
        return torch.from_numpy(flat).view(getattr(torch, array.dtype.name)).reshape(array.shape)

    state = OrderedDict((key, tensor(array)) for key, array in content["state_dict"].items())
    with new_file(file) as temporary, temporary.open("wb") as stream:
        try:
            torch.save({**content, "state_dict": state}, stream)
        except RuntimeError as error:  # as which PyTorch passes on what the stream says
            raise CheckpointError(f"cannot write {file}: {error}") from error
        stream.flush()
        os.fsync(stream.fileno())


def _not_empty(state: State, path: Path) -> State:
    if not state:
        raise CheckpointError(f"{path} holds no arrays")
    return state
