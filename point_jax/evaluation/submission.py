"""Files that the ScanNet benchmark takes: the class id of every point of a scene, one a line."""

from pathlib import Path

import numpy as np

from point_jax.data.scenes import Scene
from point_jax.evaluation.classes import Classes
from point_jax.training.config import write_atomically


def write_submission(folder: Path, scene: Scene, predicted: np.ndarray, classes: Classes) -> Path:
    """Writes `<folder>/<scene>.txt`; one that is there is replaced, at once or not at all.

    Args:
      folder: made if missing.
      scene: with all points of the scan, in the scan's order.
      predicted: (n,) integers, the class of each point, 0 to K - 1.
      classes: K classes with the benchmark's ids.

    Returns:
      The file.

    Raises:
      ValueError: not one class for each point.
    """
    predicted, points = np.asarray(predicted), len(scene.coord)
    if predicted.shape != (points,):
        raise ValueError(
            f"{scene.name}: predictions of shape {predicted.shape} for {points} points; expected "
            "one for every point of the scan: carry those of voxels back to the points first"
        )
    if predicted.dtype.kind not in "iu" or predicted.min() < 0 or predicted.max() >= len(classes):
        raise ValueError(
            f"{scene.name}: predictions are {predicted.dtype} from {predicted.min()} to "
            f"{predicted.max()}, expected integers from 0 to {len(classes) - 1}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{scene.name}.txt"
    ids = np.array(classes.ids)[predicted]
    write_atomically(file, "".join(f"{number}\n" for number in ids.tolist()))
    return file
