"""Folders on this machine and in object stores, gs:// and s3://bucket/folder, by the same methods.

Orbax writes and reads checkpoints in all. Files that grow, metrics and events of TensorBoard,
cannot lie in an object store: a run has them in a local folder and sends them up (`Mirror`).
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from etils import epath
from fsspec.config import conf
from fsspec.core import url_to_fs

from point_jax.orbax_s3 import S3, UnknownOrbaxError, teach_orbax

STORES = {"gs://": "gcs", S3: "s3"}  # the extra of this package that has its library
LIBRARIES = (
    *("fsspec.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud."),
    *("s3fs.", "botocore.", "aiobotocore.", "aiohttp."),
)
PROBE = ".point_jax_can_write"
GLOBS = "*?[]"  # fsspec would delete all folders that match


class StorageError(OSError):
    """An object store that cannot be used, and why."""


class LostError(StorageError):
    """An object store that could be used and cannot any more."""


def place(path: str | Path) -> Path:
    """A path, in an object store if it says so; such a one has the methods of `pathlib.Path`.

    Raises:
        StorageError: an object store that checkpoints cannot be in.
    """
    text = str(path)
    scheme, _, rest = text.partition(":/")
    if f"{scheme}://" in STORES:
        form, names = f"expected {scheme}://bucket/folder", rest.split("/")
        if not rest.strip("/"):
            raise StorageError(f"{text}: {form}, with a bucket")
        if names[0] or not names[1]:
            raise StorageError(f"{text}: {form}, with two strokes")
        if set(GLOBS) & set(rest) or {".", ".."} & set(names):
            raise StorageError(f"{text}: {form}, with none of {' '.join(GLOBS)} and no . or ..")
    if "://" not in text:
        return Path(path).expanduser()  # shells leave the ~ of --workdir=~/run to the program
    if not is_remote(path):
        raise StorageError(
            f"{text}: of object stores only gs://bucket/folder and s3://bucket/folder can be used; "
            "mount the bucket and give the folder"
        )
    _always_list()
    if text.startswith(S3):
        try:
            teach_orbax()
        except UnknownOrbaxError as error:
            raise StorageError(f"{text}: {error}") from error
    return cast(Path, epath.Path(text))


def _always_list() -> None:
    """Has fsspec ask a store what is there, each time.

    It remembers what it has seen, but TensorStore and other processes write and delete as well.
    """
    for scheme in ("gs", "gcs", "s3"):
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def absolute(path: Path) -> Path:
    """The same from the root; paths in an object store are so always."""
    return path if is_remote(path) else path.absolute()


def local(path: str | Path, what: str) -> Path:
    """A path on this machine; `what` names it in the error.

    Raises:
        StorageError: it is in an object store.
    """
    if "://" in str(path) or str(path).startswith(tuple(store[:-1] for store in STORES)):
        raise StorageError(f"{what}={path}: expected a folder on this machine")
    return Path(path).expanduser()


def is_remote(path: str | Path) -> bool:
    """Whether a path is in an object store."""
    return str(path).startswith(tuple(STORES))


def move(folder: Path, target: Path) -> None:
    """Renames a folder; in an object store its files are copied within the store, then deleted.

    Raises:
        OSError: it cannot be; and what the stores' libraries raise.
    """
    if not is_remote(folder):
        folder.rename(target)
        return
    # etils' rename takes each folder for a file of its own, of which there is none.
    store, source = url_to_fs(str(folder))
    files = [file for file in store.find(source) if not file.endswith("/")]  # no marks of folders
    store.copy(files, [f"{target}{file.removeprefix(source)}" for file in files])
    store.rm(source, recursive=True)


def of_store(error: BaseException) -> bool:
    """Whether an error comes from the libraries that reach object stores.

    They have no common kind, and make some of theirs into Python's own.
    """
    trace, modules = error.__traceback__, [type(error).__module__]
    while trace is not None:
        modules.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(f"{module}.".startswith(LIBRARIES) for module in modules)


def told(error: BaseException) -> str:
    """What to tell of an error `of_store`, and what to do."""
    text = f"{type(error).__name__}: {error}"
    for extra in STORES.values():
        if f"{extra}fs" in text and "install" in text.lower():
            return f"{text}; pip install 'point_jax[{extra}]'"
    return f"{text}; look at the address, your credentials and the network"


class Mirror:
    """The local folder of files whose place is a run's folder, wherever that is.

    For a folder on this machine it is that folder itself. For one in an object store it is a
    temporary one, with what the store has of the files asked for, and `push` sends up what changed.

    Attributes:
        folder: the local one.
    """

    def __init__(self, workdir: Path, wanted: Sequence[str]) -> None:
        """Fetches files.

        Args:
            workdir: the run's folder.
            wanted: names of the files to have from the beginning, where there are any.

        Raises:
            StorageError: the store cannot be reached, or refuses.
        """
        self._workdir, self._sent = workdir, dict[Path, tuple[int, int]]()
        self.folder = workdir
        if not is_remote(workdir):
            return
        self.folder = Path(tempfile.mkdtemp(prefix="point_jax_run."))
        try:
            # Now rather than after hours. s3fs makes a bucket of a name that is a slip for the
            # first folder, but not for a file.
            (workdir / PROBE).write_bytes(b"")
            (workdir / PROBE).unlink()
            for name in wanted:
                if (workdir / name).exists():
                    (self.folder / name).write_bytes((workdir / name).read_bytes())
        except Exception as error:  # what these libraries raise has no common kind
            shutil.rmtree(self.folder)
            raise StorageError(f"{workdir} cannot be used ({told(error)})") from error

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Sends up what is left, and removes the temporary folder.

        Raises:
            LostError: the store cannot be reached, and nothing else has failed: then that is
                told, and the files stay here.
        """
        try:
            self.push()
        except LostError as failure:
            kept = f"{failure}; what could not be sent up is kept in {self.folder}"
            if error is None:
                raise LostError(kept) from failure
            print(f"warning: {kept}", file=sys.stderr, flush=True)
            return
        if self.folder != self._workdir:
            shutil.rmtree(self.folder)

    def push(self) -> None:
        """Sends up what is new or has changed since the last time; locks stay here.

        Raises:
            LostError: the store cannot be reached, or refuses.
        """
        if self.folder == self._workdir:
            return
        try:
            for file in sorted(self.folder.rglob("*")):
                state = file.stat().st_size, file.stat().st_mtime_ns
                hidden = file.name.startswith(".")
                if file.is_dir() or hidden or self._sent.get(file) == state:
                    continue
                target = self._workdir / str(file.relative_to(self.folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._sent[file] = state
        except Exception as error:
            raise LostError(f"{self._workdir} cannot be used any more ({told(error)})") from error
