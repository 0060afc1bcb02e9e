"""Schedules: golden values of the original's recipe, and the ends of short runs."""

import itertools

import numpy as np
import pytest
from shared_files import shared

from point_jax.training.config import default_config
from point_jax.training.schedules import one_cycle, sonata_schedule, warmup_cosine


@pytest.fixture(scope="module")
def golden():
    return np.load(shared("golden/j_schedules.npz"))


@pytest.fixture(scope="module")
def values():
    """The base recipe over 1,000 steps and a few past the end, name -> array."""
    schedule = sonata_schedule(default_config(), 1000)
    rows = [schedule(step) for step in range(1005)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("mask_size", "mask_size"),
        ("mask_ratio", "mask_ratio"),
        ("teacher_temp", "teacher_temp"),
        ("momentum", "momentum"),
        ("wd", "weight_decay"),
    ],
)
def test_cosines_equal_golden(golden, values, ours, theirs):
    np.testing.assert_allclose(values[ours], golden[theirs], rtol=1e-6)


def test_one_cycle_equals_golden(golden, values):
    np.testing.assert_allclose(values["lr"][:1000], golden["lr"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(values["beta1"][:1000], golden["betas"][:, 0], rtol=1e-6)
    assert values["beta1"].min() == pytest.approx(0.85, abs=1e-12)


def test_float32_keeps_the_golden_precision(golden, values):
    """The step gets float32 scalars; that alone must not break the tolerance."""
    lr = values["lr"][:1000].astype(np.float32)
    np.testing.assert_allclose(lr, golden["lr"][:, 0], rtol=1e-6)


def test_the_end_keeps_its_value(values):
    for name in ("lr", "beta1", "mask_size", "momentum"):
        assert len(set(values[name][1000:])) == 1, name
    assert values["momentum"][1000] == 1.0


def test_warm_up_is_a_line_that_reaches_the_base_on_its_last_step():
    ends = {"start": 1.0, "base": 3.0, "final": 3.0}
    line = [warmup_cosine(step, 10, warmup=5, **ends) for step in range(10)]
    np.testing.assert_allclose(line, [1, 1.5, 2, 2.5, 3, 3, 3, 3, 3, 3])
    assert warmup_cosine(0, 10, warmup=1, **ends) == 1.0  # a line of one step stands at its start


@pytest.mark.parametrize("total", [*range(1, 45), 100])
def test_runs_of_any_length_stay_within_bounds(total):
    """pct_start * total - 1 is negative, zero or no integer in short runs."""
    schedule = sonata_schedule(default_config(), total)
    rows = [schedule(step) for step in range(total)]
    rates = [row["lr"] for row in rows]
    assert all(4e-7 * (1 - 1e-9) <= rate <= 0.004 for rate in rates)
    assert all(0.85 - 1e-12 <= row["beta1"] <= 0.95 for row in rows)
    assert rates[-1] == pytest.approx(4e-7)
    after = rates[rates.index(max(rates)) :]
    assert all(a > b for a, b in itertools.pairwise(after))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_cycle_may_only_fall_or_only_rise(share):
    rates = [one_cycle(s, 8, pct_start=share, start=0.1, peak=1.0, end=0.01) for s in range(8)]
    assert rates[-1] == pytest.approx(1.0 if share else 0.01)
    assert rates == sorted(rates, reverse=not share)
