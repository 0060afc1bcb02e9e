"""What a run writes down: `metrics.jsonl`, TensorBoard events, and the digest of its parameters."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from point_jax.training.config import write_atomically

FILE = "metrics.jsonl"


class MetricsError(ValueError):
    """A file of metrics that cannot be read, and where."""


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
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=restored_step + 1 if restored_step else None,
            flush_secs=10,
            # The name's time stamp counts seconds: two starts within one would share a file.
            filename_suffix=f".{os.getpid()}.{restored_step}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's values, in the order given."""
        line: dict[str, Any] = {"step": step}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        wrong = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            line["nonfinite"] = wrong
        self._line(line)

    def event(self, name: str, step: int, **values: str | float) -> None:
        """Writes a line `{"event": name, "step": step, ...}`."""
        self._line({"event": name, "step": step, **values})

    def _line(self, line: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(line, allow_nan=False) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Flushes and closes everything."""
        self._out.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none if there is no file, without an unfinished last one.

    Raises:
        MetricsError: a line is not one that a run wrote.
    """
    file = workdir / FILE
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
            int(parsed[-1]["step"])
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
