"""Folders on this machine and in Google's object store, `gs://bucket/folder`, by the same methods.

Orbax writes and reads checkpoints in both. Files that grow, metrics and events of TensorBoard,
cannot lie in an object store: a run has them in a local folder and sends them up (`Mirror`).
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from etils import epath

STORE = "gs://"
ADVICE = "look at its name and your credentials"


class StorageError(OSError):
    """An object store that cannot be used, and why."""


def place(path: str | Path) -> Path:
    """A path, in an object store if it says so; such a one has the methods of `pathlib.Path`.

    Raises:
        StorageError: an object store that checkpoints cannot be in.
    """
    text = str(path)
    if text.startswith("gs:/") and not text.startswith(STORE):
        raise StorageError(f"{text}: expected {STORE}bucket/folder, with two strokes")
    if "://" not in text:
        return Path(path).expanduser()  # shells leave the ~ of --workdir=~/run to the program
    if not text.startswith(STORE):
        raise StorageError(
            f"{text}: of object stores only {STORE}bucket/folder can be used: Orbax has no way to "
            "write checkpoints to others; mount the bucket (s3fs-fuse does it for S3) and give the "
            "folder"
        )
    if not text.removeprefix(STORE).strip("/"):
        raise StorageError(f"{text}: expected {STORE}bucket/folder, with a bucket")
    return cast(Path, epath.Path(text))


def absolute(path: Path) -> Path:
    """The same from the root; paths in an object store are so always."""
    return path if is_remote(path) else path.absolute()


def local(path: str | Path, what: str) -> Path:
    """A path on this machine; `what` names it in the error.

    Raises:
        StorageError: it is in an object store.
    """
    if "://" in str(path) or str(path).startswith("gs:/"):
        raise StorageError(f"{what}={path}: expected a folder on this machine")
    return Path(path).expanduser()


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store."""
    return str(path).startswith(STORE)


def of_store(error: BaseException) -> bool:
    """Whether an error is of the libraries that reach object stores; they have no common kind."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google")


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
            for name in wanted:
                if (workdir / name).exists():
                    (self.folder / name).write_bytes((workdir / name).read_bytes())
        except Exception as error:  # what gcsfs raises has no common kind
            shutil.rmtree(self.folder)
            raise _unusable(workdir, error) from error

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Sends up what is left, and removes the temporary folder.

        Raises:
            StorageError: the store cannot be reached, and nothing else has failed: then that is
                told, and the files stay here.
        """
        try:
            self.push()
        except StorageError as failure:
            kept = f"{failure}; what could not be sent up is kept in {self.folder}"
            if error is None:
                raise StorageError(kept) from failure
            print(f"warning: {kept}", file=sys.stderr, flush=True)
            return
        if self.folder != self._workdir:
            shutil.rmtree(self.folder)

    def push(self) -> None:
        """Sends up what is new or has changed since the last time; locks stay here.

        Raises:
            StorageError: the store cannot be reached, or refuses.
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
            raise _unusable(self._workdir, error) from error


def _unusable(workdir: Path, error: Any) -> StorageError:
    missing = isinstance(error, ImportError) or "gcsfs" in str(error)
    advice = "pip install 'point_jax[gcs]'" if missing else ADVICE
    return StorageError(f"{workdir} cannot be used ({type(error).__name__}: {error}); {advice}")
