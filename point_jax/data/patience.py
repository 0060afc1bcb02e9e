"""A limit to waiting for batches: a disk that hangs ends the run and is named, not waited for."""

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from point_jax.data.checks import SceneError

NOTICE = 60.0  # seconds of waiting from one warning to the next
SHOWN = 4  # names in a message

log = logging.getLogger(__name__)


class HangingInput(SceneError):
    """No batch came for too long. A thread of this process still waits for it."""


class Reading:
    """What threads are reading at the moment."""

    def __init__(self) -> None:
        self._since: dict[object, tuple[float, str]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, `name` is being read."""
        token = object()
        self._since[token] = time.monotonic(), name
        try:
            yield
        finally:
            del self._since[token]

    def __str__(self) -> str:
        """Names and seconds, the oldest first."""
        there = sorted(self._since.values())
        if not there:
            return "no scene is being read"
        told = [f"{name} for {time.monotonic() - since:.0f} s" for since, name in there[:SHOWN]]
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        return f"being read: {', '.join(told)}{more}"


class Patient:
    """An iterator over another one's batches that waits for each of them for a limited time.

    A thread takes them, one when one is asked for.
    """

    def __init__(self, batches: Any, limit: float, reading: Callable[[], str]):
        """Takes over an iterator.

        Args:
            batches: has `close()`.
            limit: seconds.
            reading: what to say of the reason.
        """
        self._batches, self._limit, self._reading = batches, limit, reading
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._waiting = False
        # The thread knows nothing of this object, and ends with it when nobody has closed it.
        queues = self._asked, self._given
        threading.Thread(target=_take, args=(batches, *queues), name="batches", daemon=True).start()
        weakref.finalize(self, self._asked.put, False)

    def __iter__(self) -> "Patient":
        return self

    def __next__(self) -> Any:
        """The next batch, or what the other iterator raises.

        Raises:
            HangingInput: there is none within the limit.
        """
        self._asked.put(True)
        self._waiting = True
        since = time.monotonic()
        while True:
            left = since + self._limit - time.monotonic()
            try:
                batch, error = self._given.get(timeout=max(0.0, min(left, NOTICE)))
            except queue.Empty:
                waited = time.monotonic() - since
                if waited >= self._limit:
                    raise HangingInput(
                        f"no batch for {waited:.0f} s ({self._reading()}): the disk or the network "
                        "hangs, or is slower than config.data.patience allows"
                    ) from None
                log.warning("waiting for a batch for %.0f s; %s", waited, self._reading())
                continue
            self._waiting = False
            if error is not None:
                raise error
            return batch

    def close(self) -> None:
        """Ends the thread, and the other iterator, unless a batch of it is still waited for."""
        self._asked.put(False)
        if not self._waiting:
            self._batches.close()


def _take(batches: Any, asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    while asked.get():
        try:
            given.put((next(batches), None))
        except BaseException as error:
            given.put((None, error))
