"""What the trainer needs of an objective: six pure functions, and in which precision they read.

A step makes rows from scenes, each from one scene or a few; then the targets of all rows of the
global batch together; then differentiates the loss piece by piece and adds up. A piece is a row or
a part of one, whatever the objective needs at once; all have one shape. A device with several rows
loops over them and never gets a longer one, so the same global batch gives the same numbers on
every layout.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Params = dict[str, Any]
Scene = Mapping[str, jax.Array]
Schedule = Mapping[str, jax.Array]
Axis = str | tuple[str, ...] | None
"""The mesh axes over which the batch is spread; None for one device."""
Stats = dict[str, Any]
"""Sums over points, views or rows (any pytree): rows, micro-batches and devices simply add them."""


class Targets(NamedTuple):
    """What the loss asks for.

    Attributes:
      pieces: what the loss is differentiated for, one after the other: any pytree with a leading
        axis.
      shared: any pytree, the same for all pieces of the global batch.
      stats: sums over this device's rows.
    """

    pieces: Any
    shared: Any
    stats: Stats


class Objective(Protocol):
    """A training objective.

    Attributes:
      scenes_per_row: how many scenes make a row; a device's scenes are a multiple of it.
    """

    scenes_per_row: int

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Parameters of the student, which gradients move, and of the teacher, which they do not.

        A teacher is whatever the loss needs beside the student: a moving average, a frozen encoder,
        running statistics, or nothing, an empty dict.
        """
        ...

    def read_as(self, name: str) -> jnp.dtype:
        """To what a parameter of student and teacher is rounded wherever it is read.

        Devices that share a copy of the state send each other its slices so.

        Args:
          name: dotted, as in "backbone.enc.stage0.blocks.qkv.kernel".

        Returns:
          float32 unless all that is computed of the parameter is computed of its rounded values.
        """
        ...

    def prepare(self, scenes: Scene, key: jax.Array, schedule: Schedule) -> tuple[Any, Stats]:
        """A row of `scenes_per_row` scenes (leading axis): structure and input. No gradient."""
        ...

    def targets(
        self, teacher: Params, rows: Any, key: jax.Array, schedule: Schedule, axis: Axis
    ) -> Targets:
        """Targets for this device's rows (leading axis), with sums across the mesh axes.

        No gradient.
        """
        ...

    def loss(
        self,
        student: Params,
        piece: Any,
        shared: Any,
        key: jax.Array,
        schedule: Schedule,
    ) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
        """(sum, (count, stats)) of one piece; a batch's loss is its sums over its counts."""
        ...

    def follow(
        self, teacher: Params, student: Params, stats: Stats, schedule: Schedule, good: jax.Array
    ) -> Params:
        """The teacher after a step that gave this student.

        Args:
          teacher: before the step.
          student: after it.
          stats: the step's sums, as for `metrics`.
          schedule: the step's.
          good: () bool; where False the step did not count, and `stats` may hold anything.
        """
        ...

    def metrics(self, stats: Stats) -> dict[str, jax.Array]:
        """Scalars from the sums of `prepare`, `targets` and `loss` over the global batch."""
        ...
