"""The folder of a run: made, checked, and written by one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from point_jax.lock import HeldError, held
from point_jax.training import checkpoint
from point_jax.training.config import ConfigError

TENSORBOARD, PICTURES = "tensorboard", "pictures"


class TrainingStopped(RuntimeError):
    """The run cannot go on, and why."""


@contextlib.contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Makes the folder of a run and keeps a second run out of it; a kill of this one frees it.

    Raises:
        ConfigError: the folder cannot be made or written.
        TrainingStopped: another process is writing there.
    """
    try:
        for folder in (workdir, workdir / checkpoint.FOLDER, workdir / TENSORBOARD):
            folder.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(held(workdir / ".lock"))
    except HeldError as error:
        raise TrainingStopped(f"another run (process {error}) is writing to {workdir}") from error
    except OSError as error:
        file = error.filename or workdir
        raise ConfigError(
            f"--workdir={workdir} cannot be used ({file}: {error.strerror}); expected a "
            "folder that can be written"
        ) from error
    with lock:
        yield
