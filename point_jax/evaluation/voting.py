"""Votes for every point of a scene: Pointcept's precise protocol of testing.

The scene is turned, scaled and mirrored in several ways. Each time, a voxel has room for one of its
points, so they take turns: fragment i holds the i-th point of every voxel, from the first again
where a voxel has fewer, and there are as many fragments as the fullest voxel has points. The
network predicts each fragment by itself, and a point's votes are the probabilities summed over all
fragments that hold it. (Test transforms of Pointcept's ScanNet and S3DIS configs, `GridSample` in
mode "test", and the sum in `SemSegTester`.)

Where the originals are random or depend on the machine, this is not: points of a voxel keep the
scene's order, the first sampling of S3DIS keeps a voxel's first point, and quarter turns are exact.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from point_jax import limits
from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene
from point_jax.evaluation.predict import Predictor
from point_jax.features.voxels import INPUTS, LARGEST, Input, Voxels, grid_key

TOGETHER = 16  # fragments in memory; their voxels are the same, only the points in them differ
LIMITS = {"turn": limits.number(), "scale": limits.number(above=0)}


@dataclass(frozen=True)
class Vote:
    """A way to place the scene: turned, then scaled, then mirrored.

    Attributes:
      turn: about the z axis through the middle of the scene, in half turns, counter-clockwise from
        above.
      scale: factor of the three axes.
      flip: mirrors x and y, both.
    """

    turn: float = 0.0
    scale: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        limits.check(vars(self), LIMITS)

    def direct(self, vectors: np.ndarray) -> np.ndarray:
        """(n, 3) directions, turned and mirrored; float64."""
        x, y, z = vectors.T.astype(np.float64)
        cos, sin = _cos_sin(self.turn)
        # Written out: a library's matrix product may round differently from machine to machine.
        turned = np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=1)
        return turned * [-1, -1, 1] if self.flip else turned

    def place(self, coord: np.ndarray) -> np.ndarray:
        """(n, 3) positions, turned, scaled and mirrored; float64."""
        return self.direct(coord) * self.scale


# Those of Pointcept's ScanNet and S3DIS configs.
VOTES = (
    *(Vote(turn, scale) for scale in (1.0, 0.95, 1.05) for turn in (0.0, 0.5, 1.0, 1.5)),
    Vote(flip=True),
)


def vote(
    predict: Predictor,
    scene: Scene,
    grid_size: float,
    inputs: Sequence[Input] = INPUTS,
    votes: Sequence[Vote] = VOTES,
    first_grid: float | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Sums the probabilities that each point of a scene gets in all fragments of all votes.

    Args:
      predict: gets up to `TOGETHER` fragments of one vote at a time.
      scene: a checked cloud of n points.
      grid_size: edge of a voxel, metres.
      inputs: see `voxels.voxelize`.
      votes: ways to place the scene, at least one.
      first_grid: edge in metres of a grid that leaves one point a voxel before anything is voted
        on; the others get the votes of that point. S3DIS: 0.01. None votes on every point.
      scale: see `voxels.voxelize`.

    Returns:
      (n, K) float32; the row's largest entry is the prediction. Rows do not sum to the same: a
      point alone in its voxel is in every fragment.

    Raises:
      SceneError: more than a million voxels along an axis.
      ValueError: no votes; predictions of a wrong shape or number.
    """
    if not votes:
        raise ValueError("votes is empty, expected at least one; Vote() leaves the scene as it is")
    centred = _centre(scene.coord.astype(np.float64) * scale, floor=True).astype(np.float32)
    kept = np.arange(len(centred))
    back = kept
    if first_grid is not None:
        keys = grid_key(_grid(centred, first_grid, scene.name))
        _, first, voxel = np.unique(keys, return_index=True, return_inverse=True)
        kept = np.sort(first)  # in the scene's order again
        back = np.searchsorted(kept, first[voxel.reshape(-1)])
    sums = np.zeros((len(kept), predict.classes), np.float32)
    for one in votes:
        fragments = _fragments(scene, centred, kept, one, grid_size, inputs)
        while found := list(itertools.islice(fragments, TOGETHER)):
            clouds = [cloud for _, cloud in found]
            for (rows, _), part in zip(found, predict(clouds), strict=True):
                if part.shape != (len(rows), predict.classes):
                    raise ValueError(
                        f"{scene.name}: predictions of shape {part.shape} for {len(rows)} voxels "
                        f"and {predict.classes} classes"
                    )
                sums[rows] += part  # a fragment holds a point once
    return sums[back]


def turns(grid: np.ndarray) -> Iterator[np.ndarray]:
    """The points of each fragment: (V,) int64 rows of `grid` (n, 3), voxels in the same order."""
    keys = grid_key(grid)
    order = np.argsort(keys, kind="stable")
    _, start, count = np.unique(keys[order], return_index=True, return_counts=True)
    for i in range(count.max()):
        yield order[start + i % count]


def _fragments(
    scene: Scene,
    centred: np.ndarray,
    kept: np.ndarray,
    vote: Vote,
    grid_size: float,
    inputs: Sequence[Input],
) -> Iterator[tuple[np.ndarray, Voxels]]:
    """(rows of `kept`, their voxels) of each fragment."""
    coord = vote.place(centred[kept])
    grid = _grid(coord, grid_size, scene.name)
    nothing = np.zeros((len(kept), 3), np.float32)
    color = nothing if scene.color is None else scene.color[kept].astype(np.float32) / 255
    normal = nothing if scene.normal is None else vote.direct(scene.normal[kept])
    for rows in turns(grid):
        # The grid is that of all points; the positions that the network reads are the fragment's.
        position = _centre(coord[rows], floor=False).astype(np.float32)
        columns = {"coord": position, "color": color[rows], "normal": normal[rows]}
        yield (
            rows,
            Voxels(
                grid[rows],
                np.concatenate([columns[name] for name in inputs], axis=1).astype(np.float32),
                position,
                None,
                scene.coord[kept[rows]],
                np.arange(len(rows), dtype=np.int32),
            ),
        )


def _centre(coord: np.ndarray, floor: bool) -> np.ndarray:
    """Moves the middle of the bounding box to x = y = 0, and the lowest point to z = 0 if asked."""
    low, high = coord.min(0), coord.max(0)
    return coord - [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2] if floor else 0]


def _grid(coord: np.ndarray, size: float, name: str) -> np.ndarray:
    """(n, 3) int32 voxel coordinates from 0."""
    steps = np.floor(coord / np.float64(size))
    steps -= steps.min(0)
    if steps.max() >= LARGEST:
        raise SceneError(
            f"{name}: {steps.max():.0f} voxels of {size} m along an axis, at most {LARGEST} fit: "
            "are the coordinates in metres? Or give a larger grid"
        )
    return steps.astype(np.int32)


def _cos_sin(turn: float) -> tuple[float, float]:
    """Of half turns; exact at quarter turns, where rounding would move points across voxels."""
    quarters = turn * 2 % 4
    if quarters == int(quarters):
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[int(quarters)]
    return math.cos(math.pi * turn), math.sin(math.pi * turn)
