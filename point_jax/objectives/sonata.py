"""Sonata (arXiv:2503.16429): self-distillation of a point encoder.

The teacher, a moving average of the student, sees two large views of a scene. The student sees the
same two with blocks of points masked and jittered, and four small views. For every point of the
student the nearest point of a teacher's view says to which prototypes it belongs: the same view
(mask), the other one (roll), and for the small views the major one (unmask). Sinkhorn-Knopp over
the global batch keeps the prototypes evenly used.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from point_jax.data.masks import jitter_masked, random_mask
from point_jax.data.views import ViewBatch, ViewSpec, make_views
from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec, build_hierarchy, sort_row
from point_jax.geometry.matching import nearest
from point_jax.models.functional import Params, functional
from point_jax.models.heads import OnlineCluster, start_prototypes
from point_jax.models.ptv3 import PTv3, PTv3Spec, up_cast
from point_jax.objectives.interface import Scene, Schedule, Stats, Targets
from point_jax.ops.gather import take_rows
from point_jax.ops.pool import cluster_mean
from point_jax.ops.prototypes import Sums, log_sum_over_points, prototype_loss

LOSSES = ("mask", "roll", "unmask")
SINKHORN_STEPS = 3


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

    def __post_init__(self) -> None:
        levels = len(self.network.encoder)
        if len(self.shares) != levels:
            raise ValueError(
                f"shares has {len(self.shares)} entries, the encoder {levels} levels: give one each"
            )
        if not 0 <= self.up_cast < levels:
            raise ValueError(f"up_cast={self.up_cast} must be from 0 to {levels - 1}")
        if self.weights[1] > 0 and self.views.global_count < 2:
            raise ValueError("the roll loss (weights[1]) needs at least two global views")

    def rows(self, views: int, capacity: int) -> HierarchySpec:
        """The hierarchy of a row that holds some views of some capacity."""
        slots = views * capacity
        capacities = tuple(max(16, math.ceil(slots * share / 8) * 8) for share in self.shares)
        return self.network.hierarchy(capacities, views)


class Views(NamedTuple):
    """Some views of a scene as a row of N slots; A is the capacity of the level that the heads see.

    Attributes:
      features: (N, 9) float32: augmented coordinates (metres), colour 0 to 1, normal.
      mask: (N,) bool, masked points.
      hierarchy: the row's structure, one cloud a view.
      origin: (A, 3) float32, scene coordinates of the points of the heads' level, metres.
      dropped: () int32, points that did not fit the row.
    """

    features: jax.Array
    mask: jax.Array
    hierarchy: Hierarchy
    origin: jax.Array
    dropped: jax.Array


class Row(NamedTuple):
    """A scene, ready for the networks.

    Attributes:
      teacher, masked, local: the views that the teacher sees, the same masked, and the small ones.
      matches: for each loss the teacher's point (index on the heads' level) of every student's
        point; the capacity A of the teacher's level for none.
      key: of the row's drop path.
      scenes: () float32, 1; 0 if the scene is empty.
    """

    teacher: Views
    masked: Views
    local: Views
    matches: dict[str, jax.Array]
    key: jax.Array
    scenes: jax.Array


class Sonata:
    """The objective's functions; see `interface.Objective`. Immutable."""

    def __init__(self, spec: SonataSpec):
        self.spec = spec
        network = spec.network
        inputs = sum(stage.channels for stage in network.encoder[-1 - spec.up_cast :])
        self._init_backbone, self.backbone = functional(lambda rngs: PTv3(network, rngs=rngs))
        self._init_head, self._head = functional(
            lambda rngs: OnlineCluster(
                inputs, spec.hidden, spec.embed, spec.prototypes, network.dtype, rngs=rngs
            )
        )
        views = spec.views
        self.global_rows = spec.rows(views.global_count, views.global_capacity)
        self.local_rows = spec.rows(views.local_count, views.local_capacity)

    def init(self, key: jax.Array) -> Params:
        """Parameters of the student: backbone, mask_head, unmask_head."""
        keys = jax.random.split(key, 5)
        params = {"backbone": self._init_backbone(keys[0])}
        for name, head_key, key in zip(
            ("mask_head", "unmask_head"), keys[1:3], keys[3:], strict=True
        ):
            head = self._init_head(head_key)
            prototypes = start_prototypes(key, head["prototypes"].shape)
            params[name] = head | {"prototypes": prototypes}
        return params

    def prepare(self, scene: Scene, key: jax.Array, schedule: Schedule) -> tuple[Row, Stats]:
        """Views, masks, structure and matches of a scene.

        Args:
          scene: `coord` (P, 3) float32 metres, `color` (P, 3) 0-255, `normal` (P, 3),
            `count` () int32.
          key: of this scene in this step.
          schedule: `mask_size` metres and `mask_ratio`, () float32.
        """
        views_key, mask_key, jitter_key, drop_key = jax.random.split(key, 4)
        views = make_views(dict(scene), views_key, self.spec.views)
        large, small = views.global_, views.local
        valid = jnp.arange(large.coord.shape[1])[None] < large.count[:, None]
        mask = jax.vmap(random_mask, (0, 0, 0, None, None))(
            jax.random.split(mask_key, len(valid)),
            large.coord,
            valid,
            schedule["mask_size"],
            schedule["mask_ratio"],
        )
        noise = jax.random.normal(jitter_key, large.coord.shape)
        jittered = jax.vmap(jitter_masked, (0, 0, 0, None))(
            large.coord, mask, noise, self.spec.mask_jitter
        )
        # The teacher's row and the masked one have one shape: a loop compiles it once.
        sides = jax.lax.map(
            lambda side: self._views(large, side[0], side[1], self.global_rows),
            (jnp.stack([large.coord, jittered]), jnp.stack([jnp.zeros_like(mask), mask])),
        )
        row = self.assemble(
            jax.tree.map(lambda x: x[0], sides),
            jax.tree.map(lambda x: x[1], sides),
            self._views(
                small, small.coord, jnp.zeros(small.coord.shape[:2], bool), self.local_rows
            ),
            drop_key,
            (scene["count"] > 0).astype(jnp.float32),
        )
        return row, self._row_stats(row, scene, views.points, views.overflow)

    def assemble(
        self, teacher: Views, masked: Views, local: Views, key: jax.Array, scenes: jax.Array
    ) -> Row:
        """Matches the student's points to the teacher's and puts a row together."""
        level = -1 - self.spec.up_cast
        cloud = teacher.hierarchy[level].cloud
        views = self.spec.views.global_count
        point = jnp.where(cloud < views, cloud, -2)
        rolled = jnp.where(cloud < views, (cloud + 1) % views, -2)
        major = jnp.where(cloud == 0, 0, -2)
        query = masked.hierarchy[level]
        query_cloud = jnp.where(query.valid, query.cloud, -1)
        local_query = jnp.where(local.hierarchy[level].valid, 0, -1)

        def match(student, query_cloud, point_cloud):
            return nearest(
                student.origin, query_cloud, teacher.origin, point_cloud, self.spec.match_radius
            )

        matches = {
            "mask": match(masked, query_cloud, point),
            "roll": match(masked, query_cloud, rolled),
            "unmask": match(local, local_query, major),
        }
        return Row(teacher, masked, local, matches, key, scenes)

    def arrange(
        self,
        grid: jax.Array,
        origin: jax.Array,
        features: jax.Array,
        cloud: jax.Array,
        valid: jax.Array,
        mask: jax.Array,
        spec: HierarchySpec,
        depths: jax.Array | None = None,
    ) -> Views:
        """Sorts points (A of them) into a row and builds its structure.

        Args:
          grid: (A, 3) int32.
          origin: (A, 3) float32, scene coordinates.
          features: (A, 9) float32.
          cloud: (A,) int32, the view.
          valid, mask: (A,) bool.
          spec: the row's shape.
          depths: bits of the curves, see `build_hierarchy`.
        """
        order, count, overflow = sort_row(grid, cloud, valid, spec.capacities[0])
        packed = jnp.concatenate([features, origin, mask[:, None].astype(jnp.float32)], axis=1)
        packed = take_rows(packed, order)
        hierarchy = build_hierarchy(
            take_rows(grid, order), take_rows(cloud, order), count, spec, depths
        )
        width = features.shape[1]
        at = packed[:, width : width + 3]
        for level in hierarchy[1 : len(hierarchy) - self.spec.up_cast]:
            at = cluster_mean(at, level.first_child)
        return Views(packed[:, :width], packed[:, -1] > 0, hierarchy, at, overflow)

    def _views(
        self, views: ViewBatch, coord: jax.Array, mask: jax.Array, spec: HierarchySpec
    ) -> Views:
        """A row of views with the voxels of `coord` (V, N, 3) and the features of the views."""
        count, capacity = coord.shape[:2]
        valid = jnp.arange(capacity)[None] < views.count[:, None]
        lowest = jnp.where(valid[..., None], coord, jnp.inf).min(1, keepdims=True)
        steps = jnp.where(valid[..., None], (coord - lowest) / self.spec.views.grid_size, 0.0)
        grid = jnp.clip(steps.astype(jnp.int32), 0, (1 << 16) - 1)
        features = jnp.concatenate([views.coord, views.color, views.normal], axis=-1)
        cloud = jnp.broadcast_to(jnp.arange(count)[:, None], valid.shape)
        grid, origin, features = (
            x.reshape(count * capacity, *x.shape[2:]) for x in (grid, views.origin, features)
        )
        cloud, valid, mask = (x.reshape(-1) for x in (cloud, valid, mask))
        return self.arrange(grid, origin, features, cloud, valid, mask, spec)

    def targets(
        self,
        teacher: Params,
        rows: Row,
        key: jax.Array,
        schedule: Schedule,
        axis: str | None = None,
    ) -> Targets:
        """The teacher's embeddings of every row, and the scales of the prototypes over all rows.

        Args:
          teacher: parameters.
          rows: leading axis R.
          key: of this step, the same on all devices.
          schedule: `teacher_temp`, () float32.
          axis: the mesh axis over which the batch is spread; None for one device.
        """
        order_key = jax.random.fold_in(key, 0)

        def embed(views: Views) -> tuple[dict[str, jax.Array], Stats]:
            x = self.features(teacher["backbone"], views, order_key, None)
            level = views.hierarchy[-1 - self.spec.up_cast]
            used = jnp.where(level.valid[:, None], x.astype(jnp.float32), 0.0)
            stats = {
                "teacher_points": level.count.astype(jnp.float32),
                "feature_sum": used.sum(0),
                "feature_square": (used * used).sum(0),
            }
            heads = ("mask_head", "unmask_head")
            return {head: self._embed(teacher[head], x) for head in heads}, stats

        embeddings, stats = jax.lax.map(embed, rows.teacher)
        directions = {head: self._directions(teacher[head]) for head in embeddings}
        scales = {
            name: self._sinkhorn(embeddings, directions, rows, name, schedule, axis)
            for name in LOSSES
        }
        views = self._matched_views(rows, axis)
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        return Targets(
            embeddings, {"directions": directions, "scales": scales, "views": views}, stats
        )

    def _sinkhorn(self, embeddings, directions, rows, name, schedule, axis) -> jax.Array:
        """(Q,) log scales of a loss's prototypes after three rounds over the global batch.

        In log space an assignment is score / temperature + scale of the prototype + scale of the
        point; normalising points last leaves a softmax, so only the prototypes' scales are kept.
        """
        head = head_of(name)

        def one_round(scale: jax.Array | None) -> jax.Array:
            def add(total, this):
                embedding, row = this
                match, count = row.matches[name], self._student_level(row, name).count
                weight = (match < len(embedding)).astype(jnp.float32)
                received = log_sum_over_points(
                    take_rows(embedding, match),
                    directions[head],
                    scale,
                    weight,
                    count,
                    schedule["teacher_temp"],
                )
                return jnp.logaddexp(total, received), None

            empty = jnp.full(self.spec.prototypes, -jnp.inf)
            total, _ = jax.lax.scan(add, empty, (embeddings[head], rows))
            if axis is not None:
                top = jax.lax.pmax(total, axis)
                top = jnp.where(jnp.isfinite(top), top, 0.0)
                total = top + jnp.log(jax.lax.psum(jnp.exp(total - top), axis))
            # Without any match there is nothing to scale.
            return jnp.where(jnp.isfinite(total), -total, 0.0)

        scale = one_round(None)
        for _ in range(SINKHORN_STEPS - 1):
            scale = one_round(scale)
        return scale

    def _matched_views(self, rows: Row, axis: str | None) -> dict[str, jax.Array]:
        """How many views divide each loss, per scene of the global batch: () float32 each."""
        views = self.spec.views
        fixed = {
            "mask": views.global_count,
            "roll": views.global_count,
            "unmask": views.local_count,
        }
        if not self.spec.matched_views_only:
            return {name: jnp.float32(number) for name, number in fixed.items()}
        scenes = _psum(rows.scenes.sum(), axis)
        matched = {
            name: jax.vmap(lambda row, name=name: (self._per_view(row, name)[0] > 0).sum())(rows)
            for name in LOSSES
        }
        matched = {name: _psum(n.sum().astype(jnp.float32), axis) for name, n in matched.items()}
        return {name: jnp.maximum(n, 1.0) / jnp.maximum(scenes, 1.0) for name, n in matched.items()}

    def loss(
        self,
        student: Params,
        row: Row,
        target: dict[str, jax.Array],
        shared: dict[str, Any],
        key: jax.Array,
        schedule: Schedule,
    ) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
        """Weighted losses of a row, each the mean over its views of the mean over matched points.

        Args:
          student: parameters; differentiated.
          row, target, shared: of `prepare` and `targets`.
          key: of this step, the same on all devices.
          schedule: `teacher_temp`, () float32.

        Returns:
          (sum, (count, stats)): count is 1, or 0 for an empty scene.
        """
        masked_key, local_key = jax.random.split(row.key)
        masked = self.features(
            student["backbone"], row.masked, jax.random.fold_in(key, 1), masked_key
        )
        local = self.features(student["backbone"], row.local, jax.random.fold_in(key, 2), local_key)
        embeddings = {
            "mask_head": self._embed(student["mask_head"], masked),
            "unmask_head": self._embed(student["unmask_head"], local),
        }
        directions = {head: self._directions(student[head]) for head in embeddings}
        total, stats = jnp.zeros(()), {}
        for name, weight in zip(LOSSES, self.spec.weights, strict=True):
            head, match = head_of(name), row.matches[name]
            teacher = target[head]
            points, sums = prototype_loss(
                embeddings[head],
                directions[head],
                take_rows(teacher, match),
                shared["directions"][head],
                shared["scales"][name],
                (match < len(teacher)).astype(jnp.float32),
                self._student_level(row, name).count,
                self.spec.student_temperature,
                schedule["teacher_temp"],
            )
            matched, level = self._per_view(row, name)
            per_view = jax.ops.segment_sum(points, level.cloud, len(matched))
            value = (per_view / jnp.maximum(matched, 1)).sum() / shared["views"][name]
            total += weight * value
            stats[name] = {"loss": value, "matched": matched.sum(), "sums": sums}
        stats = jax.lax.stop_gradient(stats | {"rows": row.scenes})
        return total, (row.scenes, stats)

    def features(
        self,
        backbone: Params,
        views: Views,
        order_key: jax.Array | None,
        drop_key: jax.Array | None,
    ) -> jax.Array:
        """(A, channels) backbone features of a row, carried up to the heads' level."""
        clouds = len(views.hierarchy[0].starts) - 1
        out = self.backbone(
            backbone,
            views.features,
            views.hierarchy,
            mask=views.mask if self.spec.network.mask_token else None,
            order_key=order_key,
            drop_keys=None
            if drop_key is None or not self.spec.network.drop_path
            else jax.random.split(drop_key, clouds),
        )
        return up_cast(out.levels, views.hierarchy, self.spec.up_cast)

    def metrics(self, stats: Stats) -> dict[str, jax.Array]:
        """Losses, and the health of the distillation.

        Entropies are over the log of the number of prototypes: 1 is uniform, 0 certain. Use is the
        perplexity of the mean assignment over the number of prototypes: 1 when all are used evenly,
        near 0 in a collapse. `feature_std` is the mean over channels of the standard deviation of
        the teacher's features over points, relative to their root mean square: 0 in a collapse.
        """
        rows = jnp.maximum(stats["rows"], 1.0)
        out = {f"{name}_loss": stats[name]["loss"] / rows for name in LOSSES}
        weights = zip(LOSSES, self.spec.weights, strict=True)
        out["loss"] = sum((w * out[f"{name}_loss"] for name, w in weights), jnp.zeros(()))
        sums = {name: stats[name]["sums"] for name in LOSSES}
        matched = {name: jnp.maximum(stats[name]["matched"], 1.0) for name in LOSSES}
        everything = jax.tree.map(lambda *parts: sum(parts), *sums.values())
        pairs = sum(matched.values(), jnp.zeros(()))
        most = jnp.log(float(self.spec.prototypes))
        out["teacher_entropy"] = everything.teacher_entropy / pairs / most
        out["student_entropy"] = everything.student_entropy / pairs / most
        out["teacher_use"] = _use(sums["mask"].teacher_use / matched["mask"])
        out["student_use"] = _use(sums["mask"].student_use / matched["mask"])
        out["matched"] = pairs / jnp.maximum(stats["student_points"], 1.0)
        points = jnp.maximum(stats["teacher_points"], 1.0)
        mean, square = stats["feature_sum"] / points, stats["feature_square"] / points
        spread = jnp.sqrt(jnp.maximum(square - mean * mean, 0.0))
        out["feature_std"] = spread.mean() / jnp.sqrt(jnp.maximum(square.mean(), 1e-12))
        for name in ("points", "empty_scenes", "overflow_grid", "overflow_elastic", "overflow_row"):
            out[name] = stats[name]
        scenes = jnp.maximum(stats["rows"] + stats["empty_scenes"], 1.0)
        for name in ("cut", "padding", "masked"):
            out[name] = stats[name] / scenes
        return out

    def _row_stats(self, row: Row, scene: Scene, points: jax.Array, overflow) -> Stats:
        sides = (row.teacher, row.masked, row.local)
        used = sum(side.hierarchy[0].count for side in sides)
        slots = sum(len(side.hierarchy[0].cloud) for side in sides)
        students = [self._student_level(row, name).count for name in LOSSES]
        lost = [side.dropped for side in sides]
        lost += [level.overflow for side in sides for level in side.hierarchy]
        first = row.masked.hierarchy[0]
        stats = {
            "points": points,
            "empty_scenes": 1.0 - row.scenes,
            "cut": scene.get("cut", jnp.zeros(())),
            "padding": 1.0 - used / slots,
            "masked": (row.masked.mask & first.valid).sum() / jnp.maximum(first.count, 1),
            "student_points": sum(students),
            "overflow_grid": overflow["grid"],
            "overflow_elastic": overflow["elastic"],
            "overflow_row": sum(lost),
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}

    def _student_level(self, row: Row, name: str):
        side = row.local if name == "unmask" else row.masked
        return side.hierarchy[-1 - self.spec.up_cast]

    def _per_view(self, row: Row, name: str):
        """Matched points of each view (V,) float32, and the student's level."""
        level = self._student_level(row, name)
        found = row.matches[name] < len(row.teacher.origin)
        views = len(level.starts) - 1
        return jax.ops.segment_sum(found.astype(jnp.float32), level.cloud, views), level

    def _embed(self, head: Params, x: jax.Array) -> jax.Array:
        return self._head(head, x, method="embed")

    def _directions(self, head: Params) -> jax.Array:
        return self._head(head, method="directions")


def head_of(name: str) -> str:
    """The head that a loss uses."""
    return "unmask_head" if name == "unmask" else "mask_head"


def _use(mean: jax.Array) -> jax.Array:
    return jnp.exp(-(mean * jnp.log(jnp.maximum(mean, 1e-30))).sum()) / len(mean)


def _psum(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


__all__ = ["LOSSES", "Row", "Sonata", "SonataSpec", "Sums", "Views"]
