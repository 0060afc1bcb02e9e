"""Losses of a segmentation: cross-entropy and Lovász-softmax, in float32."""

import jax
import jax.numpy as jnp

from point_jax.geometry.running import running_sum


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log probability of every point's label.

    Args:
      logits: (N, K).
      labels: (N,) int32; -1 for none.

    Returns:
      (N,) float32, 0 where there is no label.
    """
    log = jax.nn.log_softmax(logits.astype(jnp.float32))
    found = jnp.take_along_axis(log, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    return jnp.where(labels >= 0, -found, 0.0)


def lovasz_softmax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Lovász-softmax (arXiv:1705.08790, algorithm 1), the mean over the classes that have points.

    The extension is linear in the errors once they are sorted, so its weights are constants of the
    gradient: each class is sorted once, forward only, and the backward pass is a product.

    Args:
      logits: (N, K).
      labels: (N,) int32; -1 for points that do not count.

    Returns:
      () float32; 0 if no point has a label.
    """
    classes = logits.shape[1]
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    counted = labels >= 0

    def one(this: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mine, probability = this
        inside = labels == mine
        errors = jnp.where(counted, jnp.abs(inside.astype(jnp.float32) - probability), 0.0)
        weights = _weights(jax.lax.stop_gradient(errors), inside, counted)
        present = jnp.any(inside)
        return jnp.where(present, (errors * weights).sum(), 0.0), present

    # Class by class: the sorted copies of all of them need not be there at once.
    losses, present = jax.lax.map(one, (jnp.arange(classes), probability.T))
    return losses.sum() / jnp.maximum(present.sum(), 1)


def _weights(errors: jax.Array, inside: jax.Array, counted: jax.Array) -> jax.Array:
    """How much the Jaccard loss grows as each point, the worst first, is counted as wrong."""
    size = len(errors)
    # Points that do not count come last; a stable order makes equal errors repeatable.
    rank = jnp.where(counted, -errors, jnp.inf)
    _, order = jax.lax.sort((rank, jnp.arange(size)), num_keys=1, is_stable=True)
    right = running_sum(inside[order]).astype(jnp.float32)
    wrong = running_sum((counted & ~inside)[order]).astype(jnp.float32)
    total = right[-1]
    jaccard = 1.0 - (total - right) / jnp.maximum(total + wrong, 1.0)
    growth = jnp.diff(jaccard, prepend=0.0)
    # The inverse of the order, as a sort: no scatter.
    _, growth = jax.lax.sort((order, growth), num_keys=1)
    return growth
