"""Packs scene folders into shards, for data sets on network disks and object stores.

    python -m data_prep.pack --input=ROOT --output=DIR --splits train test

writes DIR/packed.json and ArrayRecord files of --shard_size scenes each, with the images of scenes
that have a frames.npz; train from them with {'kind': 'packed', 'root': 'DIR'}. What is read from
them is equal bit for bit. DIR is a local folder; copy it to gs:// when it is complete.

packed.json comes last: a packing that was stopped cannot be read, and the same command goes on with
it. Every scene is checked as training does, and every record is read back.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  compiled, no stubs
)
from rich.progress import Progress

from data_prep.check import check_images
from data_prep.progress import counted
from point_jax import flags
from point_jax.data.checks import SceneError, read_array
from point_jax.data.packed import (
    FORMAT,
    INDEX,
    VERSION,
    WRITER_OPTIONS,
    Shard,
    encode_arrays,
    is_packed,
)
from point_jax.data.scenes import Dataset
from point_jax.lock import HeldError, held

PLAN = "plan.json"  # there while a packing is not complete: what it packs
LOCK = ".lock"  # likewise: held by the process that packs
ARRAYS = ("coord", "color", "normal", "instance")


def scene_files(folder: Path) -> list[Path]:
    """The npy files of a scene that are packed; label files under all their names."""
    files = sorted(folder.glob("*.npy"))
    return [f for f in files if f.stem in ARRAYS or f.stem.startswith("segment")]


def image_files(root: Path, folder: Path) -> list[tuple[str, Path]]:
    """The frames.npz of a scene, named "", and the files it names; [] without one.

    Raises:
        SceneError: a damaged frames.npz.
    """
    file = folder / "frames.npz"
    if not file.exists():
        return []
    try:
        with np.load(file, allow_pickle=False) as stored:
            names = [str(name) for name in stored["files"]]
    except Exception as error:  # no zip, damaged inside, an array missing: many kinds
        raise SceneError(f"{file}: not a frames file ({error})") from error
    return [("", file), *((name, root / name) for name in names)]


def read_images(root: Path, folder: Path) -> list[tuple[str, bytes]]:
    """What is packed of a scene's images, whose frames have been checked; see `image_files`.

    Raises:
        SceneError: a file that cannot be read.
    """
    found = []
    for name, path in image_files(root, folder):
        try:
            found.append((name, path.read_bytes()))
        except OSError as error:
            raise SceneError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found


class Writer:
    """Writes a shard beside its place; `close` reads it back and renames it into it."""

    def __init__(self, file: Path):
        self._file = file
        self._temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
        self._digests: list[bytes] = []
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, record: bytes) -> int:
        """Appends a record; returns its number."""
        self._writer.write(record)
        self._digests.append(hashlib.sha256(record).digest())
        return len(self._digests) - 1

    def close(self) -> int:
        """Puts the file in its place; returns its size in bytes."""
        self._writer.close()
        reader = array_record_module.ArrayRecordReader(str(self._temporary))
        found = [hashlib.sha256(reader.read()).digest() for _ in range(reader.num_records())]
        reader.close()
        if found != self._digests:
            raise RuntimeError(f"{self._file}: what was read back is not what was written")
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self._file)
        return self._file.stat().st_size


def write_shard(output: Path, name: str, dataset: Dataset, scenes: Sequence[int]) -> Shard:
    """Packs some scenes of a data set into `<output>/<name>.arrayrecord`.

    Raises:
        SceneError: a scene that training would refuse.
        RuntimeError: the shard cannot be written.
    """
    writer, images = Writer(output / f"{name}.arrayrecord"), None
    frames: list[list[int] | None] = []
    known: dict[str, int] = {}  # images that several scenes of the shard share
    for index in scenes:
        folder = dataset.folders[index]
        try:
            check_images(dataset.images(index, dataset.load(index)))
        except SceneError as error:
            raise SceneError(f"{error}; data_prep.check lists all such scenes") from error
        arrays = {file.stem: read_array(file) for file in scene_files(folder)}
        try:
            writer.add(encode_arrays(folder.name, arrays))
        except (KeyError, TypeError, ValueError) as error:
            dtypes = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
            raise SceneError(f"{folder}: cannot be packed ({error}): {dtypes}") from error
        records = []
        for file, content in read_images(dataset.root, folder):
            images = images or Writer(output / f"{name}-images.arrayrecord")
            if not file or file not in known:
                known[file] = images.add(content)
            records.append(known[file])
        frames.append(records or None)
    about = {}
    if images is not None:
        about["image_bytes"] = images.close()
        about |= {"image_file": f"{name}-images.arrayrecord", "frames": frames}
    names = [dataset.folders[index].name for index in scenes]
    return Shard(f"{name}.arrayrecord", writer.close(), names, **about)


def plan_of(dataset: dict[str, Dataset], shard_size: int) -> dict[str, Any]:
    """What a packing packs, to tell whether one that was stopped is the same.

    Raises:
        SceneError: a file that cannot be looked at, or a damaged frames.npz.
    """
    total = hashlib.sha256()
    for split, scenes in dataset.items():
        for folder in scenes.folders:
            images = [path for _, path in image_files(scenes.root, folder)]
            files = [*scene_files(folder), *images]
            try:
                stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            except OSError as error:
                raise SceneError(f"{error.filename}: cannot be read: {error.strerror}") from error
            total.update(json.dumps([split, folder.name, stats]).encode())
    counts = {split: len(scenes) for split, scenes in dataset.items()}
    first = next(iter(dataset.values()))
    frame = {"units": first.units, "up": first.up, "classes": first.classes}
    plan = {"shard_size": shard_size, "scenes": counts, "files": total.hexdigest()} | frame
    return json.loads(json.dumps(plan))  # as it is read again


def check_free(output: Path, plan: dict[str, Any]) -> None:
    """A packing may use a folder that is not there, empty, or its own, stopped.

    Raises:
        SceneError: something else is there.
    """
    if is_packed(output):
        raise SceneError(f"{output} is packed already: choose another --output, or remove it")
    if (output / PLAN).exists():
        if _read_json(output / PLAN) != plan:
            raise SceneError(
                f"{output} has the beginning of another packing, or its scenes have changed: "
                "remove it"
            )
    elif output.exists() and any(each.name != LOCK for each in output.iterdir()):
        raise SceneError(f"{output} is not empty: choose another --output, or remove it")


def begin(output: Path, plan: dict[str, Any]) -> None:
    """Makes a folder, which this process holds, ready for a packing; see `check_free`."""
    check_free(output, plan)  # what another process may have made meanwhile
    for left in output.glob(".*.tmp-*"):
        left.unlink()
    write_json(output / PLAN, plan)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SceneError(
            f"{file}: damaged ({error}): remove {file.parent} and pack anew"
        ) from error


def read_shard(file: Path) -> Shard:
    """The entry of a shard that a stopped packing has left.

    Raises:
        SceneError: it is damaged, or the shard's files are not what it says.
    """
    try:
        shard = Shard(**_read_json(file))
    except (TypeError, ValueError) as error:
        raise SceneError(
            f"{file}: damaged ({error}): remove {file.parent} and pack anew"
        ) from error
    for name, size in ((shard.file, shard.bytes), (shard.image_file, shard.image_bytes)):
        path = file.parent / name
        if name and (not path.is_file() or path.stat().st_size != size):
            raise SceneError(f"{path}: missing or cut off: remove {file.parent} and pack anew")
    return shard


def write_json(file: Path, content: Any) -> None:
    """Writes JSON that is whole or absent."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    with temporary.open("w") as out:
        json.dump(content, out)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def pack(
    datasets: dict[str, Dataset], output: Path, shard_size: int, progress: Progress
) -> tuple[int, int]:
    """Packs the splits of a data set; goes on with a packing that was stopped.

    Args:
        datasets: one a split.
        output: local folder.
        shard_size: scenes of a shard.
        progress: shows how many shards are done.

    Returns:
        Bytes of all shards, and how many shards were there already.

    Raises:
        SceneError: a scene that training would refuse, or an output that is not free.
        RuntimeError, OSError: the output cannot be written.
    """
    plan = plan_of(datasets, shard_size)
    check_free(output, plan)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with held(output / LOCK):
            try:
                return _pack(datasets, output, shard_size, plan, progress)
            finally:
                (output / LOCK).unlink(missing_ok=True)
    except HeldError as error:
        raise SceneError(f"another packing (process {error}) is writing to {output}") from error


def _pack(
    datasets: dict[str, Dataset],
    output: Path,
    shard_size: int,
    plan: dict[str, Any],
    progress: Progress,
) -> tuple[int, int]:
    begin(output, plan)
    jobs = [
        (split, number, range(first, min(first + shard_size, len(dataset))))
        for split, dataset in datasets.items()
        for number, first in enumerate(range(0, len(dataset), shard_size))
    ]
    shards: dict[str, list[Shard]] = {split: [] for split in datasets}
    done, kept = [], 0
    for split, number, scenes in counted(progress, jobs, "packing shards"):
        name = f"{split}-{number:05d}"
        done.append(output / f"{name}.json")  # the shard's entry: there when the shard is complete
        if done[-1].exists():
            kept += 1
            shard = read_shard(done[-1])
        else:
            shard = write_shard(output, name, datasets[split], scenes)
            write_json(done[-1], dataclasses.asdict(shard))
        shards[split].append(shard)
    first = next(iter(datasets.values()))
    entries = {split: [dataclasses.asdict(s) for s in found] for split, found in shards.items()}
    content = {"format": FORMAT, "version": VERSION, "units": first.units, "up": first.up}
    write_json(output / INDEX, content | {"classes": first.classes, "splits": entries})
    for file in [*done, output / PLAN]:
        file.unlink()
    size = sum(s.bytes + s.image_bytes for found in shards.values() for s in found)
    return size, kept


def main() -> None:
    """Command line; see the module's docstring."""
    parser = flags.Parser(
        prog="python -m data_prep.pack",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="root of the scene folders")
    add("--output", type=Path, required=True, help="local folder for the shards")
    add("--splits", nargs="+", default=["train"])
    add("--shard_size", type=int, default=64, help="scenes of a shard")
    add("--units", default="", help="m, cm or mm, where there is no dataset.json")
    add("--up", default="", help="z, -z, y, -y, x or -x, where there is no dataset.json")
    given = parser.parse_args()
    if given.shard_size < 1:
        parser.error(f"--shard_size={given.shard_size}, expected 1 or more")
    if "://" in str(given.output) or ":/" in str(given.output):
        parser.error(f"--output={given.output}: pack into a local folder and copy that")
    if len(set(given.splits)) < len(given.splits):
        parser.error(f"--splits {' '.join(given.splits)}: one is named twice")
    start = time.monotonic()
    try:
        datasets = {
            split: Dataset(given.input, (split,), given.units, given.up) for split in given.splits
        }
    except SceneError as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {given.input} cannot be read: {error}\n")
    try:
        with Progress() as progress:
            size, kept = pack(datasets, given.output, given.shard_size, progress)
    except SceneError as error:
        parser.exit(1, f"error: {error}\n")
    except (RuntimeError, OSError) as error:
        parser.exit(1, f"error: {given.output} cannot be written: {error}\n")
    count = sum(map(len, datasets.values()))
    went_on = f", {kept} shards were there already" if kept else ""
    print(
        f"{count} scenes packed into {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s"
        f"{went_on}\ntrain with --config.data.sources=\"({{'kind': 'packed', 'root': "
        f"'{given.output}', 'splits': ('{given.splits[0]}',)}},)\""
    )


if __name__ == "__main__":
    main()
