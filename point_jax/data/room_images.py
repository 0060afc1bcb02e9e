"""Images of procedural rooms: views along the path of their scan, rendered when they are taken."""

import dataclasses
import functools

import numpy as np

from point_jax.data.cameras import pixel_of, project, sees, transform
from point_jax.data.images import Sight, Size, fit_places
from point_jax.data.rooms import Room, RoomSpec, build_room, camera_path_of, render_view


class RoomImages:
    """What a perfect camera sees from the poses of a room's scan; a function of seed and spec."""

    def __init__(self, seed: int, spec: RoomSpec, coord: np.ndarray):
        """For the scan with points `coord` (n, 3) float32 that `make_room` makes of them."""
        self._seed, self._spec, self._coord = seed, spec, coord

    def __len__(self) -> int:
        return self._spec.frames

    def file(self, image: int) -> None:
        """See `images.Images`: it is rendered."""

    @functools.cached_property
    def _posed(self) -> tuple[Room, np.ndarray]:
        room = build_room(self._seed)
        return room, camera_path_of(room, self._seed, self._spec)

    def sight(self, image: int, size: Size) -> Sight:
        """See `images.Images`. The horizontal field of view is the scan's, at any size."""
        room, poses = self._posed
        width, height = size[::-1]
        intrinsics = dataclasses.replace(self._spec, width=width, height=height).intrinsics()
        render = functools.cache(
            lambda: render_view(room, poses[image], intrinsics, (width, height))
        )
        near = transform(self._coord.astype(np.float64), np.linalg.inv(poses[image]))
        column, row, depth = project(near, intrinsics)
        seen = pixel_of(column, row, depth, size)[2]
        if seen.any():
            seen = sees(near, render().depth, intrinsics)
        # The renderer's pixel centres have whole coordinates.
        places = np.stack([row, column], axis=1) + 0.5
        pixels = np.where(seen[:, None], fit_places(places, size, size), np.float32(-1))
        return Sight(pixels, lambda: render().color)
