"""The processes of a job watch over one another, so that none waits for one that is gone.

JAX ends a job when a process of it vanishes: its heartbeats stay away for `HEARTBEAT`, and all
others abort. Of an exception it knows nothing: the process that failed leaves, the others wait for
it in a sum over all devices. So a process that fails says why in the job's key-value store; the
others read it there, say it, and leave too.
"""

import atexit
import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the store has no public name; Orbax reaches it here, too

HEARTBEAT = 40  # seconds without a sign of life after which JAX ends the job
PERIOD = 2.0  # seconds from one look into the store to the next
SILENT = 20.0  # seconds after which the first process names the one that it does not hear
GRACE = 3.0  # seconds that a process has to end by itself once another has failed
LONGEST = 2_000  # characters of a message
FAILED, HEARD = "point_jax/failed/", "point_jax/heard/"
ALIVE, DONE = "point_jax/alive/", "point_jax/done"
LONG = 10**9  # milliseconds, twelve days: of processes that are gone the watch and JAX know sooner
ALONE = 134  # exit code of who has lost the first process: that of JAX's abort, for schedulers

_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")

_leaving = threading.Event()  # this process ends, in one way or another: nobody else need end it


def watch() -> None:
    """Watches the other processes from a thread of this one; alone, it does nothing.

    Call it right after `jax.distributed.initialize`, once. At its end a process waits for all
    others, still watching, so that JAX's own end finds all of them ready.
    """
    if jax.distributed.is_initialized():
        thread = threading.Thread(target=_watch, args=(_store(),), name="peers", daemon=True)
        thread.start()
        atexit.register(_finish, thread)  # runs before JAX's own end


def which_process() -> str:
    """For messages: " of process 3 of 8 on HOST"; nothing where there is only one."""
    if not jax.distributed.is_initialized():
        return ""
    number, processes = _job()
    return f" of process {number} of {processes} on {socket.gethostname()}"


def say(text: str, kind: str = "error") -> None:
    """One line on stderr that names this process; nothing where nobody can be told."""
    with contextlib.suppress(OSError, ValueError):
        line = f"{kind}{which_process()}: {' '.join(text.split())}"
        print(line, file=sys.stderr, flush=True)


def leave(error: BaseException, message: str, code: int) -> None:
    """Tells the other processes that this one has failed, and ends it; alone, it does nothing.

    It ends without JAX's usual end, which would wait for all of them. The first process, which
    holds the store, is the last to go.

    Args:
        error: what failed. One of JAX's own, or caused by it, may come from a sum whose other half
            was killed: JAX then has its time to notice, and ends this process with the code that
            says so.
        message: why.
        code: the exit code.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        if _may_be_another(error):
            time.sleep(HEARTBEAT + PERIOD)
        _leaving.set()
        number, processes = _job()
        store, text = _store(), message[:LONGEST].encode("utf-8", "replace").decode()
        told = f"{code} {socket.gethostname()} {text}"
        store.key_value_set(f"{FAILED}{number}", told, allow_overwrite=True)
        deadline = time.monotonic() + HEARTBEAT
        while time.monotonic() < deadline:
            gone = {one for one, _ in (*_read(store, HEARD), *_read(store, FAILED))} - {number}
            if len(gone) == processes - 1:
                break
            time.sleep(0.1)
        # Nobody shall lose this process before it has left itself, least of all the first one.
        time.sleep(GRACE + PERIOD * (2 if number == 0 else 0.5))
    finally:  # whatever happens: the first process may be gone, and with it the store
        end(code)


def _may_be_another(error: BaseException | None) -> bool:
    """Whether an error may come from another process that is gone."""
    while error is not None:
        text = str(error)
        # A sum that breaks while it is dispatched is a ValueError with XLA's status as its text.
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(text):
            return "RESOURCE_EXHAUSTED" not in text  # memory is this process's own
        error = error.__cause__ or error.__context__
    return False


def _finish(thread: threading.Thread) -> None:
    """Waits for all processes to come to their end; the watch ends this one if another fails."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().wait_at_barrier(DONE, LONG)
    _leaving.set()
    thread.join(HEARTBEAT)


def _watch(store: Any) -> None:
    """Looks into the store until this process ends or must end because of another."""
    number, processes = _job()
    # Process -> its last sign, when, whether named. One may be gone before it has given any.
    heard = {one: ("", time.monotonic(), False) for one in range(processes) if one != number}
    for sign in itertools.count(1):
        try:
            text = f"{socket.gethostname()} {sign}"
            store.key_value_set(f"{ALIVE}{number}", text, allow_overwrite=True)
            failed = [one for one in _read(store, FAILED) if one[0] != number]
            if failed:
                store.key_value_set(f"{HEARD}{number}", "", allow_overwrite=True)
            elif number == 0:
                _name_the_silent(store, heard, processes)
        except jax.errors.JaxRuntimeError:
            if not _leaving.wait(GRACE):
                say("process 0 cannot be reached: it was killed, or its host is down")
                end(ALONE)
            return
        if failed:
            if not _leaving.wait(GRACE):
                say("; ".join(_failure(*one) for one in failed))
                if number == 0:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # how sums fail without the others
                    time.sleep(2 * PERIOD)
                end(int(failed[0][1].partition(" ")[0]))
            return
        if _leaving.wait(PERIOD):
            return


def _name_the_silent(store: Any, heard: dict[int, tuple[str, float, bool]], processes: int) -> None:
    """Says which processes have given no sign for `SILENT` seconds; keeps `heard` up to date."""
    now = time.monotonic()
    for one, sign in _read(store, ALIVE):
        if one in heard and heard[one][0] != sign:
            heard[one] = sign, now, False
    for one, (sign, since, named) in heard.items():
        if now - since > SILENT and not named:
            heard[one] = sign, since, True
            host = f" on {sign.partition(' ')[0]}" if sign else ""
            say(
                f"process {one} of {processes}{host} has given no sign for "
                f"{SILENT:.0f} s; if it was killed, or its host is down, the job ends within "
                f"{HEARTBEAT - SILENT:.0f} s",
                "warning",
            )


def _failure(process: int, told: str) -> str:
    _, host, why = told.split(" ", 2)
    return f"process {process} on {host} failed: {why}"


def _job() -> tuple[int, int]:
    """This process's number, and how many there are; touches no device."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def _store() -> Any:
    """The job's key-value store, kept by the first process."""
    return distributed.global_state.client


def _read(store: Any, folder: str) -> Iterator[tuple[int, str]]:
    """What processes have written under a name of the store: their numbers and texts."""
    for key, value in store.key_value_dir_get(folder):
        yield int(key.rpartition("/")[2]), value


def end(code: int) -> NoReturn:
    """Ends this process at once, whatever its threads are waiting for."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
