"""Files for other programs: coloured PLY clouds and NPZ archives, written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once the block has ended well.

    So a file that is there is complete, whatever stops the program. Folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays the last one: writers choose the format by it.
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_ply(
    path: str | Path,
    coord: np.ndarray,
    color: np.ndarray,
    normal: np.ndarray | None = None,
    edges: np.ndarray | None = None,
    edge_color: np.ndarray | None = None,
) -> Path:
    """Writes a coloured cloud as binary little-endian PLY.

    Args:
        path: of the file.
        coord: (n, 3); float64 is written as double, everything else as float.
        color: (n, 3) uint8, or floats in [0, 1].
        normal: (n, 3), or None.
        edges: (k, 2) points to join by lines, as PLY's element "edge"; or None.
        edge_color: (k, 3) uint8, needed with `edges`.

    Returns:
        The path.

    Raises:
        ValueError: arrays of different length, or not (n, 3).
        ImportError: without the package plyfile.
    """
    try:
        from plyfile import PlyData, PlyElement
    except ImportError as error:
        raise ImportError("writing PLY needs plyfile: pip install 'point_jax[io]'") from error
    if np.asarray(color).dtype != np.uint8:
        color = np.rint(np.clip(color, 0, 1) * 255).astype(np.uint8)
    columns = [("xyz", np.asarray(coord), "f8" if coord.dtype == np.float64 else "f4")]
    columns += [(("red", "green", "blue"), color, "u1")]
    if normal is not None:
        columns += [(("nx", "ny", "nz"), np.asarray(normal), "f4")]
    for names, array, _ in columns:
        if array.shape != (len(coord), 3):
            raise ValueError(
                f"{path}: {', '.join(names)} have shape {array.shape}, expected ({len(coord)}, 3)"
            )
    vertex = np.empty(len(coord), [(name, kind) for names, _, kind in columns for name in names])
    for names, array, _ in columns:
        for axis, name in enumerate(names):
            vertex[name] = array[:, axis]
    elements = [PlyElement.describe(vertex, "vertex")]
    if edges is not None and edge_color is not None:
        kinds = [("vertex1", "i4"), ("vertex2", "i4")] + [(c, "u1") for c in columns[1][0]]
        edge = np.empty(len(edges), kinds)
        for (name, _), values in zip(kinds, [*edges.T, *edge_color.T], strict=True):
            edge[name] = values
        elements.append(PlyElement.describe(edge, "edge"))
    with whole(path) as part:
        PlyData(elements, byte_order="<").write(str(part))
    return Path(path)


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes arrays as an NPZ file, uncompressed: features hardly compress.

    Returns:
        The path.
    """
    with whole(path) as part:
        np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
    return Path(path)
