"""Running sums of whole numbers along a row, for CPUs and for accelerators."""

import jax
import jax.numpy as jnp

LANES = 128


@jax.jit  # traced once for each length
def running_sum(values: jax.Array) -> jax.Array:
    """Sums of the first 1, 2, 3, ... entries.

    Args:
      values: (N,) bool or int32, not negative; all together at most 2^24.

    Returns:
      (N,) int32.
    """
    return jax.lax.platform_dependent(
        values.astype(jnp.int32), cpu=jnp.cumsum, default=running_sum_by_products
    )


def running_sum_by_products(values: jax.Array) -> jax.Array:
    """As `running_sum`: products with a triangle of ones, in blocks, and again for the blocks.

    XLA's own has a window as long as the row, which takes TPUs' compiler six times as long. Exact:
    float32 holds whole numbers up to 2^24.
    """
    size = len(values)
    blocks = jnp.pad(values, (0, -size % LANES)).astype(jnp.float32).reshape(-1, LANES)
    triangle = jnp.triu(jnp.ones((LANES, LANES), jnp.float32))
    within = jnp.dot(blocks, triangle, precision=jax.lax.Precision.HIGHEST)
    if len(blocks) > 1:
        total = within[:, -1]
        before = running_sum_by_products(total.astype(jnp.int32)).astype(jnp.float32) - total
        within = within + before[:, None]
    return within.reshape(-1)[:size].astype(jnp.int32)
