"""Pointcept's names and layouts of weights, against this project's parameters.

The table below names every module once; both directions follow from walking this project's tree.
Blocks are stacked here (a leading axis) and numbered there.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

Params = dict[str, Any]

_BLOCK = {
    "conv": "cpe.0",
    "conv_linear": "cpe.1",
    "conv_norm": "cpe.2",
    "norm1": "norm1.0",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2.0",
    "mlp/fc1": "mlp.0.fc1",
    "mlp/fc2": "mlp.0.fc2",
    "bias_table": "attn.rpe.rpe_table",
    "scale1": "ls1.0.gamma",
    "scale2": "ls2.0.gamma",
}
_MODULE = {
    "linear": "stem.linear",
    "conv": "stem.conv",
    "norm": "stem.norm",
    "mask_token": "mask_token",
    "down/proj": "down.proj",
    "down/norm": "down.norm.0",
    "up/proj": "up.proj.0",
    "up/norm": "up.proj.1",
    "up/skip": "up.proj_skip.0",
    "up/skip_norm": "up.proj_skip.1",
    "mlp/fc1": "mlp.0",
    "mlp/fc2": "mlp.2",
    "prototypes": "prototype.parametrizations.weight.original1",
}
_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def from_state_dict(
    state: Mapping[str, np.ndarray],
    template: Params,
    prefix: str = "",
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Params:
    """Parameters of a backbone or a head from a PyTorch state dict.

    Args:
      state: arrays by Pointcept's keys.
      template: a tree of this project with the shapes wanted (arrays or `jax.ShapeDtypeStruct`).
      prefix: what the keys start with, e.g. "student.backbone.".
      constants: arrays that the state dict holds and this project computes, by key without prefix,
        see `release.constants`. Floats must be there and equal; integers, which count batches,
        must be there.

    Returns:
      A tree like `template` with float32 numpy arrays.

    Raises:
      ValueError: lists every key that is missing, left over or misshapen. The prototypes' lengths
        ("original0") are fixed to 1 here and must be 1 there.
    """
    used, problems = set(), []

    def read(key: str, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        used.add(key)
        if key not in state:
            problems.append(f"missing {key}")
            return np.zeros(shape, np.float32)
        array = _layout_in(np.asarray(state[key], np.float32), path)
        if array.shape != shape:
            problems.append(
                f"{key} has shape {np.shape(state[key])}, which gives {array.shape} here, "
                f"not {shape}"
            )
        return array

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, (*path, name)) for name, child in node.items()}
        keys = _keys(path, node.shape)
        if "blocks" in path:
            return np.stack([read(prefix + key, path, node.shape[1:]) for key in keys])
        return read(prefix + keys[0], path, node.shape)

    params = walk(template, ())
    for name, want in constants.items():
        used.add(prefix + name)
        if prefix + name not in state:
            problems.append(f"missing {prefix + name}")
            continue
        given = np.asarray(state[prefix + name])
        if given.shape != want.shape:
            problems.append(f"{prefix + name} has shape {given.shape}, not {want.shape}")
        elif want.dtype.kind == "f" and not np.allclose(given, want, rtol=1e-5, atol=0):
            problems.append(f"{prefix + name} is {given}, for this network it must be {want}")
    for key in sorted(set(state) - used):
        if not key.startswith(prefix):
            continue
        if key.endswith("prototype.parametrizations.weight.original0"):
            if not np.allclose(state[key], 1, atol=1e-6):
                problems.append(f"{key} is not 1: prototypes have unit length here")
        else:
            problems.append(f"left over {key}")
    if problems:
        raise ValueError("the state dict does not fit:\n  " + "\n  ".join(problems))
    return params


def to_state_dict(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`."""
    state: dict[str, np.ndarray] = {}
    for path, array in _leaves(params, ()):
        arrays = list(array) if "blocks" in path else [array]
        for key, part in zip(_keys(path, array.shape), arrays, strict=True):
            state[prefix + key] = _layout_out(np.asarray(part), path)
            if path[-1] == "prototypes":
                ones = np.ones((len(part), 1), np.float32)
                state[prefix + key.replace("original1", "original0")] = ones
    return state


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, (*path, name))
    else:
        yield path, node


def _keys(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """Pointcept's key of a parameter; of stacked blocks one key each."""
    leaf = [_LEAF[path[-1]]] if path[-1] in _LEAF else []
    names = path[: len(path) - len(leaf)]
    if names[0] in ("enc", "dec"):
        part, stage, *rest = names
        stem = [part, f"{part}{stage.removeprefix('stage')}"]
        if rest[0] == "blocks":
            name = _BLOCK["/".join(rest[1:])]
            return [".".join([*stem, f"block{i}", name, *leaf]) for i in range(shape[0])]
        return [".".join([*stem, _MODULE["/".join(rest)], *leaf])]
    if names[0] == "embedding":
        return [".".join(["embedding", _MODULE["/".join(names[1:])], *leaf])]
    return [".".join([_MODULE["/".join(names)], *leaf])]


def _layout_in(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    if path[-1] == "mask_token":
        return array.reshape(-1)
    if path[-1] == "bias_table":
        return array.reshape(3, -1, array.shape[-1])
    if path[-1] != "kernel":
        return array
    if path[-2] == "conv":  # (out, kx, ky, kz, in) -> (taps, in, out)
        return array.reshape(len(array), -1, array.shape[-1]).transpose(1, 2, 0)
    return array.T


def _layout_out(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    if path[-1] == "mask_token":
        return array[None]
    if path[-1] == "bias_table":
        return array.reshape(-1, array.shape[-1])
    if path[-1] != "kernel":
        return array
    if path[-2] == "conv":
        side = round(len(array) ** (1 / 3))
        return array.transpose(2, 0, 1).reshape(array.shape[2], side, side, side, array.shape[1])
    return array.T
