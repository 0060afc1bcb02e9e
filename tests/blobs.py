"""Labelled features that a linear layer can tell apart."""

import numpy as np

from point_jax.evaluation.features import LabelledArrays


def blobs(seed, scenes=6, rows=80, channels=5, classes=3, spread=0.5):
    """Features around a centre for each class, with large offsets and scales of the channels."""
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(classes, channels))
    offset, scale = draw.normal(size=channels) * 10, 10 ** draw.uniform(-2, 2, channels)
    pieces = []
    for _ in range(scenes):
        labels = draw.integers(-1, classes, rows).astype(np.int32)
        noise = draw.normal(size=(rows, channels)) * spread
        pieces.append((((centers[labels] + noise + offset) * scale).astype(np.float32), labels))
    return LabelledArrays(pieces)
