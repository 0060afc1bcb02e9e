"""The image side of a joint step that is measured: images for clouds without any, its products."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from point_jax.data.pipeline import batch_shapes
from point_jax.measure.traced import product_flops
from point_jax.measure.work import TRAINED, Work
from point_jax.objectives.concerto import Concerto
from point_jax.objectives.images import StoredImages


def image_arrays(objective: Concerto, data: Any, coord: np.ndarray) -> dict[str, Any]:
    """What a batch has of the images of a scene, made for a cloud that has none.

    As many images as a scene may have, of noise. Their cameras stand level in the middle of the
    cloud, are 90 degrees wide and share a full turn; nothing hides what lies before them.

    Args:
      objective: whose step reads them.
      data: config section as `pipeline.default_data` makes it.
      coord: (P, 3) float32 metres, z up.

    Returns:
      images (I, H, W, 3) uint8 or features (I, h, w, F) float16, pixels (P, I, 2) float32,
      image_count () int32; see `pipeline.make_batches`.
    """
    images, shapes = objective.images, batch_shapes(data, 1)
    stored = isinstance(images, StoredImages)
    name, pixel = ("features", images.spec.stride) if stored else ("images", 1)
    (_, count, rows, columns, channels), dtype = shapes[name]
    draws = np.random.default_rng(0)
    noise = draws.integers(0, 256, (count, rows, columns, channels)).astype(dtype)
    turns = np.linspace(0, 2 * np.pi, count, endpoint=False)
    size = rows * pixel, columns * pixel
    pixels = np.stack([_places(coord, turn, *size) for turn in turns], axis=1)
    return {name: noise, "pixels": pixels, "image_count": np.int32(count)}


def _places(coord: np.ndarray, turn: float, height: int, width: int) -> np.ndarray:
    """(P, 2) row and column in an image of a camera that looks `turn` radians from x; -1: none."""
    offset = coord - (coord.min(0) + coord.max(0)) / 2
    ahead = np.array([np.cos(turn), np.sin(turn), 0])
    right = np.array([np.sin(turn), -np.cos(turn), 0])
    depth = offset @ ahead
    scale = width / 2 / np.where(depth > 0, depth, np.inf)
    places = np.stack([height / 2 - offset[:, 2] * scale, width / 2 + offset @ right * scale], 1)
    inside = (depth > 0) & (places >= 0).all(1) & (places < (height, width)).all(1)
    return np.where(inside[:, None], places, -1).astype(np.float32)


def image_work(
    objective: Concerto, teacher: Mapping[str, Any], scene: Mapping[str, Any]
) -> dict[str, Work]:
    """Operations of the image side of a step on a scene: encoder forward, projection trained.

    Args:
      objective: whose step it is.
      teacher: its parameters, or their shapes.
      scene: the arrays of a scene, or their shapes.
    """
    key = jax.eval_shape(jax.random.key, np.uint32(0))
    images = jax.eval_shape(lambda scene, key: objective.images.prepare(scene, key)[0], scene, key)
    encoder = product_flops(objective.images.features, teacher.get("image", {}), images)
    patches = len(images) * objective.images.height * objective.images.width
    projection = 2.0 * TRAINED * patches * objective.inputs * objective.images.channels
    return {"images": Work(encoder + projection, encoder + projection)}
