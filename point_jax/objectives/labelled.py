"""Labelled rows: scenes augmented as for supervised training, packed, perhaps mixed.

The recipe is Pointcept's for ScanNet: drop a fifth of the points, rotate, scale, flip, jitter,
distort, change colours, keep one point a voxel, cut a ball of at most `max_size` points. Mix3D
(arXiv:2110.02210) then lays two scenes over one another as one cloud.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax import limits
from point_jax.data.augment import GeometrySpec, centre_shift, random_geometry
from point_jax.data.color import add_noise, normalize_color, stretch_color, translate_color
from point_jax.data.elastic import noise_cells
from point_jax.data.views import crop
from point_jax.geometry.curves import MAX_DEPTH
from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec, build_hierarchy, sort_row
from point_jax.geometry.sampling import bounds, grid_sample, voxel_grid
from point_jax.geometry.select import compact, member, smallest, uniform_below
from point_jax.objectives.interface import Scene, Stats
from point_jax.ops.gather import take_rows

CROP_LIMITS = {
    "grid_size": limits.number(above=0),
    "max_size": limits.whole(16),
    "max_share": limits.number(above=0, most=1),
    "drop": limits.number(0, below=1),
    "drop_probability": limits.PROBABILITY,
    "mix": limits.PROBABILITY,
    "stretch_probability": limits.PROBABILITY,
    "translation": limits.number(0),
    "translation_probability": limits.PROBABILITY,
    "noise": limits.number(0),
    "noise_probability": limits.PROBABILITY,
}


@dataclass(frozen=True)
class CropSpec:
    """How a training crop of a labelled scene is made; the defaults are Pointcept's for ScanNet.

    Attributes:
      grid_size: edge of the voxels that keep one point each, metres.
      max_size: most points of a crop, the nearest of a random one.
      max_share: and at most this share of the scene's.
      drop, drop_probability: share of a scene's points that are left out before anything else, and
        how often.
      mix: probability that the scenes of a row become one cloud (Mix3D).
      geometry: changes of the geometry.
      stretch_probability: of stretching the colours' range, by a random share.
      translation, translation_probability: one random colour added to all points, at most this
        share of 255 a channel.
      noise, noise_probability: standard deviation of every point's own change of colour, over 255.
    """

    grid_size: float = 0.02
    max_size: int = 102_400
    max_share: float = 1.0
    drop: float = 0.2
    drop_probability: float = 1.0
    mix: float = 0.8
    geometry: GeometrySpec = field(default_factory=lambda: GeometrySpec(rotation_probability=0.5))
    stretch_probability: float = 0.2
    translation: float = 0.05
    translation_probability: float = 0.95
    noise: float = 0.05
    noise_probability: float = 0.95

    def __post_init__(self) -> None:
        limits.check(vars(self), CROP_LIMITS)


class LabelledRow(NamedTuple):
    """Labelled clouds in a row of N slots; its structure is built where a network reads it.

    Attributes:
      features: (N, 9) float32: coordinates (metres, the cloud's middle at x = y = 0), colour 0 to
        1, normal.
      grid: (N, 3) int32, voxels.
      cloud: (N,) int32, ascending; G in padding.
      used: () int32, slots in use.
      labels: (N,) int32, -1 for none and in padding.
      keys: (G,) keys of the clouds, for drop path and moved rotary coordinates.
    """

    features: jax.Array
    grid: jax.Array
    cloud: jax.Array
    used: jax.Array
    labels: jax.Array
    keys: jax.Array

    def structure(self, shape: HierarchySpec) -> Hierarchy:
        """Of the row's voxels; `shape` is what the row was made for."""
        return build_hierarchy(self.grid, self.cloud, self.used, shape)


class Crop(NamedTuple):
    """A crop of one scene: M points, the first `used` of them; the rest is padding."""

    grid: jax.Array
    features: jax.Array
    labels: jax.Array
    used: jax.Array


@dataclass(frozen=True)
class LabelledRowMaker:
    """Makes rows of `scenes` scenes each.

    Attributes:
      spec: how crops are made.
      scenes: of a row.
      shares: slots of each level over the row's slots; 1.0 at level 0 can never overflow.
    """

    spec: CropSpec
    scenes: int
    shares: tuple[float, ...]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of a row at every level."""
        slots = self.scenes * self.spec.max_size
        return tuple(max(16, math.ceil(slots * share / 8) * 8) for share in self.shares)

    def make(
        self, scenes: Scene, key: jax.Array, shape: HierarchySpec
    ) -> tuple[LabelledRow, Stats]:
        """Crops of the scenes, packed into a row.

        Args:
          scenes: with a leading axis of `scenes`: `coord` (P, 3) float32 metres, `color` (P, 3)
            0-255, `normal` (P, 3), `segment` (P,) integers, -1 for none, `count` () int32.
          key: of this row in this step.
          shape: of the row; its capacities are `capacities`.
        """
        crop_key, mix_key, noise_key = jax.random.split(key, 3)
        crops, overflow = jax.lax.map(
            lambda this: self.crop(*this), (dict(scenes), jax.random.split(crop_key, self.scenes))
        )
        mixed = jax.random.uniform(mix_key) < self.spec.mix
        row, dropped = self._pack(crops, mixed, jax.random.split(noise_key, self.scenes), shape)
        lost = dropped + sum(level.overflow for level in row.structure(shape))
        stats = {
            "points": crops.used.sum(),
            "empty_scenes": (scenes["count"] == 0).sum(),
            "cut": scenes["cut"].sum(),
            "padding": 1.0 - row.used / len(row.cloud),
            "rows": jnp.ones(()),
            "labelled": (row.labels >= 0).sum(),
            "overflow_elastic": overflow.sum(),
            "overflow_row": lost,
        }
        return row, {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}

    @jax.named_scope("views")
    def crop(self, scene: Scene, key: jax.Array) -> tuple[Crop, jax.Array]:
        """An augmented crop of a scene, and how many points a full noise grid left in place."""
        spec = self.spec
        keys = jax.random.split(key, 6)
        points = scene["coord"].shape[0]
        valid = jnp.arange(points) < scene["count"]
        dropped = jax.random.uniform(jax.random.fold_in(keys[0], 0)) < spec.drop_probability
        share = jnp.where(dropped, 1.0 - spec.drop, 1.0)
        keep = jnp.floor(share * scene["count"]).astype(jnp.int32)
        priority = (jax.random.bits(keys[0], valid.shape) >> 1).astype(jnp.int32)
        valid = smallest(priority, valid, keep)
        size, geometry = spec.grid_size, spec.geometry
        cells = tuple(
            noise_cells(points, size, granularity, geometry.elastic_cells_per_area)
            for granularity, _ in geometry.elastic
        )
        coord, normal, overflow = random_geometry(
            keys[1], scene["coord"], scene["normal"], valid, geometry, cells
        )
        color = self._change_color(scene["color"].astype(jnp.float32), valid, keys[2])
        # A voxel keeps one point; of these the nearest to one of them.
        grid, _ = voxel_grid(coord, valid, size)
        index, count, _ = grid_sample(keys[3], coord, valid, size, points)
        sampled = jnp.arange(points) < count
        at = jnp.where(sampled[:, None], coord[index], 0.0)
        draw = uniform_below(jax.random.uniform(keys[4]), count)
        centre = at[jnp.minimum(member(sampled, draw), points - 1)]
        most = jnp.floor(spec.max_share * count).astype(jnp.int32)
        near = crop(at, sampled, centre, jnp.minimum(most, spec.max_size))
        rows, count = compact(near, spec.max_size)
        index = index[rows]
        used = jnp.arange(spec.max_size) < count
        coord = centre_shift(coord[index], used, apply_z=False)
        parts = jnp.concatenate([coord, normalize_color(color[index]), normal[index]], axis=1)
        features = jnp.where(used[:, None], parts, 0.0)
        labels = jnp.where(used, scene["segment"][index].astype(jnp.int32), -1)
        return Crop(grid[index], features, labels, count), overflow

    def _change_color(self, color: jax.Array, valid: jax.Array, key: jax.Array) -> jax.Array:
        """Stretches, moves and roughens the colours, 0 to 255."""
        spec = self.spec
        draw_key, noise_key = jax.random.split(key)
        draws = jax.random.uniform(draw_key, (7,))
        blend = jnp.where(draws[0] < spec.stretch_probability, draws[1], 0.0)
        color = stretch_color(color, valid, blend)
        shift = 255.0 * spec.translation * (2.0 * draws[2:5] - 1.0)
        color = translate_color(
            color, jnp.where(draws[5] < spec.translation_probability, shift, 0.0)
        )
        sigma = jnp.where(draws[6] < spec.noise_probability, spec.noise, 0.0)
        return add_noise(color, jax.random.normal(noise_key, color.shape), sigma)

    @jax.named_scope("geometry")
    def _pack(
        self, crops: Crop, mixed: jax.Array, keys: jax.Array, shape: HierarchySpec
    ) -> tuple[LabelledRow, jax.Array]:
        """The crops (leading axis G) as a row of G clouds, or of one if `mixed`."""
        scenes, points = crops.labels.shape
        used = jnp.arange(points)[None] < crops.used[:, None]
        cloud = jnp.where(mixed, 0, jnp.arange(scenes))[:, None]
        grid = jnp.where(mixed, _about_one_middle(crops.grid, used), crops.grid)

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(scenes * points, *x.shape[2:])

        cloud = flat(jnp.broadcast_to(cloud, used.shape))
        order, count, dropped = sort_row(flat(grid), cloud, flat(used), shape.capacities[0])
        valid = jnp.arange(len(order)) < count
        return LabelledRow(
            features=take_rows(flat(crops.features), order),
            grid=take_rows(flat(grid), order),
            cloud=jnp.where(valid, take_rows(cloud, order), scenes),
            used=count,
            labels=jnp.take(flat(crops.labels), order, mode="fill", fill_value=-1),
            keys=keys,
        ), dropped


def _about_one_middle(grid: jax.Array, used: jax.Array) -> jax.Array:
    """Voxels (G, M, 3) of clouds moved in x and y so that their middles fall into one voxel.

    Clouds are centred in metres too, so that what lies together in the one lies together in the
    other. (Pointcept's older recipes left the voxels of each scene at its own corner; its newest
    ones compute them anew. Whole voxels keep a scene's own voxels distinct.)
    """
    low, high = jax.vmap(bounds)(grid.astype(jnp.float32), used)
    middle = jnp.floor((low + high) / 2).astype(jnp.int32).at[:, 2].set(0)
    shift = middle.max(0)[None] - middle
    return jnp.clip(grid + shift[:, None], 0, (1 << MAX_DEPTH) - 1)
