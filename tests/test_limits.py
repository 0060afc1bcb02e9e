"""Limits: which values pass, and how the others are named."""

import numpy as np
import pytest

from point_jax import limits


@pytest.mark.parametrize(
    ("limit", "fits", "does_not"),
    [
        (limits.number(), (0, -2.5, np.float32(1)), (np.nan, np.inf, "1", None, True, (1,))),
        (limits.number(0, 1), (0, 1, 0.5), (-1e-9, 1.1)),
        (limits.number(above=0, below=1), (0.5,), (0, 1)),
        (limits.whole(1), (1, np.int32(7)), (0, 1.0, True)),
        (limits.each(limits.whole(0)), ((), (1,), [1, 2]), (1, (-1,), "12")),
        (limits.each(limits.number(), "low", "high"), ((1, 0),), ((1,), (1, 2, 3))),
        (limits.each(limits.number(), "low", "high", rising=True), ((0, 0), (0, 1)), ((1, 0),)),
        (limits.text(empty=False), ("a",), ("", 5)),
        (limits.one_of("a", "b"), ("a", "b"), ("ab", "", None, 1)),
        (limits.either(limits.NOTHING, limits.whole(1)), (None, 1), (0, "")),
        (limits.MAPPING, ({},), ((), 5)),
    ],
)
def test_what_fits(limit, fits, does_not):
    assert [value for value in fits if not limit.holds(value)] == []
    assert [value for value in does_not if limit.holds(value)] == []


def test_the_error_names_the_key_the_value_and_what_was_expected():
    table = {
        "size": limits.number(above=0),
        "range": limits.each(limits.number(0, 1), "low", "high", rising=True),
        "absent": limits.whole(),
    }
    limits.check({"size": 1, "range": (0, 1), "other": "anything"}, table)
    with pytest.raises(ValueError) as caught:
        limits.check({"size": -1}, table, "config.views.")
    assert str(caught.value) == "config.views.size is -1, expected a number above 0"
    with pytest.raises(ValueError) as caught:
        limits.check({"range": (1, 0)}, table)
    assert "(low, high) with low <= high, each a number from 0 to 1" in str(caught.value)
