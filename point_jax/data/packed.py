"""Scenes packed into shards: few large files in place of many small ones, read by index.

    packed.json                      units, up, classes; of every split its shards and scenes
    train-00000.arrayrecord          a record a scene: the arrays of its npy files and its name, as
                                     safetensors
    train-00000-images.arrayrecord   the frames.npz of its scenes and their image files, as they are

`data_prep.pack` writes them from scene folders, packed.json last: without it nothing is there. The
arrays are those of the files, bit for bit, and pass the same checks when they are read.

Records are compressed by zstd (level 3). Rendered rooms of 155,000 points take 8.2 bytes a point in
place of 20.1, and 3 ms of a core to read either way; byte planes of differences would take 5.6.
"""

import bisect
import errno
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np
import safetensors.numpy
from etils import epath

from point_jax import limits, storage
from point_jax.data.checks import UNITS, SceneError, read_stated
from point_jax.data.frames import parse_frames
from point_jax.data.images import FrameImages, Images
from point_jax.data.scenes import UP, Scene, make_scene

INDEX = "packed.json"
FORMAT, VERSION = "point_jax packed scenes", 1
NAME = "name of the scene"  # an array of a record: its UTF-8 bytes
WRITER_OPTIONS = "group_size:1,zstd:3"  # a record is read alone

SHARD_LIMITS = {
    "file": limits.text(empty=False),
    "bytes": limits.whole(0),
    "scenes": limits.each(limits.text(empty=False)),
    "image_file": limits.text(),
    "image_bytes": limits.whole(0),
    "frames": limits.either(
        limits.NOTHING, limits.each(limits.either(limits.NOTHING, limits.each(limits.whole(0))))
    ),
}


@dataclass(frozen=True)
class Shard:
    """Scenes that lie in one file.

    Attributes:
        file: name of the shard.
        bytes: its size.
        scenes: names of the scenes, a record each.
        image_file: name of the shard of their images; "" where none has any.
        image_bytes: its size.
        frames: for each scene the records of its frames.npz and of its images, in their order; None
            for a scene without.
    """

    file: str
    bytes: int
    scenes: list[str]
    image_file: str = ""
    image_bytes: int = 0
    frames: list[list[int] | None] | None = None

    def __post_init__(self) -> None:
        limits.check(vars(self), SHARD_LIMITS)
        if not self.scenes or len(self.frames or self.scenes) != len(self.scenes):
            raise ValueError(f"{self.file}: {len(self.scenes)} scenes, not as many frames")

    @property
    def image_records(self) -> int:
        """How many records the shard of images has."""
        return 1 + max((r for records in self.frames or () for r in records or ()), default=-1)


@dataclass(frozen=True)
class _Records:
    """All records of a file, as Grain wants to be told, so that it need not open it to count."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


def encode_arrays(scene: str, arrays: dict[str, np.ndarray]) -> bytes:
    """The record of a scene's arrays; byte order and memory layout become the machine's own.

    The scene's name goes with them, so that a record in the wrong place is noticed.
    """
    arrays = arrays | {NAME: np.frombuffer(scene.encode(), np.uint8)}
    plain = {n: np.ascontiguousarray(a, a.dtype.newbyteorder("=")) for n, a in arrays.items()}
    return safetensors.numpy.save(plain)


def decode_arrays(record: bytes) -> tuple[str | None, dict[str, np.ndarray]]:
    """Inverse of `encode_arrays`: arrays with memory of their own.

    Returns:
        The scene's name, None in records from before they had it; the arrays.

    Raises:
        ValueError: arrays of anything but numbers; others of safetensors for what is no record.
    """
    arrays = {name: np.array(a) for name, a in safetensors.numpy.load(record).items()}
    if strange := [f"{n} {a.dtype}" for n, a in arrays.items() if a.dtype.kind not in "fiub"]:
        raise ValueError(f"{', '.join(strange)}: expected numbers")
    scene = arrays.pop(NAME, None)
    return None if scene is None else scene.tobytes().decode(), arrays


def is_packed(root: str | Path) -> bool:
    """Whether a folder has packed scenes.

    Raises:
        SceneError: the folder is in an object store that cannot be read.
    """
    return _is_there(_folder(root) / INDEX)


def _folder(root: str | Path) -> epath.Path:
    if str(root).startswith(storage.S3):
        raise SceneError(
            f"{root}: ArrayRecord cannot read from S3; mount the bucket (mountpoint-s3, s3fs) and "
            "give the folder"
        )
    try:
        return epath.Path(str(storage.place(root)))
    except storage.StorageError as error:
        raise SceneError(str(error)) from error


def _is_there(file: epath.Path) -> bool:
    try:
        return file.exists()
    except Exception as error:  # what the stores' libraries raise
        raise SceneError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error


class PackedDataset:
    """The packed scenes of some splits, in the order that `scenes.Dataset` has them in.

    Attributes:
        names: of the scenes.
        classes: names of the segment ids, or None when unknown.
        local_root: the folder; None in an object store.
    """

    def __init__(
        self,
        root: str | Path,
        splits: str | Sequence[str] = ("train",),
        segment: str | None = None,
    ):
        """Reads the index and looks whether the shards are whole; opens none.

        Args:
            root: folder with packed.json, local or gs://.
            splits: their scenes follow one another.
            segment: stem of the label file, as "segment20"; None takes segment where there is one.

        Raises:
            SceneError: no index, a split that it does not have, shards missing or of another size,
                or more of them than may be open at a time.
        """
        self._root = _folder(root)
        index = _read_index(self._root / INDEX)
        self.units, self.up, self.segment = index["units"], index["up"], segment
        self.classes: tuple[str, ...] | None = index["classes"] and tuple(index["classes"])
        self.local_root = None if "://" in str(root) else Path(root)
        self._shards: list[Shard] = []
        for split in (splits,) if isinstance(splits, str) else splits:
            if split not in index["splits"]:
                there = ", ".join(index["splits"])
                raise SceneError(f"{self._root}: no split {split!r}; packed are {there}")
            self._shards += index["splits"][split]
        if not self._shards:
            raise SceneError(
                f"{self._root}: splits is empty; packed are {', '.join(index['splits'])}"
            )
        self.names = [name for shard in self._shards for name in shard.scenes]
        self._ends = list(accumulate(len(shard.scenes) for shard in self._shards))
        files, images = [], []
        self._first_image: list[int] = []  # record of each shard among those of all
        for shard in self._shards:
            self._check(shard.file, shard.bytes)
            files.append(self._records(shard.file, len(shard.scenes)))
            self._first_image.append(sum(file.take for file in images))
            if shard.image_file:
                self._check(shard.image_file, shard.image_bytes)
                images.append(self._records(shard.image_file, shard.image_records))
        _allow_open(len(files) + len(images), str(self._root))
        self._scenes = grain.sources.ArrayRecordDataSource(files)
        self._images = grain.sources.ArrayRecordDataSource(images) if images else None

    def _check(self, file: str, size: int) -> None:
        path = self._root / file
        try:
            found = path.stat().length
        except FileNotFoundError as error:
            raise SceneError(f"{path}: missing; copy it again, or pack again") from error
        except Exception as error:  # what the stores' libraries raise
            raise SceneError(f"{path}: cannot be read: {error}") from error
        if found != size:
            raise SceneError(
                f"{path}: {found} bytes, {INDEX} says {size}: cut off or of another packing; copy "
                "it again, or pack again"
            )

    def _records(self, file: str, count: int) -> _Records:
        return _Records(str(self._root / file), count, count)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Scene:
        """Reads scene `index` and checks it as `scenes.load_scene` does.

        Raises:
            SceneError: names the shard and what is wrong.
        """
        shard, _ = self._find(index)
        what = self.describe(index)
        record = _read(self._scenes, index, what)
        try:
            name, arrays = decode_arrays(record)
        except Exception as error:
            raise SceneError(f"{what}: not the arrays of a scene ({error})") from error
        if name is not None and name != self.names[index]:
            raise SceneError(
                f"{what}: holds the scene {name!r}, so shard and {INDEX} are of two packings; copy "
                "the folder again, or pack again"
            )
        folder = Path(str(self._root / shard.file)) / self.names[index]
        return make_scene(folder, arrays.get, self.units, self.up, self.segment, self.classes)

    def describe(self, index: int) -> str:
        """Shard, record and name of scene `index`, for messages."""
        shard, place = self._find(index)
        return f"{self._root / shard.file}: record {place} (scene {self.names[index]})"

    def place(self, index: int) -> str:
        """Shard and name of scene `index`: no other scene has the same."""
        shard, _ = self._find(index)
        root = self._root if self.local_root is None else self.local_root.resolve()
        return f"{root}/{shard.file}/{self.names[index]}"

    def images(self, index: int, scene: Scene) -> Images | None:
        """The images of scene `index`, a record each; None where it has none.

        Args:
            index: of the scene.
            scene: as `load` gave it.

        Raises:
            SceneError: damaged frames. Images are read when they are taken.
        """
        shard, place = self._find(index)
        records = shard.frames[place] if shard.frames else None
        if not records:
            return None
        first = self._first_image[bisect.bisect_right(self._ends, index)]

        def content(number: int) -> bytes:
            what = f"{self._root / shard.image_file}: record {number} (scene {scene.name})"
            return _read(self._images, first + number, what)

        file = Path(str(self._root / shard.image_file)) / scene.name / "frames.npz"
        frames = parse_frames(file, io.BytesIO(content(records[0])), len(scene.coord))
        if len(frames.files) != len(records) - 1:
            raise SceneError(f"{file}: {len(frames.files)} images, {INDEX} has {len(records) - 1}")
        root = self.local_root or Path(str(self._root))
        return FrameImages(root, frames, scene.coord, lambda image: content(records[1 + image]))

    def _find(self, index: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        return shard, index - (self._ends[number] - len(shard.scenes))


SPARE = 256  # files that a process has open beside its shards


def _allow_open(files: int, root: str) -> None:
    """Raises this process's limit of open files: a shard stays open once it has been read from.

    Raises:
        SceneError: the system allows fewer.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else max(soft, files + SPARE, 65_536)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if files + SPARE > most:
        raise SceneError(
            f"{root}: {files} shards, and a process may have {most} files open (ulimit -Hn): raise "
            "that, or pack with a larger --shard_size"
        )


def _read(source: Any, record: int, what: str) -> bytes:
    try:
        return source[record]
    except Exception as error:  # RuntimeError of a hash that differs, others of a file cut off
        if "Too many open files" in str(error):  # no damage, which a run may pass over
            raise OSError(errno.EMFILE, "too many open files, see ulimit -n", what) from error
        raise SceneError(
            f"{what}: damaged or not there ({error}); copy the shard again, or pack again"
        ) from error


def _read_index(file: Any) -> dict[str, Any]:
    if not _is_there(file):
        raise SceneError(
            f"{file}: missing; expected what data_prep.pack wrote, and if it was stopped, the same "
            "command goes on"
        )
    content = read_stated(file, FORMAT, VERSION)
    try:
        frame, names = {n: content[n] for n in ("units", "up")}, content["classes"]
        limits.check(frame, {"units": limits.one_of(*UNITS), "up": limits.one_of(*UP)})
        if names is not None and not all(isinstance(name, str) for name in names):
            raise TypeError("classes are no names")
        content["splits"] = {
            split: [Shard(**entry) for entry in entries]
            for split, entries in content["splits"].items()
        }
        if not all(content["splits"].values()):
            raise ValueError("a split without scenes")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise SceneError(
            f"{file}: not what data_prep.pack wrote ({what}); copy it again"
        ) from error
    return content
