"""A lock that one process holds, and that frees itself when the process ends, however it does."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class HeldError(Exception):
    """Another process holds the lock; the message is its number."""


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Holds a lock, once a process; on file systems without locks, none.

    Args:
        file: made if it is not there; it stays.

    Raises:
        HeldError: another process has it.
        OSError: the file cannot be made or written.
    """
    with file.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise HeldError(lock.read().strip()) from error
        except OSError:
            pass
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
