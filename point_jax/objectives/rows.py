"""Rows: scenes as views with masks, structure and matches, ready for the networks.

The teacher's row holds the large views; the student's the same with blocks of points masked and
jittered, and a second one the small views. The three have one shape, so that what makes them and
the networks that read them are compiled once; padding costs next to nothing. No parameters, no
gradients.

A row holds points, sorted, not the structure of its levels: that is many times as large, and is
built where a network reads it (`RowMaker.structure`), for one side of one scene at a time. It is
integers of integers, so whoever builds it gets the same.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.data.masks import jitter_masked, random_mask
from point_jax.data.views import ViewBatch, ViewSpec, make_views
from point_jax.geometry.hierarchy import (
    Hierarchy,
    HierarchySpec,
    build_hierarchy,
    sort_row,
)
from point_jax.geometry.matching import nearest
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.interface import Scene, Schedule, Stats
from point_jax.ops.gather import take_rows
from point_jax.ops.pool import cluster_mean

LOSSES = ("mask", "roll", "unmask")
SIDES = ("masked", "local")  # of the student


class Slots(NamedTuple):
    """The clouds of a level of A slots and G clouds; see `hierarchy.Level`.

    Attributes:
      cloud: (A,) int32, ascending; G in padding.
      used: () int32, slots in use.
      starts: (G + 1,) int32, where each cloud starts.
    """

    cloud: jax.Array
    used: jax.Array
    starts: jax.Array

    @property
    def valid(self) -> jax.Array:
        """(A,) bool, whether a slot is in use."""
        return jnp.arange(len(self.cloud)) < self.used


class Views(NamedTuple):
    """Some views of a scene as a row of N slots; A is the capacity of the level that the heads see.

    Attributes:
      features: (N, 9) float32: augmented coordinates (metres), colour 0 to 1, normal.
      coord: (N, 3) float32, where the points are (metres): as in `features`, but for the jitter of
        masked points, which moves their voxels and rotary positions and not their features.
      mask: (N,) bool, masked points.
      grid: (N, 3) int32, voxels.
      cloud: (N,) int32, the view; the number of clouds in padding.
      used: () int32, slots in use.
      level: clouds of the heads' level.
      origin: (A, 3) float32, scene coordinates of the points of the heads' level, metres.
      source: (N,) int32, the scene's row that each point is from.
      dropped: () int32, points that did not fit the row, and voxels that did not fit a level.
      depths: bits of the curves, where they are given; see `build_hierarchy`.
    """

    features: jax.Array
    coord: jax.Array
    mask: jax.Array
    grid: jax.Array
    cloud: jax.Array
    used: jax.Array
    level: Slots
    origin: jax.Array
    source: jax.Array
    dropped: jax.Array
    depths: jax.Array | None = None


class Row(NamedTuple):
    """A scene, ready for the networks.

    Attributes:
      teacher: the views that the teacher sees.
      students: the same masked, and the small ones; leading axis as in `SIDES`.
      matches: for each loss the teacher's point (index on the heads' level) of every student's
        point; the capacity A of the heads' level for none.
      key: of the row's drop path and moved rotary coordinates.
      scenes: () float32, 1; 0 if the scene is empty.
    """

    teacher: Views
    students: Views
    matches: dict[str, jax.Array]
    key: jax.Array
    scenes: jax.Array


@dataclass(frozen=True)
class RowMaker:
    """Makes rows; the fields are those of `SonataSpec`."""

    network: PTv3Spec
    views: ViewSpec
    shares: tuple[float, ...]
    up_cast: int
    mask_jitter: float
    match_radius: float

    @property
    def _slots(self) -> int:
        """Of the views of a side, all capacities together; of the side that has more."""
        spec = self.views
        return max(spec.global_count * spec.global_capacity, spec.local_count * spec.local_capacity)

    @property
    def shape(self) -> HierarchySpec:
        """Of every row: the large views fit and the small ones."""
        spec, slots = self.views, self._slots
        capacities = tuple(max(16, math.ceil(slots * share / 8) * 8) for share in self.shares)
        return self.network.hierarchy(capacities, max(spec.global_count, spec.local_count))

    @jax.named_scope("views")
    def make(self, scene: Scene, key: jax.Array, schedule: Schedule) -> tuple[Row, Stats]:
        """Views, masks, structure and matches of a scene.

        Args:
          scene: `coord` (P, 3) float32 metres, `color` (P, 3) 0-255, `normal` (P, 3),
            `count` () int32.
          key: of this scene in this step.
          schedule: `mask_size` metres and `mask_ratio`, () float32.
        """
        views_key, mask_key, jitter_key, noise_key = jax.random.split(key, 4)
        views = make_views(dict(scene), views_key, self.views)
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
            large.coord, mask, noise, self.mask_jitter
        )
        no_mask, plain = jnp.zeros_like(mask), jnp.zeros(small.coord.shape[:2], bool)
        sides = (
            self._points(large, large.coord, no_mask),
            self._points(large, jittered, mask),
            self._points(small, small.coord, plain),
        )
        sides = jax.tree.map(lambda *parts: jnp.stack(parts), *sides)
        made = jax.lax.map(lambda side: self.arrange(**side), sides)
        row = self.assemble(
            jax.tree.map(lambda x: x[0], made),
            jax.tree.map(lambda x: x[1:], made),
            noise_key,
            (scene["count"] > 0).astype(jnp.float32),
        )
        return row, self._stats(row, scene, views.points, views.overflow)

    @jax.named_scope("geometry")
    def assemble(self, teacher: Views, students: Views, key: jax.Array, scenes: jax.Array) -> Row:
        """Matches the student's points to the teacher's and puts a row together."""
        masked, local = (jax.tree.map(lambda x, i=i: x[i], students) for i in range(len(SIDES)))
        cloud = teacher.level.cloud
        views = self.views.global_count
        point = jnp.where(cloud < views, cloud, -2)
        rolled = jnp.where(cloud < views, (cloud + 1) % views, -2)
        major = jnp.where(cloud == 0, 0, -2)
        query_cloud = jnp.where(masked.level.valid, masked.level.cloud, -1)
        local_query = jnp.where(local.level.valid, 0, -1)

        def match(student, query_cloud, point_cloud):
            return nearest(
                student.origin, query_cloud, teacher.origin, point_cloud, self.match_radius
            )

        matches = {
            "mask": match(masked, query_cloud, point),
            "roll": match(masked, query_cloud, rolled),
            "unmask": match(local, local_query, major),
        }
        return Row(teacher, students, matches, key, scenes)

    @jax.named_scope("geometry")
    def arrange(
        self,
        grid: jax.Array,
        coord: jax.Array,
        origin: jax.Array,
        features: jax.Array,
        cloud: jax.Array,
        valid: jax.Array,
        mask: jax.Array,
        source: jax.Array,
        depths: jax.Array | None = None,
    ) -> Views:
        """Sorts points (A of them) into a row.

        Args:
          grid: (A, 3) int32.
          coord: (A, 3) float32, metres.
          origin: (A, 3) float32, scene coordinates.
          features: (A, 9) float32.
          cloud: (A,) int32, the view.
          valid, mask: (A,) bool.
          source: (A,) int32, rows of the scene.
          depths: bits of the curves, see `build_hierarchy`.
        """
        order, count, overflow = sort_row(grid, cloud, valid, self.shape.capacities[0])
        parts = [features, origin, coord, mask[:, None].astype(jnp.float32)]
        packed = take_rows(jnp.concatenate(parts, axis=1), order)
        # Of this only what is read is computed: parents, not orders, tables and patches.
        hierarchy = build_hierarchy(
            take_rows(grid, order), take_rows(cloud, order), count, self.shape, depths
        )
        first, last = hierarchy[0], hierarchy[-1 - self.up_cast]
        level = Slots(last.cloud, last.count, last.starts)
        width = features.shape[1]
        features, mask = packed[:, :width], packed[:, -1] > 0
        origin, coord = packed[:, width : width + 3], packed[:, width + 3 : width + 6]
        for one in hierarchy[1 : len(hierarchy) - self.up_cast]:
            origin = cluster_mean(origin, one.first_child)
        dropped = overflow + sum(one.overflow for one in hierarchy)
        voxels, source = (first.grid, first.cloud, count), take_rows(source, order)
        return Views(features, coord, mask, *voxels, level, origin, source, dropped, depths)

    @jax.named_scope("geometry")
    def structure(self, views: Views) -> Hierarchy:
        """What the networks read of a row's voxels: one cloud a view."""
        return build_hierarchy(views.grid, views.cloud, views.used, self.shape, views.depths)

    def _points(self, views: ViewBatch, coord: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """What `arrange` takes: the points of all views, one after the other, with the voxels of
        `coord` (V, N, 3) and the features of the views, padded to one length for all sides."""
        count, capacity = coord.shape[:2]
        valid = jnp.arange(capacity)[None] < views.count[:, None]
        lowest = jnp.where(valid[..., None], coord, jnp.inf).min(1, keepdims=True)
        steps = jnp.where(valid[..., None], (coord - lowest) / self.views.grid_size, 0.0)
        grid = jnp.clip(steps.astype(jnp.int32), 0, (1 << 16) - 1)
        features = jnp.concatenate([views.coord, views.color, views.normal], axis=-1)
        cloud = jnp.broadcast_to(jnp.arange(count)[:, None], valid.shape)
        rest = max(self._slots, self.shape.capacities[0]) - count * capacity

        def flat(x: jax.Array) -> jax.Array:
            x = x.reshape(count * capacity, *x.shape[2:])
            return jnp.pad(x, ((0, rest),) + ((0, 0),) * (x.ndim - 1))

        points = dict(grid=grid, coord=coord, origin=views.origin, features=features)
        points |= dict(cloud=cloud, valid=valid, mask=mask, source=views.source)
        return jax.tree.map(flat, points)

    def _stats(self, row: Row, scene: Scene, points: jax.Array, overflow) -> Stats:
        sides = (row.teacher, *(student(row, side) for side in SIDES))
        used = sum(side.used for side in sides)
        slots = sum(len(side.cloud) for side in sides)
        masked = student(row, "masked")
        stats = {
            "points": points,
            "empty_scenes": 1.0 - row.scenes,
            "cut": scene.get("cut", jnp.zeros(())),
            "padding": row.scenes * (1.0 - used / slots),
            "masked": masked.mask.sum() / jnp.maximum(masked.used, 1),
            "student_points": sum(student_level(row, name).used for name in LOSSES),
            "overflow_grid": overflow["grid"],
            "overflow_elastic": overflow["elastic"],
            "overflow_row": sum(side.dropped for side in sides),
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}


def student(row: Row, side: str) -> Views:
    """One of the student's two sides."""
    return jax.tree.map(lambda x: x[SIDES.index(side)], row.students)


def side_of(name: str) -> str:
    """The student's side that a loss is about, of `SIDES`."""
    return "local" if name == "unmask" else "masked"


def student_level(row: Row, name: str) -> Slots:
    """The level on which a loss compares the student's points."""
    return student(row, side_of(name)).level


def matched_per_view(match: jax.Array, level: Slots) -> jax.Array:
    """(V,) float32: points of each of the student's views that have a match."""
    found = match < len(match)
    views = len(level.starts) - 1
    return jax.ops.segment_sum(found.astype(jnp.float32), level.cloud, views)
