"""Where tests find the optional golden arrays and scans beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """`../shared/<path>` as seen from the project's root; skips the test when it is missing."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"needs ../shared/{path}, which is not here")
    return file
