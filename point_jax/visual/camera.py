"""Cameras that look at point clouds: pinhole or orthographic, placed to just hold a cloud."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIELD_OF_VIEW = 32.0  # degrees, vertical: a long lens, so that walls stay nearly parallel
MARGIN = 0.03  # of the picture, on each side

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Camera:
    """A pinhole or orthographic camera.

    Attributes:
        eye: (3,) position in metres.
        axes: (3, 3) unit rows: right, down, forward.
        scale: pinhole: pixels per unit of tangent (focal length); orthographic: pixels per metre.
        center: (2,) pixel (x, y) that the forward axis hits.
        size: (width, height) of the picture in pixels.
        perspective: False for an orthographic camera.
    """

    eye: FloatArray
    axes: FloatArray
    scale: float
    center: tuple[float, float]
    size: tuple[int, int]
    perspective: bool = True

    def project(self, coord: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Points (n, 3) in metres -> pixel positions (n, 2), depths (n,) along the forward axis."""
        local = (np.asarray(coord, np.float64) - self.eye) @ self.axes.T
        depth = local[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            plane = local[:, :2] / depth[:, None] if self.perspective else local[:, :2]
        return plane * self.scale + np.asarray(self.center), depth

    def toward(self, coord: FloatArray) -> FloatArray:
        """Unit directions (n, 3) from points (n, 3) to the camera."""
        if not self.perspective:
            return np.broadcast_to(-self.axes[2], coord.shape)
        ray = self.eye - coord
        return ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-9)


def direction(azimuth: float, elevation: float) -> FloatArray:
    """Unit vector (3,) toward an azimuth (degrees around z from +x) and elevation (degrees up)."""
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    return np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])


def look(
    coord: ArrayLike,
    *,
    azimuth: float,
    elevation: float,
    size: tuple[int, int],
    perspective: bool = True,
) -> Camera:
    """A camera that looks down on a cloud from a direction and just holds all of it.

    Args:
        coord: (n, 3) metres, z up, n >= 1.
        azimuth: degrees around z from +x, where the camera stands.
        elevation: degrees above the horizon, in (0, 90]; 90 looks straight down with the
            picture's top toward the side opposite `azimuth`.
        size: (width, height) in pixels.
        perspective: pinhole with `FIELD_OF_VIEW`, or orthographic.
    """
    points = np.asarray(coord, np.float64)
    forward = -direction(azimuth, elevation)
    right = direction(azimuth + 90.0, 0.0)
    axes = np.stack([right, np.cross(forward, right), forward])
    x, y, z = ((points - points.mean(axis=0)) @ axes.T).T
    half = np.asarray(size) * (0.5 - MARGIN)
    if not perspective:
        middle = np.array([x.min() + x.max(), y.min() + y.max()]) / 2
        extent = np.maximum([np.ptp(x), np.ptp(y)], 1e-3)
        scale = float(min(2 * half / extent))
        eye = points.mean(axis=0) + middle @ axes[:2] + (z.min() - 1.0) * forward
        return Camera(eye, axes, scale, (size[0] / 2, size[1] / 2), size, perspective=False)
    scale = size[1] / 2 / np.tan(np.deg2rad(FIELD_OF_VIEW) / 2)
    # A point stays inside the right edge if x - x0 <= (z - z0) * tan, and so on for each edge:
    # the nearest camera that satisfies all four touches the tighter pair of edges with its frame.
    tan = half / scale
    z0, position = np.inf, []
    for side, t in zip((x, y), tan, strict=True):
        above, below = (side - t * z).max(), (-side - t * z).max()
        position.append((above - below) / 2)
        z0 = min(z0, -(above + below) / (2 * t))
    z0 = min(z0, z.min() - 0.1)
    eye = points.mean(axis=0) + np.array([*position, z0]) @ axes
    return Camera(eye, axes, scale, (size[0] / 2, size[1] / 2), size)
