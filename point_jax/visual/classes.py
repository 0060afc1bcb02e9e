"""Colours of classes, and the key that says which is which."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GOLDEN = 0.61803399  # turns of the hue from one class to the next: no two of a few are alike


def class_colors(classes: int) -> np.ndarray:
    """(classes, 3) uint8: hues spread evenly however many there are, light and dark in turn."""
    shades = ((0.55, 0.95), (0.85, 0.65))  # saturation, value
    colors = [colorsys.hsv_to_rgb(i * GOLDEN % 1, *shades[i % 2]) for i in range(classes)]
    return np.rint(255 * np.array(colors).reshape(-1, 3)).astype(np.uint8)


class KeyEntry(NamedTuple):
    """A class in a picture's key: its name, (r, g, b) in 0-255, and its share of the points."""

    name: str
    color: tuple[int, int, int]
    share: float


def class_key(
    segments: Sequence[np.ndarray], names: Sequence[str], colors: np.ndarray
) -> list[KeyEntry]:
    """The classes that occur, the most frequent first.

    Args:
        segments: of each cloud (n,) integers, classes of its points.
        names: of the classes.
        colors: (classes, 3) uint8.
    """
    counts = np.bincount(np.concatenate(segments), minlength=len(names))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    shares = counts / counts.sum()
    return [KeyEntry(names[i], tuple(colors[i].tolist()), float(shares[i])) for i in order]


def share_text(share: float) -> str:
    """A share in whole percent; "<1 %" for less than one."""
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"
