"""The moving average that teaches."""

import jax
from jax.typing import ArrayLike

from point_jax.objectives.interface import Params


def move_teacher(teacher: Params, student: Params, momentum: ArrayLike) -> Params:
    """The teacher's moving average: momentum * teacher + (1 - momentum) * student.

    Written as a step towards the student, so that equal values stay exactly as they are.
    """
    return jax.tree.map(lambda t, s: t + (1.0 - momentum) * (s - t), teacher, student)
