"""Choosing rows in linear time: the k smallest, the n-th of a set, compaction to a capacity."""

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import planned
from point_jax.geometry.running import running_sum

BLOCK = 256
LARGEST = jnp.iinfo(jnp.int32).max


def smallest(values: jax.Array, valid: jax.Array, k: jax.Array | int) -> jax.Array:
    """The rows with the k smallest values; of equal values the first rows.

    The bits of a float that is not negative order like integers, so the k-th smallest is found by
    searching for its bits with counts of the row, without a sort.

    Args:
      values: (N,) float32 or int32, not negative where valid. Anything elsewhere, NaN included.
      valid: (N,) bool, the rows that may be chosen. N is at most 2^24.
      k: how many, int32 scalar; more than the valid rows means all of them, less than one none.

    Returns:
      (N,) bool with min(k, valid rows) rows set: the set that a stable argsort begins with.
    """
    if values.dtype == jnp.float32:
        values = jax.lax.bitcast_convert_type(values, jnp.int32)
    bits = jnp.where(valid, values, LARGEST)

    threshold = jax.lax.platform_dependent(
        bits, jnp.asarray(k, jnp.int32), cpu=by_halves, default=by_digits
    )
    below = valid & (bits < threshold)
    equal = valid & (bits == threshold)
    last = member(equal, k - number(below) - 1)
    rows = jnp.arange(bits.shape[0], dtype=jnp.int32)
    return (below | (equal & (rows <= last))) & (k > 0)


def by_halves(bits: jax.Array, k: jax.Array) -> jax.Array:
    """A threshold that `min(k, N)` of the integers (N,) >= 0 do not exceed, by bisection.

    At most 31 counts, about 25 where values differ, each of one comparison: for CPUs.
    """

    def search(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state
        middle = low + (high - low) // 2
        count = number(bits <= middle)
        low, high = jnp.where(count >= k, low, middle + 1), jnp.where(count >= k, middle, high)
        # An exact count ends the search: any threshold with it picks the same rows.
        return jnp.where(count == k, high, low), high

    # Finding the true range first would cost more than the few steps that it saves.
    everything = (jnp.int32(0), jnp.int32(LARGEST))
    with planned(31):
        return jax.lax.while_loop(lambda state: state[0] < state[1], search, everything)[1]


def by_digits(bits: jax.Array, k: jax.Array) -> jax.Array:
    """As `by_halves`, four bits at a time: 8 passes, no loop; for accelerators."""
    threshold = jnp.int32(0)
    for place in range(28, -1, -4):
        digits = jnp.arange(8 if place == 28 else 16, dtype=jnp.int32)
        upto = threshold | (digits << place) | ((1 << place) - 1)
        counts = jnp.sum((bits[None] <= upto[:, None]).astype(jnp.float32), axis=1)
        below = number(counts.astype(jnp.int32) < k)
        threshold |= jnp.minimum(below, digits[-1]) << place
    return threshold


def number(mask: jax.Array) -> jax.Array:
    """How many of the entries (N,) are set, int32 scalar; N is at most 2^24."""
    # Exact in float32 up to 2^24, and on CPUs two to three times as fast as a sum of integers.
    return jnp.sum(mask.astype(jnp.float32)).astype(jnp.int32)


def member(mask: jax.Array, rank: jax.Array | int) -> jax.Array:
    """Row of the set member with a given rank: `flatnonzero(mask)[rank]`.

    The block of rows that holds it comes from the blocks' running counts, the row from a running
    count in that block alone.

    Args:
      mask: (N,) bool, N at least 1.
      rank: int32 scalar; below 0 reads as 0.

    Returns:
      int32 scalar, N if no member has this rank.
    """
    blocks = jnp.pad(mask, (0, -mask.shape[0] % BLOCK)).reshape(-1, BLOCK)
    counts = jnp.sum(blocks.astype(jnp.float32), axis=1).astype(jnp.int32)
    ends = running_sum(counts)
    rank = jnp.maximum(rank, 0)
    block = jnp.minimum(number(ends <= rank), counts.shape[0] - 1)
    rest = rank - (ends[block] - counts[block])
    row = block * BLOCK + number(running_sum(blocks[block]) <= rest)
    return jnp.where(rank < ends[-1], row, mask.shape[0])


def compact(mask: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Rows of the set members, in order, at the front of a fixed number of slots.

    Args:
      mask: (N,) bool.
      capacity: slots of the result.

    Returns:
      (rows, count): rows (capacity,) int32, 0 in the slots from `count` on; count int32 scalar, at
      most `capacity`. Members beyond the capacity are left out; the caller knows `number(mask)`.
    """
    rows = jnp.arange(mask.shape[0], dtype=jnp.int32)
    ends = running_sum(mask)
    # A row to leave out gets a slot of its own beyond the capacity: no slot is written twice, so
    # this scatter has one result on every platform. (On CPUs it beats a search by gathers.)
    slot = jnp.where(mask & (ends <= capacity), ends - 1, capacity + rows)
    packed = jnp.zeros((capacity,), jnp.int32)
    packed = packed.at[slot].set(rows, mode="drop", unique_indices=True)
    return packed, jnp.minimum(number(mask), capacity)


def uniform_below(share: jax.Array, bound: jax.Array) -> jax.Array:
    """Turns uniform draws in [0, 1) into uniform integers in [0, bound), 0 where the bound is 0.

    Args:
      share: float32, any shape.
      bound: int32 of that shape, less than 2^23.

    Returns:
      int32 of that shape. Draws have 23 bits, so the integers' shares differ by up to bound / 2^23.
    """
    # The product may round up to the bound itself.
    return jnp.clip(jnp.floor(share * bound).astype(jnp.int32), 0, jnp.maximum(bound - 1, 0))
