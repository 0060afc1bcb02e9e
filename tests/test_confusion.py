"""Scores are those of the definition, whichever way the points are counted."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.evaluation.classes import S3DIS, S3DIS_AREAS, SCANNET20, SCANNET200, Classes
from point_jax.evaluation.confusion import confusion, scores, six_fold, sum_over_processes
from point_jax.evaluation.predict import LinearPredictor
from point_jax.features.voxels import Voxels

NAMES = ("wall", "floor", "chair", "lamp")


@st.composite
def predictions(draw, least_label=-1, points=st.integers(1, 40)):
    """(predicted, labels) of four classes, of which some may occur nowhere."""
    count = draw(points)
    wanted = draw(st.lists(st.integers(least_label, 3), min_size=count, max_size=count))
    got = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return np.array(got, np.int32), np.array(wanted, np.int32)


@given(predictions())
def test_a_pair_of_label_and_prediction_is_counted_where_there_is_a_label(pair):
    predicted, labels = pair
    matrix = confusion(predicted, labels, 4)
    assert matrix.dtype == np.int64 and matrix.shape == (4, 4)
    pairs = list(zip(labels.tolist(), predicted.tolist(), strict=True))
    for label in range(4):
        for guess in range(4):
            assert matrix[label, guess] == pairs.count((label, guess))


@given(predictions(), predictions())
def test_matrices_of_parts_add_up_to_that_of_the_whole(first, second):
    predicted, labels = (np.concatenate(both) for both in zip(first, second, strict=True))
    parts = [confusion(guesses, wanted, 4) for guesses, wanted in (first, second)]
    np.testing.assert_array_equal(confusion(predicted, labels, 4), parts[0] + parts[1])


@given(predictions())
def test_scores_are_those_of_sets_of_points(pair):
    predicted, labels = pair
    known = labels >= 0
    matrix = confusion(predicted, labels, 4)
    if not known.any():
        with pytest.raises(ValueError, match="no point is labelled"):
            scores(matrix, NAMES)
        return
    got = scores(matrix, NAMES)
    iou, acc = {}, {}
    for number, name in enumerate(NAMES):
        wanted = {i for i in range(len(labels)) if labels[i] == number}
        guessed = {i for i in range(len(labels)) if known[i] and predicted[i] == number}
        assert got.counts[name] == len(wanted)
        if wanted:
            iou[name] = len(wanted & guessed) / len(wanted | guessed)
            acc[name] = len(wanted & guessed) / len(wanted)
    assert got.per_class == {name: pytest.approx(iou[name]) if name in iou else None
                             for name in NAMES}  # fmt: skip
    assert got.confusion == tuple(tuple(row) for row in matrix.tolist())
    assert got.mIoU == pytest.approx(np.mean(list(iou.values())))
    assert got.mAcc == pytest.approx(np.mean(list(acc.values())))
    assert got.allAcc == pytest.approx((predicted == labels)[known].mean())


@given(predictions(least_label=0, points=st.just(30)))
def test_where_every_class_occurs_they_are_pointcepts(pair):
    predicted, labels = pair
    labels[:4] = range(4)
    # From histograms, class by class, as its engine computes them.
    bins = np.arange(5)
    hit = np.histogram(predicted[predicted == labels], bins)[0]
    target = np.histogram(labels, bins)[0]
    union = np.histogram(predicted, bins)[0] + target - hit
    got = scores(confusion(predicted, labels, 4), NAMES)
    assert got.mIoU == pytest.approx(np.mean(hit / (union + 1e-10)), abs=1e-9)
    assert got.mAcc == pytest.approx(np.mean(hit / (target + 1e-10)), abs=1e-9)
    assert got.allAcc == pytest.approx(sum(hit) / (sum(target) + 1e-10), abs=1e-9)


def test_a_class_that_is_nowhere_is_not_scored_but_points_given_to_it_are_wrong():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 3, 1, 1])
    got = scores(confusion(predicted, labels, 4), NAMES)
    assert got.per_class == {"wall": 0.5, "floor": 1.0, "chair": None, "lamp": None}
    assert (got.mIoU, got.mAcc, got.allAcc) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("predicted", "labels", "says"),
    [
        ([0, 1], [0, 1, 2], r"shape \(2,\) and labels \(3,\)"),
        ([[0]], [[0]], "expected \\(n,\\) both"),
        ([0, 4], [0, 1], "predicted is from 0 to 4, expected 0 to 3"),
        ([0, -1], [0, 1], "predicted is from -1 to 0"),
        ([0, 1], [0, 255], "labels is from 0 to 255, expected -1 to 3"),
        ([0, 1], [0, -2], "labels is from -2"),
        ([0.5, 1], [0, 1], "predicted is float64"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(predicted, labels, says):
    with pytest.raises(ValueError, match=says):
        confusion(np.array(predicted), np.array(labels), 4)


def test_a_matrix_that_does_not_fit_the_names_is_refused():
    for names in (NAMES[:3], ("wall", "wall", "chair", "lamp")):
        with pytest.raises(ValueError, match="different names"):
            scores(np.eye(4, dtype=np.int64), names)


def test_scores_are_equal_where_their_matrices_are():
    matrix = np.array([[2**62, 1], [0, 3]])
    names = NAMES[:2]
    assert scores(matrix, names) == scores(matrix.copy(), names)
    swapped = np.array([[2**62, 1], [0, 2]])
    assert scores(matrix, names) != scores(swapped, names)
    assert all(type(count) is int for row in scores(matrix, names).confusion for count in row)


def random_folds():
    rng = np.random.default_rng(0)
    return {area: rng.integers(0, 10**6, (13, 13)) for area in S3DIS_AREAS}


def test_six_folds_are_one_test_set_and_six():
    folds = random_folds()
    got = six_fold(folds, S3DIS.names)
    assert got.summed == scores(np.sum(list(folds.values()), axis=0), S3DIS.names)
    each = [scores(matrix, S3DIS.names) for matrix in folds.values()]
    assert list(got.folds.values()) == each
    for name, mean in got.mean.items():
        assert mean == pytest.approx(np.mean([getattr(one, name) for one in each]))
    assert set(got.mean) == {"mIoU", "mAcc", "allAcc"}


def test_a_missing_area_is_told():
    folds = random_folds()
    del folds["Area_5"]
    with pytest.raises(ValueError, match=r"expected one of each: Area_1, .*Area_5"):
        six_fold(folds, S3DIS.names)


def test_one_process_keeps_its_matrix():
    matrix = np.array([[1, 2], [3, 2**62]])
    assert sum_over_processes(matrix) is matrix


CHILD = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from point_jax.evaluation.confusion import sum_over_processes
mine = np.array([[2**40 + 1, 2**32 - 1], [7, 2**61 - 1]]) * (1 + int(sys.argv[2]))
print(sum_over_processes(mine).tolist())
"""


def test_two_processes_get_the_sum_to_the_last_point():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(i)], text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for child in children:
            out, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
            wanted = [[3 * (2**40 + 1), 3 * (2**32 - 1)], [21, 3 * (2**61 - 1)]]
            assert out.splitlines()[-1] == str(wanted)
    finally:
        for child in children:
            child.kill()


def test_benchmarks_have_their_classes():
    assert [len(c) for c in (SCANNET20, SCANNET200, S3DIS)] == [20, 200, 13]
    known = dict(zip(SCANNET20.names, SCANNET20.ids, strict=True))
    assert (known["desk"], known["shower curtain"], known["otherfurniture"]) == (14, 28, 39)
    known = dict(zip(SCANNET200.names, SCANNET200.ids, strict=True))
    assert (known["wall"], known["case of water bottles"], known["mattress"]) == (1, 1181, 1191)
    for classes in (SCANNET20, SCANNET200):  # the benchmarks list them by rising id
        assert list(classes.ids) == sorted(set(classes.ids))
    with pytest.raises(ValueError, match="2 names \\(1 different\\)"):
        Classes(("wall", "wall"), (1, 2))


class Columns:
    """Features that are the voxels' own."""

    channels = 3

    def __call__(self, clouds):
        for cloud in clouds:
            yield cloud.features


def voxels(features):
    count = len(features)
    zero = np.zeros((count, 3), np.float32)
    return Voxels(zero.astype(np.int32), features, None, None, zero, np.arange(count))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 300))
def test_a_linear_layer_gives_probabilities_in_the_ratio_of_its_scores(seed, size):
    rng = np.random.default_rng(seed)
    kernel = (size * rng.standard_normal((3, 4))).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    predict = LinearPredictor(Columns(), kernel, bias)
    clouds = [voxels(rng.standard_normal((n, 3)).astype(np.float32)) for n in (5, 2)]
    got = list(predict(clouds))
    assert predict.classes == 4
    for cloud, found in zip(clouds, got, strict=True):
        logits = cloud.features.astype(np.float64) @ kernel + bias
        powers = np.exp(logits - logits.max(1, keepdims=True))
        wanted = powers / powers.sum(1, keepdims=True)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_a_linear_layer_for_other_features_is_refused():
    kernel, bias = np.zeros((3, 4), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 4\), expected \(3, classes\)"):
        LinearPredictor(Columns(), kernel[:2], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        LinearPredictor(Columns(), kernel, bias[:3])
