"""Whatever gives each voxel of a cloud the probabilities of its classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from point_jax.evaluation.features import Extractor
from point_jax.features.voxels import Voxels


class Predictor(Protocol):
    """Predicts clouds that are voxels already, one by one, in their order."""

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        ...

    @property
    def extractor(self) -> Extractor:
        """Gives the features that it reads."""
        ...

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, K) float32 of each cloud: probabilities of the classes, each row sums to 1."""
        ...


@dataclass(frozen=True)
class LinearPredictor:
    """A linear layer over features that stay as they are.

    Attributes:
      extractor: gives the features (V, C) float32 of a cloud's voxels.
      kernel: (C, K) float32.
      bias: (K,) float32.

    Raises:
      ValueError: arrays whose shapes do not fit together.
    """

    extractor: Extractor
    kernel: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        channels = self.extractor.channels
        if self.kernel.ndim != 2 or len(self.kernel) != channels or not self.kernel.size:
            raise ValueError(
                f"kernel has shape {self.kernel.shape}, expected ({channels}, classes) for the "
                "extractor's channels"
            )
        if self.bias.shape != self.kernel.shape[1:]:
            raise ValueError(
                f"bias has shape {self.bias.shape}, expected ({self.classes},) for kernel "
                f"{self.kernel.shape}"
            )

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return self.kernel.shape[1]

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, K) float32 of each cloud, see `Predictor`."""
        for features in self.extractor(clouds):
            yield _softmax(features @ self.kernel + self.bias)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """(V, K) float32."""
    powers = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float32))
    return powers / powers.sum(1, keepdims=True)
