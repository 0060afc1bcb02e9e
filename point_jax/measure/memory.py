"""Peak memory of a call above what was in use before it."""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

Result = TypeVar("Result")
_PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """Memory above what was in use before a call.

    Attributes:
      size: bytes; None if nothing here can tell.
      how: it was measured.
    """

    size: int | None
    how: str


def measure_peak(call: Callable[[], Result], device: Any) -> tuple[Result, Peak]:
    """Runs `call`, waits for what it returns, and tells the memory of a device at its peak.

    An accelerator's allocator counts its own bytes. Elsewhere it is the resident set of this
    process: its high-water mark where the system lets a process reset that (Linux), else samples of
    it, taken every millisecond.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        result = jax.block_until_ready(call())
        after = device.memory_stats() or {}
        peak = after["peak_bytes_in_use"]
        # The allocator's mark cannot be reset: an earlier call may have set it.
        how = "allocator" if peak > stats["peak_bytes_in_use"] else "allocator, at most"
        return result, Peak(peak - stats["bytes_in_use"], how)
    _give_back()
    before = _status("VmRSS")
    if before is None:
        return jax.block_until_ready(call()), Peak(None, "not known on this platform")
    if _reset_high_water():
        result = jax.block_until_ready(call())
        return result, Peak((_status("VmHWM") or 0) - before, "resident set, high-water mark")
    with _Sampler() as sampler:
        result = jax.block_until_ready(call())
    return result, Peak(sampler.most - before, "resident set, sampled")


def _give_back() -> None:
    """Returns freed memory to the system (glibc), so that reusing it counts."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _status(name: str) -> int | None:
    """Bytes of an entry of /proc/self/status; None where there is none."""
    try:
        text = (_PROCESS / "status").read_text()
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None


def _reset_high_water() -> bool:
    """Sets the high-water mark of the resident set to what is in use; whether that worked."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    now, mark = _status("VmRSS"), _status("VmHWM")
    return now is not None and mark is not None and mark - now < 8 << 20


class _Sampler:
    """Looks at the resident set every millisecond from a thread of its own."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, _status("VmRSS") or 0)
            time.sleep(0.001)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
