"""Losses of a segmentation against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.ops.lovasz import cross_entropy, lovasz_softmax

POINTS, CLASSES = 24, 4
loss = jax.jit(lovasz_softmax)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def jaccard_loss(wrong, inside):
    """1 - IoU of a class when just the points of a set are predicted wrongly."""
    return 1 - (inside & ~wrong).sum() / (inside | wrong).sum()


def by_definition(probability, labels):
    """Equation 8 of arXiv:1705.08790: errors, the largest first, times growth of the set loss."""
    counted = labels >= 0
    losses = []
    for mine in sorted(set(labels[counted])):
        inside = labels[counted] == mine
        errors = np.abs(inside - probability[counted, mine])
        wrong, before, total = np.zeros(len(inside), bool), 0.0, 0.0
        for point in np.argsort(-errors, kind="stable"):
            wrong[point] = True
            now = jaccard_loss(wrong, inside)
            total += errors[point] * (now - before)
            before = now
        losses.append(total)
    return np.mean(losses) if losses else 0.0


draws = st.tuples(
    st.integers(0, 2**32 - 1), st.lists(st.integers(-1, CLASSES - 1), min_size=24, max_size=24)
)


@settings(max_examples=60, deadline=None)
@given(draws)
def test_lovasz_softmax_is_its_definition(drawn):
    seed, labels = drawn
    labels = np.array(labels, np.int32)
    logits = np.random.default_rng(seed).normal(0, 3, (POINTS, CLASSES)).astype(np.float32)
    probability = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_allclose(loss(logits, labels), by_definition(probability, labels), atol=2e-6)


def test_certain_predictions_cost_one_minus_iou(rng):
    labels = rng.integers(0, CLASSES, POINTS).astype(np.int32)
    claimed = np.where(rng.random(POINTS) < 0.3, (labels + 1) % CLASSES, labels)
    logits = 1e4 * np.eye(CLASSES, dtype=np.float32)[claimed]
    iou = [
        ((labels == c) & (claimed == c)).sum() / ((labels == c) | (claimed == c)).sum()
        for c in set(labels)
    ]
    np.testing.assert_allclose(loss(logits, labels), 1 - np.mean(iou), atol=1e-6)


def test_order_and_points_without_labels_do_not_matter(rng):
    logits = rng.normal(size=(POINTS, CLASSES)).astype(np.float32)
    labels = rng.integers(-1, CLASSES, POINTS).astype(np.int32)
    expected = loss(logits, labels)
    order = rng.permutation(POINTS)
    np.testing.assert_allclose(loss(logits[order], labels[order]), expected, rtol=1e-6)
    other = np.where(labels[:, None] < 0, 99.0 * rng.normal(size=logits.shape), logits)
    np.testing.assert_allclose(loss(other.astype(np.float32), labels), expected, rtol=1e-6)
    assert loss(logits, np.full(POINTS, -1, np.int32)) == 0


def test_gradients_are_those_of_finite_differences(rng):
    logits = rng.normal(size=(POINTS, CLASSES)).astype(np.float32)
    labels = rng.integers(-1, CLASSES, POINTS).astype(np.int32)
    for function in (lovasz_softmax, lambda x, y: cross_entropy(x, y).sum()):
        found = np.asarray(jax.jit(jax.grad(function))(logits, labels))
        direction = rng.normal(size=logits.shape).astype(np.float32)
        step = 1e-2
        ahead, behind = (
            function(logits + step * direction, labels),
            function(logits - step * direction, labels),
        )
        np.testing.assert_allclose(
            (found * direction).sum(), (ahead - behind) / (2 * step), rtol=2e-2, atol=1e-4
        )
        assert (found[labels < 0] == 0).all()


def test_cross_entropy_is_minus_the_log_of_the_labels_share(rng):
    logits = rng.normal(size=(POINTS, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, POINTS).astype(np.int32)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(share[np.arange(POINTS), labels])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), labels), expected, rtol=1e-5)
