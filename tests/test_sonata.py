"""The objective equals the original's, piece by piece and as a whole step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import clouds_of, load
from golden_step import GoldenStep
from test_ptv3 import close

from point_jax.geometry.matching import nearest
from point_jax.interop.pointcept import from_state_dict, to_state_dict
from point_jax.models import layers
from point_jax.models.functional import functional
from point_jax.models.heads import OnlineCluster
from point_jax.objectives.rows import LOSSES
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.teacher import move_teacher
from point_jax.ops.prototypes import log_sum_over_points, prototype_loss


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_head_equals_the_original():
    arrays, _ = load("f1_sonata_pieces")
    weights = {k.removeprefix("head.sd."): v for k, v in arrays.items() if k.startswith("head.sd.")}
    lengths = weights.pop("prototype.parametrizations.weight.original0")  # fixed to 1 here
    init, apply = functional(lambda rngs: OnlineCluster(48, 64, 32, 40, rngs=rngs))
    params = from_state_dict(weights, jax.eval_shape(init, jax.random.key(0)))

    def scores(params, x):
        directions = apply(params, method="directions") * lengths
        return apply(params, x, jnp.int32(len(x)), method="embed") @ directions.T

    x, weight = jnp.asarray(arrays["head.x"]), arrays["head.R"]
    np.testing.assert_allclose(scores(params, x), arrays["head.y"], atol=2e-5)
    grads, grad_x = jax.grad(lambda p, x: (scores(p, x) * weight).sum(), (0, 1))(params, x)
    np.testing.assert_allclose(grad_x, arrays["head.gx"], atol=2e-5)
    np.testing.assert_allclose(grads["prototypes"], arrays["head.g_original1"], atol=2e-5)


@pytest.mark.parametrize("case", range(3))
def test_sinkhorn_equals_the_original(case):
    arrays, _ = load("f1_sonata_pieces")
    scores, temperature = arrays[f"sinkhorn{case}.feat"], arrays[f"sinkhorn{case}.temp"]
    points = len(scores)
    # Scores as embeddings against unit prototypes.
    eye, ones, scale = jnp.eye(scores.shape[1]), jnp.ones(points), None
    for _ in range(3):
        scale = -log_sum_over_points(
            jnp.asarray(scores), eye, scale, ones, jnp.int32(points), temperature
        )
    got = jax.nn.softmax(scores / temperature + scale[None], axis=-1)
    np.testing.assert_allclose(got, arrays[f"sinkhorn{case}.out"], atol=2e-5)


def test_matching_equals_the_original():
    arrays, _ = load("f1_sonata_pieces")
    index = nearest(
        jnp.asarray(arrays["match.view1_coord"]),
        jnp.asarray(clouds_of(arrays["match.view1_offset"])),
        jnp.asarray(arrays["match.view2_coord"]),
        jnp.asarray(clouds_of(arrays["match.view2_offset"])),
        float(arrays["match.max_r"]),
    )
    found = np.flatnonzero(np.asarray(index) < len(arrays["match.view2_coord"]))
    np.testing.assert_array_equal(
        np.stack([found, np.asarray(index)[found]], 1), arrays["match.index"]
    )


def reference_loss(student, directions, teacher, teacher_directions, scale, weight):
    p = jax.nn.log_softmax(student @ directions.T / 0.1)
    t = jax.nn.log_softmax(teacher @ teacher_directions.T / 0.05 + scale[None])
    return -(jnp.exp(t) * p).sum(1) * weight, p, t


def test_streamed_cross_entropy_is_its_definition():
    """Over several blocks, the last one ragged, with points left out."""
    points, width, prototypes = 600, 8, 24
    args = [normal(i, n, width) for i, n in enumerate((points, prototypes, points, prototypes))]
    scale = normal(4, prototypes)
    weight = jnp.asarray(np.random.default_rng(5).integers(0, 2, points), jnp.float32)
    weight = weight.at[550:].set(0)
    slope = normal(6, points)

    def ours(student, directions):
        return prototype_loss(
            student, directions, *args[2:], scale, weight, jnp.int32(550), 0.1, jnp.float32(0.05)
        )

    losses, sums = jax.jit(ours)(*args[:2])
    want, p, t = reference_loss(*args, scale, weight)
    np.testing.assert_allclose(losses, want, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(sums.teacher_entropy, -(jnp.exp(t) * t).sum(1) @ weight, rtol=1e-5)
    np.testing.assert_allclose(sums.student_entropy, -(jnp.exp(p) * p).sum(1) @ weight, rtol=1e-4)
    np.testing.assert_allclose(sums.teacher_use, weight @ jnp.exp(t), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums.student_use, weight @ jnp.exp(p), rtol=1e-4, atol=1e-5)
    got = jax.jit(jax.grad(lambda *a: ours(*a)[0] @ slope, (0, 1)))(*args[:2])
    truth = jax.grad(lambda *a: reference_loss(*a, *args[2:], scale, weight)[0] @ slope, (0, 1))
    for g, t in zip(got, truth(*args[:2]), strict=True):
        np.testing.assert_allclose(g, t, atol=2e-5 * float(jnp.abs(t).max()))


def test_memory_of_the_loss_does_not_grow_by_a_matrix_of_scores():
    """Twice the prototypes may cost their own weights and blocks, not points x prototypes."""
    points, width = 16384, 32

    def peak(prototypes):
        shape = jax.ShapeDtypeStruct
        arrays = [shape((points, width), jnp.float32), shape((prototypes, width), jnp.float32)]

        def loss(student, directions, teacher, teacher_directions):
            scale = None
            ones, count = jnp.ones(points), jnp.int32(points)
            for _ in range(3):
                scale = -log_sum_over_points(
                    teacher, teacher_directions, scale, ones, count, jnp.float32(0.05)
                )
            out = prototype_loss(
                student, directions, teacher, teacher_directions, scale, ones, count, 0.1,
                jnp.float32(0.05),
            )  # fmt: skip
            return out[0].mean()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays, *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = points * 2048 * 4  # what 2,048 more prototypes would add to one matrix of scores
    assert peak(4096) - peak(2048) < matrix / 4


# The losses are held to the golden files' own tolerance. Their gradients cannot be: the original
# casts the operands of attention to bfloat16 (the golden gradients of qkv biases show it: a quarter
# of them have only bfloat16's bits), and gradients of the first level hang on which of nearly equal
# points wins a maximum. Casting the operands here as well moves the same tensors by up to 10 % of
# their largest value (mask token 7 %, first convolution's bias 10 %), and no two implementations
# round alike. b3 and c3, computed without the cast, hold to 1e-3 in test_ptv3.


def check_step(golden, losses, grads, loss_tolerance, norm_tolerance, grad_tolerance):
    for name, theirs in zip(
        (*LOSSES, "loss"), ("mask_loss", "roll_mask_loss", "unmask_loss", "loss"), strict=True
    ):
        np.testing.assert_allclose(
            losses[name], golden.arrays[f"loss.{theirs}"], rtol=loss_tolerance, err_msg=name
        )
    norms = np.array([np.linalg.norm(grads[n]) for n in golden.grad_names])
    want = golden.arrays["grad.norms"]
    np.testing.assert_allclose(
        norms, want, rtol=norm_tolerance, atol=norm_tolerance * want.max() / 100
    )
    for key, want in golden.arrays.items():
        if key.startswith("grad.student"):
            close(grads[key.removeprefix("grad.")], want, grad_tolerance)


def test_a_step_equals_the_original():
    golden = GoldenStep("f3_sonata_step_nodup")
    matches = {"mask": "mask", "roll": "roll_mask", "unmask": "unmask"}
    for name, theirs in matches.items():
        found = (np.asarray(golden.rows.matches[name]) < golden.rows.teacher.origin.shape[1]).sum()
        assert found == len(golden.arrays[f"{theirs}.match_index"])
    check_step(golden, *golden.run(), 1e-4, 0.05, 0.15)


def test_views_without_a_match_can_be_left_out_of_the_mean():
    golden = GoldenStep("f3_sonata_step_nodup")
    spec = dataclasses.replace(golden.objective.spec, matched_views_only=True)
    objective, rows = Sonata(spec), golden.rows
    views = objective._matched_views(rows, None)
    assert {name: float(v) for name, v in views.items()} == {"mask": 2, "roll": 2, "unmask": 4}
    cloud = rows.students.level.cloud[:, 0]
    none = rows.teacher.origin.shape[1]
    matches = rows.matches | {"mask": jnp.where(cloud == 1, none, rows.matches["mask"])}
    views = objective._matched_views(rows._replace(matches=matches), None)
    assert {name: float(v) for name, v in views.items()} == {"mask": 1, "roll": 2, "unmask": 4}


def test_a_step_with_duplicated_voxels_is_near_the_original():
    """The rule for duplicates is symmetric here; the original's is not (REFERENCE quirk 5)."""
    golden = GoldenStep("f4_sonata_step_dups")
    check_step(golden, *golden.run(), 2e-3, 0.15, 0.25)


def test_a_step_with_duplicated_voxels_equals_the_original_under_its_rule(monkeypatch):
    """Taps before the centre add all rows of a voxel into the first row of the target voxel; those
    after it read the first row of the neighbour into every row; the centre reads its own row."""

    def originals_conv(x, weight, neighbours, voxel, count, pairs, stacked):
        del count, pairs, stacked
        padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        first = (voxel == jnp.arange(len(x)))[:, None]
        added = jnp.pad(jax.ops.segment_sum(x, voxel, len(x)), ((0, 1), (0, 0)))
        before = jnp.einsum("tnc,tcf->nf", added[neighbours[:13]], weight[:13])
        after = jnp.einsum("tnc,tcf->nf", padded[neighbours[13:]], weight[13:])
        return jnp.where(first, before, 0) + after

    monkeypatch.setattr(layers, "submanifold_conv", originals_conv)
    golden = GoldenStep("f4_sonata_step_dups")
    check_step(golden, *golden.run(), 1e-4, 0.05, 0.05)


def test_the_teacher_moves_as_the_original():
    golden = GoldenStep("f3_sonata_step_nodup", rows=False)
    teacher = move_teacher(golden.teacher, golden.student, golden.momentum)
    named = to_state_dict(jax.tree.map(np.asarray, teacher["backbone"]), "")
    want = golden.arrays["ema.teacher.enc4.block0.mlp.0.fc1.bias"]
    np.testing.assert_allclose(named["enc.enc4.block0.mlp.0.fc1.bias"], want, atol=1e-6)
    np.testing.assert_allclose(
        teacher["mask_head"]["prototypes"],
        golden.arrays["ema.teacher.mask_head.original1"],
        atol=1e-6,
    )
