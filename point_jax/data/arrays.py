"""What the readers of cloud files take and give: options, and arrays as a file has them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from point_jax.data.checks import SceneError

COORD = (("x", "y", "z"),)
COLOR = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
)
NORMAL = (
    ("nx", "ny", "nz"),
    ("normal_x", "normal_y", "normal_z"),
    ("normalx", "normaly", "normalz"),
)
KNOWN = {name for spellings in (COORD, COLOR, NORMAL) for names in spellings for name in names}


@dataclass(frozen=True)
class ReadOptions:
    """What a file does not say about itself, and how to read it.

    Attributes:
        units: of the coordinates, "m", "cm" or "mm"; empty: as dataset.json says, or metres.
        up: axis that points up, "z", "-z", "y", "-y", "x" or "-x"; empty: as dataset.json says, y
            for glTF as its specification says, or z.
        color: read colours; False leaves them out unread, and so unchecked.
        normal: the same for normals.
        color_range: the value of full colour, 1, 255 or 65535; 0: by the rule in `readers`.
        columns: of text files without a header, as "x y z red green blue nx ny nz"; any other
            name skips a column.
        drop_invalid: leave out points with NaN or infinite coordinates instead of an error.
        any_size: accept a cloud whose extent says that its units may be mixed up.
        mesh: "sample" the surface of meshes, or take the "vertices" of PLY meshes as points.
        density: points a square metre on meshes. 10,000 leaves hardly a 2 cm voxel empty.
        count: number of points on a mesh in place of the density; 0: by density.
        seed: draws the points on meshes.
    """

    units: str = ""
    up: str = ""
    color: bool = True
    normal: bool = True
    color_range: int = 0
    columns: str = ""
    drop_invalid: bool = False
    any_size: bool = False
    mesh: str = "sample"
    density: float = 10_000.0
    count: int = 0
    seed: int = 0

    def __post_init__(self):
        """Rejects values that mean nothing, whatever file is read.

        Raises:
            ValueError: names the option, its value and what is expected.
        """
        if self.color_range not in (0, 1, 255, 65535):
            raise ValueError(f"color_range is {self.color_range}; expected 1, 255 or 65535")
        if self.mesh not in ("sample", "vertices"):
            raise ValueError(f"mesh is {self.mesh!r}; expected 'sample' or 'vertices'")
        if not 0 < self.density < np.inf:
            raise ValueError(f"density is {self.density}; expected points a square metre, above 0")
        if self.count < 0:
            raise ValueError(f"count is {self.count}; expected a number of points, or 0")

    def replace(self, **changes: Any) -> "ReadOptions":
        """The same options with some changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Arrays:
    """A file's arrays before any check, in its own units, axes and dtypes.

    Attributes:
        coord: (n, 3) numbers.
        color: (n, 3) numbers, or None.
        normal: (n, 3) numbers, or None.
        segment: (n,) or (n, 1) integers, or None.
        instance: likewise.
        notes: what a rule decided.
    """

    coord: np.ndarray
    color: np.ndarray | None = None
    normal: np.ndarray | None = None
    segment: np.ndarray | None = None
    instance: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def triple(
    names: Sequence[str], spellings: Sequence[Sequence[str]], get: Callable[[str], Any]
) -> np.ndarray | None:
    """Three columns of a table as one (n, 3) array, whichever way they are spelt.

    Args:
        names: of the table's columns; case does not matter.
        spellings: the three names in each accepted spelling.
        get: a column (n,) by its name in the table.

    Returns:
        (n, 3) in native byte order, or None if no spelling is complete.
    """
    by_name = {name.lower(): name for name in names}
    for spelling in spellings:
        if all(name in by_name for name in spelling):
            return np.stack([np.asarray(get(by_name[name])) for name in spelling], axis=1)
    return None


def to_uint8(color: np.ndarray, file: Path, full: int = 0) -> tuple[np.ndarray, str]:
    """Colours of any dtype and range as uint8.

    Without `full` the dtype decides: uint8 is 0..255; floats that are all within 0..1 are shares;
    16 bits are 0..65535, unless all values are below 256 (8-bit values in a wider field, common in
    LAS); other numbers must be whole and within 0..255. Integers of which none is above 1 could
    be shares too, so they are refused.

    Args:
        color: (n, 3) numbers, n >= 1.
        file: for the error.
        full: the value of full colour, 1, 255 or 65535; 0: by the rule. Fractions are rounded.

    Returns:
        (n, 3) uint8, and what the rule decided if that may surprise, else "".

    Raises:
        SceneError: for a wrong shape, values out of range, or when the rule does not decide.
    """
    if color.ndim != 2 or color.shape[1] != 3 or color.dtype.kind not in "fiu":
        raise SceneError(
            f"{file}: colours of shape {color.shape} and dtype {color.dtype}, expected numbers "
            f"(points, 3)"
        )
    low, high = color.min(), color.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise SceneError(f"{file}: some colours are NaN or infinite; give these points a colour")
    note = ""
    if not full:
        wide = color.dtype.kind == "u" and color.dtype.itemsize == 2
        full = 1 if color.dtype.kind == "f" and high <= 1 else 65535 if wide and high > 255 else 255
        if wide and full == 255:
            note = f"colours are 16-bit numbers up to {high}: taken for 8-bit values"
        elif full == 255 and high <= 255 and (color != np.rint(color)).any():
            raise SceneError(
                f"{file}: colours up to {high:.4g} that are not whole numbers; say what full "
                f"colour is with color_range=255 or another (--color_range)"
            )
        elif full == 255 and high == 1 and low >= 0:
            raise SceneError(
                f"{file}: colours are whole numbers and none is above 1; say whether full colour "
                f"is 1 or 255 with color_range (--color_range)"
            )
    if low < 0 or high > full:
        raise SceneError(
            f"{file}: colours from {low:.6g} to {high:.6g}, expected 0 to {full}; say what full "
            f"colour is with color_range=1, 255 or 65535 (--color_range), or read without colours "
            f"(--wo_color)"
        )
    if full == 65535:
        # 8-bit colours widened by 256 or by 257 both come back exactly.
        return (color.astype(np.uint16) >> 8).astype(np.uint8), note
    scaled = color.astype(np.float64) * 255 if full == 1 else color
    return np.rint(scaled).astype(np.uint8), note
