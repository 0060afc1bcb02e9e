"""Points and the image patches that see them: pooling of pixels, means over patches, the loss.

A place is where an image sees a point, (row, column) in units of patches, so that its integer part
is the patch; (-1, -1) where it does not.
"""

import jax
import jax.numpy as jnp

from point_jax.ops.pool import cluster_sum


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


def patch_means(x: jax.Array, patch: jax.Array, patches: int) -> tuple[jax.Array, jax.Array]:
    """Mean of the features of the points that each patch sees.

    The transpose is a gather: a point gets the gradients of its patches. The sum is a scatter: GPUs
    add up in no fixed order, so there the last bits may differ from run to run.

    Args:
      x: (N, C) float32.
      patch: (N, I) int32, of `patch_of`; `patches` for none.
      patches: number of patches of an image, P.

    Returns:
      means (I, P, C), zeros for patches that see nothing; how many points each sees (I, P) float32.
    """

    def of_image(patch: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jax.ops.segment_sum(x, patch, patches + 1)[:patches]
        count = jax.ops.segment_sum(jnp.ones(len(x)), patch, patches + 1)[:patches]
        return total / jnp.maximum(count, 1.0)[:, None], count

    return jax.lax.map(of_image, patch.T)


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
