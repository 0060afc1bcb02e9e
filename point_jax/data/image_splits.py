"""Pointcept's layout of Concerto's data: a JSON file a split, and (x, y, point) rows an image."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from point_jax.data.checks import SceneError, read_array
from point_jax.data.images import Sight, Size, fit_places, image_size, read_image

KEYS = ("pointclouds", "images", "correspondences")


@dataclass(frozen=True)
class Entry:
    """A cloud and some of the images of its scene; a cloud may be in several entries.

    Attributes:
        folder: of the cloud's npy files.
        images: image files.
        correspondences: an npy file for each image.
    """

    folder: Path
    images: tuple[Path, ...]
    correspondences: tuple[Path, ...]


def read_split(root: Path, split: str) -> list[Entry]:
    """Reads `<root>/splits/<split>.json`: {name: {pointclouds, images, correspondences}}.

    Pointcept's scripts write paths as seen from its own folder, `data/<data set>/...`: what follows
    these two names is taken from `root`, as are all other relative paths.

    Returns:
        The entries in the order of their names. No file of theirs is opened.

    Raises:
        SceneError: the file is missing, no JSON, empty, or an entry is not as described.
    """
    file = root / "splits" / f"{split}.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise SceneError(
            f"{file}: missing; image_splits=True is for Pointcept's layout of Concerto's data"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SceneError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise SceneError(f"{file}: expected an object of entries, at least one")
    return [_entry(root, f"{file}: entry {name!r}", content[name]) for name in sorted(content)]


def _entry(root: Path, place: str, entry: object) -> Entry:
    if not isinstance(entry, dict) or not all(key in entry for key in KEYS):
        raise SceneError(f"{place}: expected an object with {', '.join(KEYS)}")
    folder, images, correspondences = (entry[key] for key in KEYS)
    lists = (images, correspondences)
    if not isinstance(folder, str) or not all(isinstance(files, list) for files in lists):
        raise SceneError(f"{place}: pointclouds is a path, images and correspondences are lists")
    if not all(isinstance(path, str) for path in (*images, *correspondences)):
        raise SceneError(f"{place}: images and correspondences list paths")
    if len(images) != len(correspondences):
        raise SceneError(
            f"{place}: {len(images)} images, but {len(correspondences)} correspondences"
        )
    files, rows = (tuple(_resolve(root, path) for path in paths) for paths in lists)
    return Entry(_resolve(root, folder), files, rows)


def _resolve(root: Path, path: str) -> Path:
    parts = Path(path).parts
    return root.joinpath(*parts[2:] if parts[:1] == ("data",) else parts)


class PairedImages:
    """The images of an entry."""

    def __init__(self, entry: Entry, points: int):
        """For a cloud with so many points."""
        self._entry, self._points = entry, points

    def __len__(self) -> int:
        return len(self._entry.images)

    def file(self, image: int) -> Path:
        """See `images.Images`."""
        return self._entry.images[image]

    def sight(self, image: int, size: Size) -> Sight:
        """See `images.Images`.

        A point with several rows is where their mean is: they are pixels that show what is within a
        centimetre of it. (The originals keep one of them.)
        """
        file = self.file(image)
        full = image_size(file)
        rows = read_correspondence(self._entry.correspondences[image], full, self._points)
        point = rows[:, 2].astype(np.int64)
        count = np.bincount(point, minlength=self._points)
        # x is the column; pixel centres have whole coordinates.
        sums = [np.bincount(point, rows[:, axis] + 0.5, self._points) for axis in (1, 0)]
        places = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]
        fitted = fit_places(places, full, size)
        pixels = np.where(count[:, None] > 0, fitted, np.float32(-1))
        return Sight(pixels, lambda: read_image(file, full, size))


def read_correspondence(file: Path, full: Size, points: int) -> np.ndarray:
    """Reads the (x, y, point) rows of an image.

    Args:
        file: npy of (k, 3) numbers; one row of -1 stands for none.
        full: size of the image; x is a column, y a row of its pixels.
        points: of the cloud.

    Returns:
        (k, 3) float64.

    Raises:
        SceneError: a missing or damaged file, another shape, places outside the image, points that
            the cloud does not have.
    """
    rows = read_array(file)
    if rows.ndim != 2 or rows.shape[1] != 3:
        raise SceneError(f"{file}: shape {rows.shape}, expected (rows, 3): x, y, point")
    rows = rows.astype(np.float64)
    if len(rows) == 1 and (rows == -1).all():
        return rows[:0]
    x, y, point = rows.T
    good = (point >= 0) & (point < points) & (point == np.floor(point))
    if not good.all():
        raise SceneError(
            f"{file}: row {good.argmin()} has point {point[good.argmin()]:g}, but the cloud has "
            f"{points}; are the correspondences another cloud's?"
        )
    good = (x > -0.5) & (x < full.width - 0.5) & (y > -0.5) & (y < full.height - 0.5)
    if not good.all():
        raise SceneError(
            f"{file}: row {good.argmin()} has x, y = {x[good.argmin()]:g}, {y[good.argmin()]:g}, "
            f"but the image has {full.width} x {full.height} pixels"
        )
    return rows
