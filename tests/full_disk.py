"""A stand-in for a disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def no_file_above(size):
    """Writes beyond it fail, in this process: `File too large`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
