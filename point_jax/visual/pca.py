"""PCA colours of point features, with the brightness convention of the Sonata release.

The release's demo colours a scene like this: six principal components; the first three weigh 0.6
and the next three 0.4, so that one channel shows two components; each channel is stretched to
[0, 1] between its smallest and largest value, multiplied by a brightness above one, and clipped.
There the components come from a randomised SVD, so colours change with the seed and the machine.
Here they come from an exact eigendecomposition with the signs fixed by the data, so the same
features always have the same colours, and so do rotated, mirrored, shifted or scaled ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

COMPONENTS = 6
MIX = (0.6, 0.4)  # weights of components 1-3 and 4-6 in the three channels
BRIGHTNESS = 1.25
FIT_POINTS = 32_768  # the covariance of more points than this is taken from every k-th of them
BLOCK = 8_192  # points projected at a time, so that wide features are never copied whole


@dataclass(frozen=True)
class PcaColors:
    """A map from features to colours; one fitted on several scenes makes their colours comparable.

    Attributes:
        mean: (E,) float64, subtracted from the features.
        basis: (E, 3) float64, from centred features to the three channels before stretching.
        low: (3,) float64, what becomes black.
        high: (3,) float64, what becomes 1 / brightness of the way to clipping.
        brightness: stretched channels are multiplied by this, then clipped to [0, 1].
    """

    mean: NDArray[np.float64]
    basis: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    brightness: float

    def __call__(self, features: ArrayLike) -> NDArray[np.float32]:
        """Colours of features: (n, E) -> (n, 3) float32 in [0, 1]."""
        channels = _project(_checked(features), self.mean, self.basis)
        span = self.high - self.low
        stretched = (channels - self.low) / np.where(span > 0, span, 1.0)
        stretched = np.where(span > 0, stretched, 0.0)  # features that do not differ are black
        return np.clip(stretched * self.brightness, 0.0, 1.0).astype(np.float32)


def fit_pca_colors(
    features: ArrayLike | list[ArrayLike],
    *,
    brightness: float = BRIGHTNESS,
    saturate: float = 0.0,
) -> PcaColors:
    """Fits PCA colours to the features of one scene, or jointly to those of several.

    Args:
        features: (n, E) of one scene, or a list of (n_i, E); any float dtype, finite.
        brightness: factor on the stretched channels before clipping; the release uses 1.2-1.25.
        saturate: share of the points at each end of a channel that the stretch may push out of
            range. 0 is the release's minimum and maximum; 0.005 keeps a few outliers from
            taking most of the contrast.

    Returns:
        The map from features to colours.

    Raises:
        ValueError: features are not (n, E) with n >= 1, differ in E, or are not finite.
    """
    if not 0.0 <= saturate < 0.5:
        raise ValueError(f"saturate is a share of the points in [0, 0.5), got {saturate}")
    clouds = [_checked(scene) for scene in (features if isinstance(features, list) else [features])]
    if len({cloud.shape[1] for cloud in clouds}) != 1:
        widths = [cloud.shape[1] for cloud in clouds]
        raise ValueError(f"scenes of a joint PCA need features of one width, got widths {widths}")
    every = -(-sum(map(len, clouds)) // FIT_POINTS)
    sample = np.concatenate([cloud[::every] for cloud in clouds]).astype(np.float64)
    mean = sample.mean(axis=0)
    centred = sample - mean
    components = _principal_components(centred)  # (E, 6)
    basis = MIX[0] * components[:, :3] + MIX[1] * components[:, 3:]
    channels = np.concatenate([_project(cloud, mean, basis) for cloud in clouds])
    if saturate:
        low, high = np.quantile(channels, [saturate, 1.0 - saturate], axis=0)
    else:
        low, high = channels.min(axis=0), channels.max(axis=0)
    # A spread that is only rounding error of the features must not be stretched to full colour.
    noise = 1e-6 * float(np.abs(sample).max())
    high = np.where(high - low > noise, high, low)
    return PcaColors(mean, basis, low, high, brightness)


def pca_colors(
    features: ArrayLike, *, brightness: float = BRIGHTNESS, saturate: float = 0.0
) -> NDArray[np.float32]:
    """PCA colours of one scene's features: (n, E) -> (n, 3) float32 in [0, 1].

    See `fit_pca_colors` for the arguments and errors, and for several scenes with joint colours.
    """
    return fit_pca_colors(features, brightness=brightness, saturate=saturate)(features)


def _checked(features: ArrayLike) -> NDArray:
    array = np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"PCA colours need features (n, E) with n, E >= 1, got {array.shape}")
    bad = np.count_nonzero(~np.isfinite(array).all(axis=1))
    if bad:
        raise ValueError(f"PCA colours need finite features; {bad} of {len(array)} points are not")
    return array


def _project(
    features: NDArray, mean: NDArray[np.float64], basis: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, E) -> (n, 3) channels before stretching."""
    blocks = [features[i : i + BLOCK] for i in range(0, len(features), BLOCK)]
    return np.concatenate([(block.astype(np.float64) - mean) @ basis for block in blocks])


def _principal_components(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, E) centred features -> (E, 6) unit columns by falling variance, zero-padded if E < 6.

    The sign of a component is free; it is chosen so that the projection is skewed to positive
    values, a property of the projected points alone, hence not of the axes of the feature space.
    """
    _, vectors = np.linalg.eigh(centred.T @ centred)  # by rising variance
    components = vectors[:, ::-1][:, :COMPONENTS]
    skew = ((centred @ components) ** 3).sum(axis=0)
    components = components * np.where(skew < 0, -1.0, 1.0)
    return np.pad(components, ((0, 0), (0, COMPONENTS - components.shape[1])))
