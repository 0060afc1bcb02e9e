"""A pretraining's teacher as one that stays as it is."""

from typing import Any

import jax.numpy as jnp

from point_jax.interop.release import spec_of
from point_jax.interop.store import Weights
from point_jax.models.functional import Params
from point_jax.objectives.headed import HEADS
from point_jax.objectives.sonata_spec import OfflineTeacher


def offline_teacher(
    weights: Weights, *, prototypes: int, up_cast: int, dtype: Any = jnp.float32
) -> tuple[OfflineTeacher, Params]:
    """The teacher of a checkpoint.

    The original takes the student of its checkpoint; the moving average is the better network.

    Args:
      weights: a pretraining.
      prototypes, up_cast: of the student that is to learn from it.
      dtype: of the arithmetic.

    Returns:
      The network and its parameters, see `HeadedEncoder`.

    Raises:
      ValueError: no pretraining, or one whose heads are not comparable with the student's.
    """
    if weights.kind != "pretraining":
        raise ValueError(
            f"holds one {weights.kind}, expected a pretraining: what teaches are its prototypes"
        )
    params = {name: weights.params["teacher"][name] for name in ("backbone", *HEADS)}
    network = spec_of(weights.config, weights.variant, dtype)
    head = params[HEADS[0]]
    inputs, hidden = head["mlp"]["fc1"]["kernel"].shape
    found, embed = head["prototypes"].shape
    if found != prototypes:
        raise ValueError(f"has {found} prototypes: give config.objective.prototypes={found}")
    widths = [stage.channels for stage in network.encoder]
    if inputs != sum(widths[-1 - up_cast :]):
        fits = [cast for cast in range(len(widths)) if inputs == sum(widths[-1 - cast :])]
        hint = f": give config.objective.up_cast={fits[0]}" if fits else ""
        raise ValueError(
            f"has heads for {inputs} channels, its last {up_cast + 1} levels have "
            f"{sum(widths[-1 - up_cast :])}{hint}"
        )
    return OfflineTeacher(network, hidden, embed), params
