"""Features made small enough to travel in a page, with cosines that stay nearly right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from point_jax.visual.similarity import unit_rows

BYTES = 8_000_000  # of all codes of a page together
WIDTHS = (16, 64)  # fewest and most components
SAMPLE = 32_768


@dataclass(frozen=True)
class CosineCodes:
    """Unit features on their principal directions, one byte each.

    The cosine of two features is about the inner product of `offset + scale * code`.

    Attributes:
        codes: for each cloud (m, K) uint8.
        offset: (K,) float32.
        scale: (K,) float32.
        error: largest difference from the true cosine that 95 % of sampled pairs stay below.
        worst: largest difference of all sampled pairs.
    """

    codes: list[NDArray[np.uint8]]
    offset: NDArray[np.float32]
    scale: NDArray[np.float32]
    error: float
    worst: float

    def decode(self, cloud: int) -> NDArray[np.float32]:
        """(m, K) float32 what the codes of a cloud stand for."""
        return (self.offset + self.scale * self.codes[cloud]).astype(np.float32)


def cosine_codes(features: Sequence[NDArray], width: int | None = None) -> CosineCodes:
    """Codes of the features of one or more clouds, comparable with one another.

    The directions are the leading ones of the second moment of the unit features, not of their
    covariance: they keep inner products and not differences, and cosines are not centred.

    Args:
        features: for each cloud (m, E).
        width: components to keep; by default as many of 16 to 64 as fit into `BYTES`.

    Returns:
        The codes, with the error measured on pairs drawn evenly from all clouds.
    """
    total = sum(map(len, features))
    if width is None:
        width = int(np.clip(BYTES // max(total, 1), *WIDTHS))
    every = -(-total // SAMPLE)
    sample = np.concatenate([unit_rows(rows[::every]) for rows in features]).astype(np.float64)
    _, vectors = np.linalg.eigh(sample.T @ sample)
    basis = vectors[:, ::-1][:, :width].astype(np.float32)
    reduced = [_project(rows, basis) for rows in features]
    low = np.min([rows.min(axis=0) for rows in reduced], axis=0)
    high = np.max([rows.max(axis=0) for rows in reduced], axis=0)
    scale = np.maximum(high - low, 1e-12) / 255
    codes = [np.rint((rows - low) / scale).astype(np.uint8) for rows in reduced]
    result = CosineCodes(codes, low, scale, 0.0, 0.0)
    decoded = np.concatenate([result.decode(i)[::every] for i in range(len(codes))])
    picks = np.linspace(0, len(sample) - 1, min(256, len(sample))).astype(np.int64)
    off = np.abs(decoded[picks] @ decoded.T - sample[picks] @ sample.T)
    off[np.arange(len(picks)), picks] = 0.0  # the page knows that a feature equals itself
    return CosineCodes(codes, low, scale, float(np.quantile(off, 0.95)), float(off.max()))


def _project(rows: NDArray, basis: NDArray[np.float32]) -> NDArray[np.float32]:
    blocks = [unit_rows(rows[i : i + 8_192]) @ basis for i in range(0, len(rows), 8_192)]
    return np.concatenate(blocks)
