"""Nearest neighbours within a radius, cloud by cloud."""

import jax
import jax.numpy as jnp

_BLOCK = 256


def nearest(
    query: jax.Array,
    query_cloud: jax.Array,
    point: jax.Array,
    point_cloud: jax.Array,
    radius: float,
) -> jax.Array:
    """The nearest point of the same cloud, closer than a radius; the first of equally near ones.

    Args:
      query: (A, 3) float32.
      query_cloud: (A,) int32; negative for queries that take no part.
      point: (N, 3) float32.
      point_cloud: (N,) int32; negative for points that take no part.
      radius: in the coordinates' unit.

    Returns:
      (A,) int32: index of the point, N for none. What lies in rows that take no part (even NaN)
      does not matter.
    """
    queries, points = len(query), len(point)
    size = min(_BLOCK, queries)
    blocks = -(-queries // size)
    pad = blocks * size - queries
    query = jnp.pad(query, ((0, pad), (0, 0)))
    query_cloud = jnp.pad(query_cloud, (0, pad), constant_values=-1)

    def search(block):
        query, cloud = block

        def run():
            square = sum((query[:, None, axis] - point[None, :, axis]) ** 2 for axis in range(3))
            same = (cloud[:, None] == point_cloud[None]) & (cloud >= 0)[:, None]
            square = jnp.where(same, square, jnp.inf)
            best = jnp.argmin(square, axis=1).astype(jnp.int32)
            near = jnp.take_along_axis(square, best[:, None], axis=1)[:, 0] < radius**2
            return jnp.where(near, best, points)

        # Blocks of padding are not searched.
        return jax.lax.cond((cloud >= 0).any(), run, lambda: jnp.full(size, points, jnp.int32))

    found = jax.lax.map(search, (query.reshape(blocks, size, 3), query_cloud.reshape(blocks, size)))
    return found.reshape(-1)[:queries]
