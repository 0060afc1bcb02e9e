"""What one image of a scene sees, as a cloud: in the scene's axes, upright, or in the camera's.

A robot has one frame and no map. Encoders read z as height, so the same points in camera axes, with
z along the line of sight, ask how much of what they know hangs on gravity.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from scipy.linalg import rq

from point_jax.data.frames import Frames
from point_jax.data.scenes import Scene, SceneError

Axes = Literal["scene", "upright", "camera"]
FEWEST = 1_000  # points of a view: frames that look at nearly nothing tell nothing
STEEP = 0.99  # cosine of the line of sight and the vertical from which on yaw is the image's upside


class Camera(NamedTuple):
    """A pinhole camera: a point p in metres is seen at `intrinsics @ (rotation @ p + translation)`.

    Attributes:
      intrinsics: (3, 3) float64, upper triangular with a positive diagonal.
      rotation: (3, 3) float64, scene axes to camera axes (x right, y down, z forward); its rows are
        the camera's axes in the scene.
      translation: (3,) float64, metres.
    """

    intrinsics: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def position(self) -> np.ndarray:
        """(3,) float64, where the camera is in the scene, metres."""
        return -self.rotation.T @ self.translation


def decompose(matrix: np.ndarray) -> Camera:
    """The camera of a projection matrix (3, 4), see `Frames.camera`.

    The left half of K [R | t] is an upper triangular times an orthogonal matrix. Such a product is
    unique once the diagonal of the first is positive (Hartley and Zisserman, section 6.2.4).

    Raises:
      SceneError: a matrix that no camera has: singular, or a mirror image.
    """
    left = np.asarray(matrix, np.float64)[:, :3]
    size = np.linalg.norm(left)
    turn = np.linalg.det(left / size) if np.isfinite(size) and size > 0 else 0.0
    if np.shape(matrix) != (3, 4) or not np.isfinite(matrix).all() or not turn > 1e-12:
        raise SceneError(
            f"no camera has the projection matrix {np.asarray(matrix).tolist()}: expected K [R | "
            "t], finite, with depth as its last row and a left half of positive determinant"
        )
    upper, orthogonal = rq(left)
    signs = np.where(np.diag(upper) < 0, -1.0, 1.0)
    intrinsics, rotation = upper * signs, signs[:, None] * orthogonal
    return Camera(intrinsics, rotation, np.linalg.solve(intrinsics, matrix[:, 3]))


def upright_axes(camera: Camera) -> np.ndarray:
    """The rotation (3, 3) from scene axes to x right, y ahead, z up.

    Ahead is where the camera looks, along the ground. For one that looks straight down it is where
    the upper edge of its image is, straight up the lower edge.
    """
    _, down, forward = camera.rotation
    ahead = down * np.sign(forward[2]) if abs(forward[2]) > STEEP else forward
    ahead = ahead * (1, 1, 0)
    ahead /= np.linalg.norm(ahead)
    up = np.array([0.0, 0.0, 1.0])
    return np.stack([np.cross(ahead, up), ahead, up])


def view(scene: Scene, frames: Frames, frame: int, axes: Axes = "scene") -> Scene:
    """The points that one image sees, with their colours, normals and labels.

    Args:
      scene: as its folder has it: points in the same order.
      frames: of the same folder.
      frame: index of the image.
      axes: "scene": coordinates as they are. "upright": seen from the camera, with z up, x to the
        camera's right and y ahead. "camera": x right, y down, z along the line of sight, gravity
        anywhere. In both of these the camera is the origin.

    Raises:
      SceneError: frames of another scene, or a matrix that no camera has.
      ValueError: unknown axes.
    """
    if axes not in ("scene", "upright", "camera"):
        raise ValueError(f"axes={axes!r}, expected 'scene', 'upright' or 'camera'")
    if frames.seen.shape[1] != len(scene.coord):
        raise SceneError(
            f"{scene.name}: {len(scene.coord)} points, but its frames are of "
            f"{frames.seen.shape[1]}; read both from the same folder"
        )
    seen = np.flatnonzero(frames.seen[frame])
    parts = {
        field.name: value[seen]
        for field in dataclasses.fields(scene)
        if isinstance(value := getattr(scene, field.name), np.ndarray)
    }
    # Images see the points of the whole scene, not of a part.
    part = dataclasses.replace(scene, name=f"{scene.name}/{frame}", images=None, **parts)
    if axes == "scene":
        return part
    camera = decompose(frames.camera[frame])
    rotation = camera.rotation if axes == "camera" else upright_axes(camera)
    coord = (part.coord.astype(np.float64) - camera.position) @ rotation.T
    normal = part.normal
    if normal is not None:
        normal = (normal @ rotation.T).astype(np.float32)
    return dataclasses.replace(part, coord=coord.astype(np.float32), normal=normal)


def views(
    scene: Scene, frames: Frames, axes: Axes = "scene", fewest: int = FEWEST
) -> Iterator[Scene]:
    """The views of all images that see at least `fewest` points, see `view`."""
    for frame in np.flatnonzero(frames.seen.sum(1) >= fewest):
        yield view(scene, frames, int(frame), axes)
