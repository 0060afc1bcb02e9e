"""Sonata (arXiv:2503.16429): self-distillation of a point encoder.

The teacher, a moving average of the student, sees two large views of a scene. (Or it is offline, a
network of its own that stays as it is, as in Pointcept's distillation of Concerto.) The student
sees the same two with blocks of points masked and jittered, and four small views. For every point
of the student the nearest point of a teacher's view says to which prototypes it belongs: the same
view (mask), the other one (roll), and for the small views the major one (unmask). Sinkhorn-Knopp
over the global batch keeps the prototypes evenly used.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.hierarchy import Hierarchy
from point_jax.models.functional import Params
from point_jax.models.ptv3 import up_cast
from point_jax.objectives.headed import HeadedEncoder
from point_jax.objectives.interface import Axis, Scene, Schedule, Stats, Targets
from point_jax.objectives.rows import (
    LOSSES,
    SIDES,
    Row,
    Views,
    matched_per_view,
    side_of,
    student_level,
)
from point_jax.objectives.sonata_spec import HEADS, OFFLINE, SonataSpec
from point_jax.objectives.teacher import move_teacher
from point_jax.ops.gather import take_rows
from point_jax.ops.prototypes import Sums, log_sum_over_points, prototype_loss

SINKHORN_STEPS = 3


class Piece(NamedTuple):
    """One side of a row's student, with the losses that are compared on it.

    Attributes:
      views: what the student sees.
      side: () int32, place in `SIDES`.
      losses: (2,) int32, places in `LOSSES`; len(LOSSES) for none.
      matches: (2, A) int32, the teacher's point of every student's point, for each loss.
      teacher: (A, E) float32, the teacher's embeddings by the head that the losses use.
      key: of the student's drop path and moved rotary coordinates.
      scenes: () float32, 1 for the first side of a scene that is not empty, else 0.
    """

    views: Views
    side: jax.Array
    losses: jax.Array
    matches: jax.Array
    teacher: jax.Array
    key: jax.Array
    scenes: jax.Array


class Sonata:
    """The objective's functions; see `interface.Objective`. Immutable.

    The teacher's parameters are the student's moving average, under the same names, and if the
    teacher is offline, its own as the part `OFFLINE`. The average is what a run leaves either way.

    Attributes:
      spec: the settings.
      student: the network that learns.
      teacher: the one that gives the targets.
      rows: makes rows, and their structure for the student.
      teacher_rows: their structure for the teacher.
    """

    scenes_per_row = 1

    def __init__(self, spec: SonataSpec):
        self.spec = spec
        sizes = spec.prototypes, spec.up_cast
        self.student = HeadedEncoder(spec.network, spec.hidden, spec.embed, *sizes)
        self.rows = spec.rows
        self.teacher, self.teacher_rows = self.student, self.rows
        if given := spec.offline:
            heads = set(spec.teacher_heads)
            self.teacher = HeadedEncoder(given.network, given.hidden, given.embed, *sizes, heads)
            self.teacher_rows = replace(spec.rows, network=given.network)

    def __repr__(self) -> str:
        return f"Sonata({self.spec!r})"

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Parameters of the student, and the same again with those of an offline teacher."""
        student = self.student.init(key)
        teacher = jax.tree.map(jnp.copy, student)
        if self.spec.offline:
            teacher[OFFLINE] = self.teacher.init(jax.random.fold_in(key, 0))
        return student, teacher

    def read_as(self, name: str) -> jnp.dtype:
        """The network's dtype for the kernels of backbone and heads: layers cast them first."""
        reader = self.teacher if name.startswith(f"{OFFLINE}.") else self.student
        part, *_, last = name.removeprefix(f"{OFFLINE}.").split(".")
        cast = part in ("backbone", *HEADS) and last == "kernel"
        return reader.network.dtype if cast else jnp.float32

    def prepare(self, scenes: Scene, key: jax.Array, schedule: Schedule) -> tuple[Row, Stats]:
        """Views, masks and matches of a scene; see `RowMaker.make`."""
        return self.rows.make({name: x[0] for name, x in scenes.items()}, key, schedule)

    def follow(
        self, teacher: Params, student: Params, stats: Stats, schedule: Schedule, good: jax.Array
    ) -> Params:
        """The moving average of the student, by `momentum`; other parts stay as they are."""
        del stats
        momentum = jnp.where(good, schedule["momentum"], 1.0)
        return {
            name: move_teacher(part, student[name], momentum) if name in student else part
            for name, part in teacher.items()
        }

    @jax.named_scope("losses")
    def targets(
        self,
        teacher: Params,
        rows: Row,
        key: jax.Array,
        schedule: Schedule,
        axis: Axis = None,
    ) -> Targets:
        """The teacher's embeddings of every row, and the scales of the prototypes over all rows.

        Args:
          teacher: parameters.
          rows: leading axis R.
          key: of this step, the same on all devices.
          schedule: `teacher_temp`, () float32.
          axis: the mesh axes over which the batch is spread; None for one device.
        """
        order_key = jax.random.fold_in(key, 0)
        teacher = teacher.get(OFFLINE, teacher)

        def embed(views: Views) -> tuple[dict[str, jax.Array], Stats]:
            hierarchy, level = self.teacher_rows.structure(views), views.level
            levels = self.teacher.levels(teacher["backbone"], views, hierarchy, order_key, None)
            x = up_cast(levels, hierarchy, self.spec.up_cast)
            used = jnp.where(level.valid[:, None], x.astype(jnp.float32), 0.0)
            stats = {
                "teacher_points": level.used.astype(jnp.float32),
                "feature_sum": used.sum(0),
                "feature_square": (used * used).sum(0),
            }
            heads = dict.fromkeys(self.spec.teacher_heads)
            return {head: self.teacher.embed(teacher[head], x, level.used) for head in heads}, stats

        embeddings, stats = jax.lax.map(embed, rows.teacher)
        directions = {
            head: self.teacher.directions(teacher[head]) for head in self.spec.teacher_heads
        }
        scales = self._sinkhorn(embeddings, directions, rows, schedule, axis)
        views = self._matched_views(rows, axis)
        # One entry more: the loss that there is none of.
        shared = {
            "directions": jnp.stack([directions[head] for head in self.spec.teacher_heads]),
            "scales": jnp.pad(scales, ((0, 1), (0, 0))),
            "views": jnp.stack([*views.values(), jnp.ones(())]),
        }
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        return Targets(self._pieces(rows, embeddings), shared, stats)

    def _pieces(self, rows: Row, embeddings: dict[str, jax.Array]) -> Piece:
        """Both sides of every row, row after row; leading axis 2 R."""
        none = len(LOSSES)
        matches = [
            *rows.matches.values(),
            jnp.full_like(rows.matches["mask"], rows.matches["mask"].shape[1]),
        ]
        scenes = len(rows.scenes)
        pieces = Piece(
            views=rows.students,
            side=jnp.broadcast_to(jnp.arange(2), (scenes, 2)),
            losses=jnp.broadcast_to(jnp.array([[0, 1], [2, none]]), (scenes, 2, 2)),
            matches=jnp.stack(matches, axis=1).reshape(scenes, 2, 2, -1),
            teacher=jnp.stack([embeddings[head] for head in self.spec.teacher_heads], axis=1),
            key=jax.vmap(jax.random.split)(rows.key),
            scenes=rows.scenes[:, None] * jnp.array([[1.0, 0.0]]),
        )
        return jax.tree.map(lambda x: x.reshape(2 * scenes, *x.shape[2:]), pieces)

    @jax.named_scope("losses")
    def _sinkhorn(self, embeddings, directions, rows, schedule, axis) -> jax.Array:
        """(3, Q) log scales of each loss's prototypes after three rounds over the global batch.

        In log space an assignment is score / temperature + scale of the prototype + scale of the
        point; normalising points last leaves a softmax, so only the prototypes' scales are kept.
        The losses go side by side, so that a round takes two small sums over the mesh.
        """

        def received(name, scale, embeddings, row) -> jax.Array:
            head = self.spec.teacher_heads[SIDES.index(side_of(name))]
            match, count = row.matches[name], student_level(row, name).used
            return log_sum_over_points(
                take_rows(embeddings[head], match),
                directions[head],
                scale,
                (match < len(embeddings[head])).astype(jnp.float32),
                count,
                schedule["teacher_temp"],
            )

        def one_round(scales: jax.Array | None) -> jax.Array:
            def add(total, this):
                given = [None] * len(LOSSES) if scales is None else scales
                found = [received(*each, *this) for each in zip(LOSSES, given, strict=True)]
                return jnp.logaddexp(total, jnp.stack(found)), None

            empty = jnp.full((len(LOSSES), self.spec.prototypes), -jnp.inf)
            total, _ = jax.lax.scan(add, empty, (embeddings, rows))
            if axis is not None:
                top = jax.lax.pmax(total, axis)
                top = jnp.where(jnp.isfinite(top), top, 0.0)
                total = top + jnp.log(jax.lax.psum(jnp.exp(total - top), axis))
            # Without any match there is nothing to scale.
            return jnp.where(jnp.isfinite(total), -total, 0.0)

        scales = one_round(None)
        for _ in range(SINKHORN_STEPS - 1):
            scales = one_round(scales)
        return scales

    @jax.named_scope("losses")
    def _matched_views(self, rows: Row, axis: Axis) -> dict[str, jax.Array]:
        """How many views divide each loss, per scene of the global batch: () float32 each."""
        views = self.spec.views
        fixed = {
            "mask": views.global_count,
            "roll": views.global_count,
            "unmask": views.local_count,
        }
        if not self.spec.matched_views_only:
            return {name: jnp.float32(number) for name, number in fixed.items()}

        def number(row: Row, name: str) -> jax.Array:
            level = student_level(row, name)
            return (matched_per_view(row.matches[name], level) > 0).sum()

        counts = [jax.vmap(partial(number, name=name))(rows).sum() for name in LOSSES]
        counts = jnp.stack([*counts, rows.scenes.sum()]).astype(jnp.float32)
        *matched, scenes = jnp.maximum(counts if axis is None else jax.lax.psum(counts, axis), 1.0)
        return {name: n / scenes for name, n in zip(LOSSES, matched, strict=True)}

    @jax.named_scope("losses")
    def loss(
        self,
        student: Params,
        piece: Piece,
        shared: dict[str, jax.Array],
        key: jax.Array,
        schedule: Schedule,
    ) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
        """Weighted losses of a piece, each the mean over its views of the mean over matched points.

        Args:
          student: parameters; differentiated.
          piece, shared: of `targets`.
          key: of this step, the same on all devices.
          schedule: `teacher_temp`, () float32.

        Returns:
          (sum, (count, stats)): the counts of a row's pieces sum to 1, to 0 for an empty scene.
        """
        levels, hierarchy = self.student_levels(student, piece, key)
        x = up_cast(levels, hierarchy, self.spec.up_cast)
        values, stats = self.compare(student, x, piece, shared, schedule)
        return (jnp.array(self.spec.weights) * values).sum(), (piece.scenes, stats)

    def student_levels(
        self, student: Params, piece: Piece, key: jax.Array
    ) -> tuple[tuple[jax.Array, ...], Hierarchy]:
        """The student's features of every level of a piece, and its structure; as for `loss`."""
        order_key = jax.random.fold_in(key, 1 + piece.side)
        hierarchy = self.rows.structure(piece.views)
        backbone, noise_key = student["backbone"], piece.key
        levels = self.student.levels(backbone, piece.views, hierarchy, order_key, noise_key)
        return levels, hierarchy

    @jax.named_scope("losses")
    def compare(
        self,
        student: Params,
        x: jax.Array,
        piece: Piece,
        shared: dict[str, jax.Array],
        schedule: Schedule,
    ) -> tuple[jax.Array, Stats]:
        """The losses (3,) of a piece, 0 for those of the other side, and its sums.

        `x` (A, channels) are the student's features at the heads' level; the other arguments are
        those of `loss`.
        """
        level = piece.views.level
        head = jax.tree.map(
            lambda first, second: jnp.where(piece.side == 0, first, second),
            *(student[head] for head in HEADS),
        )
        embedding = self.student.embed(head, x, level.used)
        directions = self.student.directions(head)

        def compare(this: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, Sums]:
            loss, match = this
            points, sums = prototype_loss(
                embedding,
                directions,
                take_rows(piece.teacher, match),
                shared["directions"][piece.side],
                shared["scales"][loss],
                (match < len(match)).astype(jnp.float32),
                jnp.where(loss < len(LOSSES), level.used, 0),
                self.spec.student_temperature,
                schedule["teacher_temp"],
            )
            matched = matched_per_view(match, level)
            per_view = jax.ops.segment_sum(points, level.cloud, len(matched))
            value = (per_view / jnp.maximum(matched, 1)).sum() / shared["views"][loss]
            return value, matched.sum(), sums

        values, matched, sums = jax.lax.map(compare, (piece.losses, piece.matches))
        mine = jax.nn.one_hot(piece.losses, len(LOSSES))  # (2, 3)
        found = {"loss": values, "matched": matched, "sums": sums}
        stats: Stats = {
            name: jax.tree.map(lambda x, i=i: jnp.tensordot(mine[:, i], x, 1), found)
            for i, name in enumerate(LOSSES)
        }
        stats = jax.lax.stop_gradient(stats | {"rows": piece.scenes})
        return (values[:, None] * mine).sum(0), stats

    @jax.named_scope("losses")
    def metrics(self, stats: Stats) -> dict[str, jax.Array]:
        """Losses, and the health of the distillation.

        Entropies are over the log of the number of prototypes: 1 is uniform, 0 certain. Use is the
        perplexity of the mean assignment over the number of prototypes: 1 when all are used evenly,
        near 0 in a collapse. `feature_std` is the mean over channels of the standard deviation of
        the teacher's features over points, relative to their root mean square: 0 in a collapse.
        Means are over the scenes that are not empty; without any there is no loss: it is NaN.
        """
        out = {f"{name}_loss": stats[name]["loss"] / stats["rows"] for name in LOSSES}
        weights = zip(LOSSES, self.spec.weights, strict=True)
        out["loss"] = sum((w * out[f"{name}_loss"] for name, w in weights), jnp.zeros(()))
        sums = {name: stats[name]["sums"] for name in LOSSES}
        found = sum((stats[name]["matched"] for name in LOSSES), jnp.zeros(()))
        matched = {name: jnp.maximum(stats[name]["matched"], 1.0) for name in LOSSES}
        everything = jax.tree.map(lambda *parts: sum(parts), *sums.values())
        pairs = jnp.maximum(found, 1.0)
        most = jnp.log(float(self.spec.prototypes))
        out["teacher_entropy"] = everything.teacher_entropy / pairs / most
        out["student_entropy"] = everything.student_entropy / pairs / most
        out["teacher_use"] = _use(sums["mask"].teacher_use / matched["mask"])
        out["student_use"] = _use(sums["mask"].student_use / matched["mask"])
        out["matched"] = found / jnp.maximum(stats["student_points"], 1.0)
        points = jnp.maximum(stats["teacher_points"], 1.0)
        mean, square = stats["feature_sum"] / points, stats["feature_square"] / points
        spread = jnp.sqrt(jnp.maximum(square - mean * mean, 0.0))
        out["feature_std"] = spread.mean() / jnp.sqrt(jnp.maximum(square.mean(), 1e-12))
        for name in ("points", "empty_scenes", "overflow_grid", "overflow_elastic", "overflow_row"):
            out[name] = stats[name]
        for name in ("cut", "padding", "masked"):
            out[name] = stats[name] / jnp.maximum(stats["rows"], 1.0)
        return out


def _use(mean: jax.Array) -> jax.Array:
    return jnp.exp(-(mean * jnp.log(jnp.maximum(mean, 1e-30))).sum()) / len(mean)
