"""The neighbours that exist, tap by tap: on indoor surfaces 10 to 14 of 27."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from point_jax.geometry.select import compact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """A neighbour table without its holes.

    Attributes:
      rows: (T, N) int32, the rows that have a neighbour at each tap, ascending; 0 from `counts` on.
      reads: (T, N) int32, that neighbour; 0 from `counts` on.
      counts: (T,) int32.
      taps: (T,) int32, the taps that have pairs, ascending; 0 from `used` on.
      used: () int32, how many these are.
    """

    rows: jax.Array
    reads: jax.Array
    counts: jax.Array
    taps: jax.Array
    used: jax.Array


def find_pairs(neighbours: jax.Array) -> Pairs:
    """The pairs of a table (T, N) whose entries are rows, or N for none."""
    capacity = neighbours.shape[1]
    rows, counts = jax.vmap(lambda row: compact(row < capacity, capacity))(neighbours)
    reads = jnp.take_along_axis(neighbours, rows, axis=1)
    exist = jnp.arange(capacity)[None] < counts[:, None]
    taps, used = compact(counts > 0, len(counts))
    return Pairs(rows, jnp.where(exist, reads, 0), counts, taps, used)
