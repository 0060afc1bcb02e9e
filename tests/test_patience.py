"""Waiting for batches has a limit, names what is being read, and leaves nothing behind."""

import gc
import itertools
import threading
import time

import pytest

from point_jax.data import patience
from point_jax.data.patience import HangingInput, Patient, Reading


class Batches:
    """0, 1, ...; waits for ever before batch `hangs`, fails at batch `fails`."""

    def __init__(self, hangs=-1, fails=-1):
        self.hangs, self.fails, self.numbers, self.closed = hangs, fails, itertools.count(), False

    def __next__(self):
        number = next(self.numbers)
        if number == self.hangs:
            threading.Event().wait()
        if number == self.fails:
            raise KeyError("scene_7")
        return number

    def close(self):
        self.closed = True


def threads():
    return sum(thread.name == "batches" for thread in threading.enumerate())


def soon(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_batches_come_in_their_order_and_close_ends_everything():
    before, batches = threads(), Batches()
    patient = Patient(batches, 10.0, str)
    assert [next(patient) for _ in range(5)] == [0, 1, 2, 3, 4]
    patient.close()
    assert batches.closed and soon(lambda: threads() == before)


def test_errors_come_through_and_the_next_batch_after_them():
    patient = Patient(Batches(fails=1), 10.0, str)
    assert next(patient) == 0
    with pytest.raises(KeyError, match="scene_7"):
        next(patient)
    assert next(patient) == 2
    patient.close()


def test_a_batch_that_does_not_come_is_told_of_and_ends_the_waiting(monkeypatch, caplog):
    monkeypatch.setattr(patience, "NOTICE", 0.1)
    batches, reading = Batches(hangs=1), Reading()
    patient = Patient(batches, 0.35, lambda: str(reading))
    assert next(patient) == 0
    with reading("scans/kitchen"), pytest.raises(HangingInput, match="scans/kitchen for 0 s"):
        next(patient)
    assert 2 <= len(caplog.messages) <= 3
    assert all("waiting for a batch" in line for line in caplog.messages)
    patient.close()  # does not wait, and does not touch what hangs
    assert not batches.closed


def test_nobody_need_close_it():
    before = threads()
    patient = Patient(Batches(), 10.0, str)
    next(patient)
    assert threads() == before + 1
    del patient
    gc.collect()
    assert soon(lambda: threads() == before)


def test_what_is_being_read_is_named_the_oldest_first():
    reading = Reading()
    assert str(reading) == "no scene is being read"
    names = [f"scene_{i}" for i in range(6)]
    with reading(names[0]), reading(names[1]):
        assert str(reading) == "being read: scene_0 for 0 s, scene_1 for 0 s"
        with reading("a"), reading("b"), reading("c"):
            assert str(reading).endswith("a for 0 s, b for 0 s and 1 more")
    assert str(reading) == "no scene is being read"
