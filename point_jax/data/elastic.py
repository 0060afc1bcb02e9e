"""Elastic distortion: points move along a smooth random field."""

import jax
import jax.numpy as jnp

from point_jax.geometry.sampling import bounds, floor_divide

# Cells that any noise grid gets: those of a cube of 13 granularities.
FEWEST_CELLS = 4096


def elastic(
    coord: jax.Array, valid: jax.Array, noise: jax.Array, granularity: float, magnitude: float
) -> tuple[jax.Array, jax.Array]:
    """Adds a smoothed noise field, interpolated at every point.

    The field lives on a grid of edge `granularity` that starts one cell below the cloud's minimum
    and has floor(extent / granularity) + 3 cells an axis. It is blurred twice by boxes of three
    cells along every axis, with zeros beyond the grid, and interpolated trilinearly: the originals'
    definition.

    The grid is stored flat with the cloud's own dimensions and one spare cell at the end of each
    axis, so the static capacity bounds its volume and not its shape. A cloud that needs more gets a
    grid that is cut in x, if necessary in y, then in z.

    Args:
      coord: (N, 3) float32, metres. Anything in rows that are not valid.
      valid: (N,) bool.
      noise: (cells, 3) standard normal, at least 64 cells. The cell (x, y, z) of nx * ny * nz is
        row (x * (ny + 1) + y) * (nz + 1) + z.
      granularity: edge of a noise cell, metres.
      magnitude: metres per unit of noise.

    Returns:
      (coord, overflow): coord (N, 3) float32; overflow int32 scalar, the points beyond a grid that
      had to be cut: they stay where they are.
    """
    cells = noise.shape[0]
    used = valid[:, None]
    coord = jnp.where(used, coord, 0.0)
    low, high = bounds(coord, valid)
    offset = jnp.where(used, coord - low[None], 0.0)
    below = floor_divide(offset, granularity)
    wanted = floor_divide(high - low, granularity).astype(jnp.int32) + 3
    nz = jnp.minimum(wanted[2], cells // 16 - 1)
    ny = jnp.minimum(wanted[1], cells // (4 * (nz + 1)) - 1)
    nx = jnp.minimum(wanted[0], cells // ((ny + 1) * (nz + 1)) - 1)
    field = _blur(noise, nx, ny, nz)

    corner = below.astype(jnp.int32) + 1
    inside = valid & jnp.all(corner < jnp.stack([nx, ny, nz])[None] - 1, axis=1)
    strides = jnp.stack([(ny + 1) * (nz + 1), nz + 1, jnp.ones_like(nz)])
    row = jnp.where(inside, jnp.sum(corner * strides[None], axis=1), 0)
    weight = offset / granularity - below

    # A loop over the eight corners, or XLA would compute the points anew for each of them.
    def add_corner(number: jax.Array, shift: jax.Array) -> jax.Array:
        upper = (number >> jnp.array([2, 1, 0])) & 1
        share = jnp.prod(jnp.where(upper[None] == 1, weight, 1.0 - weight), axis=1)
        return shift + share[:, None] * field[row + jnp.sum(upper * strides)]

    shift = jax.lax.fori_loop(0, 8, add_corner, jnp.zeros_like(coord))
    moved = coord + jnp.where(inside[:, None], shift * magnitude, 0.0)
    return moved, jnp.sum(valid & ~inside, dtype=jnp.int32)


def noise_cells(capacity: int, grid_size: float, granularity: float, cells_per_area: float) -> int:
    """Cells to provide for the noise of a view.

    A view of `capacity` points, one per voxel, covers a surface of about capacity * grid_size^2;
    its bounding box holds several times as many cells of edge `granularity` as the surface has
    squares of that edge: 6 to 27 in furnished rooms.

    Args:
      capacity: points of the view.
      grid_size: edge of the voxels, metres.
      granularity: edge of a noise cell, metres.
      cells_per_area: cells per square.

    Returns:
      The number of cells, at least `FEWEST_CELLS`.
    """
    return max(FEWEST_CELLS, round(cells_per_area * capacity * (grid_size / granularity) ** 2))


def _blur(noise: jax.Array, nx: jax.Array, ny: jax.Array, nz: jax.Array) -> jax.Array:
    """Two blurs by boxes of three cells along every axis, zeros beyond the grid; (cells, 3)."""
    cell = jnp.arange(noise.shape[0], dtype=jnp.int32)
    column = cell // (nz + 1)
    x = column // (ny + 1)
    inside = (x < nx) & (column - x * (ny + 1) < ny) & (cell - column * (nz + 1) < nz)
    inside = inside.astype(noise.dtype)[:, None]
    strides = jnp.stack([(ny + 1) * (nz + 1), nz + 1, jnp.ones_like(nz)])

    def box(step: jax.Array, field: jax.Array) -> jax.Array:
        # The spare cells are zero, so a roll brings zeros in at every side of the grid.
        stride = strides[step % 3]
        total = field + jnp.roll(field, stride, axis=0) + jnp.roll(field, -stride, axis=0)
        return total * inside / 3.0

    return jax.lax.fori_loop(0, 6, box, noise * inside)
