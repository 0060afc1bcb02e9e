"""Files and folders that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from point_jax.training.checkpoint import CheckpointError


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A temporary path that becomes `file` when the block ends well; nothing is overwritten."""
    must_be_free(file)
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        must_be_free(file)
        temporary.rename(file)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder; an empty one may be there."""
    must_be_free(folder)
    temporary = folder.absolute().with_name(f".{folder.absolute().name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)  # fails if the folder has been filled meanwhile
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def must_be_free(path: Path) -> None:
    """Raises CheckpointError if something is at `path`, other than an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already: choose another output, or remove it")
