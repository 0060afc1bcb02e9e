"""Readers of point cloud files: arrays as they are in the file.

Each may raise anything for a damaged file; `readers.read_cloud` turns it into a `SceneError`.
Libraries are imported where they are used: none is needed for the formats of the others.
"""

import warnings
import zipfile
from pathlib import Path

import numpy as np

from point_jax.data.arrays import COLOR, COORD, KNOWN, NORMAL, Arrays, triple
from point_jax.data.checks import SceneError, read_array

TEXT = (".xyz", ".txt", ".csv", ".asc", ".pts", ".xyzrgb", ".xyzn")
COLUMNS = {  # of text files without a header, by suffix and by number of columns
    ".xyzn": {6: "x y z nx ny nz"},
    "": {3: "x y z", 6: "x y z red green blue", 9: "x y z red green blue nx ny nz"},
}
NAMES = ("coord", "color", "normal", "segment", "instance")
VLR_COUNT, VLR_SIZE = 100, 54  # bytes: where LAS counts its records, and the least of one
LAZ_FACTOR = 2000  # no file is packed to less than this part


def ply_has_faces(path: Path) -> bool:
    """Whether the header of a PLY file announces faces."""
    with path.open("rb") as file:
        lines = file.read(65536).split(b"end_header")[0].split(b"\n")
    words = [line.split() for line in lines if line.startswith(b"element ")]
    return any(w[1:2] in ([b"face"], [b"tristrips"]) and w[2:] != [b"0"] for w in words)


def read_ply(path: Path) -> Arrays:
    """The vertices of a PLY file, ascii or binary of either byte order."""
    from plyfile import PlyData

    # Faces are of no use here, and plyfile reads lists one by one: triangles it can skip.
    triangles = {"face": {"vertex_indices": 3, "vertex_index": 3}}
    try:
        data = PlyData.read(str(path), known_list_len=triangles)
    except Exception:
        data = PlyData.read(str(path))
    if "vertex" not in data:
        raise SceneError(f"{path}: has no vertices, only {', '.join(e.name for e in data)}")
    vertex = data["vertex"]
    return _table(path, [p.name for p in vertex.properties], vertex.data)


def _table(path: Path, names: list[str], data: np.ndarray) -> Arrays:
    """Arrays of a structured array whose columns are called `names`."""
    coord = triple(names, COORD, data.__getitem__)
    if coord is None:
        raise SceneError(f"{path}: has no x, y, z, only {', '.join(names)}")
    color, normal = (triple(names, kind, data.__getitem__) for kind in (COLOR, NORMAL))
    return Arrays(coord, color, normal)


def read_pcd(path: Path) -> Arrays:
    """A PCD file: ascii, binary or binary_compressed; colours packed in rgb or of their own."""
    from pypcd4.pypcd4 import PointCloud

    cloud = PointCloud.from_path(path)
    data = np.atleast_1d(cloud.pc_data)
    if len(data) != cloud.points:
        raise SceneError(
            f"{path}: has {len(data)} of the {cloud.points} points that its header announces; "
            f"it is cut off: export or copy it again"
        )
    arrays = _table(path, list(cloud.fields), data)
    packed = next((name for name in cloud.fields if name.lower() in ("rgb", "rgba")), None)
    if packed is None or arrays.color is not None:
        return arrays
    if data.dtype[packed].itemsize != 4:
        raise SceneError(f"{path}: field {packed} has {data.dtype[packed]}, expected 4 bytes")
    color = PointCloud.decode_rgb(np.ascontiguousarray(data[packed]))
    return Arrays(arrays.coord, color, arrays.normal)


def read_las(path: Path) -> Arrays:
    """A LAS or LAZ file; coordinates in float64; normals from extra dimensions nx, ny, nz."""
    import laspy

    if path.suffix.lower() == ".laz":
        import lazrs  # noqa: F401  laspy without it says nothing of what to install

    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(VLR_COUNT)
        blocks = int.from_bytes(file.read(4), "little")
        if blocks * VLR_SIZE > size:  # laspy would look for each of them
            raise SceneError(f"{path}: its header announces {blocks} records: it is damaged")
        file.seek(0)
        # Parallel decompression of a damaged file aborts the whole process; one thread does not.
        one = (laspy.LazBackend.Lazrs,)
        reader = laspy.LasReader(file, closefd=False, laz_backend=one, read_evlrs=False)
        header = reader.header
        factor = LAZ_FACTOR if header.are_points_compressed else 1
        if header.point_count * header.point_format.size > size * factor:
            raise SceneError(
                f"{path}: its header announces {header.point_count} points, too many for its "
                f"{size} bytes; it is cut off or damaged: export or copy it again"
            )
        if header.are_points_compressed:
            _check_chunks(path, header.offset_to_point_data, size)
        las = reader.read_points(header.point_count)
    if len(las) != header.point_count:
        raise SceneError(f"{path}: has {len(las)} of {header.point_count} points: it is cut off")
    names = list(header.point_format.dimension_names)
    coord = np.stack([np.asarray(las[axis], np.float64) for axis in "xyz"], axis=1)
    color, normal = (triple(names, kind, las.__getitem__) for kind in (COLOR, NORMAL))
    return Arrays(coord, color, normal)


def _check_chunks(path: Path, points: int, size: int) -> None:
    """Refuses a LAZ file with a damaged table of chunks, whose reader would abort the process.

    The points start with the table's place (or -1: that is in the file's last bytes); the table
    with a version and the number of chunks, of which each takes a byte or more.
    """
    with path.open("rb") as file:
        file.seek(points)
        place = int.from_bytes(file.read(8), "little", signed=True)
        if place == -1 and size > 8:
            file.seek(size - 8)
            place = int.from_bytes(file.read(8), "little", signed=True)
        file.seek(min(max(place, 0), size))
        table = file.read(8)
    if len(table) < 8 or int.from_bytes(table[4:], "little") > size:
        raise SceneError(f"{path}: its table of chunks is damaged or cut off; copy it again")


def read_npz(path: Path) -> Arrays:
    """An NPZ file with coord, and perhaps color, normal, segment, instance."""
    arrays = load_npz(path, NAMES)
    if "coord" not in arrays:
        raise SceneError(
            f"{path}: has no array coord, only {', '.join(npz_names(path)) or 'none at all'}; "
            f"expected {', '.join(NAMES[:3])}"
        )
    return _named(arrays)


def _named(arrays: dict[str, np.ndarray]) -> Arrays:
    color, normal, segment, instance = (arrays.get(name) for name in NAMES[1:])
    return Arrays(arrays["coord"], color, normal, segment, instance)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an NPZ file.

    Raises:
        SceneError: for a missing file, or one that is not a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:
        raise SceneError(f"{path}: not a whole npz file ({error}); write it again") from error


def load_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an NPZ file has; the others stay unread.

    Raises:
        SceneError: for a damaged file, and for arrays that do not hold numbers.
    """
    there = npz_names(path)
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in names:
                if name in there:
                    arrays[name] = stored[name]
    except Exception as error:  # damaged inside: zlib, zipfile and numpy raise many kinds
        raise SceneError(f"{path}: not a whole npz file ({error}); write it again") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            kind = getattr(array, "dtype", type(array).__name__)
            raise SceneError(f"{path}: {name} holds {kind}, expected an array of numbers")
    return arrays


def read_folder(path: Path) -> Arrays:
    """A scene folder: coord.npy and what there is of color, normal, segment, instance."""
    files = {name: path / f"{name}.npy" for name in NAMES}
    arrays = {n: read_array(file) for n, file in files.items() if n == "coord" or file.exists()}
    return _named(arrays)


def read_text(path: Path, columns: str) -> Arrays:
    """A table of numbers: columns apart by spaces, tabs, commas or semicolons.

    Lines that start with # or // are comments. The columns' names come from `columns`, a header
    line (also as the last comment before the numbers), or else from the number of columns: x y z,
    then colours, then normals. A first line that is one whole number (PTS) is skipped.

    Args:
        path: the file.
        columns: names that replace the header's; empty: as above.
    """
    skip, said, first = _before_the_numbers(path)
    separator = next((mark for mark in ";," if mark in first), None)
    width = len(_split(first, separator))
    by_width = COLUMNS.get(path.suffix.lower(), COLUMNS[""])
    names = columns.replace(",", " ").split() or said or by_width.get(width, "").split()
    if not names:
        raise SceneError(
            f"{path}: {width} columns without a header line; say what they are, as "
            f"columns='x y z intensity red green blue' (--columns)"
        )
    if len(names) != width:
        source = "columns" if columns else "the header"
        raise SceneError(
            f"{path}: {source} names {len(names)} columns ({' '.join(names)}), "
            f"but line {skip + 1} has {width}"
        )
    names = [name.lower() for name in names]
    used = [index for index, name in enumerate(names) if name in KNOWN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = np.loadtxt(
            path, np.float64, comments=["#", "//"], delimiter=separator, skiprows=skip,
            usecols=used, ndmin=2, encoding="utf-8-sig",
        )  # fmt: skip
    data = dict(zip([names[i] for i in used], table.T, strict=True))
    coord, color, normal = (triple(list(data), k, data.get) for k in (COORD, COLOR, NORMAL))
    if coord is None:
        raise SceneError(f"{path}: no columns called x, y, z, only {' '.join(names)}")
    if color is not None and not columns and not said and len(color) and color.min() < 0:
        raise SceneError(
            f"{path}: columns 4 to 6 have negative values, so they are not colours; are they "
            f"normals? then read with columns='x y z nx ny nz' (--columns)"
        )
    return Arrays(coord, _as_written(path, color), normal)


def _as_written(path: Path, color: np.ndarray | None) -> np.ndarray | None:
    """Colours of a text, whose numbers have no dtype: whole ones as integers.

    Only 0 and 1 may be both (1 of 1, or 1 of 255), so the rule of integers refuses them.
    """
    if color is None or not np.isfinite(color).all() or (color != np.rint(color)).any():
        return color
    if np.abs(color).max(initial=0) > 65535:
        raise SceneError(f"{path}: colours up to {color.max():g}, expected at most 65535")
    return color.astype(np.int32)


def _split(line: str, separator: str | None) -> list[str]:
    return [word.strip() for word in line.strip().split(separator)]


def _before_the_numbers(path: Path) -> tuple[int, list[str], str]:
    """How many lines precede the table, the column names found there, and its first line."""
    names: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            bare = line.strip()
            comment = bare.startswith(("#", "//"))
            words = bare.lstrip("#/ ").replace(",", " ").replace(";", " ").replace('"', " ").split()
            if not words:
                continue
            if {"x", "y", "z"} <= {word.lower() for word in words}:
                names = words
            elif comment or (number == 0 and bare.isdigit()):
                continue
            else:
                try:
                    [float(word) for word in words]
                except ValueError:
                    raise SceneError(
                        f"{path}: line {number + 1} is not numbers: {bare[:60]!r}; expected "
                        f"x y z [red green blue] [nx ny nz], or a header with these names"
                    ) from None
                return number, names, bare
    raise SceneError(f"{path}: no lines of numbers")
