"""Colours of classes."""

import colorsys

import numpy as np

GOLDEN = 0.61803399  # turns of the hue from one class to the next: no two of a few are alike


def class_colors(classes: int) -> np.ndarray:
    """(classes, 3) uint8: hues spread evenly however many there are, light and dark in turn."""
    shades = ((0.55, 0.95), (0.85, 0.65))  # saturation, value
    colors = [colorsys.hsv_to_rgb(i * GOLDEN % 1, *shades[i % 2]) for i in range(classes)]
    return np.rint(255 * np.array(colors).reshape(-1, 3)).astype(np.uint8)
