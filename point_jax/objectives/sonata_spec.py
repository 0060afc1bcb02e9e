"""Settings of the Sonata objective."""

import dataclasses
from dataclasses import dataclass, field

from point_jax import limits
from point_jax.data.views import ViewSpec
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.rows import LOSSES, RowMaker

SONATA_LIMITS = {
    "shares": limits.each(limits.number(above=0, most=1)),
    "hidden": limits.whole(1),
    "embed": limits.whole(1),
    "prototypes": limits.whole(2),
    "up_cast": limits.whole(0),
    "weights": limits.each(limits.number(0), *LOSSES),
    "mask_jitter": limits.number(0),
    "student_temperature": limits.number(above=0),
    "match_radius": limits.number(above=0),
}

HEADS = ("mask_head", "unmask_head")  # one for each of the student's sides
OFFLINE = "offline"  # of the teacher's parameters, what gives the targets and stays as it is


@dataclass(frozen=True)
class OfflineTeacher:
    """A network that teaches and stays as it is.

    Attributes:
      network: the encoder; its drop path does nothing.
      hidden, embed: sizes of its heads.
    """

    network: PTv3Spec
    hidden: int
    embed: int


@dataclass(frozen=True)
class SonataSpec:
    """The objective; the defaults are the original's.

    Attributes:
      network: the encoder.
      views: how views are made.
      shares: slots of each level of a row over the slots of its views; 1.0 at level 0 can never
        overflow.
      hidden, embed, prototypes: sizes of the heads.
      up_cast: levels that the coarsest features are carried up before the heads.
      weights: of the mask, roll and unmask losses.
      mask_jitter: standard deviation of the jitter of masked points, metres.
      student_temperature: of the student's softmax.
      match_radius: farthest match, metres.
      matched_views_only: leave views without any match out of the mean instead of counting 0.
      shared_head: the teacher's mask head also gives the targets of the unmask loss (Concerto).
      offline: the teacher, where it is no moving average of the student. Of any width and depth,
        with as many levels and prototypes.
    """

    network: PTv3Spec
    views: ViewSpec = field(default_factory=ViewSpec)
    shares: tuple[float, ...] = (1.0, 0.5, 0.2, 0.06, 0.02)
    hidden: int = 4096
    embed: int = 256
    prototypes: int = 4096
    up_cast: int = 2
    weights: tuple[float, float, float] = (2 / 8, 2 / 8, 4 / 8)
    mask_jitter: float = 0.01
    student_temperature: float = 0.1
    match_radius: float = 0.32
    matched_views_only: bool = False
    shared_head: bool = False
    offline: OfflineTeacher | None = None

    def __post_init__(self) -> None:
        limits.check(vars(self), SONATA_LIMITS)
        levels = len(self.network.encoder)
        if len(self.shares) != levels:
            raise ValueError(
                f"shares has {len(self.shares)} entries, the encoder {levels} levels: give one each"
            )
        if not 0 <= self.up_cast < levels:
            raise ValueError(f"up_cast is {self.up_cast}, expected 0 to {levels - 1}")
        if not sum(self.weights) > 0:
            raise ValueError(f"weights is {self.weights}, expected one above 0")
        if self.weights[1] > 0 and self.views.global_count < 2:
            raise ValueError("weights[1], the roll loss, needs views.global_count of at least 2")
        if self.views.local_count < 1:
            raise ValueError("weights[2], the unmask loss, needs views.local_count of at least 1")
        if self.offline:
            self._check_teacher(self.offline.network)

    def _check_teacher(self, teacher: PTv3Spec) -> None:
        if len(teacher.encoder) != len(self.network.encoder):
            raise ValueError(
                f"offline has {len(teacher.encoder)} levels, the student "
                f"{len(self.network.encoder)}: points are compared on a level of both"
            )
        if teacher.inputs != self.network.inputs:
            raise ValueError(
                f"offline reads {teacher.inputs} channels a point, the student "
                f"{self.network.inputs}: both see the same views"
            )

    @property
    def teacher_heads(self) -> tuple[str, str]:
        """Of the teacher, for each of the student's sides, the head that it meets."""
        return (HEADS[0], HEADS[0]) if self.shared_head else HEADS

    @property
    def rows(self) -> RowMaker:
        """What makes the rows."""
        names = (field.name for field in dataclasses.fields(RowMaker))
        return RowMaker(**{name: getattr(self, name) for name in names})
