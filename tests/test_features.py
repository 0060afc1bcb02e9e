"""Features of any cloud: the same however they are computed, and back on every point."""

import jax
import numpy as np
import pytest
from golden import load as load_golden

import point_jax
from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene
from point_jax.features.chunks import split
from point_jax.features.encoder import Encoder
from point_jax.features.shapes import Shapes, bucket
from point_jax.features.voxels import grid_key, voxelize
from point_jax.interop.pointcept import from_state_dict
from point_jax.interop.release import constants, spec_of, variant_of
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec, StageSpec

STAGES = tuple(StageSpec(1, *numbers, 64) for numbers in ((8, 1), (16, 2), (24, 3)))
SPEC = PTv3Spec(STAGES)


@pytest.fixture(scope="module")
def encoder():
    init, _ = functional(lambda rngs: PTv3(SPEC, rngs=rngs))
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0)))
    return Encoder(SPEC, params, grid_size=0.1)


def make_cloud(seed, points=400, size=2.0):
    """Points of a box's floor and one wall, several in a voxel."""
    rng = np.random.default_rng(seed)
    coord = rng.uniform(0, size, (points, 3))
    coord[::2, 2] = 0
    coord[1::2, 0] = 0
    return {
        "coord": coord.astype(np.float32),
        "color": rng.integers(0, 256, (points, 3), np.uint8),
        "normal": np.tile(np.float32([0, 0, 1]), (points, 1)),
    }


def same(got, want):
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def test_a_cloud_has_its_features_whatever_else_is_encoded_and_in_any_shape(encoder):
    clouds = [make_cloud(seed, points) for seed, points in enumerate((400, 1500, 60, 1))]
    together = encoder(clouds)
    # An encoder that has seen larger clouds pads this one more.
    larger = Encoder(SPEC, encoder.params, 0.1)
    larger._shapes._known = {256: (320, 320, 320), 384: (448, 400, 320)}
    for cloud, features in zip(clouds[::2], together[::2], strict=True):
        for other in (encoder([cloud])[0], larger([cloud])[0]):
            same(other.at_points(), features.at_points())


def test_every_point_gets_the_features_of_its_voxel_at_every_level(encoder):
    cloud = make_cloud(0)
    features = encoder([cloud])[0]
    centred = cloud["coord"].astype(np.float64)
    low, high = centred.min(0), centred.max(0)
    centred -= [*(low + high)[:2] / 2, low[2]]
    cell = np.floor(centred.astype(np.float32) / 0.1)
    cell = (cell - cell.min(0)).astype(int)
    assert features.depth == 3 and features.inverse.shape == (400,)
    for i in range(3):
        level = features.level(i)
        ancestor = level.ancestor[features.inverse]
        np.testing.assert_array_equal(level.grid[ancestor], cell >> i)
        assert level.features.shape == (len(np.unique(cell >> i, axis=0)), (8, 16, 24)[i])
        np.testing.assert_array_equal(level.at_points(), level.features[ancestor])
        np.testing.assert_array_equal(level.at_voxels()[features.inverse], level.at_points())
        for voxel in range(0, len(level.grid), 37):
            mean = cloud["coord"][ancestor == voxel].mean(0)
            np.testing.assert_allclose(level.coord[voxel], mean, atol=1e-5)
    joined = features.at_points()
    parts = [features.level(i).at_points() for i in range(3)]
    np.testing.assert_array_equal(joined, np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(features.at_voxels()[features.inverse], joined)
    np.testing.assert_array_equal(features.up_cast(0).features, features.level(-1).features)
    np.testing.assert_array_equal(features.up_cast(1).at_points(), joined[:, 8:])
    first = features.voxels
    np.testing.assert_array_equal(features.inverse[first], np.arange(len(first)))


def test_arrays_mappings_and_scenes_are_clouds(encoder):
    cloud = make_cloud(1)
    bare = {"coord": cloud["coord"]}
    for other in (cloud["coord"], Scene("s", cloud["coord"]), bare, bare | {"color": None}):
        np.testing.assert_array_equal(
            encoder([other])[0].at_points(), encoder([bare])[0].at_points()
        )
    same(
        encoder([Scene("s", **cloud)])[0].at_points(),
        encoder([cloud | {"path": "else"}])[0].at_points(),
    )


def test_moving_a_cloud_far_away_changes_nothing(encoder):
    cloud = make_cloud(2)
    exact = np.round(cloud["coord"].astype(np.float64) * 1024) / 1024
    near, far = encoder([exact, exact + [4_500_000, 512_000, 300]])
    np.testing.assert_array_equal(far.at_points(), near.at_points())
    assert far.level(1).coord.min() > 200 and far.coord.dtype == np.float64


def test_a_cloud_that_cannot_be_used_says_why(encoder):
    good = make_cloud(0)
    wrong = good["coord"].copy()
    wrong[7, 1] = np.nan
    for cloud, message in [
        ({"points": good["coord"]}, r"clouds\[0\]: has no 'coord', only \['points'\]"),
        (good["coord"][:, :2], r"float32 of shape \(400, 2\), expected .* \(points, 3\)"),
        (good["coord"][:0], "has no points"),
        (wrong, "1 of 400 points are NaN or infinite, the first is 7"),
        (good | {"color": good["color"][:9]}, "9 rows of color for 400 points"),
        (good | {"color": good["color"] / 255}, "no value is above 1: colours are 0 to 255"),
        (good | {"normal": 3 * good["normal"]}, "not of unit length"),
        (good["coord"] * 1e6, "in metres"),
        (None, r"clouds\[0\]: is None"),
        (good | {"colors": good["color"]}, "has 'colors'; is it 'color'?"),
        (good | {"Colour": good["color"]}, "has 'Colour'; is it 'color'?"),
    ]:
        with pytest.raises(SceneError, match=message):
            encoder([cloud])
    with pytest.raises(SceneError, match="put a single one in a list"):
        encoder(good)
    with pytest.raises(ValueError, match="reads 9 channels a point: say which"):
        Encoder(SPEC, encoder.params, inputs=("coord",))
    for wrong in ({"grid_size": 0.0}, {"grid_size": np.nan}, {"scale": np.inf}, {"max_voxels": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            Encoder(SPEC, encoder.params, **wrong)
    with pytest.raises(ValueError, match="say which"):
        Encoder(SPEC, encoder.params, inputs=("color", "color", "color"))
    with pytest.raises(ValueError, match="inputs is not known: the network reads 9"):
        Encoder(SPEC, encoder.params, inputs=None)([good])


def test_features_that_are_not_finite_are_an_error_and_not_a_result(encoder):
    params = jax.tree.map(lambda x: x, encoder.params)
    params["embedding"]["norm"]["bias"] = params["embedding"]["norm"]["bias"].at[0].set(np.nan)
    with pytest.raises(FloatingPointError, match="features are not finite"):
        encoder.with_params(params)([make_cloud(0)])


def test_chunks_cover_a_cloud_once_and_hold_whole_cells():
    rng = np.random.default_rng(0)
    grid = np.unique(rng.integers(0, [300, 90, 40], (4000, 3)), axis=0).astype(np.int32)
    chunks = split(grid, levels=4, most=900, margin=1)
    assert len(chunks) > 4
    owners = np.zeros(len(grid), int)
    for chunk in chunks:
        assert len(chunk.rows) <= 900 and (chunk.origin % 8 == 0).all()
        assert (grid[chunk.rows] >= chunk.origin).all()
        own = chunk.inside(grid, shift=3)
        assert np.isin(np.flatnonzero(own), chunk.rows).all()
        # the margin is there: every voxel of the next cell
        cell = grid >> 3
        near = ((cell >= chunk.low - 1) & (cell < chunk.high + 1)).all(1)
        np.testing.assert_array_equal(np.flatnonzero(near), chunk.rows)
        owners += own
    assert (owners == 1).all()
    assert len(split(grid, 4, len(grid), 1)) == 1
    with pytest.raises(SceneError, match="raise max_voxels"):
        split(grid, levels=4, most=5, margin=2)


def test_chunks_with_enough_surroundings_change_little_and_whole_clouds_nothing(encoder):
    """Every position is filled once; with the whole cloud as margin nothing changes."""
    cloud = make_cloud(3, 1500, size=3.0)
    whole = encoder([cloud])[0]
    assert len(whole.grids[0]) > 700
    cut = Encoder(SPEC, encoder.params, 0.1, max_voxels=400, margin=1)([cloud])[0]
    for i in range(3):
        np.testing.assert_array_equal(cut.grids[i], whole.grids[i])
        a, b = cut.levels[i], whole.levels[i]
        assert np.isfinite(a).all()
        # the network has no norm that forgets the input: near, though never equal at the rims
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9


def test_a_handful_of_shapes_holds_clouds_of_all_sizes():
    shapes = Shapes()
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(20_000), np.log(200_000), 100)).astype(int)
    counts = [(n, n // 3, n // 13, n // 55, n // 200) for n in sizes]
    shapes.grow(counts)
    found = [shapes.find(count) for count in counts]
    assert len(set(found)) <= 4
    for count, shape in zip(counts, found, strict=True):
        assert all(c <= s for c, s in zip(count, shape, strict=True))
        assert shape[0] <= 2.1 * count[0]  # the next bucket at most
    shapes.grow([(2_000, 700, 200, 50, 20)])  # nothing is near it
    assert shapes.find((2_000, 700, 200, 50, 20))[0] <= 1.5 * 2_000
    wide = (found[0][0] - 1, found[0][1] + 1, 1, 1, 1)  # more on a level than there was room for
    shapes.grow([wide])
    assert shapes.find(wide)[1] > found[0][1] and shapes.find(wide)[0] <= 2.1 * wide[0]
    assert [bucket(n, 2) for n in (1, 256, 257, 512, 513)] == [256, 256, 384, 512, 768]


@pytest.mark.parametrize(
    "name", ["b3_ptv3m2_enc_varlen", "c3_ptv3m2_encdec_varlen", "d4_utonia_encdec_norope_dec"]
)
def test_prepared_arrays_give_the_originals_features(name):
    arrays, about = load_golden(name)
    weights = load_golden(about["weights_file"].removesuffix(".npz"))[0]
    spec = spec_of(about["config"], variant_of(weights))
    init, _ = functional(lambda rngs: PTv3(spec, rngs=rngs))
    template = jax.eval_shape(init, jax.random.key(0))
    encoder = Encoder(spec, from_state_dict(weights, template, constants=constants(spec)))
    clouds = encoder.encode_prepared(
        arrays["in.grid_coord"],
        arrays["in.feat"],
        arrays["in.offset"],
        arrays.get("in.mask"),
        np.array([arrays[f"enc{i}.serialized_depth"] for i in range(5)]),
        arrays["in.coord"],
    )
    for i in range(5):
        want, ends = arrays[f"enc{i}.feat"], arrays[f"enc{i}.offset"]
        grid = arrays[f"enc{i}.grid_coord"]
        for cloud, start, end in zip(clouds, [0, *ends[:-1]], ends, strict=True):
            mine = np.argsort(grid_key(cloud.level(i).grid))
            theirs = np.argsort(grid_key(grid[start:end]))
            error = np.abs(cloud.levels[i][mine] - want[start:end][theirs]).max()
            assert error < 1e-4 * np.abs(want).max()
            if i < len(cloud.decoded):
                decoded = arrays[f"dec{i}.feat"][start:end][theirs]
                error = np.abs(cloud.decoder(i).features[mine] - decoded).max()
                assert error < 1e-4 * np.abs(decoded).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": np.zeros((5, 3))}, "grid_coord is float64"),
        ({"grid": -np.ones((5, 3), int)}, "grid_coord is from -1 to -1"),
        ({"features": np.zeros((5, 8))}, r"feat is float64 of shape \(5, 8\).*\(5, 9\)"),
        ({"features": np.full((5, 9), np.inf)}, "feat holds NaN or infinity"),
        ({"offset": np.array([2, 4])}, "the last 5"),
        ({"offset": np.array([2, 2, 5])}, "empty cloud"),
        ({"mask": np.zeros(5)}, "mask is float64"),
        ({"depth": np.array([3, 2])}, "3 integers"),
        ({"depth": np.array([0, 0, 0])}, "does not hold"),
        ({"coord": np.zeros((4, 3))}, r"coord is float64 of shape \(4, 3\)"),
    ],
)
def test_prepared_arrays_that_do_not_fit_say_why(encoder, change, message):
    good = {"grid": np.arange(15).reshape(5, 3), "features": np.zeros((5, 9))}
    with pytest.raises(SceneError, match=message):
        encoder.encode_prepared(**(good | change))


def test_the_default_transform_is_the_releases():
    """Centre, floor by the grid size, start at 0; colours to 1."""
    cloud = Scene("s", np.float32([[1, 5, 2], [1.03, 5.1, 2.5], [1.031, 5.1, 2.5]]))
    voxels = voxelize(cloud, 0.02)
    # x: -0.0155, 0.0145, 0.0155 -> cells -1, 0, 0; y: -0.05, 0.05 -> -3, 2; z: 0, 0.5 -> 0, 25
    np.testing.assert_array_equal(voxels.grid, [[0, 0, 0], [1, 5, 25]])
    np.testing.assert_array_equal(voxels.inverse, [0, 1, 1])
    np.testing.assert_allclose(voxels.features[1, :3], [0.0145, 0.05, 0.5], atol=1e-6)
    assert (voxels.features[:, 3:] == 0).all()


def test_the_parts_for_users_are_at_the_top():
    assert point_jax.Encoder is Encoder
    assert callable(point_jax.load)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = point_jax.lod
