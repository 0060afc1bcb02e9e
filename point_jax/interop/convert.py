"""Foreign state dicts as `Weights`, and back: equal bit for bit, or refused with every reason.

What a file is shows in its keys:

    embedding.* enc.* [dec.*]                            an encoder (or with a decoder), a release
    seg_head.*                                           a release's linear head
    [module.]backbone.* [module.]seg_head.*              a segmentor that Pointcept trained
    [module.]student.* [module.]teacher.* and others     a pretraining of Pointcept
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from point_jax.interop.files import Foreign, State, dtype_of, refuse_misfits, sha256_of
from point_jax.interop.networks import settle_network
from point_jax.interop.pointcept import from_state_dict, to_state_dict
from point_jax.interop.release import constants, spec_of
from point_jax.interop.store import Weights
from point_jax.models.functional import functional
from point_jax.models.heads import OnlineCluster
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.sonata_spec import HEADS
from point_jax.training.checkpoint import CheckpointError

TREES = ("student", "teacher")
MODULE = "module."  # what Pointcept's keys start with when several GPUs trained

# Concerto's and Utonia's image branch: it has no place in `params` and is carried along. Its heads
# and its teacher get no gradient (REFERENCE quirk 17).
IMAGE_BRANCH = ("patch_proj.", "enc2d_model.", "enc2d_head_student.", "enc2d_head_teacher.")


class _Part(NamedTuple):
    """A module: its place in `params`, its prefix in the file, its shapes, and fixed arrays."""

    place: tuple[str, ...]
    prefix: str
    template: dict[str, Any]
    constants: State


def to_weights(foreign: Foreign, network: str | None = None, tree: str | None = None) -> Weights:
    """A foreign file's content in this project's names.

    Args:
      foreign: of `files.read_file`.
      network: for a file without config: a published name or a JSON file, see `find_network`.
      tree: of a pretraining take only the "student"'s or the "teacher"'s backbone, as an encoder.

    Raises:
      CheckpointError: no such network, or keys that are missing, extra or misshapen: all of them.
    """
    state, file = foreign.state, foreign.file
    prefix = MODULE if all(key.startswith(MODULE) for key in state) else ""
    state = {key.removeprefix(prefix): array for key, array in state.items()}
    kind = _kind(state, file)
    source = {
        "file": file.name,
        "format": foreign.format,
        "sha256": sha256_of(file),
        "prefix": prefix,
        "numbers": foreign.numbers,
    }
    if tree is not None:
        if kind != "pretraining":
            raise CheckpointError(f"{file} is one {kind}: it has no student and teacher (--tree)")
        state, kind = _under(state, f"{tree}.backbone."), "encoder"
        source |= {"tree": tree, "prefix": ""}
        if not state:
            raise CheckpointError(f"{file} has no {tree}")
    source["keys"] = len(state)
    outside: State = {}
    if kind == "linear_head":
        variant, config = "", _linear_config(state, foreign.config, file)
        parts = [_seg_head(state)]
    else:
        backbones = {name: _under(state, name) for name in _backbones(kind)}
        if not all(backbones.values()):
            lost = [name for name, part in backbones.items() if not part]
            raise CheckpointError(f"{file} is a pretraining without {' and '.join(lost)}*")
        variant, config = settle_network(backbones, foreign.config, network, file)
        try:
            parts = _parts(kind, spec_of(config, variant), state)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: its config makes no network: {error}") from error
        if kind == "pretraining":
            outside = {key: array for key, array in state.items() if key.startswith(IMAGE_BRANCH)}
    inside = {key: array for key, array in state.items() if key not in outside}
    params = _read(parts, inside, file)
    weights = Weights(kind, variant, config, params, outside, source)
    return _keep_bits(weights, state, parts, file)


def to_state(weights: Weights) -> State:
    """All arrays of weights by the names of the original, without `module.`.

    With the source's dtypes, and with its arrays that have no place in `params`.
    """
    state: State = {}
    for place, prefix in _places(weights):
        node: Any = weights.params
        for name in place:
            node = node[name]
        if place[-1] == "seg_head":
            kernel, bias = np.asarray(node["kernel"]), np.asarray(node["bias"])
            state |= {f"{prefix}weight": kernel.T, f"{prefix}bias": bias}
            continue
        state |= to_state_dict(jax.tree.map(np.asarray, node), prefix)
        if place[-1] == "backbone":
            fixed = constants(spec_of(weights.config, weights.variant))
            state |= {prefix + key: array for key, array in fixed.items()}
    for name, keys in weights.source.get("dtypes", {}).items():
        state |= {key: state[key].astype(dtype_of(name)) for key in keys if key in state}
    return state | weights.extra


def encoder_of(weights: Weights, tree: str = "teacher") -> Weights:
    """The backbone alone, as a release has it.

    Args:
      weights: of an encoder, a segmentor or a pretraining.
      tree: which one of a pretraining.

    Raises:
      CheckpointError: a linear head has no encoder.
    """
    if weights.kind == "encoder":
        return weights
    if weights.kind == "linear_head":
        raise CheckpointError("a linear head has no encoder")
    pretraining = weights.kind == "pretraining"
    params = weights.params[tree] if pretraining else weights.params
    prefix = f"{tree}.backbone." if pretraining else "backbone."
    dtypes = {
        name: [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        for name, keys in weights.source.get("dtypes", {}).items()
    }
    source = weights.source | {"prefix": "", "dtypes": {n: k for n, k in dtypes.items() if k}}
    source.pop("keys", None)  # of the whole
    return dataclasses.replace(
        weights,
        kind="encoder",
        params={"backbone": params["backbone"]},
        extra=_under(weights.extra, prefix),
        source=source | ({"tree": tree} if pretraining else {}),
    )


def to_release(weights: Weights) -> dict[str, Any]:
    """The content of a release's .pth: `config` and `state_dict`, of an encoder or a linear head.

    Raises:
      CheckpointError: of other kinds; take `encoder_of` them.
    """
    if weights.kind not in ("encoder", "linear_head"):
        raise CheckpointError(
            f"a release holds an encoder or a linear head, not one {weights.kind}"
        )
    return {"config": weights.config, "state_dict": to_state(weights)}


def to_pointcept(weights: Weights) -> dict[str, Any]:
    """The content of a Pointcept checkpoint, of a pretraining or a segmentor.

    The optimizer's, scheduler's and scaler's states are None: Pointcept numbers its moments by
    parameter groups that only its config knows. A file without them starts a run (`weight=FILE`),
    and cannot resume one (`resume=True` fails in PyTorch).

    Raises:
      CheckpointError: of other kinds.
    """
    if weights.kind not in ("pretraining", "segmentor"):
        raise CheckpointError(
            f"a Pointcept checkpoint holds a pretraining or a segmentor, not one {weights.kind}"
        )
    numbers = weights.source.get("numbers", {})
    prefix = weights.source.get("prefix", MODULE)
    return {
        "epoch": numbers.get("epoch", 0),
        "state_dict": {prefix + key: array for key, array in to_state(weights).items()},
        "optimizer": None,
        "scheduler": None,
        "scaler": None,
        "best_metric_value": numbers.get("best_metric_value", float("-inf")),
    }


def _kind(state: State, file: Path) -> str:
    heads = {key.split(".")[0] for key in state}
    if heads & set(TREES):
        return "pretraining"
    if heads == {"seg_head"}:
        return "linear_head"
    if "backbone" in heads:
        return "segmentor"
    if {"embedding", "enc"} <= heads:
        return "encoder"
    raise CheckpointError(
        f"{file} holds no network of this family: its keys start with {', '.join(sorted(heads))}"
    )


def _backbones(kind: str) -> tuple[str, ...]:
    """Prefixes of the backbones of a kind of file."""
    if kind == "pretraining":
        return tuple(f"{tree}.backbone." for tree in TREES)
    return ("backbone.",) if kind == "segmentor" else ("",)


def _under(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): array for k, array in state.items() if k.startswith(prefix)}


@functools.lru_cache(16)
def backbone_template(spec: PTv3Spec) -> dict[str, Any]:
    """Shapes of a network's parameters; not to be changed."""
    init, _ = functional(lambda rngs: PTv3(spec, rngs=rngs))
    return jax.eval_shape(init, jax.random.key(0))


def _parts(kind: str, spec: PTv3Spec, state: State) -> list[_Part]:
    template, fixed = backbone_template(spec), constants(spec)
    if kind == "encoder":
        return [_Part(("backbone",), "", template, fixed)]
    if kind == "segmentor":
        parts = [_Part(("backbone",), "backbone.", template, fixed)]
        head = any(key.startswith("seg_head.") for key in state)  # none: a network for features
        return [*parts, _seg_head(state)] if head else parts
    parts = []
    for tree in TREES:
        parts.append(_Part((tree, "backbone"), f"{tree}.backbone.", template, fixed))
        for head in HEADS:
            prefix = f"{tree}.{head}."
            if any(key.startswith(prefix) for key in state):
                parts.append(_Part((tree, head), prefix, _head_template(state, prefix), {}))
    return parts


def _head_template(state: State, prefix: str) -> dict[str, Any]:
    """Shapes of a prototype head, after its own first, second and third array."""

    def sizes(key: str) -> tuple[int, int]:
        shape = state[prefix + key].shape if prefix + key in state else ()
        return (shape[0], shape[1]) if len(shape) == 2 else (1, 1)  # the check will name it

    hidden, inputs = sizes("mlp.0.weight")
    prototypes, embed = sizes("prototype.parametrizations.weight.original1")
    init, _ = functional(lambda rngs: OnlineCluster(inputs, hidden, embed, prototypes, rngs=rngs))
    return jax.eval_shape(init, jax.random.key(0))


def _seg_head(state: State) -> _Part:
    weight = state.get("seg_head.weight")
    classes, inputs = weight.shape if weight is not None and weight.ndim == 2 else (1, 1)
    template = {
        "kernel": jax.ShapeDtypeStruct((inputs, classes), jnp.float32),
        "bias": jax.ShapeDtypeStruct((classes,), jnp.float32),
    }
    return _Part(("seg_head",), "seg_head.", template, {})


def _linear_config(state: State, given: Mapping[str, Any] | None, file: Path) -> dict[str, Any]:
    """Both arguments of a linear head's constructor show in its shapes."""
    kernel = _seg_head(state).template["kernel"].shape
    seen = {"backbone_out_channels": kernel[0], "num_classes": kernel[1]}
    if given is not None and "seg_head.weight" in state and dict(given) != seen:
        raise CheckpointError(f"{file}: its config is {given}, its arrays say {seen}")
    return seen


def _wanted(part: _Part) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a part in the file."""
    if part.place[-1] == "seg_head":
        inputs, classes = part.template["kernel"].shape
        return {f"{part.prefix}weight": (classes, inputs), f"{part.prefix}bias": (classes,)}
    # Arrays of one number each, repeated without copies: only shapes matter.
    nothing = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), part.template)
    shapes = {key: array.shape for key, array in to_state_dict(nothing, part.prefix).items()}
    return shapes | {part.prefix + key: array.shape for key, array in part.constants.items()}


def _read(parts: list[_Part], state: State, file: Path) -> dict[str, Any]:
    """Parameters of all parts, once every key is there with its shape and none is left over."""
    wanted = {key: shape for part in parts for key, shape in _wanted(part).items()}
    refuse_misfits(file, state, wanted)
    params: dict[str, Any] = {}
    for part in parts:
        node = params
        for name in part.place[:-1]:
            node = node.setdefault(name, {})
        keys = list(_wanted(part))
        here = {key: state[key] for key in keys}
        if part.place[-1] == "seg_head":
            weight, bias = (np.asarray(here[key], np.float32) for key in keys)
            node[part.place[-1]] = {"kernel": weight.T, "bias": bias}
            continue
        try:
            node[part.place[-1]] = from_state_dict(here, part.template, part.prefix, part.constants)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return params


def _keep_bits(weights: Weights, state: State, parts: list[_Part], file: Path) -> Weights:
    """Weights that give back each array of `state` bit for bit.

    Notes other dtypes than float32, and keeps fixed arrays that differ in their last bits.
    """
    fixed = {part.prefix + key for part in parts for key in part.constants}
    dtypes: dict[str, list[str]] = {}
    extra, faults = dict(weights.extra), []
    again = to_state(weights)
    for key, array in state.items():
        back = again.pop(key)
        if _same(array, back):
            continue
        if key in fixed or key.endswith("weight.original0"):
            extra[key] = array
        elif _same(array, back.astype(array.dtype)):
            dtypes.setdefault(array.dtype.name, []).append(key)
        else:
            faults.append(f"{key} ({array.dtype.name})")
    if faults:
        raise CheckpointError(f"{file}: float32 cannot hold exactly: {'; '.join(faults)}")
    return dataclasses.replace(weights, extra=extra, source=weights.source | {"dtypes": dtypes})


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return bool(np.array_equal(a, b))


def _places(weights: Weights) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place in `params` and prefix in the original of every module of weights."""
    for name, node in weights.params.items():
        if weights.kind == "pretraining":
            for part in node:
                yield (name, part), f"{name}.{part}."
        elif name == "backbone" and weights.kind == "encoder":
            yield (name,), ""
        else:
            yield (name,), f"{name}."
