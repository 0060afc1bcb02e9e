"""Which part of every parameter a device keeps, and the collectives that follow from it.

The devices along the mesh's axis `fsdp` share one copy of the state: of a parameter that a rule
shards each of them keeps an equal slice, and so of its teacher and its moments. A step gathers the
slices, and what it has computed of a gradient it adds up into slices again.

How a tree is cut is a tree of its own, one int a leaf: the dimension that is cut, or `WHOLE`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from point_jax.training.config import Config, ConfigError
from point_jax.training.mesh import DATA, FSDP

Tree = Any  # nested dicts of arrays
WHOLE = -1
TREES = ("student", "teacher", "mu", "nu")  # of a state; the rest are counters

_LARGEST, _WHOLE = "largest", "whole"
_STACKED = ".blocks."  # in the path of leaves whose leading axis is the depth of a stage


def cuts(params: Mapping[str, Tree], section: Config, size: int) -> dict[str, Tree]:
    """The dimension along which each leaf is cut.

    Args:
        params: trees of arrays or `jax.ShapeDtypeStruct` with their whole shapes: those of `TREES`
            that there are. A rule sees a leaf's dotted path below them, so that a parameter, its
            moving average and its moments are cut alike.
        section: `config.mesh`; `rules` and `smallest`, see `default_config`.
        size: devices that share a copy.

    Returns:
        Trees like `params` of ints.

    Raises:
        ConfigError: a rule that matches no leaf, or a dimension that cannot be cut.
    """
    rules = [(re.compile(pattern), wanted) for pattern, wanted in section.rules]
    shapes = {path: tuple(leaf.shape) for tree in params.values() for path, leaf in _leaves(tree)}
    for rule, _ in rules:
        if not any(map(rule.search, shapes)):
            raise ConfigError(_unmatched(rule.pattern, shapes))

    def cut(path: str, shape: tuple[int, ...]) -> int:
        wanted: Any = next((wanted for rule, wanted in rules if rule.search(path)), _WHOLE)
        if wanted == _WHOLE or size == 1 or len(shape) < 2 or math.prod(shape) < section.smallest:
            return WHOLE
        first = 1 if _STACKED in f".{path}" else 0
        fitting = [i for i in range(first, len(shape)) if shape[i] % size == 0]
        if wanted == _LARGEST:
            return max(fitting, key=lambda i: shape[i], default=WHOLE)
        dimension = wanted + len(shape) if wanted < 0 else wanted
        if dimension not in fitting:
            raise ConfigError(_misfit(path, shape, wanted, first, fitting, size))
        return dimension

    return {
        name: jax.tree_util.tree_map_with_path(
            lambda keys, leaf: cut(_path(keys), tuple(leaf.shape)), tree
        )
        for name, tree in params.items()
    }


def specs(state: Mapping[str, Tree], section: Config, mesh: Mesh) -> dict[str, Tree]:
    """The `PartitionSpec` of every leaf of a state, given with its whole shapes; errors of `cuts`.

    The state may be a part of one; what is not in `TREES` is whole on every device.
    """
    found = cuts({n: state[n] for n in TREES if n in state}, section, fsdp_size(mesh))
    whole = {name: jax.tree.map(lambda _: WHOLE, part) for name, part in state.items()}
    return jax.tree.map(
        lambda dimension: P() if dimension == WHOLE else P(*(None,) * dimension, FSDP),
        whole | found,
    )


def shardings(state: Mapping[str, Tree], section: Config, mesh: Mesh) -> dict[str, Tree]:
    """`specs` as a `NamedSharding` of every leaf, e.g. for `out_shardings` and checkpoints."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state, section, mesh))


def fsdp_size(mesh: Mesh) -> int:
    """Devices that share a copy of the state; 1 for a mesh without that axis."""
    return mesh.shape.get(FSDP, 1)


# ---- Inside a step, on the slices of one device.


def gather(tree: Tree, cut: Tree, read_as: Callable[[str], Any]) -> Tree:
    """The whole arrays of a tree of slices.

    Args:
        tree: the slices of this device.
        cut: of `cuts`.
        read_as: dotted path -> what a leaf is rounded to wherever it is read. It travels so, half
            as many bytes for bfloat16, and arrives in its own dtype: what adds up gradients of it
            adds in float32.
    """

    def join(keys: Sequence[Any], x: jax.Array, dimension: int) -> jax.Array:
        if dimension == WHOLE:
            return x
        sent = x.astype(read_as(_path(keys)))
        return jax.lax.all_gather(sent, FSDP, axis=dimension, tiled=True).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(join, tree, cut)


def reduce(grads: Tree, cut: Tree, sums: Tree, axes: Sequence[str]) -> tuple[Tree, Tree]:
    """Adds up gradients over all devices, each device keeping its slices, and other sums.

    Args:
        grads: whole arrays; every device has added up those of its scenes.
        cut: of `cuts`.
        sums: any pytree, wanted whole on every device.
        axes: of the mesh.

    Returns:
        The slices of the sums of the gradients, and the sums of `sums`.
    """
    # A sum over one device is a copy on CPUs.
    axes = [axis for axis in axes if jax.lax.axis_size(axis) > 1]
    if not axes:
        return grads, sums
    leaves, structure = jax.tree.flatten(grads)
    where = jax.tree.leaves(cut)
    parts = [
        jax.lax.psum_scatter(x, FSDP, scatter_dimension=i, tiled=True)
        for x, i in zip(leaves, where, strict=True)
        if i != WHOLE
    ]
    if rest := [axis for axis in axes if axis != FSDP]:
        parts = jax.lax.psum(parts, tuple(rest))
    whole = [x for x, i in zip(leaves, where, strict=True) if i == WHOLE]
    whole, sums = jax.lax.psum((whole, sums), tuple(axes))
    parts, whole = iter(parts), iter(whole)
    joined = [next(whole if i == WHOLE else parts) for i in where]
    return jax.tree.unflatten(structure, joined), sums


def total(scalars: Tree, cut: Tree) -> jax.Array:
    """The sum of one number a leaf, each computed of a slice: whole leaves count once.

    The slices' part is summed over all devices at once, so that it has the same bits on all: copies
    of the state that clip by norms that differ in the last bit would drift apart.
    """
    pairs = list(zip(jax.tree.leaves(scalars), jax.tree.leaves(cut), strict=True))
    whole = sum((x for x, i in pairs if i == WHOLE), jnp.zeros(()))
    parts = [x for x, i in pairs if i != WHOLE]
    if not parts:
        return whole
    return whole + jax.lax.psum(sum(parts), (DATA, FSDP)) / jax.lax.axis_size(DATA)


# ---- Paths and errors.


def _path(keys: Sequence[Any]) -> str:
    return ".".join(str(key.key) for key in keys)


def _leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _path(keys), leaf


def _unmatched(pattern: str, shapes: Mapping[str, Any]) -> str:
    words = sorted({word for path in shapes for word in path.split(".")})
    asked = re.findall(r"\w+", pattern)
    near = [n for word in asked for n in difflib.get_close_matches(word, words, 1, 0.5)]
    hint = f"did you mean {near[-1]!r}?" if near else f"there are: {', '.join(words)}"
    return f"config.mesh.rules: {pattern!r} matches no parameter; {hint}"


def _misfit(
    path: str, shape: tuple[int, ...], wanted: int, first: int, fitting: list[int], size: int
) -> str:
    about = f"config.mesh.rules cut dimension {wanted} of {path} {shape} into {size} parts"
    dimension = wanted + len(shape) if wanted < 0 else wanted
    if not 0 <= dimension < len(shape):
        why = f"it has {len(shape)} dimensions"
    elif dimension < first:
        why = "that is the depth of stacked blocks, which stays whole"
    else:
        why = f"{shape[dimension]} cannot be cut equally"
    if fitting:
        return f"{about}: {why}; {size} divides dimension {' and '.join(map(str, fitting))}"
    return f"{about}: {why}; use {_WHOLE!r}, or another config.mesh.fsdp"
