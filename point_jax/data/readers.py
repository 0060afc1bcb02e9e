"""Clouds from files of many formats: one call, one validated scene in metres with z up.

`read_cloud` reads what scanners, mesh programs and other projects write (`FORMATS` lists it) by
well-kept libraries, which `pip install 'point_jax[io]'` brings. What is odd raises a `SceneError`;
what a rule below decides is said in `Scan.notes`. Rules, the same for every format:

- Colours become uint8 as `arrays.to_uint8` says, by dtype; `color_range` overrides it.
- Coordinates far from the origin (UTM) get whole numbers subtracted in float64, axis by axis,
  before they are rounded to float32; `Scan.frame` takes coordinates back to those of the file.
- Meshes are sampled on their surface, by area, with a seed.
"""

import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from point_jax.data import formats, meshes
from point_jax.data.arrays import Arrays, ReadOptions, to_uint8
from point_jax.data.checks import (
    RESOLUTION,
    UNITS,
    SceneError,
    check_coord,
    check_extent,
    check_labels,
    check_normal,
)
from point_jax.data.scenes import UP, Scene, read_dataset_json

NEAR = 1000.0  # metres: float32 resolves 0.06 mm up to here, so nothing needs to be subtracted
FORMATS = {
    "PLY": (".ply",),
    "PCD": (".pcd",),
    "LAS": (".las", ".laz"),
    "NPZ": (".npz",),
    "text": formats.TEXT,
    "mesh": meshes.SUFFIXES,
}
KIND = {suffix: kind for kind, suffixes in FORMATS.items() for suffix in suffixes}
GLTF = (".glb", ".gltf")


@dataclass(frozen=True)
class Frame:
    """How the coordinates of a file and those of a scene in memory belong together.

    Attributes:
        offset: (3,) float64, subtracted from the file's coordinates: file's units and axes.
        units: of the file, a key of `UNITS`.
        up: the file's axis that points up, a key of `UP`.
    """

    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    units: str = "m"
    up: str = "z"

    def to_file(self, coord: np.ndarray) -> np.ndarray:
        """Scene coordinates (n, 3) float32 as the file has them: units, axes and offset.

        Returns:
            (n, 3) float32; float64 where there is an offset, which float32 could not hold.
        """
        if self.up != "z" or self.units != "m" or self.offset.any():
            coord = coord.astype(np.float64) @ UP[self.up] / UNITS[self.units] + self.offset
        return coord if self.offset.any() else coord.astype(np.float32)

    def to_scene(self, coord: np.ndarray) -> np.ndarray:
        """Coordinates (n, 3) of the file in metres with z up, near the origin, float32."""
        shifted = (coord - self.offset) * UNITS[self.units]
        return np.ascontiguousarray(shifted @ UP[self.up].T, np.float32)


@dataclass(frozen=True)
class Scan(Scene):
    """A scene that was read from a file.

    Attributes:
        frame: takes coordinates back to the file's.
        rows: (n,) int64, the file's row of each point if some were dropped; None if point i is
            the file's row i (or a mesh was sampled).
        notes: what a rule decided, for the person who gave the file.
    """

    frame: Frame = field(default_factory=Frame)
    rows: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def find_clouds(path: str | Path, pattern: str = "*") -> list[Path]:
    """Lists the clouds at a path, by their names: nothing is opened.

    Args:
        path: a file; a scene folder (it has coord.npy); or a folder that is searched for both, with
            everything below it. Hidden files and folders are left out, links are not followed.
        pattern: which names in a searched folder to take, as "*.ply"; case does not matter.

    Returns:
        Paths, sorted. A scene folder stands for its files.

    Raises:
        SceneError: for a missing path, or a folder without clouds.
    """
    path = Path(path)
    if not path.exists():
        raise SceneError(f"{path}: no such file or folder")
    if not path.is_dir() or (path / "coord.npy").exists():
        return [path]
    found = []
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        if "coord.npy" in files:
            below.clear()
            names = [""]
        else:
            names = [n for n in files if not n.startswith(".") and Path(n).suffix.lower() in KIND]
        clouds = [Path(folder) / name for name in names]
        found += [c for c in clouds if fnmatch(c.name.lower(), pattern.lower())]
    if not found:
        chosen = "" if pattern == "*" else f" that are called {pattern}"
        raise SceneError(f"{path}: no clouds{chosen}; readable are {_known()}")
    return sorted(found)


def read_cloud(path: str | Path, options: ReadOptions | None = None) -> Scan:
    """Reads one cloud.

    Args:
        path: a file of one of `FORMATS`, or a scene folder (Pointcept's or this project's).
        options: see `ReadOptions`; the default takes the file's word for everything.

    Returns:
        A `Scan`, which is a `Scene`: validated, metres, z up. Point i is the file's row i.

    Raises:
        SceneError: names the file, what is wrong with it and what to do.
    """
    path, options = Path(path), options or ReadOptions()
    for name, value, known in (("units", options.units, UNITS), ("up", options.up, UP)):
        if value and value not in known:
            listed = ", ".join(map(repr, known))
            raise SceneError(f"{name} is {value!r}; expected one of {listed}")
    if path.is_dir():
        if not (path / "coord.npy").exists():
            raise SceneError(f"{path}: not a scene folder: it has no coord.npy")
        return _finish(path, path.name, formats.read_folder(path), _stated(path, options))
    kind = KIND.get(path.suffix.lower())
    if not path.exists():
        raise SceneError(f"{path}: no such file")
    if kind is None:
        raise SceneError(f"{path}: files of this kind are not read; readable are {_known()}")
    try:
        with np.errstate(all="ignore"):  # of damaged numbers; they are checked afterwards
            arrays = _read(path, kind, options)
    except SceneError:
        raise
    except ModuleNotFoundError as error:
        raise SceneError(
            f"{path}: reading {kind} files needs the package {error.name!r}: "
            f"pip install 'point_jax[io]'"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        raise
    # Parsers of damaged files raise whatever went wrong first; a Rust one even a BaseException.
    except BaseException as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SceneError(
            f"{path}: not a whole {kind} file ({reason}); export or copy it again"
        ) from error
    if path.suffix.lower() in GLTF and not options.up:
        options = options.replace(up="y")  # the glTF specification: +y is up, units are metres
    return _finish(path, path.stem, arrays, options)


def _known() -> str:
    listed = (f"{kind} ({' '.join(suffixes)})" for kind, suffixes in FORMATS.items())
    return ", ".join(listed) + ", and folders with coord.npy"


def _read(path: Path, kind: str, options: ReadOptions) -> Arrays:
    if path.stat().st_size == 0:
        raise SceneError(f"{path}: the file is empty")
    if kind == "PLY" and formats.ply_has_faces(path) and options.mesh == "sample":
        kind = "mesh"
    if kind == "mesh" and options.mesh == "vertices":
        raise SceneError(f"{path}: the vertices of a mesh are read from PLY only; sample it")
    match kind:
        case "PLY":
            return formats.read_ply(path)
        case "PCD":
            return formats.read_pcd(path)
        case "LAS":
            return formats.read_las(path)
        case "NPZ":
            return formats.read_npz(path)
        case "text":
            return formats.read_text(path, options.columns)
        case _:
            return meshes.read_mesh(path, options)


def _stated(folder: Path, options: ReadOptions) -> ReadOptions:
    """Options with the units and the up-axis of the data set that a scene folder belongs to."""
    root = folder.absolute().parent.parent
    stated = read_dataset_json(root)
    for key in ("units", "up"):
        given, said = getattr(options, key), stated.get(key)
        if given and said and given != said:
            raise SceneError(
                f"{folder}: {key}={given!r} is asked for, {root}/dataset.json says {said!r}; "
                f"leave out the one that is wrong"
            )
        options = options.replace(**{key: given or said or ""})
    return options


def _finish(path: Path, name: str, arrays: Arrays, options: ReadOptions) -> Scan:
    """Checks what a file held and brings it into metres with z up."""
    units, up = options.units or "m", options.up or "z"
    coord, notes = arrays.coord, list(arrays.notes)
    if coord.ndim != 2 or coord.shape[1] != 3:
        raise SceneError(f"{path}: coordinates of shape {coord.shape}, expected (points, 3)")
    optional = {
        "color": arrays.color if options.color else None,
        "normal": arrays.normal if options.normal else None,
        "segment": arrays.segment,
        "instance": arrays.instance,
    }
    for key, array in optional.items():
        if array is not None and array.shape[:1] != (len(coord),):
            raise SceneError(
                f"{path}: {key} has shape {array.shape}, but there are {len(coord)} points; "
                f"write one row a point"
            )
    rows = None
    whole = np.isfinite(coord).all(axis=1) if coord.dtype.kind == "f" else np.array([True])
    if options.drop_invalid and not whole.all():
        rows = np.flatnonzero(whole)
        notes.append(f"{len(coord) - len(rows)} of {len(coord)} points are not finite: dropped")
        coord = coord[rows]
        optional = {key: None if a is None else a[rows] for key, a in optional.items()}
    elif not whole.all():
        raise SceneError(
            f"{path}: {np.count_nonzero(~whole)} of {len(coord)} points have NaN or infinite "
            f"coordinates, the first is row {whole.argmin()}; remove them, or read with "
            f"drop_invalid (--drop_invalid), which leaves them out"
        )
    frame = Frame(_offset(path, coord, UNITS[units]), units, up)
    if frame.offset.any():
        coord = coord.astype(np.float64) - frame.offset
        notes.append(f"computed relative to {', '.join(f'{o:.0f}' for o in frame.offset)}")
    check_coord(coord, path, units)
    coord = Frame(units=units, up=up).to_scene(coord)
    try:
        check_extent(coord, path, units)
    except SceneError as error:
        if not np.ptp(coord, axis=0).any():
            raise
        if not options.any_size:
            raise SceneError(f"{error}; or read with any_size (--any_size)") from error
    color, normal = optional["color"], optional["normal"]
    if color is not None:
        color, note = to_uint8(color, path, options.color_range)
        notes += [note] if note else []
    if normal is not None:
        try:
            normal = Frame(up=up).to_scene(check_normal(normal, path))
        except SceneError as error:
            raise SceneError(f"{error} (or read without normals: --wo_normal)") from error
    segment, instance = (
        None if array is None else check_labels(array, path, None)
        for array in (optional["segment"], optional["instance"])
    )
    return Scan(
        name, coord, color, normal, segment, instance, frame=frame, rows=rows, notes=tuple(notes)
    )


def _offset(path: Path, coord: np.ndarray, scale: float) -> np.ndarray:
    """(3,) whole numbers in the file's units to subtract, zero along axes that are near enough."""
    if len(coord) == 0:
        return np.zeros(3)
    low, high = coord.min(axis=0).astype(np.float64), coord.max(axis=0).astype(np.float64)
    far = np.maximum(np.abs(low), np.abs(high)) * scale
    if coord.dtype == np.float32:
        rounding = float(np.spacing(np.float32(far.max() / scale))) * scale
        if rounding > RESOLUTION:
            raise SceneError(
                f"{path}: coordinates up to {far.max():.6g} m are stored in 32 bits, which rounds "
                f"them to {rounding:.2g} m; export them in double precision or nearer to 0, or "
                f"check units ({scale:g} m)"
            )
    return np.where(far > NEAR, np.rint(low / 2 + high / 2), 0.0)
