"""Points and the image patches that see them: pooling of pixels, means over patches, the loss.

A place is where an image sees a point, (row, column) in units of patches, so that its integer part
is the patch; (-1, -1) where it does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from point_jax.geometry.running import running_sum
from point_jax.ops.gather import take_rows
from point_jax.ops.pool import cluster_sum

BLOCK = 256  # points that are added up in one product


def pool_places(places: jax.Array, first_child: jax.Array) -> jax.Array:
    """Places of clusters: the mean over those of their points that an image sees.

    Args:
      places: (N, I, 2) float32.
      first_child: (M + 1,) int32, where each cluster's points start.

    Returns:
      (M, I, 2) float32; -1 where an image sees none of the points.
    """
    points, images, _ = places.shape
    seen = (places >= 0).all(-1, keepdims=True).astype(jnp.float32)
    packed = jnp.concatenate([places * seen, seen], axis=-1).reshape(points, 3 * images)
    total = cluster_sum(packed, first_child).reshape(-1, images, 3)
    count = total[..., 2:]
    return jnp.where(count > 0, total[..., :2] / jnp.maximum(count, 1.0), -1.0)


def patch_of(places: jax.Array, height: int, width: int) -> jax.Array:
    """The patch that a place lies in, truncated as the original does (REFERENCE quirk 18).

    Args:
      places: (N, I, 2) float32.
      height, width: of an image in patches.

    Returns:
      (N, I) int32, row * width + column; height * width where the image does not see the point.
    """
    row, column = jnp.moveaxis(places.astype(jnp.int32), -1, 0)
    inside = (places >= 0).all(-1) & (row < height) & (column < width)
    return jnp.where(inside, row * width + column, height * width)


class Sightings(NamedTuple):
    """Which points the patches of I images see, both ways round.

    Attributes:
      patch: (N, I) int32, the patch that sees a point, see `patch_of`; P for none.
      order: (I, N) int32, the points of an image's first patch, of the second, and so on; those
        that it does not see last.
      first: (I, P + 1) int32, where each patch's points start in the order.
    """

    patch: jax.Array
    order: jax.Array
    first: jax.Array


def sightings(patch: jax.Array, patches: int) -> Sightings:
    """Sorts points by patch.

    Args:
      patch: (N, I) int32, of `patch_of`; `patches` for none.
      patches: number of patches of an image, P.
    """
    of_points = jnp.arange(len(patch), dtype=jnp.int32)

    def of_image(patch: jax.Array) -> tuple[jax.Array, jax.Array]:
        ascending, order = jax.lax.sort((patch, of_points), num_keys=1, is_stable=True)
        first = jnp.searchsorted(ascending, jnp.arange(patches + 1, dtype=patch.dtype))
        return order, first.astype(jnp.int32)

    return Sightings(patch, *jax.lax.map(of_image, patch.T))


@jax.custom_vjp
def patch_sums(x: jax.Array, seen: Sightings) -> jax.Array:
    """Sum of the features of the points that each patch sees.

    Without a scatter either way: GPUs would add up in an order that changes from run to run.
    CPUs take a turn of a loop for every point of the largest patch, a hundred or more; accelerators
    add up blocks of points. GPUs take the images side by side, as what costs there is to start
    kernels; TPUs move windows fast where there is one of them.

    Args:
      x: (N, C) float32.
      seen: of I images with P patches.

    Returns:
      (I, P, C), zeros for patches that see nothing.
    """

    def one_by_one(x: jax.Array, order: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.map(lambda image: sum_by_blocks(x, *image), (order, first))

    def by_turns(x: jax.Array, order: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda image: cluster_sum(take_rows(x, image[0]), image[1]), (order, first)
        )

    side_by_side = jax.vmap(sum_by_blocks, in_axes=(None, 0, 0))
    return jax.lax.platform_dependent(
        *(x, seen.order, seen.first), cpu=by_turns, cuda=side_by_side, default=one_by_one
    )


def sum_by_blocks(x: jax.Array, order: jax.Array, first: jax.Array) -> jax.Array:
    """Sums of x[order] over clusters of any size, block after block.

    A block's rows are added up by cluster in a product with ones and zeros. It reaches no more
    clusters than it has rows, so its sums are added to a window of those before.

    Args:
      x: (N, C) float32.
      order: (R,) int32, a permutation of rows of x.
      first: (P + 1,) int32, where each cluster starts in the order.

    Returns:
      (P, C), zeros for empty clusters.
    """
    place = jnp.arange(len(order), dtype=jnp.int32)
    inside = (place >= first[0]) & (place < first[-1])
    # The number of each row's cluster among those that have rows, from 1; 0 before the first.
    starts = jnp.zeros(len(order), jnp.int32).at[first].set(1, mode="drop")
    rank = running_sum(starts)
    rows, ranks = _in_blocks(jnp.where(inside, order, len(x)), len(x)), _in_blocks(rank, 0)

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        begin = ranks[i, 0]
        mine = (jnp.arange(BLOCK)[:, None] == (ranks[i] - begin)[None]).astype(x.dtype)
        more = jnp.dot(mine, take_rows(x, rows[i]), precision=jax.lax.Precision.HIGHEST)
        before = jax.lax.dynamic_slice_in_dim(sums, begin, BLOCK)
        return jax.lax.dynamic_update_slice_in_dim(sums, before + more, begin, axis=0)

    sums = jnp.zeros((len(first) + BLOCK, x.shape[1]), x.dtype)
    sums = jax.lax.fori_loop(0, len(rows), add, sums)
    of_cluster = rank[jnp.minimum(first[:-1], len(order) - 1)]
    return jnp.where((first[1:] > first[:-1])[:, None], sums[of_cluster], 0)


def _in_blocks(array: jax.Array, fill: int) -> jax.Array:
    """Rows (N, ...) as blocks (B, BLOCK, ...); the last one is filled up."""
    filling = ((0, -len(array) % BLOCK),) + ((0, 0),) * (array.ndim - 1)
    return jnp.pad(array, filling, constant_values=fill).reshape(-1, BLOCK, *array.shape[1:])


def _patch_sums_fwd(x, seen):
    return patch_sums(x, seen), seen.patch


def _patch_sums_bwd(patch, g):
    def of_points(g, patch):
        return sum(take_rows(g[image], patch[:, image]) for image in range(len(g)))

    def in_blocks(g, patch):  # what is gathered of every image stays small
        blocks = _in_blocks(patch, g.shape[1])
        slope = jax.lax.map(lambda block: of_points(g, block), blocks)
        return slope.reshape(-1, g.shape[2])[: len(patch)]

    # A GPU gathers and adds in one kernel.
    grad = jax.lax.platform_dependent(g, patch, cuda=of_points, default=in_blocks)
    return grad, None


patch_sums.defvjp(_patch_sums_fwd, _patch_sums_bwd)


def patch_means(x: jax.Array, seen: Sightings) -> tuple[jax.Array, jax.Array]:
    """Mean of the features of the points that each patch sees.

    Args:
      x: (N, C) float32.
      seen: of I images with P patches.

    Returns:
      means (I, P, C), zeros for patches that see nothing; how many points each sees (I, P) int32.
    """
    count = jnp.diff(seen.first, axis=1)
    return patch_sums(x, seen) / jnp.maximum(count, 1)[..., None], count


def shifted_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cosine of the angle between vectors whose mean over channels is taken away.

    Args:
      a, b: (..., C) float32.

    Returns:
      (...) float32, from 0 to 2; 1 where one of them is constant over its channels.
    """
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    dot = (a * b).sum(-1)
    # The smallest length is PyTorch's; inside the root, so that the gradient of 0 is 0.
    lengths = jnp.sqrt(jnp.maximum((a * a).sum(-1), 1e-16) * jnp.maximum((b * b).sum(-1), 1e-16))
    return 1.0 - dot / lengths
