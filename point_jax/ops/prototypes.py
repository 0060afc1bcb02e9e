"""Losses over prototypes without the (points x prototypes) matrix.

A score is the product of a point's embedding and a prototype's direction. At 4,096 prototypes the
scores are the largest array of the objective, so blocks of points make theirs when they need them:
Sinkhorn-Knopp only keeps one scale per prototype, cross-entropy a running log-sum-exp, and the
gradients are made block by block as well. All in float32, scales and sums that pass from block to
block in log space.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.loops import over_blocks

_BLOCK = 256
# A loop on a GPU asks the host before each block whether there is one more: few and large ones.
_CUDA_BLOCK = 4096


def _over_blocks(body, init, points: int, count: jax.Array):
    """Folds `body(size, i, carry)` over the blocks of `size` points of which some are in use."""

    def loop(block):
        size = min(block, points)
        return over_blocks(partial(body, size), init, points, size, count)

    return jax.lax.platform_dependent(
        cuda=partial(loop, _CUDA_BLOCK), default=partial(loop, _BLOCK)
    )


def points_done(capacity: int, count: int) -> int:
    """Points of which each product with the prototypes makes scores: the last block is whole."""
    size = min(_BLOCK, capacity)
    return -(-count // size) * size


def _block(array: jax.Array, i: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Rows of block i, and which of them it is the first to see (the last block overlaps)."""
    start = jnp.minimum(i * size, len(array) - size)
    return jax.lax.dynamic_slice_in_dim(array, start, size), start + jnp.arange(size) >= i * size


def log_sum_over_points(
    embedding: jax.Array,
    directions: jax.Array,
    log_scale: jax.Array | None,
    weight: jax.Array,
    count: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """One half-step of Sinkhorn-Knopp: how much weight each prototype receives, as a logarithm.

    Args:
      embedding: (A, E) float32.
      directions: (Q, E) float32.
      log_scale: (Q,) scales of the prototypes, by which each point's assignment is normalised
        first, as a half-step over the points of all rows has left them; None for the raw
        exponentials of the first half-step. A prototype with less than 1e-38 of every point here
        receives nothing.
      weight: (A,) float32, 1 for points that take part, else 0.
      count: () int32, points from here on take no part (their blocks are skipped).
      temperature: () float32.

    Returns:
      (Q,) float32: log of the sum over points of exp(score / temperature), each point normalised.
    """

    def add(size, i, total):
        rows, fresh = _block(embedding, i, size)
        use = jnp.where(fresh, _block(weight, i, size)[0], 0.0)
        scores = rows @ directions.T / temperature  # (block, Q)
        if log_scale is None:
            scores = jnp.where(use[:, None] > 0, scores, -jnp.inf)
            return jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=0))
        # A half-step leaves scales by which each prototype receives 1 in all, so that among all
        # points one gives it a share that float32 holds; what is below adds nothing to that.
        weights, share, _ = _softmax(jnp.where(use[:, None] > 0, scores + log_scale[None], 0.0))
        received = jnp.dot(use * share, weights, precision=jax.lax.Precision.HIGHEST)
        return jnp.logaddexp(total, jnp.log(received) - log_scale)

    empty = jnp.full(len(directions), -jnp.inf)
    return _over_blocks(add, empty, len(embedding), count)


class Sums(NamedTuple):
    """Sums over the points of what tells how the distillation fares; see `prototype_loss`."""

    teacher_entropy: jax.Array  # () nats
    student_entropy: jax.Array  # () nats
    teacher_use: jax.Array  # (Q,) probability
    student_use: jax.Array  # (Q,) probability


def prototype_loss(
    student: jax.Array,
    student_directions: jax.Array,
    teacher: jax.Array,
    teacher_directions: jax.Array,
    log_scale: jax.Array,
    weight: jax.Array,
    count: jax.Array,
    student_temperature: float,
    teacher_temperature: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the student's assignment against the teacher's, point by point.

    The teacher's assignment is softmax(score / temperature + log_scale), what Sinkhorn-Knopp's last
    normalisation leaves.

    Args:
      student: (A, E) float32 embeddings; differentiated.
      student_directions: (Q, E) float32; differentiated.
      teacher: (A, E) float32 embeddings, one a student's point.
      teacher_directions: (Q, E) float32.
      log_scale: (Q,) float32.
      weight: (A,) float32, 1 for points that take part, else 0.
      count: () int32, points from here on take no part (their blocks are skipped).
      student_temperature: of the student's softmax.
      teacher_temperature: () float32.

    Returns:
      (A,) float32 losses, 0 where the weight is 0; and `Sums`, without gradient.
    """
    blocks = teacher, teacher_directions, log_scale, weight, count, teacher_temperature
    return _loss(student, student_directions, blocks, student_temperature)


def _scores(student, student_directions, blocks, temperature, i, size):
    """Weights (block,) and what the student's and the teacher's softmax are of, (block, Q) each."""
    teacher, teacher_directions, log_scale, weight, _, teacher_temperature = blocks
    use, fresh = _block(weight, i, size)
    use = jnp.where(fresh, use, 0.0)
    guess = _block(student, i, size)[0] @ student_directions.T / temperature
    target = _block(teacher, i, size)[0] @ teacher_directions.T / teacher_temperature
    return use, guess, target + log_scale[None]


def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax of each row as weights (block, Q) times a share (block,); and its log-sum-exp.

    One exponential a score; the division and what else is of a row go where they cost a row.
    """
    top = scores.max(1)
    weights = jnp.exp(scores - top[:, None])
    total = weights.sum(1)
    return weights, 1.0 / total, top + jnp.log(total)


def _forward(student, student_directions, blocks, temperature):
    prototypes = len(student_directions)

    def add(size, i, carry):
        losses, sums = carry
        use, guess, target = _scores(student, student_directions, blocks, temperature, i, size)
        p, p_share, p_log = _softmax(guess)
        t, t_share, t_log = _softmax(target)
        # A softmax sums to 1, so its cross-entropy with another is the other's log-sum-exp less
        # the mean of the other's scores.
        loss = use * (p_log - t_share * (t * guess).sum(1))
        # Rows that an earlier block has seen keep what it wrote.
        start = jnp.minimum(i * size, len(student) - size)
        loss += jax.lax.dynamic_slice_in_dim(losses, start, size) * (use == 0)
        sums = Sums(
            sums.teacher_entropy + (use * (t_log - t_share * (t * target).sum(1))).sum(),
            sums.student_entropy + (use * (p_log - p_share * (p * guess).sum(1))).sum(),
            sums.teacher_use + (use * t_share) @ t,
            sums.student_use + (use * p_share) @ p,
        )
        return jax.lax.dynamic_update_slice_in_dim(losses, loss, start, axis=0), sums

    zero, none = jnp.zeros(()), jnp.zeros(prototypes)
    init = jnp.zeros(len(student)), Sums(zero, zero, none, none)
    return _over_blocks(add, init, len(student), blocks[4])


@jax.custom_vjp
def _loss(student, student_directions, blocks, temperature):
    return _forward(student, student_directions, blocks, temperature)


def _loss_fwd(student, student_directions, blocks, temperature):
    out = _forward(student, student_directions, blocks, temperature)
    return out, (student, student_directions, blocks, temperature)


def _loss_bwd(saved, grads):
    student, student_directions, blocks, temperature = saved
    slope = grads[0]

    def add(size, i, carry):
        grad, grad_directions = carry
        use, guess, target = _scores(student, student_directions, blocks, temperature, i, size)
        p, p_share, _ = _softmax(guess)
        t, t_share, _ = _softmax(target)
        rate = use * _block(slope, i, size)[0] / temperature
        score_slope = (rate * p_share)[:, None] * p - (rate * t_share)[:, None] * t
        start = jnp.minimum(i * size, len(student) - size)
        # Rows of weight 0 add nothing, so the overlap of the last block is added to, not written
        # over.
        before = jax.lax.dynamic_slice_in_dim(grad, start, size)
        grad = jax.lax.dynamic_update_slice_in_dim(
            grad, before + score_slope @ student_directions, start, axis=0
        )
        return grad, grad_directions + score_slope.T @ _block(student, i, size)[0]

    init = jnp.zeros_like(student), jnp.zeros_like(student_directions)
    grad, grad_directions = _over_blocks(add, init, len(student), blocks[4])
    return grad, grad_directions, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)
