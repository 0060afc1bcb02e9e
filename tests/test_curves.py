"""Codes along the curves equal the originals' for every depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_files import shared

from point_jax.geometry import curves
from point_jax.geometry.curves import CURVES, curve_depth, parent_code, z_code

encode = jax.jit(curves.encode, static_argnames="curve")


def as_int64(code):
    high, low = code
    return (np.asarray(high).astype(np.int64) << 24) | np.asarray(low).astype(np.int64)


@pytest.mark.parametrize("depth", range(1, 17))
def test_codes_equal_the_originals(depth):
    golden = np.load(shared("golden/a_serialization.npz"))
    grid = jnp.asarray(golden[f"d{depth}_grid_coord"])
    cloud = golden[f"d{depth}_batch"]
    for row, curve in enumerate(CURVES):
        code = as_int64(encode(grid, curve, depth))
        np.testing.assert_array_equal(code, golden[f"d{depth}_code_nobatch"][row])
        np.testing.assert_array_equal(code | (cloud << 3 * depth), golden[f"d{depth}_code"][row])


def test_depth_rule_equals_the_originals():
    golden = np.load(shared("golden/a_serialization.npz"))
    depth = curve_depth(jnp.asarray(golden["depth_rule_max"].astype(np.int32)))
    np.testing.assert_array_equal(depth, golden["depth_rule_depth"])


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_visits_every_voxel_once(curve):
    side = np.arange(8)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side, side), -1).reshape(-1, 3), jnp.int32)
    code = as_int64(encode(grid, curve, 3))
    np.testing.assert_array_equal(np.sort(code), np.arange(512))
    if curve.startswith("hilbert"):  # and steps from face to face
        path = np.asarray(grid)[np.argsort(code)]
        np.testing.assert_array_equal(np.abs(np.diff(path, axis=0)).sum(-1), 1)


@pytest.mark.parametrize("curve", CURVES)
def test_halving_the_grid_and_the_depth_drops_three_bits(curve):
    grid = jnp.asarray(np.random.default_rng(0).integers(0, 2**16, (256, 3)), jnp.int32)
    fine, coarse = encode(grid, curve, 16), encode(grid >> 1, curve, 15)
    np.testing.assert_array_equal(as_int64(parent_code(fine)), as_int64(coarse))


@pytest.mark.parametrize("curve", CURVES)
def test_the_place_in_a_parent_is_the_codes_last_three_bits(curve):
    grid = jnp.asarray(np.random.default_rng(2).integers(0, 2**9, (256, 3)), jnp.int32)
    depth = jnp.arange(256) % 8 + 9
    place = jax.jit(curves.place_in_parent, static_argnames="curve")(grid, curve, depth)
    np.testing.assert_array_equal(place, as_int64(encode(grid, curve, depth)) & 7)


def test_several_curves_at_once_are_each_alone():
    grid = jnp.asarray(np.random.default_rng(3).integers(0, 2**9, (64, 3)), jnp.int32)
    depth = jnp.full(64, 10)
    asked = ("hilbert-trans", "z", "hilbert", "z-trans", "hilbert")
    high, low = curves.along_curves(curves.encode, grid, asked, depth)
    for row, curve in enumerate(asked):
        want = as_int64(encode(grid, curve, depth))
        np.testing.assert_array_equal(as_int64((high[row], low[row])), want)


def test_depth_may_differ_from_point_to_point():
    grid = jnp.asarray(np.random.default_rng(1).integers(0, 8, (64, 3)), jnp.int32)
    depth = jnp.arange(64) % 14 + 3
    mixed = as_int64(encode(grid, "hilbert", depth))
    for i in range(14):
        np.testing.assert_array_equal(mixed[i], as_int64(encode(grid[i], "hilbert", i + 3)))


def test_z_code_orders_x_above_y_above_z():
    x, y, z = (as_int64(z_code(jnp.eye(3, dtype=jnp.int32)[axis])) for axis in range(3))
    assert x > y > z
