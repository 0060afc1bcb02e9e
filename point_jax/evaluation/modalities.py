"""Scenes with less in them: no colours, no normals, few labels."""

import dataclasses
import zlib
from typing import Literal

import numpy as np

from point_jax import limits
from point_jax.data.scenes import Scene, SceneError


def without(scene: Scene, *names: Literal["color", "normal"]) -> Scene:
    """The scene as if it had been recorded without colours, normals or both."""
    return dataclasses.replace(scene, **dict.fromkeys(names))


def thin_labels(scene: Scene, share: float, seed: int) -> Scene:
    """Keeps the labels of a random share of the labelled points; the others become -1.

    A larger share keeps what a smaller one keeps, and more.

    Args:
      scene: with labels.
      share: of the labelled points, 0 < share <= 1; at least one is kept.
      seed: not negative; the choice is a function of (seed, the scene's name).

    Raises:
      SceneError: the scene has no labels.
      ValueError: a share out of range.
    """
    limits.check({"share": share}, {"share": limits.number(above=0, most=1)})
    if scene.segment is None:
        raise SceneError(f"{scene.name}: has no labels to thin out")
    there = np.flatnonzero(scene.segment >= 0)
    key = np.random.default_rng((seed, zlib.crc32(scene.name.encode())))
    kept = key.permutation(there)[: max(1, round(share * len(there)))]
    segment = np.full_like(scene.segment, -1)
    segment[kept] = scene.segment[kept]
    return dataclasses.replace(scene, segment=segment)
