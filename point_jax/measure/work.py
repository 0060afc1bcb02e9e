"""Floating-point operations of a network, counted from the structure of its input.

Needed is what a perfect program would do: products of real points alone, no padding. A
multiplication and its addition are two operations. Norms, activations, softmax, gathers and sorts
count nothing. Backward counts twice forward: the gradients of the inputs and of the weights; the
network's own input has no gradient.

Done is what the program does on CPUs, padding and what it makes twice included: how far the loops
of an op run is asked of the op. Accelerators do more. XLA may still merge what a stage of a single
block makes twice.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from point_jax.geometry.neighbours import offsets
from point_jax.geometry.patches import patch_shape, patches_used
from point_jax.models.spec import PTv3Spec, StageSpec
from point_jax.objectives.sonata import SINKHORN_STEPS
from point_jax.objectives.sonata_spec import SonataSpec
from point_jax.ops.attention_loop import operations_done
from point_jax.ops.conv_pairs import pairs_done
from point_jax.ops.prototypes import points_done
from point_jax.ops.rowwise import rows_done

FORWARD, TRAINED = 1, 3  # products of a layer: its own; and those of the two gradients
# Of every loss with the prototypes. Of the teacher's embeddings: Sinkhorn-Knopp, and the scores
# twice, the second time backward. Of the student's: the scores, so too, and two gradients.
_TEACHER_PRODUCTS, _STUDENT_PRODUCTS = SINKHORN_STEPS + 2, 2 + 2
_AXIS = 17  # bits of a key for each axis: 16, and one more for neighbours outside


class Work(NamedTuple):
    """Operations of a part: needed, and done on CPUs."""

    needed: float
    done: float

    def times(self, factor: float) -> "Work":
        """So many times the work."""
        return Work(factor * self.needed, factor * self.done)


@dataclass(frozen=True)
class LevelCount:
    """What of a level decides the work.

    Attributes:
      sizes: points of each cloud of the row, 0 for those that it lacks.
      taps: at each tap of the 3x3x3 neighbourhood, the points that have a neighbour there; at the
        centre all have.
      capacity: slots.
    """

    sizes: tuple[int, ...]
    taps: tuple[int, ...]
    capacity: int

    @property
    def points(self) -> int:
        """Points of all clouds."""
        return sum(self.sizes)

    @property
    def pairs(self) -> int:
        """(point, neighbour) that both exist, the point itself included."""
        return sum(self.taps)

    def attended(self, patch_size: int) -> int:
        """(query, key) pairs: a point attends to its patch, full where the cloud fills one."""
        return sum(size * min(size, patch_size) for size in self.sizes)


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
    taps = []
    for step in offsets(1):
        wanted = key(step)
        place = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
        taps.append(int((known[place] == wanted).sum()) if len(known) else 0)
    sizes = np.bincount(cloud, minlength=clouds)
    return LevelCount(tuple(sizes.tolist()), tuple(taps), capacity)


def count_levels(grid: np.ndarray, capacities: Sequence[int]) -> tuple[LevelCount, ...]:
    """Every level of a row with one cloud of voxels (n, 3)."""
    levels = []
    for capacity in capacities:
        levels.append(count_level(grid, np.zeros(len(grid), np.int64), 1, capacity))
        grid = np.unique(grid >> 1, axis=0)
    return tuple(levels)


def add(*works: Mapping[str, Work]) -> dict[str, Work]:
    """The sum, part by part."""
    total: dict[str, Work] = {}
    for part, work in itertools.chain.from_iterable(w.items() for w in works):
        before = total.get(part, Work(0, 0))
        total[part] = Work(before.needed + work.needed, before.done + work.done)
    return total


def network_work(
    spec: PTv3Spec, levels: Sequence[LevelCount], trained: bool = False
) -> dict[str, Work]:
    """An encoder with a linear stem, by part.

    Args:
      spec: the network; without a decoder.
      levels: of its input, finest first.
      trained: whether there is a backward pass.

    Raises:
      ValueError: a decoder or a convolutional stem, which are not counted.
    """
    if spec.decoder or spec.stem != "linear":
        raise ValueError("work is counted for encoders with a linear stem")
    first, finest = spec.encoder[0].channels, levels[0]
    products = 2 if trained else 1  # the input has no gradient
    stem = _linear(finest.points, finest.capacity, spec.inputs * first, products)
    parts = [{"projections": stem}]
    for i, (stage, level) in enumerate(zip(spec.encoder, levels, strict=True)):
        if i:
            fine, weights = levels[i - 1], spec.encoder[i - 1].channels * stage.channels
            down = _linear(fine.points, fine.capacity, weights, TRAINED if trained else FORWARD)
            parts.append({"pooling": down})
        again = spec.remat_of(i) if trained else "none"
        block = _block(spec, stage, level, trained, again)
        parts.append({part: work.times(stage.depth) for part, work in block.items()})
    return add(*parts)


def _linear(points: int, rows: int, weights: int, products: int, again: int = 0) -> Work:
    """A layer with so many weights.

    Args:
      points: rows that there should be.
      rows: rows that there are.
      weights: its inputs x outputs.
      products: that are needed.
      again: how often the backward pass makes its output once more.
    """
    return Work(2.0 * points * weights * products, 2.0 * rows * weights * (products + again))


def _block(
    spec: PTv3Spec, stage: StageSpec, level: LevelCount, trained: bool, again: str
) -> dict[str, Work]:
    """One block.

    The backward pass of `ops.rowwise` makes again what others follow in the same function: all
    layers but the MLP's second one, and that, too, where a scale follows. With remat (`again`, see
    `PTv3Spec`) what attention reads is made again as well, and where it is not "cheap", the results
    of convolution and attention.
    """
    channels, hidden = stage.channels, int(stage.channels * spec.mlp_ratio)
    square, products = channels * channels, TRAINED if trained else FORWARD
    remade, everything = int(again != "none"), int(again == "all")
    scaled = int(trained and spec.layer_scale is not None)
    points, rows = level.points, rows_done(level.capacity, level.points)
    patches, width = patches_used(level.sizes, level.capacity, stage.patch_size)
    slots = math.prod(patch_shape(level.capacity, len(level.sizes), stage.patch_size))
    projections = (
        _linear(points, rows, square, products, trained + remade),  # conv_linear
        _linear(points, rows_done(slots, patches * width), 3 * square, products, remade),  # qkv
        _linear(points, rows, square, products, trained),  # proj
    )
    mlp = (
        _linear(points, rows, channels * hidden, products, trained),
        _linear(points, rows, channels * hidden, products, scaled),
    )
    pairs = pairs_done(level.taps, level.capacity, channels)
    forward, backward = operations_done(len(level.sizes), width, channels // stage.heads)
    attention = patches * stage.heads * ((1 + everything) * forward + trained * backward)
    return {
        "convolution": _linear(level.pairs, pairs, square, products, everything),
        # a product for the scores and one for the mixing
        "attention": Work(4.0 * level.attended(stage.patch_size) * channels * products, attention),
        "projections": add(*({"": work} for work in projections))[""],
        "mlp": add(*({"": work} for work in mlp))[""],
    }


def sonata_work(
    spec: SonataSpec,
    teacher: Sequence[LevelCount],
    masked: Sequence[LevelCount],
    local: Sequence[LevelCount],
) -> dict[str, Work]:
    """A training step on one scene, by part, from the levels of its three rows.

    The teacher passes forward, the student forward and backward. Scores against the prototypes
    are needed once for every point and head (`losses`).
    """
    student, guide = (spec.network, spec.hidden, spec.embed), spec.offline
    given = student if guide is None else (guide.network, guide.hidden, guide.embed)
    embeds = _TEACHER_PRODUCTS * given[2] + _STUDENT_PRODUCTS * spec.embed
    parts = []
    for levels, trained, heads, losses, (network, hidden, embed) in (
        (teacher, False, 2, 0, given),
        (masked, True, 1, 2, student),  # mask, roll
        (local, True, 1, 1, student),  # unmask
    ):
        inputs = sum(stage.channels for stage in network.encoder[-1 - spec.up_cast :])
        parts.append(network_work(network, levels, trained))
        level, products = levels[-1 - spec.up_cast], TRAINED if trained else FORWARD
        rows = rows_done(level.capacity, level.points)
        head = _linear(level.points, rows, inputs * hidden + hidden * embed, products)
        parts.append({"heads": head.times(heads)})
        score = 2.0 * spec.prototypes
        compared = losses * embeds * points_done(level.capacity, level.points)
        needed = heads * products * embed * level.points
        parts.append({"losses": Work(score * needed, score * compared)})
    return {part: work for part, work in add(*parts).items() if work.needed}
