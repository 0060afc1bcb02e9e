"""Which pixels of which images see a scene's points: `frames.npz` of a scene folder.

A point's pixel follows from its coordinates and the camera, so only what the depth test said is
stored: one bit per point and frame. For 100,000 points and 8 frames that is 100 kB.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from point_jax.data.checks import SceneError


@dataclass(frozen=True)
class Frames:
    """Images of one scene and the points that each of them sees.

    Attributes:
        files: (F,) str, image files relative to the data set's root, with forward slashes.
        size: (F, 2) int32, width and height in pixels.
        camera: (F, 3, 4) float64, maps (x, y, z, 1) in metres with z up to (u w, v w, w): column,
            row and depth in metres; pixel centres have whole coordinates.
        seen: (F, n) bool, point n passed the depth test and lies inside the image.
    """

    files: np.ndarray
    size: np.ndarray
    camera: np.ndarray
    seen: np.ndarray

    def pixels(self, frame: int, coord: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The points that one image sees, and where.

        Args:
            frame: index of the image.
            coord: (n, 3) the whole scene as stored, metres, z up.

        Returns:
            (index (k,) int64 of points, pixel (k, 2) float32 column and row).
        """
        index = np.flatnonzero(self.seen[frame])
        camera = self.camera[frame]
        # einsum and not matmul: loading threads must not fight for the threads of BLAS.
        projected = np.einsum("nj,ij->ni", coord[index].astype(np.float64), camera[:, :3])
        projected += camera[:, 3]
        return index, (projected[:, :2] / projected[:, 2:]).astype(np.float32)


def write_frames(folder: str | Path, frames: Frames) -> None:
    """Writes `<folder>/frames.npz`; `seen` goes in as packed bits (np.packbits along points)."""
    np.savez_compressed(
        Path(folder) / "frames.npz",
        files=frames.files,
        size=frames.size.astype(np.int32),
        camera=frames.camera.astype(np.float64),
        seen=np.packbits(frames.seen, axis=1),
    )


def read_frames(folder: str | Path, points: int) -> Frames:
    """Reads `<folder>/frames.npz` of a scene with this many points.

    Raises:
        SceneError: for a missing or damaged file, or one that does not fit the points.
    """
    file = Path(folder) / "frames.npz"
    return parse_frames(file, file, points)


def parse_frames(file: Path, content: Path | io.BytesIO, points: int) -> Frames:
    """`read_frames` of a file's content, wherever that is; `file` is what errors name."""
    try:
        with np.load(content, allow_pickle=False) as stored:
            files, size = stored["files"], stored["size"]
            camera, seen = stored["camera"], stored["seen"]
    except FileNotFoundError as error:
        raise SceneError(f"{file}: missing; this scene has no images") from error
    except Exception as error:  # no zip, damaged inside, an array missing: many kinds
        raise SceneError(f"{file}: not a frames file ({error})") from error
    count = len(files) if files.ndim else -1
    expected = {
        "files": (files, "U", (count,)),
        "size": (size, "i", (count, 2)),
        "camera": (camera, "f", (count, 3, 4)),
        "seen": (seen, "u", (count, (points + 7) // 8)),
    }
    for name, (array, kind, shape) in expected.items():
        if array.shape != shape or array.dtype.kind != kind:
            raise SceneError(
                f"{file}: {name} has shape {array.shape} of {array.dtype}, expected {shape} for "
                f"{count} images and {points} points"
            )
    if not np.isfinite(camera).all() or (size < 1).any():
        raise SceneError(f"{file}: camera has NaN or infinite values, or size is below 1")
    return Frames(files, size, camera, np.unpackbits(seen, axis=1, count=points).astype(bool))
