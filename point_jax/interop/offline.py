"""A pretraining's teacher as one that stays as it is."""

from dataclasses import replace

from point_jax.interop.release import spec_of
from point_jax.interop.store import Weights
from point_jax.models.functional import Params
from point_jax.objectives.sonata_spec import OfflineTeacher, SonataSpec


def offline_teacher(weights: Weights, student: SonataSpec) -> tuple[OfflineTeacher, Params]:
    """The teacher of a checkpoint, for a student that is to learn from it.

    It is the moving average, as everywhere here; Pointcept's distillation takes the student of its
    checkpoint.

    Args:
      weights: a pretraining.
      student: the objective without the teacher. Its arithmetic is the teacher's, too.

    Returns:
      The network, and its parameters for the heads that the objective has.

    Raises:
      ValueError: no pretraining, or one whose heads are not comparable with the student's.
    """
    if weights.kind != "pretraining":
        raise ValueError(
            f"holds one {weights.kind}, expected a pretraining: what teaches are its prototypes"
        )
    tree = weights.params["teacher"]
    network = spec_of(weights.config, weights.variant, student.network.dtype)
    names = sorted(set(student.teacher_heads))
    if missing := [name for name in names if name not in tree]:
        raise ValueError(f"has no {', '.join(missing)}: the losses need it")
    widths = [stage.channels for stage in network.encoder]
    wanted = sum(widths[-1 - student.up_cast :])
    sizes = set()
    for name in names:
        inputs, hidden = tree[name]["mlp"]["fc1"]["kernel"].shape
        prototypes, embed = tree[name]["prototypes"].shape
        sizes.add((hidden, embed))
        if prototypes != student.prototypes:
            raise ValueError(
                f"has {prototypes} prototypes: give config.objective.prototypes={prototypes}"
            )
        if inputs != wanted:
            fits = [cast for cast in range(len(widths)) if inputs == sum(widths[-1 - cast :])]
            hint = f": give config.objective.up_cast={fits[0]}" if fits else ""
            raise ValueError(
                f"has a {name} for {inputs} channels, and its last {student.up_cast + 1} levels "
                f"have {wanted}{hint}"
            )
    if len(sizes) > 1:
        raise ValueError(f"has heads of different sizes: {sizes}")
    teacher = OfflineTeacher(network, *sizes.pop())
    replace(student, offline=teacher)  # says what else does not fit
    return teacher, {name: tree[name] for name in ("backbone", *names)}
