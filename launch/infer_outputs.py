"""The files that launch.infer writes of one cloud."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from point_jax.data.checks import UNITS
from point_jax.data.prepared import Prepared
from point_jax.data.readers import Frame, Scan
from point_jax.data.scenes import UP
from point_jax.features.export import feature_arrays
from point_jax.features.head import SegmentationHead
from point_jax.features.maps import PointFeatures
from point_jax.visual.classes import KeyEntry, class_colors, class_key
from point_jax.visual.codes import cosine_codes
from point_jax.visual.files import whole, write_npz, write_ply
from point_jax.visual.page import PageCloud, write_page
from point_jax.visual.pca import fit_pca_colors
from point_jax.visual.pictures import Panel, side_by_side, stack

GREY = 184  # of points without a colour
CLASSES = "predicted classes"


@dataclass(frozen=True)
class Result:
    """Features of what one file holds.

    Attributes:
        name: of the output, without suffix.
        features: one cloud; several for a prepared file with offsets.
        source: what was read.
        grid_size: edge of a voxel in metres; places a prepared file that has no coordinates.
        head: tells the class of each point; None where the checkpoint has none.
    """

    name: str
    features: Sequence[PointFeatures]
    source: Scan | Prepared
    grid_size: float
    head: SegmentationHead | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What reading decided by a rule."""
        return self.source.notes if isinstance(self.source, Scan) else ()

    @property
    def frame(self) -> Frame:
        """From coordinates in memory to those of the file."""
        return self.source.frame if isinstance(self.source, Scan) else Frame()

    def own(self) -> dict[str, np.ndarray]:
        """What else was read of each point, in the file's axes."""
        if isinstance(self.source, Prepared):
            arrays = {"coord": self.source.coord}
        else:
            arrays = {"color": self.source.color, "rows": self.source.rows}
            if self.source.normal is not None:
                arrays["normal"] = Frame(up=self.frame.up).to_file(self.source.normal)
        return {name: array for name, array in arrays.items() if array is not None}

    @cached_property
    def segments(self) -> list[np.ndarray]:
        """(n,) int32 for each cloud, classes of its points; [] without a head."""
        return [] if self.head is None else [self.head(cloud) for cloud in self.features]

    def labels(self) -> dict[str, np.ndarray]:
        """`segment` of all points and the names of its `classes`; {} without a head."""
        if self.head is None:
            return {}
        return {"segment": np.concatenate(self.segments), "classes": np.array(self.head.classes)}


@dataclass(frozen=True)
class _Shown:
    """A cloud to look at: one row of features and one PCA colour for each voxel."""

    name: str
    coord: np.ndarray
    color: np.ndarray | None
    normal: np.ndarray | None
    rows: np.ndarray
    owner: np.ndarray
    pca: np.ndarray
    segment: np.ndarray | None  # classes of the points, and the colours of classes
    palette: np.ndarray


def write(
    result: Result, files: Mapping[str, Path], up_cast: int | None = None, levels: bool = False
) -> None:
    """Writes files of a result, each whole or not at all.

    Args:
        result: of one input.
        files: format -> path; formats npz, ply, png, html.
        up_cast: see `feature_arrays`; also of what is shown.
        levels: see `feature_arrays`.
    """
    if "npz" in files:
        arrays = feature_arrays(result.features, up_cast, levels, result.frame.to_file)
        write_npz(files["npz"], arrays | result.own() | result.labels())
    shown = _shown(result, up_cast) if {"ply", "png", "html"} & set(files) else []
    if "ply" in files:
        coord = result.frame.to_file(np.concatenate([cloud.coord for cloud in shown]))
        color = np.concatenate([cloud.pca[cloud.owner] for cloud in shown])
        normal = result.own().get("normal")
        write_ply(files["ply"], coord, color, normal)
    if "png" in files:
        picture = stack([_picture(cloud, _key(result, [cloud])) for cloud in shown])
        with whole(files["png"]) as part:
            picture.save(part)
    if "html" in files:
        with whole(files["html"]) as part:
            _page(part, result, shown)


def _shown(result: Result, up_cast: int | None) -> list[_Shown]:
    maps = [c.up_cast(c.depth - 1 if up_cast is None else up_cast) for c in result.features]
    # One PCA for the clouds of a file, so that a colour means the same in each.
    colors = fit_pca_colors([level.features for level in maps])
    shown, voxel = [], np.float32(result.grid_size)
    palette = class_colors(len(result.head.classes) if result.head else 0)
    for i, (cloud, level) in enumerate(zip(result.features, maps, strict=True)):
        scan = result.source if isinstance(result.source, Scan) else None
        name = result.name if len(maps) == 1 else f"{result.name}, cloud {i}"
        shown.append(
            _Shown(
                name,
                cloud.coord if result.source.coord is not None else cloud.coord * voxel,
                None if scan is None else scan.color,
                None if scan is None else scan.normal,
                level.features,
                level.ancestor[level.inverse],
                colors(level.features),
                result.segments[i] if result.segments else None,
                palette,
            )
        )
    return shown


def _key(result: Result, shown: Sequence[_Shown]) -> list[KeyEntry]:
    """What the colours of the predicted classes mean; [] without a head."""
    if result.head is None:
        return []
    segments = [cloud.segment for cloud in shown if cloud.segment is not None]
    return class_key(segments, result.head.classes, shown[0].palette)


def _picture(cloud: _Shown, key: Sequence[KeyEntry]):
    color = np.full(cloud.coord.shape, GREY, np.uint8) if cloud.color is None else cloud.color
    title = "no colours" if cloud.color is None else "colours"
    panels = [
        Panel(title, cloud.coord, color, cloud.normal),
        Panel("PCA of the features", cloud.coord, cloud.pca[cloud.owner], cloud.normal),
    ]
    if cloud.segment is not None:
        classes = cloud.palette[cloud.segment]
        panels.append(Panel(CLASSES, cloud.coord, classes, cloud.normal, key))
    return side_by_side(panels, label=cloud.name)


def _page(path: Path, result: Result, shown: Sequence[_Shown]) -> None:
    frame = result.frame
    origin = frame.offset @ UP[frame.up].T * UNITS[frame.units]
    clouds = []
    for cloud in shown:
        colorings = {"PCA": cloud.pca[cloud.owner]}
        if cloud.color is not None:
            colorings["colours"] = cloud.color
        if cloud.segment is not None:
            colorings[CLASSES] = cloud.palette[cloud.segment]
        clouds.append(
            PageCloud(
                cloud.name,
                cloud.coord,
                colorings,
                cloud.normal,
                cloud.segment,
                cloud.owner,
                origin=origin,
            )
        )
    write_page(
        path,
        clouds,
        title=f"Features of {result.name}",
        note="\n".join(
            f"{c.name}: {len(c.coord):,} points, {len(c.rows):,} voxels with features of "
            f"{c.rows.shape[1]}"
            for c in shown
        ),
        classes=None if result.head is None else result.head.classes,
        keys={CLASSES: _key(result, shown)},
        similarity=cosine_codes([cloud.rows for cloud in shown]),
    )
