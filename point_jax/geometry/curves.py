"""Space-filling curves: Z-order and Hilbert codes of voxel coordinates, up to 16 bits an axis.

A code has up to 48 bits. JAX runs with 32-bit integers, so it is a pair `(high, low)` of uint32
which hold 24 bits each: `code = high << 24 | low`. `low` interleaves the lower 8 bits of the three
axes, `high` the upper 8. Comparing pairs lexicographically compares codes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Curve = Literal["z", "z-trans", "hilbert", "hilbert-trans"]
CURVES: tuple[Curve, ...] = get_args(Curve)
MAX_DEPTH = 16
# A coordinate of 65,535 has depth 17, and `orders` asks for one more than a cloud has: the code's
# 48 bits hold the coordinates all the same, above them are zeros, which turn the curve.
_FOLDED_BITS = MAX_DEPTH + 2

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
      depth: bits an axis, up to 18, broadcastable to (...). Only the Hilbert codes depend on it.

    Returns:
      (high, low), uint32 of shape (...). Equal to the originals' codes bit for bit.
    """
    grid = _exchanged(grid, curve)
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
    high, low = z_code(jnp.stack(_hilbert_axes(grid, depth), axis=-1))
    # The transform leaves a Gray code over all 48 bits; its binary value is the running
    # exclusive-or.
    high, low = _running_xor(high), _running_xor(low)
    return high, jnp.where(high & 1 == 1, low ^ 0xFFFFFF, low)


def place_in_parent(grid: jax.Array, curve: Curve, depth: jax.Array | int = MAX_DEPTH) -> jax.Array:
    """The code's last three bits: which of its parent's children a voxel is along a curve.

    Args:
      grid, curve, depth: as for `encode`.

    Returns:
      (...) int32 in [0, 8).
    """
    grid = _exchanged(grid, curve)
    if not curve.startswith("hilbert"):
        x, y, z = (grid[..., axis] & 1 for axis in range(3))
        return (x << 2) | (y << 1) | z
    x, y, z = _hilbert_axes(grid, depth)
    # As in the code, every bit is the exclusive-or with all bits above it.
    x = jax.lax.population_count((x ^ y ^ z) >> 1) ^ x
    y = y ^ x
    z = z ^ y
    return (((x & 1) << 2) | ((y & 1) << 1) | (z & 1)).astype(jnp.int32)


def _hilbert_axes(grid: jax.Array, depth: jax.Array | int) -> tuple[jax.Array, ...]:
    """x, y and z of the Hilbert code before they are interleaved, uint32 of shape (...)."""
    depth = jnp.broadcast_to(jnp.asarray(depth, jnp.int32), grid.shape[:-1])

    def fold(i, axes):
        bit = _FOLDED_BITS - 1 - i
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
    return jax.lax.fori_loop(0, _FOLDED_BITS, fold, axes)


def along_curves(
    function: Callable[[jax.Array, Curve, jax.Array], Any],
    grid: jax.Array,
    curves: Sequence[Curve],
    depth: jax.Array,
) -> Any:
    """`function(grid, curve, depth)` of several curves, stacked: a leading axis O.

    `function` is `encode` or `place_in_parent`. It is called once for both curves of a kind, so
    that its loop compiles once.
    """
    found = {}
    kinds: tuple[Curve, ...] = ("z", "hilbert")
    for kind in kinds:
        mine: list[Curve] = [c for c in dict.fromkeys(curves) if c.removesuffix("-trans") == kind]
        if mine:
            values = function(jnp.stack([_exchanged(grid, c) for c in mine]), kind, depth)
            found |= {c: jax.tree.map(lambda x, i=i: x[i], values) for i, c in enumerate(mine)}
    return jax.tree.map(lambda *parts: jnp.stack(parts), *(found[c] for c in curves))


def _exchanged(grid: jax.Array, curve: Curve) -> jax.Array:
    """The grid (..., 3) as the curve sees it: the "-trans" ones exchange x and y."""
    return grid[..., jnp.array([1, 0, 2])] if curve.endswith("-trans") else grid


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
