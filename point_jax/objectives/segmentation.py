"""Semantic segmentation: a linear layer on features, and whatever of the network trains with it.

One objective serves every protocol of an evaluation: a linear probe trains the layer alone, a
decoder probe the decoder too, LoRA small changes of the attention, full fine-tuning everything.
What trains is the student, what is frozen the teacher; running statistics of batch norms belong to
the teacher, whether their norms train or not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from point_jax import limits
from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec
from point_jax.models import statistics
from point_jax.models.functional import Params
from point_jax.models.lora import ALPHA, RANK, add_lora, start_lora
from point_jax.objectives.interface import Axis, Scene, Schedule, Stats, Targets
from point_jax.objectives.labelled import CropSpec, LabelledRow, LabelledRowMaker
from point_jax.objectives.trunks import Trunk
from point_jax.ops.gather import to_children
from point_jax.ops.lovasz import cross_entropy, lovasz_softmax

SEGMENTATION_LIMITS = {
    "classes": limits.whole(2),
    "shares": limits.each(limits.number(above=0, most=1)),
    "lovasz": limits.number(0),
    "class_weights": limits.each(limits.number(0)),
    "lora_rank": limits.whole(1),
    "lora_alpha": limits.number(above=0),
}


@dataclass(frozen=True)
class SegmentationSpec:
    """The objective; the defaults are Pointcept's.

    Attributes:
      classes: K.
      crops: how training crops are made.
      scenes_per_row: 2 lets Mix3D lay pairs of scenes over one another.
      shares: slots of each level of a row over the slots of its crops; as many as the trunk's
        levels are read.
      lovasz: weight of Lovász-softmax beside cross-entropy.
      class_weights: of the cross-entropy, K of them; empty for 1 each.
      lora_rank, lora_alpha: of low-rank adaptation.
    """

    classes: int
    crops: CropSpec = field(default_factory=CropSpec)
    scenes_per_row: int = 2
    shares: tuple[float, ...] = (1.0, 0.5, 0.2, 0.06, 0.02)
    lovasz: float = 1.0
    class_weights: tuple[float, ...] = ()
    lora_rank: int = RANK
    lora_alpha: float = ALPHA

    def __post_init__(self) -> None:
        limits.check(vars(self), SEGMENTATION_LIMITS)
        if len(self.class_weights) not in (0, self.classes):
            raise ValueError(
                f"class_weights has {len(self.class_weights)} entries for {self.classes} classes"
            )


Divide = Callable[[Params, jax.Array, SegmentationSpec], tuple[Params, Params]]
"""(backbone, key, spec) -> (what of the student trains beside the head, the frozen backbone)."""


def only_head(backbone: Params, key: jax.Array, spec: SegmentationSpec) -> tuple[Params, Params]:
    """Nothing but the head trains."""
    del key, spec
    return {}, backbone


def decoder(backbone: Params, key: jax.Array, spec: SegmentationSpec) -> tuple[Params, Params]:
    """The decoder trains."""
    del key, spec
    frozen = {name: part for name, part in backbone.items() if name != "dec"}
    return {"backbone": {"dec": backbone["dec"]}}, frozen


def everything(backbone: Params, key: jax.Array, spec: SegmentationSpec) -> tuple[Params, Params]:
    """All of it trains."""
    del key, spec
    return {"backbone": backbone}, {}


def lora(backbone: Params, key: jax.Array, spec: SegmentationSpec) -> tuple[Params, Params]:
    """Low-rank changes of the attention train."""
    return {"lora": start_lora(key, backbone, spec.lora_rank)}, backbone


class Segmentation:
    """The objective's functions; see `interface.Objective`. Immutable.

    Attributes:
      spec: the settings.
      trunk: where features come from.
      divide: what trains: `only_head`, `decoder`, `everything` or `lora`.
    """

    def __init__(self, spec: SegmentationSpec, trunk: Trunk, divide: Divide):
        self.spec, self.trunk, self.divide = spec, trunk, divide
        self.scenes_per_row = spec.scenes_per_row
        if len(spec.shares) < trunk.levels:
            raise ValueError(
                f"shares has {len(spec.shares)} entries, the network {trunk.levels} levels: give "
                "one each"
            )
        shares = spec.shares[: trunk.levels]
        self.rows = LabelledRowMaker(spec.crops, spec.scenes_per_row, shares)

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """The student: `head` and what trains of the backbone; the teacher: the frozen backbone.

        The teacher has all running statistics: weight decay must not reach them.
        """
        backbone_key, head_key, lora_key = jax.random.split(key, 3)
        backbone = self.trunk.init(backbone_key)
        trained, frozen = self.divide(backbone, lora_key, self.spec)
        head = start_head(head_key, sum(self.trunk.channels), self.spec.classes)
        if "backbone" in trained:
            moved, running = statistics.split(trained["backbone"])
            trained, frozen = trained | {"backbone": moved}, statistics.join(frozen, running)
        return {"head": head, **trained}, {"backbone": frozen} if frozen else {}

    def read_as(self, name: str) -> jnp.dtype:
        """float32: low-rank changes are added to kernels before these are cast."""
        del name
        return jnp.float32

    def whole(self, student: Params, teacher: Params) -> Params:
        """The backbone as the network takes it, of student and teacher together."""
        backbone = statistics.join(teacher.get("backbone", {}), student.get("backbone", {}))
        if "lora" in student:
            backbone = add_lora(backbone, student["lora"], self.spec.lora_alpha)
        return backbone

    def prepare(
        self, scenes: Scene, key: jax.Array, schedule: Schedule
    ) -> tuple[LabelledRow, Stats]:
        """Augmented crops as a row; see `LabelledRowMaker.make`."""
        del schedule
        return self.rows.make(scenes, key, self._shape)

    @property
    def _shape(self) -> HierarchySpec:
        return self.trunk.shape(self.rows.capacities, self.scenes_per_row)

    @jax.named_scope("geometry")
    def structure(self, row: LabelledRow) -> Hierarchy:
        """What networks read of a row's voxels."""
        return row.structure(self._shape)

    def targets(
        self,
        teacher: Params,
        rows: LabelledRow,
        key: jax.Array,
        schedule: Schedule,
        axis: Axis = None,
    ) -> Targets:
        """The rows, and over how much of the global batch their losses are means."""
        del key, schedule
        weight = self._weights(rows.labels).sum(-1)  # of each row
        total = jnp.stack([weight.sum(), (weight > 0).sum().astype(jnp.float32)])
        total = total if axis is None else jax.lax.psum(total, axis)
        shared = {"weight": total[0], "rows": total[1], "frozen": teacher}
        return Targets(rows, shared, {})

    def loss(
        self,
        student: Params,
        piece: LabelledRow,
        shared: Params,
        key: jax.Array,
        schedule: Schedule,
    ) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
        """Cross-entropy over all labelled points of the global batch, and Lovász-softmax of a row.

        The originals take Lovász over the points that a GPU has at once; here a row is that unit,
        so that it does not depend on the number of devices.

        Returns:
          (sum, (count, stats)): count 1, or 0 for a row without labels.
        """
        del schedule
        logits, moments = self.logits(student, shared["frozen"], piece, key)
        weights = self._weights(piece.labels)
        with jax.named_scope("losses"):
            entropy = (weights * cross_entropy(logits, piece.labels)).sum()
            lovasz = lovasz_softmax(logits, piece.labels)
        count = (weights.sum() > 0).astype(jnp.float32)
        mean = entropy * shared["rows"] / jnp.maximum(shared["weight"], 1e-12)
        stats = {
            "entropy": entropy,
            "weight": weights.sum(),
            "lovasz": lovasz * count,
            "labelled_rows": count,
            "hits": self._hits(logits, piece.labels),
            "moments": jax.tree.map(lambda x: jnp.where(count > 0, x, 0.0), moments),
        }
        total = (mean + self.spec.lovasz * lovasz) * count
        return total, (count, jax.lax.stop_gradient(stats))

    def logits(
        self, student: Params, teacher: Params, row: LabelledRow, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        """(N, K) float32 of a row in training, and its `Features.moments`."""
        trained = student.get("backbone", {}).keys()
        hierarchy = self.structure(row)
        whole = self.whole(student, teacher)
        levels, moments = self.trunk(whole, row, hierarchy, key, trained)
        with jax.named_scope("heads"):
            return self._linear(student["head"], levels, hierarchy), moments

    def _linear(
        self, head: Params, levels: tuple[jax.Array, ...], hierarchy: Hierarchy
    ) -> jax.Array:
        """The layer on the joined features of all levels, applied level by level.

        A coarse level's share is computed there and carried down: K channels instead of hundreds.
        """
        kernels = jnp.split(head["kernel"], np.cumsum(self.trunk.channels)[:-1])
        *finer, out = (x.astype(jnp.float32) @ k for x, k in zip(levels, kernels, strict=True))
        for level, mine in reversed(list(enumerate(finer))):
            fine, coarse = hierarchy[level], hierarchy[level + 1]
            out = mine + to_children(out, fine.parent, coarse.first_child)
        return out + head["bias"][None]

    def _weights(self, labels: jax.Array) -> jax.Array:
        """(..., N) float32: the class weights of the points, 0 without a label."""
        weights = jnp.array(self.spec.class_weights or (1.0,) * self.spec.classes)
        return jnp.where(labels >= 0, weights[jnp.maximum(labels, 0)], 0.0)

    def _hits(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """(3, K): points right, with this label, with this prediction."""
        classes, counted = self.spec.classes, labels >= 0
        found = jnp.where(counted, jnp.argmax(logits, axis=-1), classes)
        place = jnp.where(counted, labels, classes)

        def count(where: jax.Array) -> jax.Array:
            return jnp.bincount(where, length=classes + 1)[:classes].astype(jnp.float32)

        right = jnp.where(found == place, place, classes)
        return jnp.stack([count(right), count(place), count(found)])

    def follow(
        self, teacher: Params, student: Params, stats: Stats, schedule: Schedule, good: jax.Array
    ) -> Params:
        """What is frozen stays; running statistics of norms that train follow the rows' means."""
        del student, schedule
        if not stats["moments"]:
            return teacher
        rows = jnp.maximum(stats["labelled_rows"], 1.0)
        moments = jax.tree.map(lambda total: total / rows, stats["moments"])
        return teacher | {"backbone": statistics.follow(teacher["backbone"], moments, good)}

    def metrics(self, stats: Stats) -> dict[str, jax.Array]:
        """Losses, accuracy and mean IoU on the training crops, and what rows lost.

        Means are over the points or rows that have a label; without any the loss is NaN.
        """
        right, labelled, found = stats["hits"]
        union = labelled + found - right
        present = labelled > 0
        iou = jnp.where(present, right / jnp.maximum(union, 1.0), 0.0)
        entropy = stats["entropy"] / stats["weight"]
        lovasz = stats["lovasz"] / stats["labelled_rows"]
        points = jnp.maximum(stats["points"], 1.0)
        return {
            "loss": entropy + self.spec.lovasz * lovasz,
            "entropy_loss": entropy,
            "lovasz_loss": lovasz,
            "accuracy": right.sum() / jnp.maximum(labelled.sum(), 1.0),
            "batch_mIoU": iou.sum() / jnp.maximum(present.sum(), 1),
            "labelled": stats["labelled"] / points,
            "padding": stats["padding"] / stats["rows"],
            "cut": stats["cut"] / (stats["rows"] * self.scenes_per_row),
            **{
                name: stats[name]
                for name in ("points", "empty_scenes", "overflow_elastic", "overflow_row")
            },
        }


def start_head(key: jax.Array, inputs: int, classes: int) -> Params:
    """A linear layer as PyTorch starts one: uniform within 1 / sqrt(inputs).

    Returns:
      {"kernel": (inputs, classes), "bias": (classes,)}, float32.
    """
    bound = inputs**-0.5
    kernel_key, bias_key = jax.random.split(key)
    draw = partial(jax.random.uniform, minval=-bound, maxval=bound)
    return {"kernel": draw(kernel_key, (inputs, classes)), "bias": draw(bias_key, (classes,))}
