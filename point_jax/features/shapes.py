"""Row shapes for clouds of any size: few of them, because each is a compilation.

A cloud's voxels are counted at every level on the host, so that nothing ever overflows. Clouds
whose level 0 falls into the same bucket share a shape that holds all of them.
"""

import math
from collections.abc import Iterable

SMALLEST = 256


def bucket(count: int, steps: int) -> int:
    """The smallest capacity that holds `count`, of a ladder with `steps` rungs an octave."""
    rung = 0
    while (capacity := -(-math.ceil(SMALLEST * 2 ** (rung / steps)) // 64) * 64) < count:
        rung += 1
    return capacity


class Shapes:
    """The capacities in use, by the bucket of level 0. They only grow."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, ...]] = {}

    def grow(self, counts: Iterable[tuple[int, ...]]) -> None:
        """Makes room for clouds with these numbers of rows at every level."""
        for count in counts:
            first = bucket(count[0], 2)
            coarser = (min(bucket(rows, 4), first) for rows in count[1:])
            known = self._known.get(first, (0,) * len(count))
            self._known[first] = tuple(map(max, known, (first, *coarser)))

    def find(self, count: tuple[int, ...]) -> tuple[int, ...]:
        """The capacities for a cloud that `grow` has seen."""
        return self._known[bucket(count[0], 2)]
