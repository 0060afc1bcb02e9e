"""Row shapes for clouds of any size: few of them, because each is a compilation.

A cloud's voxels are counted at every level on the host, so that nothing ever overflows. Level 0
has the slots of a bucket, two to an octave, the others what clouds have needed; a cloud takes a
shape that is there if it is at most one bucket larger. 50 scans of 3,000 to 84,000 voxels so have 6
shapes and 1.4 slots a voxel; a shape for each bucket would be 11 and 1.2.
"""

import math
from collections.abc import Iterable

SMALLEST = 256
STEPS = 2  # buckets of level 0 an octave


def bucket(count: int, steps: int) -> int:
    """The smallest capacity that holds `count`, of a ladder with `steps` rungs an octave."""
    rung = 0
    while (capacity := -(-math.ceil(SMALLEST * 2 ** (rung / steps)) // 64) * 64) < count:
        rung += 1
    return capacity


class Shapes:
    """The shapes in use. None goes away, but one of a bucket gives way to a larger of the same."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, ...]] = {}  # by the bucket of level 0

    def grow(self, counts: Iterable[tuple[int, ...]]) -> None:
        """Makes room for clouds with these numbers of rows at every level."""
        for count in sorted(counts, reverse=True):  # the smaller may do with what the larger need
            if self._holding(count) is None:
                first = bucket(count[0], STEPS)
                coarser = (min(bucket(rows, 4), first) for rows in count[1:])
                known = self._known.get(first, (0,) * len(count))
                self._known[first] = tuple(map(max, known, (first, *coarser)))

    def find(self, count: tuple[int, ...]) -> tuple[int, ...]:
        """The capacities for a cloud that `grow` has seen."""
        found = self._holding(count)
        assert found is not None, f"{count} was never grown for"
        return found

    def _holding(self, count: tuple[int, ...]) -> tuple[int, ...] | None:
        """The smallest shape that holds a cloud and is at most one bucket larger."""
        first = bucket(count[0], STEPS)
        for size in (first, bucket(first + 1, STEPS)):
            known = self._known.get(size)
            if known and all(have >= rows for have, rows in zip(known, count, strict=True)):
                return known
        return None
