"""Rows and hierarchies from the arrays that the originals computed."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from shared_files import shared

from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec, build_hierarchy, sort_row

build_hierarchy_jit = jax.jit(build_hierarchy, static_argnames="spec")


@dataclass(frozen=True)
class Row:
    """A golden batch as a sorted row: `order` maps slots to input points."""

    hierarchy: Hierarchy
    order: np.ndarray  # (N,) input point per slot; the number of points in padding
    count: int

    def put(self, array: np.ndarray) -> jax.Array:
        """(n, ...) per input point -> (N, ...) per slot, zeros in padding."""
        padded = np.concatenate([array, np.zeros_like(array[:1])])
        return jnp.asarray(padded[self.order])

    def take(self, array: jax.Array) -> np.ndarray:
        """(N, ...) per slot -> (n, ...) per input point."""
        out = np.empty((self.count, *array.shape[1:]), array.dtype)
        out[self.order[: self.count]] = np.asarray(array)[: self.count]
        return out


def load(name: str) -> tuple[dict, dict]:
    """Arrays and description of a golden file."""
    arrays = np.load(shared(f"golden/{name}.npz"))
    return dict(arrays), json.loads(shared(f"golden/{name}.json").read_text())


def clouds_of(offset: np.ndarray) -> np.ndarray:
    """(n,) cloud per point from the originals' cumulative offsets."""
    return np.repeat(np.arange(len(offset)), np.diff(offset, prepend=0)).astype(np.int32)


def make_row(
    grid: np.ndarray,
    cloud: np.ndarray,
    config: dict,
    depths: np.ndarray | None,
    capacities: tuple[int, ...],
    clouds: int | None = None,
    stem_radius: int = 0,
) -> Row:
    """Sorts points into a row and builds its hierarchy for an original's `config`."""
    sizes = [{size} for size in config["enc_patch_size"]]
    for level, size in enumerate(config.get("dec_patch_size", ())):
        sizes[level].add(size)
    spec = HierarchySpec(
        capacities=capacities,
        clouds=clouds or int(cloud.max()) + 1,
        patch_sizes=tuple(tuple(sorted(s)) for s in sizes),
        curves=tuple(config["order"]),
        stem_radius=stem_radius,
    )
    order, count, _ = sort_row(
        jnp.asarray(grid, jnp.int32),
        jnp.asarray(cloud),
        jnp.ones(len(cloud), bool),
        capacities[0],
    )
    at = jnp.minimum(order, len(cloud) - 1)
    if depths is not None:
        depths = jnp.broadcast_to(jnp.asarray(depths)[:, None], (len(capacities), spec.clouds))
    hierarchy = build_hierarchy_jit(
        jnp.asarray(grid, jnp.int32)[at], jnp.asarray(cloud)[at], count, spec=spec, depths=depths
    )
    return Row(hierarchy, np.asarray(order), int(count))


def voxel_key(cloud: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """One int64 per voxel, to match rows of different orders."""
    grid = np.asarray(grid, np.int64)
    return (
        ((np.asarray(cloud, np.int64) << 48) | (grid[:, 0] << 32)) | (grid[:, 1] << 16) | grid[:, 2]
    )


def level_key(level) -> np.ndarray:
    """`voxel_key` of the slots in use."""
    used = int(level.count)
    return voxel_key(np.asarray(level.cloud)[:used], np.asarray(level.grid)[:used])
