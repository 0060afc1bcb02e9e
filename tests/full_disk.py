"""A disk that is full: a small one, or a stand-in for it."""

import contextlib
import os
import resource
import shutil
import subprocess

import pytest

MOUNT = 'mount -t tmpfs -o size=$SIZE tmpfs "$DISK"'


def on_small_disk(folder, size, script):
    """Runs a shell script that sees a disk of `size` at `folder`, "$DISK"; nobody else sees it."""
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    env = os.environ | {"DISK": str(folder), "SIZE": size}
    if shutil.which("unshare") is None or subprocess.run([*own, MOUNT], env=env).returncode:
        pytest.skip("may not mount a disk")
    return subprocess.run(
        [*own, f"{MOUNT}\n{script}"],
        env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@contextlib.contextmanager
def no_file_above(size):
    """Writes beyond it fail, in this process: `File too large`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
