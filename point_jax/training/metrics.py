"""What a run writes down: `metrics.jsonl`, TensorBoard events, and the digest of its parameters."""

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from point_jax.training.config import write_atomically

_proto: Any = event_pb2  # its classes are made at run time
FILE = "metrics.jsonl"
FLUSH = 10.0  # seconds from one writing of TensorBoard's events to the disk to the next


class MetricsError(ValueError):
    """A file of metrics that cannot be read or written, and where."""


class MetricsWriter:
    """Writes one JSON object a logged step to `metrics.jsonl`, and the same to TensorBoard.

    `step` is the number of steps done: the first step's object has `step` 1. JSON knows no NaN and
    no infinity: such a value is written as null and `"nonfinite": {name: "nan" | "inf" | "-inf"}`
    says which it was; TensorBoard gets the finite ones. Every line is flushed as it is written.
    """

    def __init__(self, workdir: Path, restored_step: int) -> None:
        """Opens the files of a run that goes on after `restored_step` (0: from the beginning).

        Lines of later steps and lines that a kill left unfinished are removed in one atomic
        replacement, so that each step appears once; TensorBoard is told to forget them.
        """
        self._file = workdir / FILE
        if self._file.exists():
            kept = [line for line in read_metrics(workdir) if line["step"] <= restored_step]
            write_atomically(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._out = self._file.open("a")
        self._board = _Board(workdir / "tensorboard", restored_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's values, in the order given.

        Raises:
            MetricsError: the line could not be written.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **{name: finite.get(name) for name in values}}
        if wrong := {name: str(value) for name, value in values.items() if name not in finite}:
            line["nonfinite"] = wrong
        self._line(line)
        with self._writing(self._board.folder):
            self._board.write(step, finite)

    def event(self, name: str, step: int, **values: str | float) -> None:
        """Writes a line `{"event": name, "step": step, ...}`."""
        self._line({"event": name, "step": step, **values})

    def _line(self, line: Mapping[str, Any]) -> None:
        with self._writing(self._file):
            if not self._file.exists():  # the open file would take the line, and nobody see it
                raise OSError(errno.ENOENT, "it was deleted while the run was writing to it")
            self._out.write(json.dumps(line, allow_nan=False) + "\n")
            self._out.flush()

    @contextlib.contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MetricsError(
                f"cannot write {place} ({error.strerror}); the checkpoints before are kept, and "
                "once the cause is removed the same command goes on from the newest"
            ) from error

    def close(self) -> None:
        """Flushes and closes everything."""
        for file in (self._out, self._board):
            with contextlib.suppress(OSError):  # `write` has told: every line is flushed there
                file.close()


class _Board:
    """Events for TensorBoard, written by the one who has them.

    tensorboardX's own writer does it in a thread, which a full disk ends without a word: the run
    then waits for ever for space in its queue.
    """

    def __init__(self, folder: Path, restored_step: int) -> None:
        self.folder, self._flushed = folder, time.monotonic()
        folder.mkdir(exist_ok=True)
        # The name's time stamp counts seconds: two starts within one would share a file.
        suffix = f".{os.getpid()}.{restored_step}"
        self._out = EventsWriter(str(folder / "events"), suffix)
        if restored_step:
            begin = _proto.SessionLog(status=_proto.SessionLog.START)
            self._out.write_event(_proto.Event(step=restored_step + 1, session_log=begin))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        for name, value in values.items():
            self._out.write_event(
                _proto.Event(step=step, wall_time=now, summary=scalar(name, value))
            )
        if time.monotonic() - self._flushed > FLUSH:
            self._out.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._out.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none if there is no file, without an unfinished last one.

    Raises:
        MetricsError: a line is not one that a run wrote.
    """
    file = workdir / FILE
    try:
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    except OSError as error:
        raise MetricsError(f"{file}: cannot be read ({error.strerror})") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
            if not isinstance(parsed[-1]["step"], int):
                raise TypeError(f"step is {parsed[-1]['step']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(
                f"{file}, line {number}: not a line of metrics ({error}); delete the line or move "
                "the file away"
            ) from error
    return parsed


def finished(workdir: Path) -> dict[str, Any] | None:
    """The `done` event of a run that has finished, otherwise None."""
    lines = read_metrics(workdir)
    return lines[-1] if lines and lines[-1].get("event") == "done" else None


def params_digest(trees: Mapping[str, Any]) -> str:
    """SHA-256 over the parameters, in hexadecimal: equal exactly when all bits are.

    Fed in the order of the sorted paths (`student/backbone/...`), each leaf as path, dtype, shape
    and bytes in C order.

    Args:
        trees: nested dicts of arrays, e.g. `{"student": ..., "teacher": ...}`.
    """
    digest = hashlib.sha256()
    leaves = {
        "/".join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    for path, leaf in sorted(leaves.items()):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
