"""The views of a scene: grid sampling, crops and augmentation, on the device and keyed.

One program per scene capacity. Everything random is a function of the key, the scene's points and
their order; neither the padding of the scene nor the capacities of the views change a draw.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax import limits
from point_jax.data.augment import GeometrySpec, Range, random_drop, random_geometry
from point_jax.data.color import ColorSpec, change_color, draw_color
from point_jax.data.elastic import noise_cells
from point_jax.geometry.sampling import grid_sample
from point_jax.geometry.select import compact, member, number, smallest, uniform_below

Drops = tuple[tuple[float, float], ...]
SIZE_DRAWS = 10

_SHARES = limits.each(limits.number(above=0, most=1), "low", "high", rising=True)
_DROPS = limits.each(limits.each(limits.PROBABILITY, "share", "probability"))
VIEW_LIMITS = {
    "grid_size": limits.number(above=0),
    "grid_capacity": limits.either(limits.NOTHING, limits.whole(1)),
    "max_size": limits.whole(1),
    "global_count": limits.whole(1),
    "local_count": limits.whole(0),
    "global_share": _SHARES,
    "local_share": _SHARES,
    "drop_color": _DROPS,
    "drop_normal": _DROPS,
}


@dataclass(frozen=True)
class ViewSpec:
    """How views are made; the defaults are Sonata's recipe. Hashable: a static argument for jit.

    Attributes:
      grid_size: edge of the voxels that keep one point each, metres.
      grid_capacity: slots for the points that are left; None: as many as the scene has.
      max_size: most points of a view.
      global_count, local_count: how many views.
      global_share, local_share: a view has int(u * min(max_size, points)) points, u uniform in
        this range.
      color, geometry: the augmentations. The global views share one draw of colour changes, made on
        the whole scene; every local view has its own. Geometry is drawn for every view.
      drop_color, drop_normal: (share of the points, probability) of each dropping, made one after
        the other on the scene before the crops. Sonata has none, Concerto ((1.0, 0.2), (0.2, 0.5))
        for both.
    """

    grid_size: float = 0.02
    grid_capacity: int | None = None
    max_size: int = 65536
    global_count: int = 2
    local_count: int = 4
    global_share: Range = (0.4, 1.0)
    local_share: Range = (0.1, 0.4)
    color: ColorSpec = field(default_factory=ColorSpec)
    geometry: GeometrySpec = field(default_factory=GeometrySpec)
    drop_color: Drops = ()
    drop_normal: Drops = ()

    def __post_init__(self) -> None:
        limits.check(vars(self), VIEW_LIMITS)

    @property
    def global_capacity(self) -> int:
        """Slots of a global view."""
        return math.ceil(self.global_share[1] * self.max_size)

    @property
    def local_capacity(self) -> int:
        """Slots of a local view."""
        return math.ceil(self.local_share[1] * self.max_size)

    def noise_cells(self, capacity: int) -> tuple[int, ...]:
        """Cells of the noise grid of each elastic distortion of a view with `capacity` slots."""
        geometry = self.geometry
        return tuple(
            noise_cells(capacity, self.grid_size, granularity, geometry.elastic_cells_per_area)
            for granularity, _ in geometry.elastic
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ViewBatch:
    """Views of one scene with the same capacity N; slots from `count` on hold zeros.

    Points keep the order of the scene's z-order codes.

    Attributes:
      coord: (V, N, 3) float32, augmented, metres.
      origin: (V, N, 3) float32, the same points in the scene's coordinates.
      color: (V, N, 3) float32, augmented, 0 to 1.
      normal: (V, N, 3) float32, rotated and mirrored with the points.
      source: (V, N) int32, the scene's row that each point is.
      count: (V,) int32.
    """

    coord: jax.Array
    origin: jax.Array
    color: jax.Array
    normal: jax.Array
    source: jax.Array
    count: jax.Array


class Views(NamedTuple):
    """All views of one scene. The first global view is the major one.

    Attributes:
      global_: the global views, N = `spec.global_capacity`.
      local: the local views, N = `spec.local_capacity`.
      points: int32 scalar, points of the scene after grid sampling.
      overflow: int32 scalars. "grid": voxels left out by `grid_capacity`, and points more than
        65,534 voxels above the lowest; "elastic": points that a full noise grid left in place, over
        all views and stages.
    """

    global_: ViewBatch
    local: ViewBatch
    points: jax.Array
    overflow: dict[str, jax.Array]


def make_views(scene: dict[str, jax.Array], key: jax.Array, spec: ViewSpec) -> Views:
    """Makes the global and local views of a scene.

    Args:
      scene: "coord" (P, 3) float32 metres, "color" (P, 3) 0 to 255 of any dtype, "normal" (P, 3),
        "count" int32 scalar: the first rows in use. Anything in the other rows. "pixels" (P, I, 2),
        if there: where each image sees each point, -1 where it does not; the centre of the major
        view is then a point that some image sees, if there is any. Other keys are ignored.
      key: random key.
      spec: what to make; static.

    Returns:
      The views; views without points for a scene without points.
    """
    keys = jax.random.split(key, 6)
    rows = scene["coord"].shape[0]
    index, points, grid_overflow = grid_sample(
        keys[0],
        scene["coord"],
        jnp.arange(rows) < scene["count"],
        spec.grid_size,
        spec.grid_capacity or rows,
    )
    valid = jnp.arange(index.shape[0]) < points
    coord, color, normal = (
        jnp.where(valid[:, None], scene[name][index].astype(jnp.float32), 0.0)
        for name in ("coord", "color", "normal")
    )
    for place, (share, probability) in enumerate(spec.drop_color):
        drop_key = jax.random.fold_in(keys[1], 2 * place)
        color = random_drop(drop_key, color, valid, share, probability)
    for place, (share, probability) in enumerate(spec.drop_normal):
        drop_key = jax.random.fold_in(keys[1], 2 * place + 1)
        normal = random_drop(drop_key, normal, valid, share, probability)

    central = valid
    if "pixels" in scene:
        seen = valid & (scene["pixels"] >= 0).all(-1).any(-1)[index]
        central = jnp.where(jnp.any(seen), seen, valid)
    global_crops, local_crops = crop_views(keys[2], coord, valid, spec, central)
    shared_color = change_color(color, valid, draw_color(keys[3], spec.color))

    def augment(
        view: tuple[jax.Array, jax.Array, jax.Array], color: jax.Array, own_color: bool
    ) -> tuple[ViewBatch, jax.Array]:
        key, rows, count = view
        geometry_key, color_key = jax.random.split(key)
        capacity = rows.shape[0]
        used = jnp.arange(capacity) < count
        # One gather of long rows instead of three of short ones.
        packed = jnp.concatenate([coord, normal, color], axis=1)[rows]
        origin, normals, colors = jnp.split(jnp.where(used[:, None], packed, 0.0), 3, axis=1)
        moved, normals, overflow = random_geometry(
            geometry_key, origin, normals, used, spec.geometry, spec.noise_cells(capacity)
        )
        if own_color:
            colors = change_color(colors, used, draw_color(color_key, spec.color))
        source = jnp.where(used, index[rows], 0)
        return ViewBatch(moved, origin, colors, normals, source, count), overflow

    # View by view: a loop skips what a draw leaves out, and needs the memory of one view.
    global_, global_overflow = jax.lax.map(
        lambda view: augment(view, shared_color, False),
        (jax.random.split(keys[4], spec.global_count), *global_crops),
    )
    local, local_overflow = jax.lax.map(
        lambda view: augment(view, color, True),
        (jax.random.split(keys[5], spec.local_count), *local_crops),
    )
    elastic_overflow = jnp.sum(global_overflow) + jnp.sum(local_overflow)
    overflow = {"grid": grid_overflow, "elastic": elastic_overflow}
    return Views(global_, local, points, overflow)


def crop_views(
    key: jax.Array,
    coord: jax.Array,
    valid: jax.Array,
    spec: ViewSpec,
    central: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Draws centres and sizes of all views and cuts them out.

    The first global view is the major one: its centre is any of the `central` points. The centres
    of the other global views are points of the major view, those of the local views points of it
    that no earlier local view covers; when all are covered, covering starts anew.

    Args:
      key: random key.
      coord: (N, 3) float32, metres, finite.
      valid: (N,) bool.
      spec: counts, sizes and shares of the views.
      central: (N,) bool, the points that may be the major view's centre; None: all valid ones.

    Returns:
      ((rows, count), (rows, count)) of the global and the local views: rows (V, capacity) int32, in
      the order of the scene, 0 from `count` (V,) on.
    """
    split, views = spec.global_count, spec.global_count + spec.local_count
    draws = jax.random.uniform(key, (views, 1 + SIZE_DRAWS))
    is_global = jnp.arange(views) < split
    low, high = (
        jnp.where(is_global, spec.global_share[end], spec.local_share[end]) for end in (0, 1)
    )
    shares = low[:, None] + draws[:, 1:] * (high - low)[:, None]
    most = jnp.minimum(number(valid), spec.max_size)
    sizes = jax.vmap(view_size, in_axes=(0, None))(shares, most)
    capacity = jnp.where(is_global, spec.global_capacity, spec.local_capacity)
    largest = max(spec.global_capacity, spec.local_capacity)

    def cut(
        state: tuple[jax.Array, jax.Array, jax.Array],
        view: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        major, covered, centre = state
        index, size, next_draw = view
        chosen = crop(coord, valid, centre, size)
        major = jnp.where(index == 0, chosen, major)
        covered = covered | (chosen & (index >= split))
        covered = covered & jnp.any(major & ~covered)
        # The next centre is part of the loop's state: computed once, not for every distance.
        centre = _draw_point(next_draw, coord, major & ~covered)
        return (major, covered, centre), compact(chosen, largest)

    nothing = jnp.zeros_like(valid)
    _, (rows, counts) = jax.lax.scan(
        cut,
        (nothing, nothing, _draw_point(draws[0, 0], coord, valid if central is None else central)),
        (jnp.arange(views), jnp.minimum(sizes, capacity), jnp.roll(draws[:, 0], -1)),
    )
    global_rows, local_rows = rows[:split, : spec.global_capacity], rows[split:]
    local_rows = local_rows[:, : spec.local_capacity]
    return (global_rows, counts[:split]), (local_rows, counts[split:])


def crop(coord: jax.Array, valid: jax.Array, centre: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k valid points nearest to a centre, ties to the first rows; (N,) bool.

    Args:
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      centre: (3,) float32.
      k: int32 scalar.
    """
    x, y, z = (coord[:, axis] - centre[axis] for axis in range(3))
    return smallest(x * x + y * y + z * z, valid, k)


def view_size(shares: jax.Array, most: jax.Array) -> jax.Array:
    """How many points a view has: int(share * most).

    Tiny scenes as in the originals: a share that gives 0 points is drawn again, and after ten of
    them the view has 10 points or all there are. So a view is empty only when the scene is.

    Args:
      shares: (SIZE_DRAWS,) float32, in the order in which they were drawn.
      most: int32 scalar, min(max_size, points of the scene).

    Returns:
      int32 scalar, at most `most`.
    """
    sizes = jnp.floor(shares * most).astype(jnp.int32)
    size = sizes[jnp.argmax(sizes > 0)]
    return jnp.minimum(jnp.where(size > 0, size, 10), most)


def _draw_point(draw: jax.Array, coord: jax.Array, mask: jax.Array) -> jax.Array:
    """Coordinates (3,) of a uniform member of a set, by a uniform draw from [0, 1)."""
    row = member(mask, uniform_below(draw, number(mask)))
    # An empty set has no member; then any finite point will do, since nothing is cut.
    return coord[jnp.minimum(row, mask.shape[0] - 1)]
