"""Logistic regression: at the optimum of its loss, whatever the features' units."""

import numpy as np
import pytest
from blobs import blobs

from point_jax.evaluation.features import LabelledArrays
from point_jax.evaluation.logistic import PENALTIES, fit_logistic
from point_jax.evaluation.ridge import fit_ridge


def joined(data):
    features = np.concatenate([features for features, _ in data]).astype(np.float64)
    labels = np.concatenate([labels for _, labels in data])
    return features[labels >= 0], labels[labels >= 0]


def loss(probe, data, classes, balance=0.5):
    """The loss that the probe minimises, and its gradient, by the definition in float64."""
    features, labels = joined(data)
    kernel, bias = probe
    spread = features.std(0)
    weight = np.maximum(np.bincount(labels, minlength=classes), 1.0)[labels] ** -balance
    weight /= weight.sum()
    logits = features @ kernel + bias
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits)
    share /= share.sum(1, keepdims=True)
    error = weight[:, None] * (share - np.eye(classes)[labels])
    value = -(weight * np.log(share[np.arange(len(labels)), labels])).sum()
    scaled = kernel * spread[:, None]  # the kernel for standardised features
    slope = ((features - features.mean(0)) / spread).T @ error
    return value, scaled, slope, error.sum(0)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_the_layer_is_at_the_minimum_of_its_loss(spread):
    data = blobs(0, spread=spread)
    probe = fit_logistic(data, 3)
    assert probe.penalty in PENALTIES
    _, kernel, slope, offset = loss((probe.kernel, probe.bias), data, 3)
    # At the start the gradient is a hundred times as long.
    assert np.abs(slope + probe.penalty * kernel).max() < 3e-3
    assert np.abs(offset).max() < 3e-3
    zero, _, first, _ = loss((np.zeros_like(probe.kernel), np.zeros(3)), data, 3)
    assert zero == pytest.approx(np.log(3)) and np.abs(first).max() > 0.1


def test_it_does_not_depend_on_the_units_of_the_channels():
    data = blobs(1, spread=0.8)
    draw = np.random.default_rng(0)
    scale, offset = 10.0 ** draw.uniform(-3, 3, 5), draw.normal(size=5)
    moved = LabelledArrays(
        [((x * scale + offset * scale).astype(np.float32), y) for x, y in data.pieces]
    )
    one, two = fit_logistic(data, 3), fit_logistic(moved, 3)
    (x, _), (y, _) = joined(data), joined(moved)
    found = x @ one.kernel + one.bias
    again = y @ two.kernel.astype(np.float64) + two.bias
    np.testing.assert_allclose(again, found, atol=0.05 * np.abs(found).max())
    assert (found.argmax(1) == again.argmax(1)).mean() > 0.99


def test_it_tells_apart_what_can_be_told_apart_and_nothing_else():
    data = blobs(2, spread=0.4)
    probe = fit_logistic(data, 3)
    features, labels = joined(blobs(2, scenes=9, spread=0.4).take([6, 7, 8]))
    assert ((features @ probe.kernel + probe.bias).argmax(1) == labels).mean() > 0.95
    assert probe.held_out_mIoU > 0.9
    assert probe.held_out_mIoU >= fit_ridge(data, 3).held_out_mIoU - 0.02
    draw = np.random.default_rng(0)
    wrong = LabelledArrays([(x, draw.permutation(y)) for x, y in data.pieces])
    assert fit_logistic(wrong, 3).held_out_mIoU < 0.5


def test_constant_channels_and_absent_classes_change_nothing():
    data = blobs(3)
    dead = LabelledArrays(
        [(np.pad(x, ((0, 0), (0, 1)), constant_values=7.0), y) for x, y in data.pieces]
    )
    probe, more = fit_logistic(data, 3), fit_logistic(dead, 4)
    assert not more.kernel[-1].any()
    features, _ = joined(data)
    found = features @ more.kernel[:-1] + more.bias
    assert (found.argmax(1) == (features @ probe.kernel + probe.bias).argmax(1)).mean() > 0.99


def test_the_bank_is_drawn_by_the_seed():
    data = blobs(4, rows=200, spread=0.8)
    first, again, other = (fit_logistic(data, 3, bank=300, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.kernel, again.kernel)
    assert not np.array_equal(first.kernel, other.kernel)


def test_what_cannot_be_fitted_is_refused():
    data = blobs(5)
    with pytest.raises(ValueError, match="logistic chooses its penalty.*there are 1"):
        fit_logistic(data.take([0]), 3)
    with pytest.raises(ValueError, match="there are 2 classes"):
        fit_logistic(data, 2)
    with pytest.raises(ValueError, match="bank=5 for 6 scenes"):
        fit_logistic(data, 3, bank=5)
    pieces = [(x, y if place != 4 else np.full_like(y, -1)) for place, (x, y) in enumerate(data)]
    with pytest.raises(ValueError, match="scenes held out"):
        fit_logistic(LabelledArrays(pieces), 3)
