"""Patches: fixed-size runs of K points of an order that attend to one another.

A cloud longer than K is cut into ceil(n / K) patches; its last patch borrows from the one before it
what it lacks, slot for slot, as the originals do. A cloud of at most K points attends to itself
alone, so several of them share a patch under a segment mask.

A cloud of at most K points has the same features in a patch of any width, so a row whose clouds all
have at most K / 4 points is laid out in patches of that: at the coarse levels of a row of several
views, scores would else be mostly between strangers.

The layout depends only on the clouds' sizes; `PatchLayout` composes it with the orders, so that
attention gathers straight from a row and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import blocks_of

NARROW = 4  # how many narrow patches a patch makes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PatchLayout:
    """Where the points of a row sit in the patches, for every order (O) of a level.

    Attributes:
      slot_point: (O, S) int32, the point in each slot; N where the slot is empty.
      point_slot: (O, N) int32, the slot that a point owns; S for padding.
      point_borrowed: (O, N) int32, the slot that borrows the point; S for none.
      segment: (S,) int32, the cloud in each slot; -1 where it is empty. The same for every order.
      narrow: () bool, whether patches have K / 4 slots; None where they never do.
      used: () int32, patches in use, the first ones.
      width: K, static.
    """

    slot_point: jax.Array
    point_slot: jax.Array
    point_borrowed: jax.Array
    segment: jax.Array
    narrow: jax.Array | None
    used: jax.Array
    width: int = field(metadata=dict(static=True))

    @property
    def used_slots(self) -> jax.Array:
        """() int32, slots of the patches in use."""
        if self.narrow is None:
            return self.used * self.width
        return self.used * jnp.where(self.narrow, self.width // NARROW, self.width)


def patch_shape(capacity: int, clouds: int, patch_size: int) -> tuple[int, int]:
    """(P, K) that hold any row of `capacity` points in at most `clouds` clouds.

    A row shorter than a patch is one patch of its own length. Otherwise long clouds waste less than
    a patch each, and of short ones packed in sequence any two neighbouring patches are more than
    full.
    """
    if capacity <= patch_size:
        return 1, capacity
    full = capacity // patch_size
    return min(2 * full + 1, full + clouds), patch_size


def build_patches(
    orders: jax.Array, inverses: jax.Array, cloud: jax.Array, starts: jax.Array, patch_size: int
) -> PatchLayout:
    """Lays the points of every order out in patches.

    Args:
      orders: (O, N) int32, points along each curve, sorted by cloud; padding last.
      inverses: (O, N) int32, position of each point in each order.
      cloud: (N,) int32, cloud of each position (the same in every order); G for padding.
      starts: (G + 1,) int32, where each cloud starts.
      patch_size: K.
    """
    capacity, clouds = cloud.shape[0], starts.shape[0] - 1
    num_patches, wide = patch_shape(capacity, clouds, patch_size)
    slots = num_patches * wide
    size = jnp.diff(starts)
    narrow, width, base, used = _place_clouds(size, capacity, patch_size)

    position = jnp.arange(capacity, dtype=jnp.int32)
    valid = cloud < clouds
    within = position - starts[cloud]  # index in its own cloud
    base, size = jnp.append(base, 0)[cloud], jnp.append(size, 0)[cloud]
    own = jnp.where(valid, base + within, slots)
    rest = jax.lax.rem(size, width)  # `%` and `//` have cases for negative numbers besides
    lends = valid & (size > width) & (within >= size - width) & (within < size - rest) & (rest > 0)
    borrowed = jnp.where(lends, own + width, slots)

    slot_position = jnp.full((slots,), capacity, jnp.int32)
    slot_position = slot_position.at[own].set(position, mode="drop")
    slot_position = slot_position.at[borrowed].set(position, mode="drop")
    cloud = jnp.where(valid, cloud, -1)
    segment = jnp.take(cloud, slot_position, mode="fill", fill_value=-1)
    return PatchLayout(
        slot_point=jnp.take(orders, slot_position, axis=1, mode="fill", fill_value=capacity),
        point_slot=own[inverses],
        point_borrowed=borrowed[inverses],
        segment=segment,
        narrow=narrow,
        used=used,
        width=wide,
    )


def patches_used(sizes: Sequence[int], capacity: int, patch_size: int) -> tuple[int, int]:
    """(patches in use, slots of each) of the layout of a row whose clouds have these sizes."""
    _, width, _, used = _place_clouds(jnp.asarray(sizes, jnp.int32), capacity, patch_size)
    return int(used), int(width)


@partial(jax.jit, static_argnums=(1, 2))
def _place_clouds(
    size: jax.Array, capacity: int, patch_size: int
) -> tuple[jax.Array | None, jax.Array, jax.Array, jax.Array]:
    """Whether patches are narrow, None where they never are; their width; and `_pack` for it."""
    clouds = len(size)
    num_patches, wide = patch_shape(capacity, clouds, patch_size)
    # Worth compiling where clouds may be short: not a lone one, nor views of many patches each.
    if clouds == 1 or capacity >= 2 * clouds * patch_size or wide % NARROW:
        width = jnp.int32(wide)
        return None, width, *_pack(size, width)
    widths = jnp.array([wide, wide // NARROW], jnp.int32)
    bases, used = jax.vmap(_pack, (None, 0))(size, widths)
    narrow = (size.max() <= wide // NARROW) & (used[1] <= num_patches * NARROW)
    chosen = narrow.astype(jnp.int32)
    return narrow, widths[chosen], bases[chosen], used[chosen]


def _pack(size: jax.Array, width: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First slot of every cloud, long clouds first, then short ones; and patches in use."""
    long = size > width
    padded = jnp.where(long, blocks_of(size, width) * width, 0)
    long_base = jnp.cumsum(padded) - padded

    def place(carry, size):
        cursor, filled = carry  # the next slot, and how much of its patch is taken
        full = filled + size > width
        cursor = jnp.where(full, cursor + width - filled, cursor)
        filled = jnp.where(full, size, filled + size)
        return (cursor + size, filled), cursor

    few = min(len(size), 16)  # no loop then: a kernel instead of some for every cloud
    init = padded.sum(), jnp.zeros_like(width)
    (end, _), short_base = jax.lax.scan(place, init, jnp.where(long, 0, size), unroll=few)
    return jnp.where(long, long_base, short_base), blocks_of(end, width)
