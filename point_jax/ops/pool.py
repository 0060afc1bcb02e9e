"""Reductions over clusters, whose points are contiguous rows.

A cluster of distinct voxels has at most 8 points, one of duplicated voxels more; the loops run as
often as the largest cluster of the row needs. On GPUs, where a turn of a loop waits for the host,
the first 8 are no loop.
"""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import planned

Carry = TypeVar("Carry")
CHILDREN = 8  # of a voxel; more only where voxels repeat


def _over_children(body, first_child: jax.Array, init):
    """Folds `body(j, rows, inside, carry)` over the j-th points of all clusters at once."""
    fold = partial(fold_children, body, first_child, init)
    return jax.lax.platform_dependent(cuda=partial(fold, CHILDREN), default=partial(fold, 0))


def fold_children(body: Any, first_child: jax.Array, init: Carry, unrolled: int) -> Carry:
    """As `_over_children`; the first `unrolled` points of a cluster one after the other."""
    start, end = first_child[:-1], first_child[1:]

    def step(j, carry):
        return body(j, start + j, start + j < end, carry)

    for j in range(unrolled):
        init = step(j, init)
    with planned(CHILDREN - unrolled):
        return jax.lax.fori_loop(unrolled, (end - start).max(), step, init)


def cluster_sum(x: jax.Array, first_child: jax.Array) -> jax.Array:
    """Sum over each cluster's points, in their order.

    Args:
      x: (N, C).
      first_child: (M + 1,) int32, where each cluster's points start.

    Returns:
      (M, C), zeros for empty clusters.
    """

    def add(_, rows, inside, total):
        return total + jnp.take(x, jnp.where(inside, rows, len(x)), 0, mode="fill", fill_value=0)

    init = jnp.zeros((len(first_child) - 1, x.shape[1]), x.dtype)
    return _over_children(add, first_child, init)


def cluster_mean(x: jax.Array, first_child: jax.Array) -> jax.Array:
    """Mean over each cluster's points; arguments as for `cluster_sum`."""
    size = jnp.maximum(jnp.diff(first_child), 1)
    return cluster_sum(x, first_child) / size[:, None].astype(x.dtype)


@jax.custom_vjp
def cluster_max(x: jax.Array, parent: jax.Array, first_child: jax.Array) -> jax.Array:
    """Channelwise maximum over each cluster's points; the first that attains it gets the gradient.

    Args:
      x: (N, C).
      parent: (N,) int32, cluster of each point; M for none.
      first_child: (M + 1,) int32, where each cluster's points start.

    Returns:
      (M, C), zeros for empty clusters.
    """
    return _max_and_where(x, first_child)[0]


def _max_and_where(x, first_child):
    """The maximum (M, C) and which of the cluster's points attains it first (M, C) int32."""

    def compare(j, rows, inside, carry):
        best, where = carry
        this = jnp.take(x, jnp.where(inside, rows, 0), axis=0)
        better = inside[:, None] & ((this > best) | (j == 0))
        return jnp.where(better, this, best), jnp.where(better, j, where)

    shape = len(first_child) - 1, x.shape[1]
    init = jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    return _over_children(compare, first_child, init)


def _cluster_max_fwd(x, parent, first_child):
    best, where = _max_and_where(x, first_child)
    return best, (where, parent, first_child)


def _cluster_max_bwd(saved, g):
    where, parent, first_child = saved
    rank = jnp.arange(len(parent)) - jnp.take(first_child, parent, mode="clip")
    chosen = jnp.take(where, parent, axis=0, mode="fill", fill_value=-1) == rank[:, None]
    grad = jnp.where(chosen, jnp.take(g, parent, axis=0, mode="fill", fill_value=0), 0)
    return grad, None, None


cluster_max.defvjp(_cluster_max_fwd, _cluster_max_bwd)
