"""A software renderer of coloured point clouds: into a room from above a corner, or from the top.

Points become discs whose size falls with distance, resolved by a depth buffer; the ceiling and
whatever faces away from the camera are left out, so that the inside of a room shows. Shading
comes from the depth buffer alone (eye-dome lighting: Boucheny, 2009), plus the normals if given.
Everything is NumPy in a fixed order: the same input gives the same picture, bit for bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.spatial import KDTree

from point_jax.visual.camera import Camera, FloatArray, direction, look

BACKGROUND = (242, 243, 246)
SUPERSAMPLE = 2
STEP = 0.12  # metres behind its surroundings at which a pixel is as dark as it gets
STRENGTH = 1.3  # of that darkness
EMPTY = np.uint64(np.iinfo(np.uint64).max)


@dataclass(frozen=True)
class Raster:
    """What each sub-pixel of a picture shows: paint it as often as wanted.

    Attributes:
        index: (h, w) int32, the point that is seen, -1 for background.
        shade: (h, w) float32 in [0, 1], factor on the point's colour.
        supersample: sub-pixels per pixel and axis.
    """

    index: NDArray[np.int32]
    shade: NDArray[np.float32]
    supersample: int


def rasterize(
    coord: ArrayLike,
    camera: Camera,
    *,
    normal: ArrayLike | None = None,
    keep: NDArray[np.bool_] | None = None,
    radius: ArrayLike | None = None,
    supersample: int = SUPERSAMPLE,
) -> Raster:
    """Draws a cloud as discs into a depth buffer.

    Args:
        coord: (n, 3) metres.
        camera: where to look from; its size is the picture's, sub-pixels are added here.
        normal: (n, 3) unit, facing free space. Points that face away are left out, and the rest
            is lightly shaded; without normals only the depth shades.
        keep: (n,) bool, points to draw; all by default.
        radius: of the discs in metres, one for all or (n,); by default `splat_radius`.
        supersample: sub-pixels per pixel and axis.

    Returns:
        The raster of (height * supersample, width * supersample) sub-pixels.
    """
    points = np.asarray(coord, np.float64)
    drawn = np.ones(len(points), bool) if keep is None else keep.copy()
    facing = None
    if normal is not None:
        facing = np.einsum("nc,nc->n", np.asarray(normal, np.float64), camera.toward(points))
        drawn &= facing > -0.1  # estimated normals at edges are off by a few degrees
    pixel, depth = camera.project(points)
    drawn &= depth > 1e-3
    width, height = (side * supersample for side in camera.size)
    chosen = np.flatnonzero(drawn)
    if len(chosen) == 0:
        blank = np.full((height, width), -1, np.int32)
        return Raster(blank, np.ones((height, width), np.float32), supersample)
    if radius is None:
        radii = splat_radius(points[chosen])
    else:
        radii = np.broadcast_to(np.asarray(radius, np.float64), len(points))[chosen]
    xy, z = pixel[chosen] * supersample, depth[chosen]
    size = radii * camera.scale * supersample / (z if camera.perspective else np.ones_like(z))
    slope = np.zeros((len(chosen), 2))
    if normal is not None:
        local = np.asarray(normal, np.float64)[chosen] @ camera.axes.T
        slope = -local[:, :2] / np.minimum(local[:, 2:], -0.3)
    key = _splat(xy, z, np.clip(size, 0.75, 24.0), slope, radii, (height, width))
    seen = key != EMPTY
    winner = np.where(seen, key & np.uint64(0xFFFFFFFF), 0).astype(np.int64)
    index = np.where(seen, chosen[winner], -1).astype(np.int32)
    nearest = (key >> np.uint64(32)).astype(np.uint32).view(np.float32).astype(np.float64)
    shade = _eye_dome(np.where(seen, nearest, np.inf), supersample, float(np.median(radii)))
    if facing is not None:
        shade *= np.where(seen, 0.78 + 0.22 * np.clip(facing[index], 0.0, 1.0), 1.0)
    return Raster(index, shade.astype(np.float32), supersample)


def paint(
    raster: Raster, color: ArrayLike, background: tuple[int, int, int] = BACKGROUND
) -> Image.Image:
    """A picture of a raster with the points' colours.

    Args:
        raster: from `rasterize`.
        color: (n, 3), uint8 in 0-255 or float in [0, 1].
        background: 0-255 where no point is seen.
    """
    colors = np.asarray(color)
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) <= raster.index.max(initial=-1):
        raise ValueError(f"one colour (3,) per point of the raster needed, got {colors.shape}")
    colors = colors.astype(np.float32) * (1.0 if colors.dtype == np.uint8 else 255.0)
    seen = (raster.index >= 0)[..., None]
    empty = np.asarray(background, np.float32)
    canvas = np.where(seen, colors[raster.index] * raster.shade[..., None], empty)
    s = raster.supersample
    height, width = raster.index.shape
    blocks = canvas.reshape(height // s, s, width // s, s, 3).mean(axis=(1, 3))
    return Image.fromarray(np.clip(np.rint(blocks), 0, 255).astype(np.uint8))


def without_ceiling(coord: ArrayLike, share: float = 0.12) -> NDArray[np.bool_]:
    """(n,) bool: the points below the ceiling of a room, by height alone.

    Leaves out the top `share` of the height between the 0.5 % lowest and highest points.
    Clouds flatter than 1.5 m (single objects, table tops) are kept whole.
    """
    z = np.asarray(coord)[:, 2]
    low, high = np.quantile(z, [0.005, 0.995])
    if high - low < 1.5:
        return np.ones(len(z), bool)
    return z < high - share * (high - low)


def without_near_walls(coord: ArrayLike, azimuth: float, shell: float = 0.35) -> NDArray[np.bool_]:
    """(n,) bool: leaves out the walls between the camera and the room, for clouds without normals.

    Seen from above, a point is on a near wall if it lies within `shell` metres of the outermost
    points in its direction from the middle, on the camera's side. The floor is kept.
    """
    points = np.asarray(coord, np.float64)
    flat = points[:, :2] - np.median(points[:, :2], axis=0)
    distance = np.hypot(flat[:, 0], flat[:, 1])
    angle = np.arctan2(flat[:, 1], flat[:, 0])
    sector = ((angle + np.pi) * (90 / np.pi)).astype(np.int64) % 180  # of two degrees
    rim = np.zeros(180)
    np.maximum.at(rim, sector, distance)
    near = np.cos(angle - np.deg2rad(azimuth)) > 0.0
    floor = np.quantile(points[:, 2], 0.01) + 0.1
    return ~(near & (distance > rim[sector] - shell) & (points[:, 2] > floor))


def corner_view(
    coord: ArrayLike,
    normal: ArrayLike | None = None,
    *,
    size: tuple[int, int] = (640, 480),
    azimuth: float | None = None,
    elevation: float = 42.0,
    supersample: int = SUPERSAMPLE,
) -> Raster:
    """A room seen from above one of its corners, ceiling and near walls cut away.

    Args:
        coord: (n, 3) metres, z up, n >= 1.
        normal: (n, 3) unit, facing free space; optional.
        size: (width, height) in pixels.
        azimuth: degrees; by default the diagonal of the room's outline that shows most points
            from their front.
        elevation: degrees above the horizon.
        supersample: sub-pixels per pixel and axis.
    """
    points = _checked(coord)
    normals = None if normal is None else np.asarray(normal, np.float64)
    camera, keep = corner_camera(points, normals, size=size, azimuth=azimuth, elevation=elevation)
    return rasterize(points, camera, normal=normals, keep=keep, supersample=supersample)


def corner_camera(
    coord: FloatArray,
    normal: FloatArray | None = None,
    *,
    size: tuple[int, int],
    azimuth: float | None = None,
    elevation: float = 42.0,
) -> tuple[Camera, NDArray[np.bool_]]:
    """The camera of `corner_view`, and which points (n,) bool it leaves uncut; see there."""
    keep = without_ceiling(coord)
    if azimuth is None:
        azimuth = best_azimuth(coord[keep], None if normal is None else normal[keep], elevation)
    if normal is None:
        keep &= without_near_walls(coord, azimuth)
    framed = coord[keep] if normal is None else coord[keep & _front(normal, azimuth, elevation)]
    inside = _trim(framed if len(framed) else coord)
    return look(inside, azimuth=azimuth, elevation=elevation, size=size), keep


def top_view(
    coord: ArrayLike,
    normal: ArrayLike | None = None,
    *,
    size: tuple[int, int] = (640, 480),
    azimuth: float = -90.0,
    supersample: int = SUPERSAMPLE,
) -> Raster:
    """A room seen straight from above without its ceiling, x to the right and y up by default."""
    points = _checked(coord)
    keep = without_ceiling(points)
    camera = look(
        _trim(points[keep]), azimuth=azimuth, elevation=90.0, size=size, perspective=False
    )
    return rasterize(points, camera, normal=normal, keep=keep, supersample=supersample)


def splat_radius(coord: FloatArray) -> FloatArray:
    """Disc radii (n,) in metres that close the surfaces of a cloud (n, 3), n >= 1.

    From the distance to the fourth neighbour (the nearest alone may be a doubled point). Where
    points are sparser than usual discs grow, but not without limit: a stray point stays small.
    """
    if len(coord) < 2:
        return np.full(len(coord), 0.02)
    distance, _ = KDTree(coord).query(coord, k=min(5, len(coord)), distance_upper_bound=1.0)
    spacing = distance[:, -1]
    usual = max(float(np.median(spacing)), 1e-4)
    return 0.85 * np.clip(spacing, 0.8 * usual, 1.6 * usual)


def _checked(coord: ArrayLike) -> FloatArray:
    points = np.asarray(coord, np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"a picture needs coordinates (n, 3) with n >= 1, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("a picture needs finite coordinates, some are NaN or infinite")
    return points


def _trim(points: FloatArray) -> FloatArray:
    """Leaves out the farthest stray points, which would make the rest of the picture small."""
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    inside = ((points >= low) & (points <= high)).all(axis=1)
    return points[inside] if inside.any() else points


def _front(normal: FloatArray, azimuth: float, elevation: float) -> NDArray[np.bool_]:
    return normal @ direction(azimuth, elevation) > 0.0


def best_azimuth(points: FloatArray, normal: FloatArray | None, elevation: float) -> float:
    """The best azimuth of the four diagonals of the tightest outline rectangle.

    With normals, the one that shows most points from their front; without, the one that has the
    tall parts of the scene at its back.
    """
    sample = points[:: -(-len(points) // 20_000)]
    turns = np.deg2rad(np.arange(0.0, 90.0, 3.0))
    areas = []
    for turn in turns:
        turned = sample[:, :2] @ np.array(
            [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        )
        areas.append(np.ptp(np.quantile(turned, [0.01, 0.99], axis=0), axis=0).prod())
    base = float(np.rad2deg(turns[int(np.argmin(areas))]))
    # A little off the diagonal: neither wall runs parallel to the picture's diagonals.
    corners = [base + 90.0 * i + 52.0 for i in range(4)]
    if normal is not None:
        scores = [np.count_nonzero(_front(normal, corner, elevation)) for corner in corners]
    else:
        tall = sample[:, 2] - sample[:, 2].min()
        centred = sample - sample.mean(axis=0)
        scores = [-float(tall @ (centred @ direction(corner, 0.0))) for corner in corners]
    return corners[int(np.argmax(scores))]


def _splat(
    xy: FloatArray,
    depth: FloatArray,
    size: FloatArray,
    slope: FloatArray,
    radius: FloatArray,
    shape: tuple[int, int],
) -> NDArray[np.uint64]:
    """Depth buffer (h, w) of discs: depth as sortable bits (high half), the point (low half).

    Each disc lies in its surface: `slope` (n, 2) is its growth of depth per step right and down.
    Depth also grows from a disc's centre to its rim, so that where discs of one surface overlap
    each pixel goes to the nearest centre, and edges between colours stay sharp.
    """
    height, width = shape
    order = np.argsort(-size, kind="stable")
    xy, depth, size = xy[order], depth[order], size[order]
    slope, radius = slope[order], radius[order]
    pixel = np.floor(xy).astype(np.int64)
    rest = pixel + 0.5 - xy  # from the point to the middle of its pixel
    low = order.astype(np.uint64)
    buffer = np.full(height * width, EMPTY)
    reach = int(np.ceil(size[0]))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            # Larger discs come first: only a prefix can reach this pixel.
            least = np.hypot(max(abs(dx) - 0.5, 0.0), max(abs(dy) - 0.5, 0.0))
            n = int(np.searchsorted(-size, -least, side="right"))
            x, y = pixel[:n, 0] + dx, pixel[:n, 1] + dy
            right, down = (rest[:n] + (dx, dy)).T / size[:n]  # in disc radii
            back = slope[:n, 0] * right + slope[:n, 1] * down
            away = right**2 + down**2 + 0.5 * back**2
            hit = (away <= 1.0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            z = depth[:n][hit] + radius[:n][hit] * (back[hit] + 0.5 * away[hit])
            bits = np.maximum(z, 1e-6).astype(np.float32).view(np.uint32).astype(np.uint64)
            np.minimum.at(buffer, y[hit] * width + x[hit], bits << np.uint64(32) | low[:n][hit])
    return buffer.reshape(height, width)


def _eye_dome(depth: FloatArray, supersample: int, radius: float) -> FloatArray:
    """Shade (h, w) in (0, 1] from depths (h, w), inf for background: darker behind nearer pixels.

    A pixel counts as hidden by how far it lies behind the middle between two opposite neighbours,
    so that planes stay even at any slant; the effect of a step is limited, so that silhouettes
    get a soft line and not a black one.
    """
    height, width = depth.shape
    shade = np.zeros_like(depth)
    for reach, weight in ((1, 0.3), (3, 0.4), (8, 0.3)):
        step = reach * supersample
        padded = np.pad(depth, step, constant_values=np.inf)
        for dy, dx in ((0, step), (step, step), (step, 0), (step, -step)):
            rows, columns = (
                slice(step + dy, height + step + dy),
                slice(step + dx, width + step + dx),
            )
            one = padded[rows, columns]
            rows, columns = (
                slice(step - dy, height + step - dy),
                slice(step - dx, width + step - dx),
            )
            other = padded[rows, columns]
            with np.errstate(invalid="ignore"):
                behind = depth - (one + other) / 2  # -inf or NaN where background takes part
            behind = np.where(np.isfinite(behind), behind - 1.5 * radius, 0.0)
            shade += weight / 4 * np.clip(behind / STEP, 0.0, 1.0)
    return np.exp(-STRENGTH * shade)
