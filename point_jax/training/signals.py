"""SIGTERM and Ctrl-C: answered at once, noted for the loop to save and leave."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

SAME = 1.0  # seconds: some launchers send a signal to the process and again to its group


class StopWaiting(Exception):
    """A signal came while the process was waiting for something that it can do without."""


class Stops:
    """The signals that have come."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._waiting = False

    def __call__(self) -> int | None:
        """The number of the first one, or None."""
        return self._received[0] if self._received else None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a signal is raised.

        Raises:
            StopWaiting: one came.
        """
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def note(self, number: int, frame: object) -> None:
        """The signal handler."""
        del frame
        self._received.append(number)
        if self._waiting:
            self._waiting = False
            raise StopWaiting


@contextlib.contextmanager
def stop_signals(say: Callable[[str], object]) -> Iterator[Stops]:
    """Notes SIGTERM and Ctrl-C instead of ending; a second one ends the process at once.

    In a job of several processes JAX listens for SIGTERM itself, so that all processes stop after
    the same step; see `Checkpoints.must_stop`. Ctrl-C is passed on as such.

    Args:
        say: takes the answer to the person who pressed Ctrl-C.

    Yields:
        What has come; nothing ever in a job of several processes.
    """
    stops = Stops()
    if jax.process_count() > 1:
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        try:
            yield stops
        finally:
            signal.signal(signal.SIGINT, before)
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Python runs handlers between its own instructions, so not while XLA compiles for minutes. But
    # it writes the signal's number to this socket at once, and another thread can answer.
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)

    def answer() -> None:
        first = None
        while heard := ears.recv(1):  # empty when the other end is closed
            number = heard[0]
            if number not in before:
                continue
            if first is None:
                first = time.monotonic()
                say(f"{signal.Signals(number).name}: saves and stops after this step; "
                    "once more ends at once")  # fmt: skip
            elif time.monotonic() - first > SAME:
                print("error: ended at once, without saving", file=sys.stderr, flush=True)
                os._exit(128 + number)

    listener = threading.Thread(target=answer, name="stop signals", daemon=True)
    listener.start()
    woken = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, stops.note)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        mouth.close()
        listener.join()
        ears.close()
