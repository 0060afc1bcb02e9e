"""An encoder that `launch.export` wrote: features of the points of a cloud, without point_jax.

    from encoder import Encoder

    encoder = Encoder("folder")  # the one that holds manifest.json
    features = encoder(coord, color, normal)  # (n, C) float32, row i belongs to point i
    cloud = encoder.encode(coord, color, normal)  # its levels one by one, and classes

Needs numpy and jax, and flatbuffers, with which JAX reads its exported programs. Clouds are
centred and sampled to voxels here, as the network was trained with; the program of the smallest
bucket that holds the voxels of every level does the rest. A bucket is compiled when it is first
used: set JAX_COMPILATION_CACHE_DIR to keep what was compiled.

This file stands alone: every export has its copy. In point_jax, `features.encoder` has no largest
cloud, reads whatever kinds of clouds, and gives the same numbers.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT, VERSION = "point_jax exported encoder", 1
MANIFEST, PARAMETERS = "manifest.json", "parameters.npz"
NEEDED = (
    *("calling_convention_version", "versions", "platforms", "parameters", "buckets", "levels"),
    *("inputs", "positions", "grid_size", "scale", "classes"),
)
LARGEST = 1 << 16  # voxels along an axis


class ExportError(RuntimeError):
    """A folder that cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class Features:
    """What the encoder knows of one cloud of n points; m voxels of a level, V of level 0.

    Attributes:
      inverse: (n,) int32, the voxel of level 0 of each point.
      grids: (m, 3) int32 voxel coordinates of each level, finest first.
      parents: (m,) int32, the next level's voxel of each voxel, for all levels but the last.
      levels: (m, C) float32, the encoder's features of each level.
      decoded: (m, C) float32, the decoder's, from level 0; empty without a decoder.
      head: kernel (C, K) and bias (K,) of a segmentation's layer; None without one.
    """

    inverse: np.ndarray
    grids: tuple[np.ndarray, ...]
    parents: tuple[np.ndarray, ...]
    levels: tuple[np.ndarray, ...]
    decoded: tuple[np.ndarray, ...]
    head: tuple[np.ndarray, np.ndarray] | None

    def at_points(self, up_cast: int | None = None) -> np.ndarray:
        """(n, C): the coarsest level's features carried up, joined to each level's own, at points.

        Args:
          up_cast: how many levels up; None for all. Own channels of a level come first.
        """
        steps = len(self.parents) if up_cast is None else up_cast
        if not 0 <= steps <= len(self.parents):
            raise ValueError(f"up_cast is {up_cast}, expected 0 to {len(self.parents)}")
        first = len(self.parents) - steps
        features = self.levels[-1]
        for i in reversed(range(first, len(self.parents))):
            features = np.concatenate([self.levels[i], features[self.parents[i]]], axis=1)
        where = self.inverse
        for parent in self.parents[:first]:
            where = parent[where]
        return features[where]

    def scores(self) -> np.ndarray:
        """(n, K) float32 scores of the segmentation's classes, at points."""
        if self.head is None:
            raise ExportError("the exported checkpoint has no segmentation: there are no scores")
        kernel, bias = self.head
        every = np.arange(len(self.grids[0]), dtype=np.int32)
        joined = Features(every, self.grids, self.parents, self.levels, (), None)
        read = self.decoded[0] if self.decoded else joined.at_points()
        return (read @ kernel + bias)[self.inverse]


class Encoder:
    """An exported encoder, ready to be called.

    Attributes:
      manifest: what manifest.json says: grid_size, inputs, levels, buckets, classes, ...
    """

    def __init__(self, folder: str | Path = Path(__file__).parent):
        """Reads and checks the folder; nothing is compiled yet.

        Args:
          folder: that `launch.export` wrote.

        Raises:
          ExportError: files are missing or damaged, or JAX here cannot run these programs.
        """
        self._folder = Path(folder)
        self.manifest = _read_manifest(self._folder / MANIFEST)
        self._check_platform()
        self._programs: dict[int, Callable] = {}
        arrays = _read_arrays(self._folder, self.manifest["parameters"])
        names = "head/kernel", "head/bias"
        self._head = (arrays[names[0]], arrays[names[1]]) if names[0] in arrays else None
        params = {name: array for name, array in arrays.items() if name not in names}
        self._params = jax.device_put(params)

    @property
    def classes(self) -> list[str] | None:
        """Names of the segmentation's classes; None without a segmentation."""
        return self.manifest["classes"]

    def __call__(
        self,
        coord: np.ndarray,
        color: np.ndarray | None = None,
        normal: np.ndarray | None = None,
    ) -> np.ndarray:
        """Features of all levels joined, (n, C) float32: row i belongs to point i. See `encode`."""
        return self.encode(coord, color, normal).at_points()

    def encode(
        self,
        coord: np.ndarray,
        color: np.ndarray | None = None,
        normal: np.ndarray | None = None,
    ) -> Features:
        """Encodes a cloud.

        Args:
          coord: (n, 3) metres, z up.
          color: (n, 3) 0 to 255; None counts as zeros, as it did in training.
          normal: (n, 3) of unit length, zero where unknown; None likewise.

        Raises:
          ValueError: arrays that cannot be used, or more voxels than the largest bucket has.
          FloatingPointError: features that are not finite.
        """
        grid, features, centred, inverse = self._voxelize(coord, color, normal)
        depth = len(self.manifest["levels"])
        grids, parents = [grid], []
        for _ in range(depth - 1):
            _, first, parent = _unique(coarser := grids[-1] >> 1)
            grids.append(coarser[first])
            parents.append(parent)
        counts = [len(level) for level in grids]
        index, bucket = self._bucket(counts)
        padding = bucket["capacities"][0] - len(grid)
        inputs: dict[str, Any] = {"grid": grid, "features": features}
        if self.manifest["positions"]:
            inputs["coord"] = centred
        inputs = {name: np.pad(array, ((0, padding), (0, 0))) for name, array in inputs.items()}
        inputs["count"] = np.int32(len(grid))
        order, found, *parts = self._program(index)(self._params, inputs)
        rows = [np.asarray(order[: counts[0]])]
        for level, sorted_grid in enumerate(found[1:], 1):
            key = _key(np.asarray(sorted_grid[: counts[level]]))
            rows.append(np.searchsorted(_key(grids[level]), key))

        def in_order(features: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
            """From the program's order to that of `grids`."""
            result = []
            for at, array in zip(rows, features, strict=False):  # a decoder has a level less
                full = np.empty((len(at), array.shape[1]), np.float32)
                full[at] = np.asarray(array[: len(at)], np.float32)
                if not np.isfinite(full).all():
                    raise FloatingPointError("features are not finite: weights or input too large")
                result.append(full)
            return tuple(result)

        levels, decoded = map(in_order, parts)
        return Features(inverse, tuple(grids), tuple(parents), levels, decoded, self._head)

    def _voxelize(
        self, coord: Any, color: Any, normal: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Voxels (V, 3), input (V, channels), centred coordinates (V, 3), voxel of each point."""
        coord = _check("coord", coord, None)
        given = {"color": color, "normal": normal}
        arrays = {n: None if a is None else _check(n, a, len(coord)) for n, a in given.items()}
        color, normal = arrays["color"], arrays["normal"]
        if color is not None and (color.min() < 0 or color.max() > 255):
            raise ValueError(f"color is from {color.min()} to {color.max()}, expected 0 to 255")
        if color is not None and 0 < color.max() <= 1:
            raise ValueError("color has no value above 1: expected 0 to 255, multiply by 255")
        if color is not None and (color != np.rint(color)).any():
            raise ValueError("color is not whole numbers: np.rint(color) makes them")
        if normal is not None:
            normal = normal.astype(np.float32)
            length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
            if (normal.any(axis=1) & ~(np.abs(length - 1) <= 0.02)).any():
                raise ValueError("normal must have unit length, or be zero where it is unknown")
        size = self.manifest["grid_size"]
        metres = coord.astype(np.float64) * self.manifest["scale"]
        low, high = metres.min(0), metres.max(0)
        metres -= np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
        centred = metres.astype(np.float32)
        steps = np.floor(centred / np.float64(size))
        steps -= steps.min(0)
        if steps.max() >= LARGEST:
            raise ValueError(
                f"coord spans {(high - low).max():.6g} m, more than {LARGEST} voxels of {size} m: "
                "is it in metres? If so, cut it, or export with a larger --grid_size"
            )
        grid = steps.astype(np.int32)
        _, first, inverse = _unique(grid)
        nothing = np.zeros((len(coord), 3), np.float32)
        columns = {
            "coord": centred,
            "color": nothing if color is None else color.astype(np.float32) / 255,
            "normal": nothing if normal is None else normal,
        }
        features = np.concatenate([columns[n][first] for n in self.manifest["inputs"]], axis=1)
        return grid[first], features.astype(np.float32), centred[first], inverse

    def _bucket(self, counts: list[int]) -> tuple[int, dict[str, Any]]:
        """The smallest bucket that holds so many voxels at every level."""
        buckets = self.manifest["buckets"]
        for index, bucket in enumerate(buckets):
            if all(n <= most for n, most in zip(counts, bucket["capacities"], strict=True)):
                return index, bucket
        largest = buckets[-1]["capacities"]
        if counts[0] <= largest[0]:
            raise ValueError(
                f"the cloud has {counts} voxels at its levels, the largest bucket holds {largest}: "
                "it is sparser than the buckets are made for; export again with larger --shares"
            )
        raise ValueError(
            f"the cloud has {counts[0]} voxels of {self.manifest['grid_size']} m, the largest "
            f"bucket holds {largest[0]}: cut the cloud into overlapping parts, or export again "
            f"with a larger one (--buckets={counts[0]}) or a larger --grid_size"
        )

    def _program(self, index: int) -> Callable:
        if index not in self._programs:
            about = self.manifest["buckets"][index]
            content = _read_bytes(self._folder, about)
            try:
                program = jax.export.deserialize(bytearray(content))
            except ImportError as error:
                raise ExportError(f"{error}: pip install flatbuffers") from error
            except Exception as error:  # another version's format fails in many ways
                raise ExportError(
                    f"{about['file']} cannot be read by jax {jax.__version__} "
                    f"({type(error).__name__}: {error}); it was exported with jax "
                    f"{self.manifest['versions']['jax']}: install that one, or export again"
                ) from error
            self._programs[index] = jax.jit(program.call)
        return self._programs[index]

    def _check_platform(self) -> None:
        version = self.manifest["calling_convention_version"]
        oldest = jax.export.minimum_supported_calling_convention_version
        newest = jax.export.maximum_supported_calling_convention_version
        if not oldest <= version <= newest:
            raise ExportError(
                f"{self._folder} has calling convention {version} of jax "
                f"{self.manifest['versions']['jax']}; jax {jax.__version__} runs {oldest} to "
                f"{newest}: {'update jax' if version > newest else 'export again'}"
            )
        device = jax.devices()[0]
        platform = device.platform
        if platform == "gpu":
            platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
        if platform not in self.manifest["platforms"]:
            raise ExportError(
                f"{self._folder} is for {', '.join(self.manifest['platforms'])}, and JAX runs on "
                f"{platform} here: export with --platforms={platform}, or start Python with "
                f"JAX_PLATFORMS={self.manifest['platforms'][0]}"
            )


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ExportError(f"{file}: missing; expected a folder that launch.export wrote") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f'{file}: expected an object with "format": "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise ExportError(
            f"{file}: version {manifest.get('version')}, this encoder.py reads {VERSION}: use the "
            "encoder.py beside it"
        )
    if missing := [name for name in NEEDED if name not in manifest]:
        raise ExportError(f"{file}: damaged, without {', '.join(missing)}; copy or export it again")
    return manifest


def _read_bytes(folder: Path, about: Mapping[str, Any]) -> bytes:
    """A file that the manifest describes, checked against its digest."""
    file = folder / about["file"]
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ExportError(f"{file}: cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ExportError(f"{file}: not the file that was exported; copy or export it again")
    return content


def _read_arrays(folder: Path, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
    _read_bytes(folder, about)
    with np.load(folder / about["file"], allow_pickle=False) as stored:
        return dict(stored)


def _check(name: str, array: Any, points: int | None) -> np.ndarray:
    """(n, 3) finite numbers."""
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "fiu" or not len(array):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, expected numbers of shape "
            f"({'n' if points is None else points}, 3), at least one row"
        )
    if points is not None and len(array) != points:
        raise ValueError(f"{name} has {len(array)} rows for {points} points")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: remove these points")
    return array


def _key(grid: np.ndarray) -> np.ndarray:
    """(V,) int64, one number for each voxel."""
    grid = grid.astype(np.int64)
    return (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]


def _unique(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted keys of the voxels, the first row of each, and the place of each row among them."""
    keys, first, inverse = np.unique(_key(grid), return_index=True, return_inverse=True)
    return keys, first, inverse.reshape(-1).astype(np.int32)
