"""Gathers along the structure of a row whose gradients are gathers too.

XLA turns the transpose of an indexing into a scatter-add, which is slow and, on GPUs, adds in an
order that changes from run to run. Here each gather knows its inverse.
"""

import jax
import jax.numpy as jnp

from point_jax.ops.pool import cluster_sum


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows] with zeros where `rows` is out of bounds: (N, C), (...) int32 -> (..., C)."""
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def to_slots(
    x: jax.Array, slot_point: jax.Array, point_slot: jax.Array, point_borrowed: jax.Array
) -> jax.Array:
    """Copies points into the slots of their patches.

    Args:
      x: (N, C).
      slot_point: (S,) int32, point of each slot; N for none.
      point_slot: (N,) int32, the slot that a point owns; S for none.
      point_borrowed: (N,) int32, the slot that borrows it; S for none.

    Returns:
      (S, C), zeros in empty slots.
    """
    return take_rows(x, slot_point)


def _to_slots_fwd(x, slot_point, point_slot, point_borrowed):
    return take_rows(x, slot_point), (slot_point, point_slot, point_borrowed)


def _to_slots_bwd(saved, g):
    _, point_slot, point_borrowed = saved
    grad = take_rows(g, point_slot) + take_rows(g, point_borrowed)
    return grad, None, None, None


to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@jax.custom_vjp
def from_slots(y: jax.Array, slot_point: jax.Array, point_slot: jax.Array) -> jax.Array:
    """Reads every point back from the slot that it owns: (S, C) -> (N, C), zeros in padding.

    Arguments as for `to_slots`.
    """
    return take_rows(y, point_slot)


def _from_slots_fwd(y, slot_point, point_slot):
    return take_rows(y, point_slot), (slot_point, point_slot)


def _from_slots_bwd(saved, g):
    slot_point, point_slot = saved
    slots = jnp.arange(slot_point.shape[0], dtype=slot_point.dtype)
    # A borrowed slot holds a point, but the point is read from its own slot.
    owned = jnp.take(point_slot, slot_point, mode="fill", fill_value=-1) == slots
    grad = take_rows(g, jnp.where(owned, slot_point, g.shape[0]))
    return grad, None, None


from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


@jax.custom_vjp
def to_children(x: jax.Array, parent: jax.Array, first_child: jax.Array) -> jax.Array:
    """Copies the features of clusters to their points (un-pooling).

    Args:
      x: (M, C), features of the coarser level.
      parent: (N,) int32, cluster of each point; M for none.
      first_child: (M + 1,) int32, where each cluster's points start; they are contiguous.

    Returns:
      (N, C), zeros where a point has no cluster.
    """
    return take_rows(x, parent)


def _to_children_fwd(x, parent, first_child):
    return take_rows(x, parent), (parent, first_child)


def _to_children_bwd(saved, g):
    return cluster_sum(g, saved[1]), None, None


to_children.defvjp(_to_children_fwd, _to_children_bwd)
