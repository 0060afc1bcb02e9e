"""Loops that run as often as a row has points."""

import contextlib

import jax


def planned(times: int) -> contextlib.AbstractContextManager[object]:
    """Scope of one `fori_loop` or `while_loop` that runs up to `times` times, for a full row.

    How often it runs is in the data; a program planned for a machine that is not there
    (`measure.cost`) reads here how often at most. It changes nothing else.
    """
    return jax.named_scope(f"planned_{times}")
