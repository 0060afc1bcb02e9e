"""Space-filling curves: Z-order and Hilbert codes of voxel coordinates, up to 16 bits an axis.

A code has up to 48 bits. JAX runs with 32-bit integers, so it is a pair `(high, low)` of uint32
which hold 24 bits each: `code = high << 24 | low`. `low` interleaves the lower 8 bits of the three
axes, `high` the upper 8. Comparing pairs lexicographically compares codes.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Curve = Literal["z", "z-trans", "hilbert", "hilbert-trans"]
CURVES: tuple[Curve, ...] = get_args(Curve)
MAX_DEPTH = 16

Code = tuple[jax.Array, jax.Array]


def curve_depth(largest: jax.Array) -> jax.Array:
    """Bits an axis that the originals give a cloud whose largest voxel coordinate is `largest`.

    bit_length(largest + 1): one more than needed when `largest` is 2^d - 1 (REFERENCE quirk 3;
    Hilbert codes depend on it, so it is kept).

    Args:
      largest: int32, any shape; at least 0.

    Returns:
      int32 of the same shape, at least 1.
    """
    return 32 - jax.lax.clz(largest.astype(jnp.int32) + 1)


def encode(grid: jax.Array, curve: Curve, depth: jax.Array | int = MAX_DEPTH) -> Code:
    """Code of each voxel along a curve.

    Args:
      grid: (..., 3) int32 voxel coordinates in [0, 2^depth).
      curve: which curve; the "-trans" ones exchange x and y.
      depth: bits an axis, broadcastable to (...). Only the Hilbert codes depend on it.

    Returns:
      (high, low), uint32 of shape (...). Equal to the originals' codes bit for bit.
    """
    if curve.endswith("-trans"):
        grid = grid[..., jnp.array([1, 0, 2])]
    return hilbert_code(grid, depth) if curve.startswith("hilbert") else z_code(grid)


def z_code(grid: jax.Array) -> Code:
    """Z-order (Morton) code; of the three axes x is the most significant.

    Args:
      grid: (..., 3) int32 in [0, 65536).

    Returns:
      (high, low), uint32 of shape (...).
    """
    axes = grid.astype(jnp.uint32)
    return _interleave((axes >> 8) & 0xFF), _interleave(axes & 0xFF)


def hilbert_code(grid: jax.Array, depth: jax.Array | int = MAX_DEPTH) -> Code:
    """Hilbert code by Skilling's transform (AIP Conf. Proc. 707, 381, 2004).

    Args:
      grid: (..., 3) int32 in [0, 2^depth).
      depth: bits an axis, broadcastable to (...).

    Returns:
      (high, low), uint32 of shape (...).
    """
    depth = jnp.broadcast_to(jnp.asarray(depth, jnp.int32), grid.shape[:-1])

    def fold(i, axes):
        bit = MAX_DEPTH - 1 - i
        below = jnp.where(bit < depth, (jnp.uint32(1) << bit.astype(jnp.uint32)) - 1, 0)
        axes = list(axes)
        for axis in range(3):
            on = (axes[axis] >> bit.astype(jnp.uint32)) & 1 == 1
            # A set bit inverts the lower bits of x; a clear one exchanges them with this axis.
            exchange = jnp.where(on, 0, (axes[0] ^ axes[axis]) & below)
            axes[axis] = axes[axis] ^ exchange
            axes[0] = axes[0] ^ jnp.where(on, below, exchange)
        return tuple(axes)

    # A loop, because sixteen copies of its body took XLA longer to compile than to run.
    axes = tuple(grid[..., axis].astype(jnp.uint32) for axis in range(3))
    axes = jax.lax.fori_loop(0, MAX_DEPTH, fold, axes)
    high, low = z_code(jnp.stack(axes, axis=-1))
    # The transform leaves a Gray code over all 48 bits; its binary value is the running
    # exclusive-or.
    high, low = _running_xor(high), _running_xor(low)
    return high, jnp.where(high & 1 == 1, low ^ 0xFFFFFF, low)


def parent_code(code: Code) -> Code:
    """Code of the voxel twice as large that holds this one: `code >> 3`."""
    high, low = code
    return high >> 3, (low >> 3) | ((high & 7) << 21)


def _interleave(bytes_: jax.Array) -> jax.Array:
    """Spreads three 8-bit axes (..., 3) over 24 bits, x y z x y z ... from the top."""
    spread = bytes_
    for shift, mask in ((8, 0x00F00F), (4, 0x0C30C3), (2, 0x249249)):
        spread = (spread | (spread << shift)) & mask
    return (spread[..., 0] << 2) | (spread[..., 1] << 1) | spread[..., 2]


def _running_xor(bits: jax.Array) -> jax.Array:
    """Exclusive-or of every bit with all bits above it, over 24 bits."""
    for shift in (1, 2, 4, 8, 16):
        bits = bits ^ (bits >> shift)
    return bits
