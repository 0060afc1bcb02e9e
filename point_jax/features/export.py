"""Features as arrays for other programs."""

from collections.abc import Callable, Sequence

import numpy as np

from point_jax.features.maps import PointFeatures


def feature_arrays(
    clouds: Sequence[PointFeatures],
    up_cast: int | None = None,
    levels: bool = False,
    place: Callable[[np.ndarray], np.ndarray] = lambda coord: coord,
) -> dict[str, np.ndarray]:
    """The arrays of one file of features; clouds lie end to end.

    Args:
        clouds: of the file, usually one.
        up_cast: levels that the coarsest features are carried up and joined; None: all.
        levels: also the encoder's features of each level.
        place: takes coordinates (m, 3) to the file's frame.

    Returns:
        `coord` (n, 3) and `features` (n, C): row i belongs to input point i. With several clouds
        `offset` (clouds,): where each ends. With `levels`, for each level i (m voxels):
        `level{i}_grid` (m, 3) int32, `level{i}_coord` (m, 3) mean of the voxel's points,
        `level{i}_features` (m, C_i); `decoder{i}_features` on the same rows if the network has a
        decoder; and with several clouds `level{i}_offset` (clouds,).

    Raises:
        IndexError: fewer levels than `up_cast` needs.
    """
    arrays = {
        "coord": place(np.concatenate([cloud.coord for cloud in clouds])),
        "features": np.concatenate(
            [c.up_cast(c.depth - 1 if up_cast is None else up_cast).at_points() for c in clouds]
        ),
    }
    if len(clouds) > 1:
        arrays["offset"] = np.cumsum([len(cloud.coord) for cloud in clouds])
    for i in range(clouds[0].depth if levels else 0):
        maps = [cloud.level(i) for cloud in clouds]
        arrays[f"level{i}_grid"] = np.concatenate([level.grid for level in maps])
        arrays[f"level{i}_coord"] = place(np.concatenate([level.coord for level in maps]))
        arrays[f"level{i}_features"] = np.concatenate([level.features for level in maps])
        if i < len(clouds[0].decoded):
            decoded = [cloud.decoder(i).features for cloud in clouds]
            arrays[f"decoder{i}_features"] = np.concatenate(decoded)
        if len(clouds) > 1:
            arrays[f"level{i}_offset"] = np.cumsum([len(level.grid) for level in maps])
    return arrays
