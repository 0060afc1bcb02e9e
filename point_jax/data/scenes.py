"""Scene folders: reading with validation at the edge, writing, and the metadata of a data set.

Two layouts hold the same npy files (coord, color, normal, segment*, instance) in
`<root>/<split>/<scene>/`: Pointcept's preprocessed one, for which units and up-axis are given in
the config, and this project's own, where `<root>/dataset.json` states them. Whatever passes here
needs no more checks later; whatever is odd raises a `SceneError`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from point_jax.data.checks import (
    UNITS,
    SceneError,
    check_color,
    check_coord,
    check_extent,
    check_labels,
    check_normal,
    read_array,
    read_stated,
)
from point_jax.data.frames import read_frames
from point_jax.data.image_splits import PairedImages, read_split
from point_jax.data.images import FrameImages, Images

FORMAT = "point_jax"
VERSION = 1
# Rotations (determinant +1: nothing is mirrored) that take each up-axis to z.
UP = {
    "z": np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "-z": np.array([[1, 0, 0], [0, -1, 0], [0, 0, -1]]),
    "y": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "-y": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "x": np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    "-x": np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]]),
}


@dataclass(frozen=True)
class Scene:
    """One point cloud in host memory: metres, z up.

    Attributes:
        name: the scene's folder name, or what a generator calls it.
        coord: (n, 3) float32, metres, z up.
        color: (n, 3) uint8, or None.
        normal: (n, 3) float32, unit length, zero where unknown; or None.
        segment: (n,) int32 class ids, -1 = ignore; or None.
        instance: (n,) int32 instance ids, -1 = none; or None.
        images: what sees its points; None where it has none, or where nobody asked for them.
    """

    name: str
    coord: np.ndarray
    color: np.ndarray | None = None
    normal: np.ndarray | None = None
    segment: np.ndarray | None = None
    instance: np.ndarray | None = None
    images: Images | None = None


class Dataset:
    """The scenes of one root folder, in the order of their names.

    Attributes:
        root: the data set's folder.
        folders: scene folders, split by split, sorted by name within a split.
        units: "m", "cm" or "mm": what the coordinates on disk are in.
        up: the axis on disk that points up: "z", "y", "-y", ...
        classes: names of the segment ids, or None when unknown.
    """

    def __init__(
        self,
        root: str | Path,
        splits: str | Sequence[str] = ("train",),
        units: str = "",
        up: str = "",
        segment: str | None = None,
        image_splits: bool = False,
    ):
        """Lists the scenes without opening them.

        Args:
            root: folder that holds `<split>/<scene>/coord.npy`, with or without dataset.json.
            splits: names of the split folders to read; their scenes follow one another.
            units: "m", "cm" or "mm"; needed where the root has no dataset.json.
            up: "z", "-z", "y", "-y", "x" or "-x"; needed where the root has no dataset.json.
            segment: stem of the label file, as "segment20"; it must then exist in every scene.
                None reads segment.npy where there is one.
            image_splits: the scenes are the entries of Pointcept's `<root>/splits/<split>.json`,
                a cloud and some images each, instead of the folders in `<root>/<split>`.

        Raises:
            SceneError: for a missing folder, empty split, missing or contradicting metadata.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise SceneError(f"{self.root}: no such folder; check the data set's `root`")
        stated = read_dataset_json(self.root)
        self.units = _agree(self.root, "units", units, stated.get("units"), tuple(UNITS))
        self.up = _agree(self.root, "up", up, stated.get("up"), tuple(UP))
        self.classes: tuple[str, ...] | None = stated.get("classes")
        self.segment = segment
        splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self._entries = ()
        if image_splits:
            self._entries = tuple(e for split in splits for e in read_split(self.root, split))
            self.folders = tuple(entry.folder for entry in self._entries)
        else:
            self.folders = tuple(folder for split in splits for folder in self._list(split))

    def _list(self, split: str) -> list[Path]:
        there = sorted(entry for entry in self.root.iterdir() if entry.is_dir())
        if self.root / split not in there:
            names = ", ".join(entry.name for entry in there) or "no folders at all"
            raise SceneError(f"{self.root}: no split folder {split!r}; here are {names}")
        entries = sorted((self.root / split).iterdir())
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in entries:
            if entry.is_symlink() and not entry.exists():
                raise SceneError(f"{entry}: a link to {entry.readlink()}, which is not there")
        scenes = [entry for entry in entries if entry.is_dir()]
        if not scenes:
            raise SceneError(
                f"{self.root / split}: no scene folders; expected {split}/<scene>/coord.npy"
            )
        return scenes

    def __len__(self) -> int:
        return len(self.folders)

    def load(self, index: int) -> Scene:
        """Reads and validates scene `index`; see `load_scene`."""
        folder = self.folders[index]
        return load_scene(folder, self.units, self.up, self.segment, self.classes)

    def images(self, index: int, scene: Scene) -> Images | None:
        """The images of scene `index`; None where neither its folder nor its entry has any.

        Args:
            index: of the scene.
            scene: as `load` gave it.

        Raises:
            SceneError: for a damaged frames.npz. Images are opened when they are taken.
        """
        if self._entries:
            return PairedImages(self._entries[index], len(scene.coord))
        folder = self.folders[index]
        if not (folder / "frames.npz").exists():
            return None
        return FrameImages(self.root, read_frames(folder, len(scene.coord)), scene.coord)


def load_scene(
    folder: str | Path,
    units: str,
    up: str,
    segment: str | None = None,
    classes: Sequence[str] | None = None,
) -> Scene:
    """Reads one scene folder into metres with z up.

    Accepted on disk: coord (n, 3) float32, float64 or integers; color (n, 3), any numbers that
    are whole and in 0..255; normal (n, 3) floats of unit length or int8 (direction x 127), zero
    where unknown; segment and instance (n,) or (n, 1) integers, -1 for none. Only coord is needed.

    Args:
        folder: holds the npy files.
        units: of coord on disk, a key of `UNITS`.
        up: axis on disk that points up, a key of `UP`; coord and normal are rotated alike.
        segment: stem of the label file; None reads segment.npy where there is one.
        classes: names of the classes, to check the labels' range.

    Returns:
        The scene, as `Scene` documents it.

    Raises:
        SceneError: names the file, what is wrong with it and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SceneError(f"{folder}: no such scene folder")

    def read(name: str) -> np.ndarray | None:
        file = folder / f"{name}.npy"
        return read_array(file) if file.exists() else None

    return make_scene(folder, read, units, up, segment, classes)


def make_scene(
    folder: Path,
    read: Callable[[str], np.ndarray | None],
    units: str,
    up: str,
    segment: str | None = None,
    classes: Sequence[str] | None = None,
) -> Scene:
    """`load_scene`, wherever the arrays of its files are.

    Args:
        folder: what errors name.
        read: stem of an npy file -> its array; None where there is no such file.
        units, up, segment, classes: see `load_scene`.

    Raises:
        SceneError: as there.
    """

    def needed(name: str) -> np.ndarray:
        array = read(name)
        if array is None:
            raise SceneError(f"{folder / name}.npy: missing")
        return array

    coord = check_coord(needed("coord"), folder / "coord.npy", units)
    coord = _turn(coord * UNITS[units], up).astype(np.float32)
    check_extent(coord, folder / "coord.npy", units)

    def fitting(name: str, array: np.ndarray | None) -> np.ndarray | None:
        if array is not None and array.shape[:1] != (len(coord),):
            rows = f"{array.shape[0]} rows" if array.ndim else "no rows"
            raise SceneError(
                f"{folder / name}.npy: {rows}, but coord.npy has {len(coord)}; they must agree"
            )
        return array

    color, normal = (fitting(name, read(name)) for name in ("color", "normal"))
    labels = read("segment") if segment is None else needed(segment)
    labels, instance = fitting(segment or "segment", labels), fitting("instance", read("instance"))
    if color is not None:
        color = check_color(color, folder / "color.npy")
    if normal is not None:
        normal = _turn(check_normal(normal, folder / "normal.npy"), up)
    if labels is not None:
        labels = check_labels(labels, folder / f"{segment or 'segment'}.npy", classes)
    if instance is not None:
        instance = check_labels(instance, folder / "instance.npy", None)
    return Scene(folder.name, coord, color, normal, labels, instance)


def validate(scene: Scene) -> Scene:
    """Checks a scene made in memory by the same rules as one read from disk; returns it.

    Raises:
        SceneError: names the scene, the array and what is wrong.
    """
    count = len(scene.coord) if np.ndim(scene.coord) else 0
    wanted = {"coord": "float32", "color": "uint8", "normal": "float32"}
    wanted |= {"segment": "int32", "instance": "int32"}
    for name, dtype in wanted.items():
        array, where = getattr(scene, name), Path(f"{scene.name}/{name}")
        if array is None and name != "coord":
            continue
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            kind = getattr(array, "dtype", type(array).__name__)
            raise SceneError(f"{where}: expected a numpy array of {dtype}, got {kind}")
        if array.shape != ((count, 3) if name in ("coord", "color", "normal") else (count,)):
            raise SceneError(f"{where}: shape {array.shape} does not fit {count} points")
        if name == "coord":
            check_extent(check_coord(array, where, "m"), where, "m")
        elif name == "normal":
            check_normal(array, where)
        elif name != "color":
            check_labels(array, where, None)
    return scene


def write_scene(folder: str | Path, scene: Scene, compact: bool = False) -> None:
    """Writes a scene's npy files, in the data set's own axes: z up.

    Args:
        folder: `<root>/<split>/<scene>`; made if missing.
        scene: checked with `validate` first.
        compact: write coord as int16 (or int32) millimetres and normal as int8 x 127, 12 bytes a
            point instead of 27; dataset.json must then say units "mm" instead of "m". It rounds
            to 1 mm and 0.4 degrees.

    Raises:
        SceneError: when `validate` finds the scene wrong.
    """
    validate(scene)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(scene, name) for name in ("color", "segment", "instance")}
    arrays["coord"], arrays["normal"] = scene.coord, scene.normal
    if compact:
        millimetres = np.rint(scene.coord.astype(np.float64) * 1000)
        small = np.abs(millimetres).max() < 2**15
        arrays["coord"] = millimetres.astype(np.int16 if small else np.int32)
        if scene.normal is not None:
            arrays["normal"] = np.rint(scene.normal * 127).astype(np.int8)
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def write_dataset_json(
    root: str | Path,
    units: str,
    up: str,
    splits: Sequence[str],
    classes: Sequence[str] | None = None,
) -> None:
    """Writes `<root>/dataset.json`, the metadata that `Dataset` needs.

    Raises:
        SceneError: for unknown units or up-axis.
    """
    root = Path(root)
    _agree(root, "units", units, None, tuple(UNITS))
    _agree(root, "up", up, None, tuple(UP))
    content = {"format": FORMAT, "version": VERSION, "units": units, "up": up}
    content |= {"splits": list(splits), "classes": None if classes is None else list(classes)}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")


def read_dataset_json(root: str | Path) -> dict:
    """Reads `<root>/dataset.json`: units, up, splits, classes (a tuple or None); {} if absent.

    Raises:
        SceneError: for anything that `write_dataset_json` would not have written.
    """
    file = Path(root) / "dataset.json"
    if not file.exists():
        return {}
    content = read_stated(file, FORMAT, VERSION)
    for key in ("units", "up"):
        if key not in content:
            options = ", ".join(f'"{value}"' for value in (UNITS if key == "units" else UP))
            raise SceneError(f'{file}: "{key}" is missing; add one of {options}')
    classes = content.get("classes")
    if classes is not None:
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
            raise SceneError(f'{file}: "classes" must be a list of names or null')
        content["classes"] = tuple(classes)
    return content


def _agree(root: Path, key: str, given: str, stated: str | None, options: tuple) -> str:
    """The one value of config and dataset.json; neither or a contradiction is an error."""
    listed = ", ".join(repr(option) for option in options)
    if given and stated and given != stated:
        raise SceneError(
            f"{root}: the config says {key}={given!r}, dataset.json says {stated!r}; "
            f"remove the one that is wrong"
        )
    value = given or stated
    if not value:
        raise SceneError(
            f"{root}: {key} unknown; set {key}= one of {listed} in the config's data source, or "
            f'add a dataset.json with "{key}" to the folder'
        )
    if value not in options:
        raise SceneError(f"{root}: {key} is {value!r}; expected one of {listed}")
    return value


def _turn(vectors: np.ndarray, up: str) -> np.ndarray:
    if up == "z":
        return vectors
    return np.ascontiguousarray(vectors @ UP[up].T.astype(vectors.dtype))
