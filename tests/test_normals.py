"""Estimated normals: exact on planes, close on spheres, zero where there is no surface."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.data.normals import estimate_normals, local_planes

RNG = np.random.default_rng(0)
# Even points on the unit sphere.
TURN = np.arange(4000) * np.pi * (3 - 5**0.5)
HEIGHT = np.linspace(1, -1, 4001)[:-1] - 1 / 4000
RING = np.sqrt(1 - HEIGHT**2)
SPHERE = np.stack([RING * np.cos(TURN), RING * np.sin(TURN), HEIGHT], 1).astype(np.float32)


def plane(normal: np.ndarray, count: int = 300, at: float = 0.0) -> np.ndarray:
    side = np.linalg.svd(normal[None])[2][1:]
    return (RNG.uniform(-1, 1, (count, 2)) @ side + at * normal).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.02, 1), st.floats(-50, 50))
def test_on_a_plane_they_are_its_normal_and_point_up(x, y, z, at):
    normal = np.array([x, y, z]) / np.linalg.norm([x, y, z])
    found = estimate_normals(plane(normal, at=at))
    assert found.dtype == np.float32
    # float32 coordinates 50 m away are rounded to 4e-6 m; neighbours span 0.3 m
    np.testing.assert_allclose(found, np.tile(normal, (300, 1)), atol=3e-4)


def test_on_a_sphere_they_point_from_the_middle_or_to_it():
    inwards = estimate_normals(SPHERE, 12, towards=np.zeros(3))
    outwards = estimate_normals(SPHERE, 12, towards=10 * SPHERE)
    np.testing.assert_allclose(inwards, -SPHERE, atol=0.03)
    np.testing.assert_array_equal(outwards, -inwards)


def test_upwards_is_the_default():
    found = estimate_normals(SPHERE, 12)
    assert (found[:, 2] >= 0).all()
    np.testing.assert_allclose(found[HEIGHT > 0.1], SPHERE[HEIGHT > 0.1], atol=0.03)


def test_a_radius_keeps_surfaces_apart():
    floor = plane(np.array([0, 0, 1.0]), 800)
    ceiling = floor + np.float32([0, 0, 0.3])
    both = np.concatenate([floor, ceiling])
    near = estimate_normals(both, neighbours=300, radius=0.29)
    wide = estimate_normals(both, neighbours=300)
    np.testing.assert_allclose(near, np.tile([0, 0, 1.0], (1600, 1)), atol=1e-5)
    assert np.abs(wide[:, 2] - 1).max() > 1e-3  # without it some neighbourhoods take in both


def test_without_a_surface_there_is_no_normal():
    line = np.linspace(0, 1, 50, dtype=np.float32)[:, None] * np.float32([1, 2, 3])
    lonely = np.array([[0, 0, 0], [0, 0, 9], [0, 9, 0]], np.float32)
    same = np.ones((40, 3), np.float32)
    assert not estimate_normals(line).any()
    assert not estimate_normals(lonely, radius=1.0).any()
    assert not estimate_normals(same).any()
    assert estimate_normals(lonely).any(1).all()  # three points do make a plane
    assert not estimate_normals(lonely[:2]).any()


def test_lengths_are_one_or_zero_and_order_does_not_matter():
    coord = RNG.normal(size=(500, 3)).astype(np.float32)
    found = estimate_normals(coord, towards=np.zeros(3))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    order = RNG.permutation(500)
    again = estimate_normals(coord[order], towards=np.zeros(3))
    np.testing.assert_allclose(again, found[order], atol=1e-6)


def test_planes_go_through_the_middle_of_their_neighbours():
    coord = plane(np.array([0, 0, 1.0]), 60).astype(np.float64)
    planes = local_planes(coord, coord, 60)
    np.testing.assert_allclose(planes.centre, np.tile(coord.mean(0), (60, 1)), atol=1e-12)
    assert planes.known.all()


@pytest.mark.parametrize("wrong", [dict(neighbours=2), dict(radius=0.0), dict(radius=np.nan)])
def test_impossible_neighbourhoods_are_refused(wrong):
    with pytest.raises(ValueError, match="expected 3 or more"):
        estimate_normals(SPHERE, **wrong)
