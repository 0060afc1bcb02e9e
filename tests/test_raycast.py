"""The ray caster against the shapes' own definitions."""

import numpy as np
import pytest

from point_jax.data.raycast import BOX, CYLINDER, ELLIPSOID, Primitives, cast, pixel_rays, surface

INTRINSICS = np.array([[60.0, 0, 40], [0, 60.0, 30], [0, 0, 1]])
WIDTH, HEIGHT = 81, 61


def rotations(rng: np.random.Generator, count: int) -> np.ndarray:
    q = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    return q * np.sign(np.linalg.det(q))[:, None, None]


def some_primitives(rng: np.random.Generator, shape: int, count: int = 40) -> Primitives:
    """Primitives 1 to 5 m in front of a camera at the origin that looks along z."""
    center = rng.uniform([-2, -1.5, 1], [2, 1.5, 5], (count, 3))
    return Primitives(
        shape=np.full(count, shape, np.int8),
        center=center.astype(np.float32),
        axes=rotations(rng, count).astype(np.float32),
        half=rng.uniform(0.02, 0.4, (count, 3)).astype(np.float32),
        taper=rng.uniform(-0.8, 0.8, count).astype(np.float32),
    )


def inside(primitives: Primitives, point: np.ndarray) -> np.ndarray:
    """(n, m) how far inside the unit shapes m points are: < 0 inside, 0 on the surface."""
    local = np.einsum("nij,nmi->nmj", primitives.axes, point[None] - primitives.center[:, None])
    unit = local / primitives.half[:, None].astype(np.float64)
    box = np.abs(unit).max(axis=2) - 1
    ball = np.linalg.norm(unit, axis=2) - 1
    radius = 1 + primitives.taper[:, None] * unit[..., 2]
    cone = np.maximum(np.hypot(unit[..., 0], unit[..., 1]) - radius, np.abs(unit[..., 2]) - 1)
    return np.select([primitives.shape[:, None] == s for s in (BOX, CYLINDER)], [box, cone], ball)


def rays() -> np.ndarray:
    x, y = pixel_rays(WIDTH, HEIGHT, INTRINSICS)
    u, v = np.meshgrid(x, y)
    return np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)


@pytest.mark.parametrize("shape", [BOX, CYLINDER, ELLIPSOID])
def test_a_ray_ends_on_the_first_surface(shape: int) -> None:
    rng = np.random.default_rng(shape)
    primitives = some_primitives(rng, shape)
    depth, index = cast(primitives, np.eye(4), INTRINSICS, WIDTH, HEIGHT)
    depth, index, ray = depth.ravel(), index.ravel(), rays()
    hit = index >= 0
    assert 0.1 < hit.mean() < 1
    assert np.array_equal(hit, np.isfinite(depth))

    end = ray[hit] * depth[hit, None]
    on_surface = inside(primitives, end)[index[hit], np.arange(hit.sum())]
    assert np.abs(on_surface).max() < 1e-3
    # Nothing lies before the end, and rays that hit nothing cross nothing.
    for share in np.linspace(0.1, 0.995, 40):
        until = np.where(hit, share * depth, share * 8)
        assert inside(primitives, ray * until[:, None]).min() > -2e-3


@pytest.mark.parametrize("shape", [BOX, CYLINDER, ELLIPSOID])
def test_normals_are_unit_and_leave_the_shape(shape: int) -> None:
    rng = np.random.default_rng(10 + shape)
    primitives = some_primitives(rng, shape)
    depth, index = cast(primitives, np.eye(4), INTRINSICS, WIDTH, HEIGHT)
    hit = np.flatnonzero(index.ravel() >= 0)
    prims = index.ravel()[hit]
    ray = rays()[hit]
    end = ray * depth.ravel()[hit, None]
    normal = surface(primitives, prims, end.astype(np.float32)).normal
    normal = np.einsum("mij,mj->mi", primitives.axes[prims], normal)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)
    assert ((normal * ray).sum(axis=1) < 1e-3).mean() > 0.999  # edges may round to the next face
    rows = np.arange(len(hit))
    outer = inside(primitives, end + 2e-3 * normal)[prims, rows]
    inner = inside(primitives, end - 2e-3 * normal)[prims, rows]
    assert (outer > 0).all()
    assert (inner < 0).mean() > 0.99  # from a sharp edge the way in may lead out again


def test_a_primitive_around_the_camera_or_behind_it_is_not_seen() -> None:
    half = np.array([[1, 1, 1], [0.3, 0.3, 0.3]], np.float32)
    center = np.array([[0, 0, 0], [0, 0, -2]], np.float32)
    axes = np.tile(np.eye(3, dtype=np.float32), (2, 1, 1))
    for shape in (BOX, CYLINDER, ELLIPSOID):
        primitives = Primitives(
            np.full(2, shape, np.int8), center.copy(), axes.copy(), half.copy(), np.zeros(2, "f4")
        )
        _, index = cast(primitives, np.eye(4), INTRINSICS, WIDTH, HEIGHT)
        assert (index != 1).all()
        if shape == BOX:
            assert (index != 0).all()


def test_culling_by_tiles_changes_nothing() -> None:
    """Each primitive alone, in an image of one tile's size around it, gives the same depths."""
    rng = np.random.default_rng(5)
    primitives = some_primitives(rng, BOX, 12)
    whole, _ = cast(primitives, np.eye(4), INTRINSICS, WIDTH, HEIGHT)
    best = np.full((HEIGHT, WIDTH), np.inf, np.float32)
    for row in range(0, HEIGHT, 7):
        for col in range(0, WIDTH, 13):
            part = INTRINSICS.copy()
            part[:2, 2] -= col, row
            size = min(13, WIDTH - col), min(7, HEIGHT - row)
            depth, _ = cast(primitives, np.eye(4), part, *size)
            best[row : row + size[1], col : col + size[0]] = depth
    seen = np.isfinite(whole)
    assert (seen == np.isfinite(best)).mean() > 0.999  # silhouettes may round either way
    both = seen & np.isfinite(best)
    np.testing.assert_allclose(whole[both], best[both], rtol=1e-3)
