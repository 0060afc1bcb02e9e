"""What values a setting may have: declared in a table beside it, checked in one place."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """A test of a value, and how to put it in words: "expected {words}"."""

    holds: Callable[[Any], bool]
    words: str


def number(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Limit:
    """A finite number, least <= number <= most, above < number < below."""
    return Limit(
        lambda value: _is(value, Real) and least <= value <= most and above < value < below,
        "a number" + _between(least, most, above, below),
    )


def whole(least: float = -math.inf, most: float = math.inf) -> Limit:
    """A whole number, least <= number <= most."""
    return Limit(
        lambda value: _is(value, Integral) and least <= value <= most,
        "a whole number" + _between(least, most),
    )


def each(limit: Limit, *names: str, rising: bool = False) -> Limit:
    """A tuple or list of such values: one for each name, or any number of them if there is none.

    Args:
        limit: of each value.
        names: say what the values are, in the error.
        rising: whether no value may be less than the one before it.
    """

    def holds(value: Any) -> bool:
        return (
            isinstance(value, (tuple, list))
            and len(value) == (len(names) or len(value))
            and all(map(limit.holds, value))
            and not (rising and sorted(value) != list(value))
        )

    words = f"({', '.join(names)})" if names else "several values, as in (a, b)"
    words += f" with {' <= '.join(names)}" if rising else ""
    return Limit(holds, f"{words}, each {limit.words}")


def text(empty: bool = True) -> Limit:
    """A string."""
    return Limit(
        lambda value: isinstance(value, str) and (empty or value != ""),
        "a text in quotes" + ("" if empty else " that is not empty"),
    )


def one_of(*values: str) -> Limit:
    """One of some words."""
    return Limit(
        lambda value: isinstance(value, str) and value in values,
        " or ".join(map(repr, values)),
    )


def either(*limits: Limit) -> Limit:
    """Any of several."""
    return Limit(
        lambda value: any(limit.holds(value) for limit in limits),
        " or ".join(limit.words for limit in limits),
    )


def check(values: Mapping[str, Any], limits: Mapping[str, Limit], place: str = "") -> None:
    """Compares values with the limits of the same names.

    Args:
        values: of dataclasses `vars(self)`, of config sections the section.
        limits: a table; its names are checked if `values` has them.
        place: comes before the name in the error, e.g. "config.views.".

    Raises:
        ValueError: the first value that does not fit, what it is and what was expected.
    """
    for name, limit in limits.items():
        if name in values and not limit.holds(values[name]):
            raise ValueError(f"{place}{name} is {values[name]!r}, expected {limit.words}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _between(least: float, most: float, above: float = -math.inf, below: float = math.inf) -> str:
    if math.isfinite(least) and math.isfinite(most):
        return f" from {least} to {most}"
    words = {"at least": least, "above": above, "at most": most, "below": below}
    said = [f"{word} {bound}" for word, bound in words.items() if math.isfinite(bound)]
    return f" {' and '.join(said)}" if said else ""


NOTHING = Limit(lambda value: value is None, "None")
PROBABILITY = number(0, 1)
SWITCH = Limit(lambda value: isinstance(value, bool), "True or False")
MAPPING = Limit(lambda value: isinstance(value, Mapping), "a dict as in {'name': value}")
