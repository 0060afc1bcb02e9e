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

BLOCK = 256  # rows that are added up in one product


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
    add up blocks of points.

    Args:
      x: (N, C) float32.
      seen: of I images with P patches.

    Returns:
      (I, P, C), zeros for patches that see nothing.
    """

    def of_image(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        order, first = image
        return jax.lax.platform_dependent(
            take_rows(x, order), first, cpu=cluster_sum, default=sum_by_blocks
        )

    return jax.lax.map(of_image, (seen.order, seen.first))


def sum_by_blocks(x: jax.Array, first: jax.Array) -> jax.Array:
    """As `ops.pool.cluster_sum`, for clusters of any size, in few passes over the rows.

    A block's rows are added up by cluster in a product with ones and zeros. A cluster has its sum
    in the block that it starts in, and the first sums of the blocks that it reaches into, of which
    there is one a block: those are added by doubling.
    """
    size, rows = BLOCK, jnp.arange(len(x), dtype=jnp.int32)
    x = jnp.where((rows < first[-1])[:, None], x, 0)
    x = jnp.pad(x, ((0, -len(x) % size), (0, 0)))
    blocks = len(x) // size
    starts = jnp.zeros(len(x), jnp.int32).at[first].set(1, mode="drop")
    rank = running_sum(starts).reshape(blocks, size)
    local = rank - rank[:, :1]
    mine = (local[..., None] == jnp.arange(size)[None, None]).astype(x.dtype)
    rows_of = x.reshape(blocks, size, -1)
    sums = jnp.einsum("brl,brc->blc", mine, rows_of, precision=jax.lax.Precision.HIGHEST)

    start = jnp.minimum(first[:-1], len(x) - 1)  # of empty clusters at the end
    begun = sums.reshape(len(x), -1)[start // size * size + local.reshape(-1)[start]]
    goes_on = starts.reshape(blocks, size)[:, 0] == 0  # from the block before
    heads = jnp.where(goes_on[:, None], sums[:, 0], 0)
    more = sum_by_doubling(heads, jnp.minimum(first // size + 1, blocks))
    return jnp.where((first[1:] > first[:-1])[:, None], begun + more, 0)


def sum_by_doubling(x: jax.Array, first: jax.Array) -> jax.Array:
    """As `ops.pool.cluster_sum`, for clusters of any size: log2 N passes over the rows."""
    rows = jnp.arange(len(x), dtype=jnp.int32)
    starts = jnp.zeros(len(x), bool).at[first].set(True, mode="drop")
    begin = jax.lax.cummax(jnp.where(starts, rows, 0))
    step = 1
    while step < len(x):
        # Of each row the sum of the `step` rows up to it, in its cluster; then of twice as many.
        before = jnp.pad(x, ((step, 0), (0, 0)))[: len(x)]
        x = x + jnp.where((rows - step >= begin)[:, None], before, 0)
        step *= 2
    some = first[1:] > first[:-1]
    return jnp.where(some[:, None], x[jnp.maximum(first[1:] - 1, 0)], 0)


def _patch_sums_fwd(x, seen):
    return patch_sums(x, seen), seen.patch


def _patch_sums_bwd(patch, g):
    def add(total, image):
        g, patch = image
        return total + take_rows(g, patch), None

    none = jnp.zeros((len(patch), g.shape[-1]), g.dtype)
    return jax.lax.scan(add, none, (g, patch.T))[0], None


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
