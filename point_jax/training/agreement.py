"""What the processes of a job must have in common, looked at before they rely on it.

Each starts with a command line and a folder of its own. Where these differ nothing fails by
itself: replicas drift apart without a word, and a save waits for parts that lie elsewhere.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from point_jax.training.config import Config, ConfigError, differences, resolved

SEEN = ".processes"  # what the first process writes for the others to find
PATIENCE = 90.0  # seconds: network disks keep what a folder held for up to a minute


def everybody_knows(fact: bool) -> bool:
    """What the first process has found; the folder of its files may be on its machine alone."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.broadcast_one_to_all(np.int32(fact)))


def check_command(config: Config) -> None:
    """Compares the config and the versions of packages with those of the first process.

    All processes call it; alone, it does nothing.

    Raises:
        ConfigError: they differ; names the keys.
    """
    if jax.process_count() == 1:
        return
    mine = resolved(config)
    firsts = _of_first(mine)
    for part, what in (("config", "another config"), ("versions", "other packages")):
        changed = differences(firsts[part], mine[part])
        changed.pop("python", None)  # its patches change no number
        if changed:
            raise ConfigError(
                f"process {jax.process_index()} has {what} than process 0 "
                f"({'; '.join(changed.values())}); all processes of a job need the same command "
                "and the same packages"
            )


def check_folder(workdir: Path) -> None:
    """Looks whether all processes see the folder that the first one writes to.

    All processes call it, the first once the folder is there; alone, it does nothing.

    Raises:
        ConfigError: this one does not see it.
    """
    if jax.process_count() == 1:
        return
    token = _of_first(secrets.token_hex(8))
    file, deadline = workdir / SEEN, time.monotonic() + PATIENCE
    if jax.process_index() == 0:
        file.write_text(token)
    while not _holds(file, token):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir={workdir}: process {jax.process_index()} does not see there what "
                "process 0 has written; all processes need a folder on a disk that they share, or "
                "one in an object store"
            )
        time.sleep(0.2)
    everybody_knows(True)  # here all have seen it
    if jax.process_index() == 0:
        file.unlink()


def _holds(file: Path, token: str) -> bool:
    try:
        return file.read_text() == token
    except OSError:
        return False


def _of_first(value: Any) -> Any:
    """The JSON value that the first process gives."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, length)  # all need one shape; the first one's is what arrives
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
