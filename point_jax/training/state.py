"""The state of a run: plain nested dicts of arrays, the same on every device."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

Tree = Any  # nested dicts of arrays
State = dict[str, Any]


class HasInit(Protocol):
    """What the state and the loop need of an objective; see `objectives.interface`."""

    scenes_per_row: int

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh parameters of the student and of the teacher."""
        ...


def init_state(objective: HasInit, key: jax.Array) -> State:
    """The state before the first step, a pure function of the run's key (may be traced by jit).

    Returns:
        `step` int32 (), steps done, skipped ones included; `student` and `teacher`; `mu` and `nu`,
        AdamW's moments of the student, float32; `bad_steps`, counts of the steps that were skipped
        because the loss or a gradient was not finite: `total`, and `in_a_row` up to the present
        step, int32 (). The updates done so far are `step - bad_steps.total`.
    """
    # The steps fold small numbers into the run's key; the initialization must not meet them.
    student, teacher = objective.init(jax.random.fold_in(key, 0x7FFFFFFF))
    return {
        "step": jnp.zeros((), jnp.int32),
        "student": student,
        "teacher": teacher,
        "mu": jax.tree.map(jnp.zeros_like, student),
        "nu": jax.tree.map(jnp.zeros_like, student),
        "bad_steps": {"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    }
