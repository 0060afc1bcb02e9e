"""Concerto (arXiv:2510.23607): Sonata, and what images of the scene say of its points.

Beside Sonata's losses the student's masked large views predict the features that a frozen image
encoder gives to the patches which see their points: voxel features are carried up, averaged over
each patch, projected, and compared by their direction. The image side is a part of the teacher;
how its features come about is an `ImageBranch`'s business.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from point_jax import limits
from point_jax.geometry.hierarchy import Hierarchy
from point_jax.models.functional import Params
from point_jax.models.ptv3 import up_cast
from point_jax.objectives.interface import Axis, Scene, Schedule, Stats, Targets
from point_jax.objectives.rows import LOSSES, Row, student
from point_jax.objectives.sonata import Piece, Sonata
from point_jax.objectives.sonata_spec import SonataSpec
from point_jax.ops.correspondence import (
    Sightings,
    patch_means,
    patch_of,
    pool_places,
    shifted_cosine,
    sightings,
)

SCALE = 10.0  # of the loss, the original's

CONCERTO_LIMITS = {
    "up_cast": limits.whole(0),
    "weight": limits.number(above=0),
}


@dataclass(frozen=True)
class ConcertoSpec:
    """The objective; the defaults are the original's.

    Attributes:
      points: the point losses, with weights 1/8, 1/8 and 2/8, and one head of the teacher for all.
      up_cast: levels that the coarsest features are carried up before they are averaged over
        patches.
      weight: of the image loss.
    """

    points: SonataSpec
    up_cast: int = 3
    weight: float = 4 / 8

    def __post_init__(self) -> None:
        limits.check(vars(self), CONCERTO_LIMITS)
        levels = len(self.points.network.encoder)
        if not self.up_cast < levels:
            raise ValueError(
                f"up_cast is {self.up_cast}, expected 0 to {levels - 1} for {levels} levels"
            )


class ImageBranch(Protocol):
    """Images of a scene, and the features of their patches.

    Attributes:
      height, width: of every image, in patches.
      channels: of a patch's features, F.
    """

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def init(self, key: jax.Array) -> Params:
        """Parameters of the image encoder; {} without one."""
        ...

    def prepare(self, scene: Scene, key: jax.Array) -> tuple[Any, jax.Array]:
        """Images (any pytree, leading axis I) and places (P, I, 2) of the scene's points in them.

        Places are (row, column) in patches, -1 where an image does not see the point, see
        `ops.correspondence`.
        """
        ...

    def features(self, params: Params, images: Any) -> jax.Array:
        """(I, height * width, F) float32."""
        ...


class ConcertoRow(NamedTuple):
    """A scene, ready for the networks.

    Attributes:
      points: see `rows.Row`.
      images: of the `ImageBranch`.
      seen: which patches see the A points of the masked views on the level of the image loss; none
        sees those of another view than the major one.
    """

    points: Row
    images: Any
    seen: Sightings


class ConcertoPiece(NamedTuple):
    """One side of a row's student.

    Attributes:
      points: see `sonata.Piece`.
      scene: () int32, place of the scene among this device's.
      masked: () bool, whether it is the side that images are compared with.
    """

    points: Piece
    scene: jax.Array
    masked: jax.Array


class Concerto:
    """The objective's functions; see `interface.Objective`. Immutable.

    Attributes:
      spec: the settings.
      points: the point losses.
      images: the image side.
      inputs: channels of a patch's mean, which the projection reads.
    """

    scenes_per_row = 1

    def __init__(self, spec: ConcertoSpec, images: ImageBranch):
        self.spec, self.images = spec, images
        self.points = Sonata(spec.points)
        self._level = -1 - spec.up_cast
        self._patches = images.height * images.width
        stages = spec.points.network.encoder[self._level :]
        self.inputs = sum(stage.channels for stage in stages)

    def __repr__(self) -> str:
        return f"Concerto({self.spec!r}, {self.images!r})"

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Sonata's student and a projection `patch_proj`; Sonata's teacher and `image`."""
        points_key, kernel_key, bias_key, image_key = jax.random.split(key, 4)
        student, teacher = self.points.init(points_key)
        # As PyTorch starts a linear layer.
        draw = partial(jax.random.uniform, minval=-(self.inputs**-0.5), maxval=self.inputs**-0.5)
        student["patch_proj"] = {
            "kernel": draw(kernel_key, (self.inputs, self.images.channels)),
            "bias": draw(bias_key, (self.images.channels,)),
        }
        image = self.images.init(image_key)
        return student, teacher | ({"image": image} if image else {})

    def read_as(self, name: str) -> jnp.dtype:
        """Sonata's; the projection and the image encoder as they are."""
        return self.points.read_as(name)

    def prepare(
        self, scenes: Scene, key: jax.Array, schedule: Schedule
    ) -> tuple[ConcertoRow, Stats]:
        """Views, masks, matches, and which patches see which points."""
        points, stats = self.points.prepare(scenes, jax.random.fold_in(key, 0), schedule)
        scene = {name: x[0] for name, x in scenes.items()}
        with jax.named_scope("images"):
            images, places = self.images.prepare(scene, jax.random.fold_in(key, 1))
            seen = self.sightings(points, places)
        stats["image_pairs"] = (seen.patch < self._patches).sum().astype(jnp.float32)
        return ConcertoRow(points, images, seen), stats

    def sightings(self, row: Row, places: jax.Array) -> Sightings:
        """See `ConcertoRow.seen`; places (P, I, 2) are of the scene's points."""
        masked = student(row, "masked")
        hierarchy = self.points.rows.structure(masked)
        major = (hierarchy[0].valid & (masked.cloud == 0))[:, None, None]
        places = jnp.where(major, jnp.take(places, masked.source, axis=0, mode="clip"), -1.0)
        for level in hierarchy[1 : len(hierarchy) - self.spec.up_cast]:
            places = pool_places(places, level.first_child)
        patch = patch_of(places, self.images.height, self.images.width)
        return sightings(patch, self._patches)

    def targets(
        self,
        teacher: Params,
        rows: ConcertoRow,
        key: jax.Array,
        schedule: Schedule,
        axis: Axis = None,
    ) -> Targets:
        """Sonata's targets, the images' features, and over how many patches the image loss goes."""
        points = self.points.targets(teacher, rows.points, key, schedule, axis)
        scenes = len(rows.seen.patch)
        with jax.named_scope("images"):
            encode = partial(self.images.features, teacher.get("image", {}))
            features = jax.lax.map(encode, rows.images)
        hit = (jnp.diff(rows.seen.first) > 0).sum().astype(jnp.float32)
        sums = hit, rows.points.scenes.sum()
        hit, count = sums if axis is None else jax.lax.psum(sums, axis)
        pieces = ConcertoPiece(
            points=points.pieces,
            scene=jnp.repeat(jnp.arange(scenes), 2),
            masked=jnp.tile(jnp.array([True, False]), scenes),
        )
        shared = {"points": points.shared, "patches": hit, "scenes": count}
        shared |= {"features": features, "seen": rows.seen}
        return Targets(pieces, shared, points.stats)

    def loss(
        self,
        student: Params,
        piece: ConcertoPiece,
        shared: Params,
        key: jax.Array,
        schedule: Schedule,
    ) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
        """Sonata's losses of a piece and the image loss, a mean over all patches hit in the batch.

        If no patch of the global batch sees a point, the image loss is the mean of the others, as
        in the original where a GPU has no image (REFERENCE quirk 17).
        """
        levels, hierarchy = self.points.student_levels(student, piece.points, key)
        x = up_cast(levels, hierarchy, self.spec.points.up_cast)
        values, stats = self.points.compare(student, x, piece.points, shared["points"], schedule)
        with jax.named_scope("images"):
            image_loss = partial(self._image_loss, hierarchy=hierarchy, piece=piece, shared=shared)
            summed, hit = jax.lax.cond(
                piece.masked, image_loss, _nothing, student["patch_proj"], levels
            )
        some = shared["patches"] > 0
        # A batch's loss is a sum over its scenes, this one a sum over its patches.
        image = summed * shared["scenes"] / jnp.maximum(shared["patches"], 1.0)
        total = (jnp.array(self.spec.points.weights) * values).sum()
        total = total + self.spec.weight * jnp.where(some, image, values.mean())
        stats |= jax.lax.stop_gradient({"image": {"loss": summed, "patches": hit}})
        return total, (piece.points.scenes, stats)

    def _image_loss(
        self,
        projection: Params,
        levels: tuple[jax.Array, ...],
        hierarchy: Hierarchy,
        piece: ConcertoPiece,
        shared: Params,
    ) -> tuple[jax.Array, jax.Array]:
        """Sum over the patches hit of the scaled loss, and their number."""
        x = up_cast(levels, hierarchy, self.spec.up_cast).astype(jnp.float32)
        means, count = patch_means(x, jax.tree.map(lambda x: x[piece.scene], shared["seen"]))
        predicted = means @ projection["kernel"] + projection["bias"][None, None]
        loss = shifted_cosine(predicted, shared["features"][piece.scene])
        hit = count > 0
        return SCALE * jnp.where(hit, loss, 0.0).sum(), hit.sum().astype(jnp.float32)

    def follow(
        self, teacher: Params, student: Params, stats: Stats, schedule: Schedule, good: jax.Array
    ) -> Params:
        """As Sonata's; the image encoder stays as it is."""
        return self.points.follow(teacher, student, stats, schedule, good)

    def metrics(self, stats: Stats) -> dict[str, jax.Array]:
        """Sonata's, the image loss, and how many patches it is a mean over."""
        out = self.points.metrics(stats)
        hit = stats["image"]["patches"]
        others = sum(out[f"{name}_loss"] for name in LOSSES) / len(LOSSES)
        mean = stats["image"]["loss"] / jnp.maximum(hit, 1.0)
        out["image_loss"] = jnp.where(hit > 0, mean, others)
        out["loss"] = out["loss"] + self.spec.weight * out["image_loss"]
        scenes = jnp.maximum(stats["rows"], 1.0)
        out["image_patches"] = hit / scenes
        out["image_pairs"] = stats["image_pairs"] / scenes
        return out


def point_losses(objective: Sonata | Concerto) -> Sonata:
    """The point losses of a pretraining, with images or without."""
    return objective.points if isinstance(objective, Concerto) else objective


def _nothing(projection: Params, levels: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The image loss of the local views, which no image is compared with."""
    del projection, levels
    return jnp.zeros(()), jnp.zeros(())
