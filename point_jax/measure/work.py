"""Floating-point operations that a network needs, counted from the structure of its input.

Needed is what a perfect program would do: products of real points alone, no padding. A
multiplication and its addition are two operations. Norms, activations, softmax, gathers and sorts
count nothing. Backward counts twice forward: the gradients of the inputs and of the weights.

Done is what the program does, padding included. Linear layers run over all slots, which follows
from the shapes. What the convolution and the attention do depends on how they are written: callers
who know pass a function, else it stays unknown.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from point_jax.geometry.patches import patch_shape
from point_jax.models.spec import PTv3Spec, StageSpec
from point_jax.objectives.sonata import SonataSpec

TEACHER, STUDENT = 1, 3  # passes: forward; forward and backward, which is two
_AXIS = 17  # bits of a key for each axis: 16, and one more for neighbours outside


class Work(NamedTuple):
    """Operations of a part: needed, and done; None where that is not known."""

    needed: float
    done: float | None = None

    def times(self, passes: float, done: float | None = None) -> "Work":
        """So many passes; `done` where the program makes more of them than are needed."""
        more = passes if done is None else done
        return Work(passes * self.needed, None if self.done is None else more * self.done)


@dataclass(frozen=True)
class LevelCount:
    """What of a level decides the work.

    Attributes:
      sizes: points of each cloud.
      pairs: (point, neighbour) in the 3x3x3 neighbourhood that both exist, the point itself
        included.
      capacity: slots.
    """

    sizes: tuple[int, ...]
    pairs: int
    capacity: int

    @property
    def points(self) -> int:
        """Points of all clouds."""
        return sum(self.sizes)

    def attended(self, patch_size: int) -> int:
        """(query, key) pairs: a point attends to its patch, full where the cloud fills one."""
        return sum(size * min(size, patch_size) for size in self.sizes)


Done = Callable[[LevelCount, StageSpec], float]  # operations of one block's forward pass


def count_level(grid: np.ndarray, cloud: np.ndarray, clouds: int, capacity: int) -> LevelCount:
    """Counts a level.

    Args:
      grid: (n, 3) voxels of the points in use, 0 to 65,535; they may repeat.
      cloud: (n,) which cloud, 0 to `clouds` - 1.
      clouds: of the row.
      capacity: slots.
    """
    grid, cloud = grid.astype(np.int64), cloud.astype(np.int64)

    def key(step: np.ndarray) -> np.ndarray:
        x, y, z = (grid + step + 1).T
        return (((cloud << _AXIS | x) << _AXIS) | y) << _AXIS | z

    known = np.unique(key(np.zeros(3, np.int64)))
    pairs = 0
    for step in itertools.product((-1, 0, 1), repeat=3):
        wanted = key(np.array(step))
        place = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
        pairs += int((known[place] == wanted).sum()) if len(known) else 0
    sizes = np.bincount(cloud, minlength=clouds)
    return LevelCount(tuple(sizes.tolist()), pairs, capacity)


def count_levels(grid: np.ndarray, capacities: Sequence[int]) -> tuple[LevelCount, ...]:
    """Every level of a row with one cloud of voxels (n, 3)."""
    levels = []
    for capacity in capacities:
        levels.append(count_level(grid, np.zeros(len(grid), np.int64), 1, capacity))
        grid = np.unique(grid >> 1, axis=0)
    return tuple(levels)


def add(*works: Mapping[str, Work]) -> dict[str, Work]:
    """The sum, part by part; done is unknown where one of them does not know it."""
    total: dict[str, Work] = {}
    for part, work in itertools.chain.from_iterable(w.items() for w in works):
        before = total.get(part, Work(0, 0))
        unknown = before.done is None or work.done is None
        done = None if unknown else before.done + work.done  # pyright: ignore
        total[part] = Work(before.needed + work.needed, done)
    return total


def network_work(
    spec: PTv3Spec,
    levels: Sequence[LevelCount],
    conv_done: Done | None = None,
    attention_done: Done | None = None,
) -> dict[str, Work]:
    """Forward pass of an encoder with a linear stem, by part.

    Args:
      spec: the network; without a decoder.
      levels: of its input, finest first.
      conv_done, attention_done: what the program does for one block.

    Raises:
      ValueError: a decoder or a convolutional stem, which are not counted.
    """
    if spec.decoder or spec.stem != "linear":
        raise ValueError("work is counted for encoders with a linear stem")
    first = spec.encoder[0].channels
    parts = [{"projections": _linear(levels[0], spec.inputs * first)}]
    for i, (stage, level) in enumerate(zip(spec.encoder, levels, strict=True)):
        if i:
            weights = spec.encoder[i - 1].channels * stage.channels
            parts.append({"pooling": _linear(levels[i - 1], weights)})
        block = _block(stage, level, spec.mlp_ratio, conv_done, attention_done)
        parts.append({part: work.times(stage.depth) for part, work in block.items()})
    return add(*parts)


def _linear(level: LevelCount, weights: int, slots: int | None = None) -> Work:
    """A layer with so many weights over a level; `slots` where it runs over patches."""
    return Work(2.0 * level.points * weights, 2.0 * (slots or level.capacity) * weights)


def _block(
    stage: StageSpec,
    level: LevelCount,
    mlp_ratio: float,
    conv_done: Done | None,
    attention_done: Done | None,
) -> dict[str, Work]:
    channels, hidden = stage.channels, int(stage.channels * mlp_ratio)
    patches, width = patch_shape(level.capacity, len(level.sizes), stage.patch_size)
    square = channels * channels
    qkv = _linear(level, 3 * square, patches * width)
    others = _linear(level, 2 * square)  # conv_linear, proj
    return {
        "convolution": Work(
            2.0 * level.pairs * square, conv_done(level, stage) if conv_done else None
        ),
        # a product for the scores and one for the mixing
        "attention": Work(
            4.0 * level.attended(stage.patch_size) * channels,
            attention_done(level, stage) if attention_done else None,
        ),
        "projections": add({"": qkv}, {"": others})[""],
        "mlp": _linear(level, 2 * channels * hidden),
    }


def sonata_work(
    spec: SonataSpec,
    teacher: Sequence[LevelCount],
    masked: Sequence[LevelCount],
    local: Sequence[LevelCount],
    conv_done: Done | None = None,
    attention_done: Done | None = None,
) -> dict[str, Work]:
    """A training step on one scene, by part, from the levels of its three rows.

    The teacher passes forward, the student forward and backward. Scores against the prototypes
    are needed once for every point and head (`losses`).
    """
    network = spec.network
    inputs = sum(stage.channels for stage in network.encoder[-1 - spec.up_cast :])
    head = inputs * spec.hidden + spec.hidden * spec.embed
    # With remat the blocks run forward once more. The layers around them do not.
    again = STUDENT + 1 if network.remat else STUDENT
    parts = []
    for levels, passes, heads in ((teacher, TEACHER, 2), (masked, STUDENT, 1), (local, STUDENT, 1)):
        level = levels[-1 - spec.up_cast]
        forward = network_work(network, levels, conv_done, attention_done)
        done = again if passes == STUDENT else TEACHER
        kept = {"pooling": forward.pop("pooling", Work(0.0, 0.0)).times(passes)}
        parts += [{part: work.times(passes, done) for part, work in forward.items()}, kept]
        parts.append({"heads": _linear(level, head).times(passes * heads)})
        scores = 2.0 * level.points * spec.prototypes * spec.embed
        parts.append({"losses": Work(passes * heads * scores)})
    return {part: work for part, work in add(*parts).items() if work.needed}
