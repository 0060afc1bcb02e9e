"""Reading the images and archives of raw recordings, with errors that name the file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from point_jax.data.scenes import SceneError


def read_archive(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an npz file.

    Args:
        file: to read.
        names: arrays that must be there.

    Raises:
        SceneError: for a missing or damaged file, or a missing array.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # missing, no zip, damaged inside: numpy raises many kinds
        raise SceneError(f"{file}: not a readable npz file ({error})") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise SceneError(f"{file}: has no {', '.join(missing)}, only {', '.join(arrays)}")
    return arrays


def read_color(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB image.

    Raises:
        SceneError: for a missing or unreadable image, or one without three channels.
    """
    image = _read(file)
    if image.ndim != 3 or image.shape[2] != 3:
        raise SceneError(f"{file}: shape {image.shape}; expected an RGB image")
    return image


def read_depth(file: Path) -> np.ndarray:
    """(H, W) float32 metres, 0 = none, of a 16-bit image in millimetres.

    Raises:
        SceneError: for a missing or unreadable image, or one that is not 16-bit.
    """
    image = _read(file)
    if image.ndim != 2 or image.dtype.kind not in "iu" or image.dtype.itemsize < 2:
        raise SceneError(
            f"{file}: {image.dtype} of shape {image.shape}; expected 16-bit millimetres"
        )
    return image.astype(np.float32) / 1000


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image)
    except FileNotFoundError as error:
        raise SceneError(f"{file}: missing") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise SceneError(f"{file}: not a readable image ({error})") from error
