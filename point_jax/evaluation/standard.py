"""Features channel by channel in units of their spread, so that probes do not depend on scales."""

from dataclasses import dataclass

import numpy as np

CONSTANT = 1e-5  # of a channel's size: spreads below are float32's rounding


@dataclass(frozen=True)
class Standard:
    """Less the mean, over the standard deviation.

    Attributes:
      mean: (C,) float32.
      inverse: (C,) float32, one over the standard deviation; 0 for channels that do not vary.
    """

    mean: np.ndarray
    inverse: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Standard":
        """By the mean and standard deviation of features (n, C)."""
        mean, spread = features.mean(0, np.float64), features.std(0, dtype=np.float64)
        alive = spread > CONSTANT * np.sqrt(mean**2 + spread**2)
        inverse = np.where(alive, 1 / np.where(alive, spread, 1), 0)
        return Standard(mean.astype(np.float32), inverse.astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, C) float32 standardised features; 0 in channels that do not vary."""
        return (features - self.mean) * self.inverse
