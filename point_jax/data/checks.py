"""Checks of a scene's arrays at the edge, and the error that they raise.

Every check takes an array as read from `file` and returns it in the dtype that the rest of the
project uses, or raises a `SceneError` that says which file, what is wrong and what to do.
"""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
VOXEL = 0.02  # metres: the finest grid that training uses
SMALLEST, LARGEST = 0.2, 500.0  # metres: extents beyond are taken for mixed-up units
WIDE, SPARSE = 50.0, 0.5  # metres: a scene wider than WIDE must be denser than SPARSE
# A scene that is large in all three directions, like a room in too large a unit, must be denser.
TALL, ROOM_SHAPE, ROOM_SPARSE = 20.0, 0.25, 0.05  # metres; smallest extent over largest; metres
RESOLUTION = 1e-3  # metres: float32 must resolve this at the largest coordinate
UNIT_TOLERANCE = 0.02  # of a normal's length; float16 needs 0.001


class SceneError(ValueError):
    """A scene or data set that cannot be used; the message names the file and what is wrong."""


def read_array(file: str | Path) -> np.ndarray:
    """Reads one npy file of plain numbers.

    Raises:
        SceneError: for a missing, unreadable, truncated or pickled file.
    """
    file = Path(file)
    if file.exists() and not file.is_file():
        raise SceneError(f"{file}: not a regular file")
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise SceneError(f"{file}: missing") from error
    except OSError as error:
        raise SceneError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy's parser of a damaged header raises a dozen kinds
        raise SceneError(f"{file}: not a whole npy file ({error}); write it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = getattr(array, "dtype", type(array).__name__)
        raise SceneError(f"{file}: holds {kind}, expected an npy array of numbers")
    return array


def _check_vectors(array: np.ndarray, file: Path) -> None:
    if array.ndim != 2 or array.shape[1] != 3:
        raise SceneError(f"{file}: shape {array.shape}, expected (number of points, 3)")


def _check_finite(array: np.ndarray, file: Path, todo: str) -> None:
    bad = np.asarray(~np.isfinite(array).all(axis=1))
    if bad.any():
        raise SceneError(
            f"{file}: {bad.sum()} of {len(bad)} rows are NaN or infinite, the first is row "
            f"{bad.argmax()}; {todo}"
        )


def check_coord(array: np.ndarray, file: Path, units: str) -> np.ndarray:
    """Finite coordinates (n, 3), still in the file's units, as float32 or float64."""
    _check_vectors(array, file)
    if array.dtype.kind == "b" or array.dtype in (np.float16, np.longdouble):
        raise SceneError(f"{file}: dtype {array.dtype}, expected float32, float64 or integers")
    if len(array) < 2:
        raise SceneError(f"{file}: {len(array)} points; a scene needs at least 2: remove it")
    if array.dtype.kind == "f":
        _check_finite(array, file, "remove these points from all arrays of the scene")
    coord = array.astype(
        np.float32 if array.dtype.itemsize == 4 and array.dtype.kind == "f" else np.float64
    )
    # Rounding to float32 happens after this, and must not be felt.
    far = float(max(abs(coord.min()), abs(coord.max()))) * UNITS[units]
    if not math.isfinite(far) or far > RESOLUTION * 2**23:
        with np.errstate(over="ignore"):
            extent = float(np.ptp(coord, axis=0).max())
            reason = _outliers_hint(coord, extent, units)
        reason = reason or _units_hint(extent * UNITS[units], units)
        reason = reason or "subtract an offset from the coordinates"
        raise SceneError(
            f"{file}: coordinates up to {far:.6g} m (with units={units!r}) cannot be held in "
            f"float32 to a millimetre; {reason}"
        )
    return coord


def _units_hint(extent: float, units: str) -> str:
    """A question about units when only others would make the extent (metres) that of a room."""
    rooms = {u: extent * scale / UNITS[units] for u, scale in UNITS.items()}
    rooms = {u: size for u, size in rooms.items() if 1 <= size <= 60}
    if not rooms or units in rooms:
        return ""
    likely = min(rooms, key=lambda u: abs(math.log(rooms[u] / 6)))
    meaning = {"m": "metres", "cm": "centimetres", "mm": "millimetres"}[likely]
    return f"are the units {meaning}? then set units={likely!r}"


def _outliers_hint(coord: np.ndarray, extent: float, units: str) -> str:
    """What to do about a few points far from all others; empty if there are none."""
    inner = float(np.ptp(np.percentile(coord, (1, 99), axis=0), axis=0).max())
    if extent * UNITS[units] <= WIDE or inner >= extent / 10:
        return ""
    size = inner * UNITS[units]
    return f"98 % of the points lie within {size:.3g} m: remove the outliers"


def check_extent(coord: np.ndarray, file: Path, units: str) -> None:
    """Rejects a degenerate cloud and one whose size says that its units are mixed up."""
    sides = np.ptp(coord, axis=0).astype(float)
    extent = float(sides.max())
    if extent == 0:
        raise SceneError(f"{file}: all {len(coord)} points are the same one; remove the scene")
    # `coord` is in metres by now, whatever its units were.
    outliers, ask = _outliers_hint(coord, extent, "m"), _units_hint(extent, units)
    if not SMALLEST <= extent <= LARGEST:
        kind = f"expected {SMALLEST} to {LARGEST:g} m"
        if extent < VOXEL:
            kind = f"the whole scene lies within one voxel of {VOXEL} m"
        raise SceneError(
            f"{file}: extent is {extent:.4g} m with units={units!r} ({kind}); "
            f"{outliers or ask or 'check units'}"
        )
    if outliers:
        raise SceneError(f"{file}: extent is {extent:.4g} m; {outliers}")
    room = sides.min() > TALL and sides.min() > ROOM_SHAPE * extent
    limit = ROOM_SPARSE if room else SPARSE if extent > WIDE else np.inf
    if np.isfinite(limit) and (spacing := _spacing(coord)) > limit:
        raise SceneError(
            f"{file}: extent is {extent:.4g} m and the points are {spacing:.2g} m apart with "
            f"units={units!r}; {ask or 'check units, or leave this scene out'}"
        )


def _spacing(coord: np.ndarray) -> float:
    """Median distance of 33 of the points, evenly picked, to their nearest other point."""
    picks = np.linspace(0, len(coord) - 1, 33).astype(int)
    nearest = []
    for pick in picks:
        square = ((coord - coord[pick]) ** 2).sum(axis=1)
        square[pick] = np.inf
        nearest.append(square.min())
    return float(np.sqrt(np.median(nearest)))


def check_color(array: np.ndarray, file: Path) -> np.ndarray:
    """Colours (n, 3) as uint8; whole numbers of 0..255 in any dtype pass."""
    _check_vectors(array, file)
    if array.dtype == np.uint8 and array.max() != 1:
        return array
    if array.dtype.kind == "f":
        _check_finite(array, file, "give these points a colour")
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise SceneError(f"{file}: values from {low} to {high}, expected 0 to 255")
    if 0 < high <= 1:
        raise SceneError(
            f"{file}: no value is above 1: colours are 0 to 255 here; "
            f"save np.rint(color * 255).astype(np.uint8)"
        )
    whole = array.astype(np.uint8)
    if (whole != array).any():
        raise SceneError(
            f"{file}: values are not whole numbers; save np.rint(color).astype(np.uint8)"
        )
    return whole


def check_normal(array: np.ndarray, file: Path) -> np.ndarray:
    """Normals (n, 3) as float32: unit length as stored, or int8 x 127, made unit here; or zero."""
    _check_vectors(array, file)
    if array.dtype.kind != "f" and array.dtype != np.int8:
        raise SceneError(f"{file}: dtype {array.dtype}, expected floats, or int8 (normal x 127)")
    if array.dtype.kind == "f":
        _check_finite(array, file, "write zeros where a normal is unknown")
    with np.errstate(over="ignore"):  # what overflows is not of unit length
        normal = array.astype(np.float32)
        # einsum: three times faster than np.linalg.norm on (n, 3)
        length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
    if array.dtype == np.int8:
        normal /= np.maximum(length, 1)[:, None]
        length = length / 127
    off = array.any(axis=1) & ~(np.abs(length - 1) <= UNIT_TOLERANCE)
    if off.any():
        raise SceneError(
            f"{file}: {off.sum()} of {len(off)} normals are not of unit length, the first is row "
            f"{off.argmax()} of length {length[off.argmax()]:.4g}; divide by the length, write "
            f"zeros where a normal is unknown, or remove the file"
        )
    return normal


def check_labels(array: np.ndarray, file: Path, classes: Sequence[str] | None) -> np.ndarray:
    """Labels (n,) as int32: -1 for none, else below the number of classes where it is known."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SceneError(
            f"{file}: {array.dtype} of shape {array.shape}, expected one integer a point"
        )
    low, high = int(array.min()), int(array.max())
    end = len(classes) if classes is not None else 2**31
    if low < -1 or high >= end:
        known = f" (dataset.json lists {end} classes)" if classes is not None else ""
        raise SceneError(
            f"{file}: ids from {low} to {high}, expected -1 to {end - 1}{known}; -1 means none"
        )
    return array.astype(np.int32)


def read_stated(file: Path, form: str, version: int) -> dict[str, Any]:
    """Reads a JSON object that states its `format` and `version`.

    Args:
        file: of UTF-8 text.
        form: the format that it must state.
        version: likewise.

    Raises:
        SceneError: it cannot be read, or states others; names the file.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SceneError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise SceneError(f'{file}: expected an object with "format": "{form}"')
    if content.get("version") != version:
        raise SceneError(f"{file}: version {content.get('version')!r}; this reads {version}")
    return content
