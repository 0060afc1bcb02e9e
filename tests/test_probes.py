"""Closed-form probes against their definitions, and what they are told apart by."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from blobs import blobs
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene, write_dataset_json, write_scene
from point_jax.evaluation import features as features_module
from point_jax.evaluation.features import (
    EncoderFeatures,
    LabelledArrays,
    LabelledVoxels,
    RawFeatures,
    extract,
    kept_points,
    voxel_labels,
)
from point_jax.evaluation.knn import (
    Directions,
    KnnPredictor,
    collect_neighbours,
    draw_rows,
)
from point_jax.evaluation.modalities import thin_labels
from point_jax.evaluation.progress import ProgressProbe, default_probe, load_probe
from point_jax.evaluation.ridge import PENALTIES, Moments, fit_ridge, solve
from point_jax.evaluation.shortcut import (
    ROWS,
    Surface,
    bin_of,
    measure_shortcut,
    spherical_kmeans,
    surface,
    surfaces,
)
from point_jax.features.encoder import Encoder
from point_jax.features.maps import PointFeatures
from point_jax.features.voxels import voxelize
from point_jax.models.spec import PTv3Spec, StageSpec

GRID = 0.1
seeds = st.integers(0, 2**32 - 1)


def make_scene(seed, points=600, classes=3):
    """A floor, a wall and clutter; the label is the kind of surface, with noise and unknowns."""
    draw = np.random.default_rng(seed)
    kind = draw.integers(0, classes, points)
    coord = draw.uniform(0, 2, (points, 3))
    coord[kind == 0, 2] = 0
    coord[kind == 1, 0] = 0
    normal = np.eye(3, dtype=np.float32)[[2, 0, 1]][kind % 3]
    segment = np.where(draw.random(points) < 0.1, -1, kind).astype(np.int32)
    color = draw.integers(0, 256, (points, 3), np.uint8)
    return Scene(f"room{seed}", coord.astype(np.float32), color, normal, segment)


class Voxelwise:
    """An extractor without a network that counts its calls: a function of the voxels' features."""

    channels = 9

    def __init__(self):
        self.groups = []

    def __call__(self, clouds):
        self.groups.append(len(clouds))
        return (np.cos(cloud.features * 3) for cloud in clouds)


# Features


def test_a_voxel_s_label_and_surface_are_those_of_its_first_point():
    scene = make_scene(0)
    cloud = voxelize(scene, GRID)
    seen = {}
    for point, voxel in enumerate(cloud.inverse):
        seen.setdefault(voxel, point)
    first = np.array([seen[voxel] for voxel in range(len(cloud.grid))])
    assert len(first) < len(scene.coord)
    np.testing.assert_array_equal(kept_points(cloud), first)
    np.testing.assert_array_equal(voxel_labels(scene, cloud), scene.segment[first])
    rows = np.arange(5, 20)
    part = surface(scene, cloud, cloud.features, rows)
    np.testing.assert_array_equal(part.features, cloud.features[rows])
    np.testing.assert_array_equal(part.normal, scene.normal[first[rows]])
    lowest = scene.coord[:, 2].min()
    np.testing.assert_allclose(part.height, scene.coord[first[rows], 2] - lowest, atol=1e-6)


def test_scenes_stream_in_groups_and_come_out_with_their_own_features(monkeypatch):
    monkeypatch.setattr(features_module, "GROUP", 3)
    extractor, scenes = Voxelwise(), [make_scene(seed, 50 + seed) for seed in range(7)]
    data = LabelledVoxels(extractor, scenes, GRID)
    assert len(data) == 7 and not extractor.groups
    stream = iter(data)
    next(stream)
    assert extractor.groups == [3]  # what has not been asked for is not read
    for (features, labels), again, scene in zip(data, data.labels(), scenes, strict=True):
        cloud = voxelize(scene, GRID)
        np.testing.assert_array_equal(features, np.cos(cloud.features * 3))
        np.testing.assert_array_equal(labels, voxel_labels(scene, cloud))
        np.testing.assert_array_equal(again, labels)
    assert extractor.groups == [3, 3, 3, 1]
    some = data.take([1, 4, 6]).take([0, 2])
    assert len(some) == 2
    for (features, _), scene in zip(some, (scenes[1], scenes[6]), strict=True):
        np.testing.assert_array_equal(features, np.cos(voxelize(scene, GRID).features * 3))


def test_raw_features_are_height_normal_and_colour_whatever_order_the_inputs_have():
    scene = make_scene(1)
    (want,) = RawFeatures()([voxelize(scene, GRID)])
    first = kept_points(voxelize(scene, GRID))
    np.testing.assert_allclose(want[:, 0], (scene.coord[:, 2] - scene.coord[:, 2].min())[first])
    np.testing.assert_array_equal(want[:, 1:4], scene.normal[first])
    np.testing.assert_allclose(want[:, 4:], scene.color[first] / 255, rtol=1e-6)
    assert want.shape[1] == RawFeatures().channels == 7 and want.dtype == np.float32
    turned = ("normal", "color", "coord")
    (again,) = RawFeatures(turned)([voxelize(scene, GRID, inputs=turned)])
    np.testing.assert_array_equal(again, want)
    (less,) = RawFeatures(("coord", "normal"))([voxelize(scene, GRID, inputs=("coord", "normal"))])
    np.testing.assert_array_equal(less, want * ([1] * 4 + [0] * 3))
    with pytest.raises(ValueError, match="voxels have 9 channels, but inputs .* make 6"):
        next(RawFeatures(("coord", "normal"))([voxelize(scene, GRID)]))


def fake_encoder(channels=(4, 6, 10)):
    """Has the shape of an encoder of three levels; what it gives says where it came from."""

    def encode(clouds):
        for cloud in clouds:
            rows = len(cloud.grid)
            parents = (np.arange(rows, dtype=np.int32) // 2, np.arange((rows + 1) // 2) // 2)
            sizes = (rows, (rows + 1) // 2, int(parents[1].max()) + 1)
            mean = cloud.features.mean(1)
            levels = tuple(
                (mean[:size, None] * 0 + np.arange(size)[:, None] + 1000 * i).repeat(width, axis=1)
                for i, (size, width) in enumerate(zip(sizes, channels, strict=True))
            )
            grids = tuple(np.zeros((size, 3), np.int32) for size in sizes)
            yield PointFeatures(cloud.points, cloud.inverse, grids, parents, levels, ())

    stages = [SimpleNamespace(channels=width) for width in channels]
    return SimpleNamespace(spec=SimpleNamespace(encoder=stages), encode_voxels=encode)


def test_encoder_features_join_as_many_levels_as_asked():
    cloud = voxelize(make_scene(2), GRID)
    rows = np.arange(len(cloud.grid))
    for up_cast, widths in [(None, (4, 6, 10)), (2, (4, 6, 10)), (1, (6, 10)), (0, (10,))]:
        extractor = EncoderFeatures(fake_encoder(), up_cast)
        (found,) = extractor([cloud])
        level = range(3 - len(widths), 3)
        want = [(rows // 2**i + 1000 * i)[:, None].repeat(widths[i - 3], 1) for i in level]
        np.testing.assert_array_equal(found, np.concatenate(want, axis=1))
        assert extractor.channels == found.shape[1]
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"up_cast={wrong}: expected 0 to 2"):
            EncoderFeatures(fake_encoder(), wrong)


def test_a_scene_without_labels_is_named():
    bare = dataclasses.replace(make_scene(0), segment=None)
    with pytest.raises(SceneError, match="room0: has no labels; a probe needs segment.npy"):
        list(LabelledVoxels(Voxelwise(), [bare], GRID))
    assert len(list(extract(Voxelwise(), [bare], GRID))) == 1


# Ridge


def slow_ridge(pieces, classes, weights, penalty):
    """From the definition: standardise, centre, and solve the normal equations row by row."""
    x = np.concatenate([f for f, _ in pieces]).astype(float)
    y = np.concatenate([labels for _, labels in pieces])
    x, y = x[y >= 0], y[y >= 0]
    w = weights[y] / weights[y].sum()
    mean = w @ x
    spread = np.sqrt(w @ (x - mean) ** 2)
    z, target = (x - mean) / spread, np.eye(classes)[y]
    share = w @ target
    left = z.T @ (z * w[:, None]) + penalty * np.eye(x.shape[1])
    a = np.linalg.solve(left, z.T @ ((target - share) * w[:, None]))
    return a / spread[:, None], share - (mean / spread) @ a


def gathered(data, classes, weights):
    total = Moments(data.pieces[0][0].shape[1], classes)
    for features, labels in data:
        total.add(features, labels, weights)
    return total


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(PENALTIES))
def test_the_closed_form_is_the_ridge_of_the_definition(seed, penalty):
    data, weights = blobs(seed), np.random.default_rng(seed).uniform(0.1, 3, 3)
    kernel, bias = solve(gathered(data, 3, weights), penalty)
    want_kernel, want_bias = slow_ridge(data.pieces, 3, weights, penalty)
    size = np.abs(want_kernel).max(1, keepdims=True)
    np.testing.assert_allclose(kernel / size, want_kernel / size, atol=1e-6)
    np.testing.assert_allclose(bias, want_bias, atol=1e-6 * np.abs(want_bias).max())
    found = np.concatenate([f for f, _ in data]) @ kernel + bias
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_moments_add_up_in_any_order_and_however_the_rows_are_cut(seed):
    draw = np.random.default_rng(seed)
    data, weights = blobs(seed), draw.uniform(0.1, 3, 3)
    whole = gathered(data, 3, weights)
    cut = [
        piece
        for features, labels in (data.pieces[i] for i in draw.permutation(len(data)))
        for piece in zip(np.split(features, [13, 40]), np.split(labels, [13, 40]), strict=True)
    ]
    parts = [gathered(LabelledArrays([piece]), 3, weights) for piece in cut]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    for name in ("weight", "first", "second"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-9)


def test_blocks_of_rows_add_up(monkeypatch):
    data, weights = blobs(0), np.array([0.5, 1, 2])
    whole = gathered(data, 3, weights)
    monkeypatch.setattr("point_jax.evaluation.ridge.BLOCK", 7)
    for name in ("weight", "first", "second"):
        found = getattr(gathered(data, 3, weights), name)
        np.testing.assert_allclose(found, getattr(whole, name), rtol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_units_and_offsets_of_the_features_change_no_score(seed):
    draw, data = np.random.default_rng(seed), blobs(seed)
    spread = np.concatenate([features for features, _ in data]).std(0)
    scale, offset = 2.0 ** draw.integers(-6, 6, 5), draw.normal(size=5) * spread
    moved = LabelledArrays([((f * scale + offset).astype(np.float32), y) for f, y in data])
    (one, b), (other, c) = (solve(gathered(d, 3, np.ones(3)), 1e-3) for d in (data, moved))
    for (features, _), (far, _) in zip(data, moved, strict=True):
        np.testing.assert_allclose(features @ one + b, far @ other + c, atol=1e-3)


def test_the_probe_tells_classes_apart_and_its_softmax_is_near_the_truth():
    ridge = fit_ridge(blobs(0, spread=0.2), 3)
    features = np.concatenate([f for f, _ in blobs(0, spread=0.2)])
    labels = np.concatenate([labels for _, labels in blobs(0, spread=0.2)])
    seen = labels >= 0
    assert (ridge.scores(features).argmax(1) == labels)[seen].mean() > 0.9
    assert ridge.held_out_mIoU > 0.85
    extractor = SimpleNamespace(channels=5)
    predictor = ridge.predictor(extractor)
    assert predictor.classes == 3 and predictor.kernel is ridge.kernel
    powers = np.exp(ridge.scores(features[seen]))
    found = powers / powers.sum(1, keepdims=True)
    # far surer than the scores themselves, which sum to 1 and whose softmax is nearly flat
    assert found.max(1).mean() > 0.8
    assert -np.log(found[np.arange(seen.sum()), labels[seen]]).mean() < 0.45


def hidden_and_noise(seed):
    """The class is a small part of three directions that vary much otherwise; the rest is noise."""
    draw, pieces = np.random.default_rng(seed), []
    for _ in range(6):
        labels = draw.integers(0, 3, 60).astype(np.int32)
        noise = draw.normal(size=(60, 20))
        told = noise[:, :3] + draw.choice([0.01, 0.03, 0.1]) * np.eye(3)[labels]
        pieces.append((np.concatenate([told, noise], 1).astype(np.float32), labels))
    return LabelledArrays(pieces)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_the_penalty_is_the_best_of_the_list_on_the_held_out_scene_and_the_strongest_of_equals(
    seed,
):
    data = hidden_and_noise(seed)
    counts = np.bincount(np.concatenate(list(data.labels())))
    features, labels = data.pieces[4]
    best, chosen = -1.0, None
    for penalty in sorted(PENALTIES, reverse=True):
        rest = [piece for i, piece in enumerate(data.pieces) if i != 4]
        kernel, bias = slow_ridge(rest, 3, counts**-0.5, penalty)
        found = (features @ kernel + bias).argmax(1)
        pairs = [((found == c) & (labels == c), (found == c) | (labels == c)) for c in range(3)]
        score = np.mean([both.sum() / either.sum() for both, either in pairs])
        if score > best + 1e-9:
            best, chosen = score, penalty
    ridge = fit_ridge(data, 3)
    assert ridge.penalty == chosen
    assert ridge.held_out_mIoU == pytest.approx(best)


def test_every_fifth_scene_chooses_and_all_are_fitted():
    """Scenes 4 and 9 are what the penalty is chosen on; the fit is that of all ten."""
    data = blobs(3, scenes=10)
    ridge = fit_ridge(data, 3, balance=0.0)
    kernel, _ = slow_ridge(data.pieces, 3, np.ones(3), ridge.penalty)
    np.testing.assert_allclose(ridge.kernel * ridge.temperature, kernel, rtol=1e-3, atol=1e-6)
    asked = []

    class Watched(LabelledArrays):
        def take(self, scenes):
            asked.append(list(scenes))
            return LabelledArrays([self.pieces[i] for i in asked[-1]])

    for count in (10, 4, 2):
        fit_ridge(Watched(data.pieces[:count]), 3)
    assert asked == [[4, 9], [3], [1]]
    # labels of the held-out scenes turned round: what was fitted before still scores by them
    wrong = [
        (f, np.where(y >= 0, (y + 1) % 3, y) if i in (4, 9) else y)
        for i, (f, y) in enumerate(data.pieces)
    ]
    assert fit_ridge(LabelledArrays(wrong), 3).held_out_mIoU < ridge.held_out_mIoU - 0.3


def test_balance_is_the_power_of_the_counts_that_weights_are():
    draw = np.random.default_rng(0)
    pieces = []
    for _ in range(5):
        labels = (draw.random(400) < 0.05).astype(np.int32)
        features = (draw.normal(size=(400, 2)) + labels[:, None]).astype(np.float32)
        pieces.append((features, labels))
    counts = np.bincount(np.concatenate([labels for _, labels in pieces]))
    claimed = []
    for balance in (0.0, 0.5, 1.0):
        ridge = fit_ridge(LabelledArrays(pieces), 2, balance)
        kernel, _ = slow_ridge(pieces, 2, counts**-balance, ridge.penalty)
        np.testing.assert_allclose(ridge.kernel * ridge.temperature, kernel, rtol=1e-4)
        claimed.append(sum((ridge.scores(f).argmax(1) == 1).sum() for f, _ in pieces))
    assert claimed[0] < claimed[1] < claimed[2]


def with_dead_channels(features):
    """Two more that do not vary, and one that varies by float32's rounding alone."""
    ones = np.ones(len(features), np.float32)
    rounding = np.where(np.arange(len(features)) % 3, 1000, np.nextafter(np.float32(1000), 0))
    more = np.stack([7.3 * ones, 0 * ones, rounding], axis=1)
    return np.concatenate([features, more], axis=1).astype(np.float32)


def test_a_class_without_a_voxel_is_never_predicted_and_dead_channels_change_nothing():
    data = blobs(0)
    dead = LabelledArrays([(with_dead_channels(features), labels) for features, labels in data])
    ridge, more = fit_ridge(data, 3), fit_ridge(dead, 5)
    np.testing.assert_allclose(more.kernel[:5, :3], ridge.kernel, rtol=1e-5)
    np.testing.assert_array_equal(more.kernel[5:], 0)
    np.testing.assert_allclose(more.kernel[:, 3:], 0, atol=1e-9)
    for features, _ in dead:
        assert more.scores(features).argmax(1).max() < 3


def test_what_no_probe_can_be_fitted_to_says_why():
    data = blobs(0)
    unlabelled = [(f, np.full_like(y, -1)) for f, y in data]
    with pytest.raises(ValueError, match="there are 1 training scenes, give at least 2"):
        fit_ridge(data.take([0]), 3)
    with pytest.raises(ValueError, match="labels from -1 to 2, but there are 2 classes"):
        fit_ridge(data, 2)
    with pytest.raises(ValueError, match="all labels are -1"):
        fit_ridge(LabelledArrays(unlabelled), 3)
    held_out = [*data.pieces[:4], unlabelled[4]]
    with pytest.raises(ValueError, match="no labelled voxel in the training scenes held out"):
        fit_ridge(LabelledArrays(held_out), 3)
    with pytest.raises(ValueError, match="no labelled voxel in the training scenes: "):
        collect_neighbours(LabelledArrays(unlabelled), 3)
    with pytest.raises(ValueError, match="bank=5 for 6 scenes"):
        collect_neighbours(data, 3, bank=5)


# Nearest neighbours


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_neighbours_vote_as_the_definition_says(seed):
    data = blobs(seed, scenes=3, rows=60)
    probe = collect_neighbours(data, 3, bank=62, k=7)
    x = np.concatenate([f[y >= 0] for f, y in data.pieces]).astype(float)
    # The bank is drawn from the labelled rows; find which by their directions.
    unit = probe.directions(x.astype(np.float32))
    kept = [int(np.abs(unit - row).sum(1).argmin()) for row in probe.bank]
    assert len(set(kept)) == len(kept) == 60
    mean, spread = x[kept].mean(0), x[kept].std(0)
    queries = data.pieces[0][0]
    bank, asked = ((v - mean) / spread for v in (x[kept], queries.astype(float)))
    bank, asked = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (bank, asked))
    cosine = asked @ bank.T
    want = np.zeros((len(queries), 3))
    for row, similar in enumerate(cosine):
        for place in np.argsort(-similar)[:7]:
            want[row, probe.labels[place]] += np.exp(similar[place] / 0.07)
    found = probe(queries)
    np.testing.assert_allclose(found, want / want.sum(1, keepdims=True), atol=1e-3)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_the_bank_has_the_same_number_of_voxels_from_every_scene_that_has_them():
    draw = np.random.default_rng(0)
    pieces = []
    for scene, rows in enumerate((500, 90, 12)):
        labels = np.full(rows, scene, np.int32)
        labels[::2] = -1
        pieces.append((draw.normal(size=(rows, 4)).astype(np.float32), labels))
    data = LabelledArrays(pieces)
    probe = collect_neighbours(data, 3, bank=100)
    np.testing.assert_array_equal(np.bincount(probe.labels), [33, 33, 6])
    again, other = (collect_neighbours(data, 3, bank=100, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(probe.bank, again.bank)
    assert (probe.bank != other.bank).any()


def test_the_same_query_gets_the_same_answer_in_any_block(monkeypatch):
    probe = collect_neighbours(blobs(0), 3)
    queries = blobs(0).pieces[1][0]
    want = probe(queries)
    monkeypatch.setattr("point_jax.evaluation.knn.BLOCK", 32)
    np.testing.assert_allclose(probe(queries), want, atol=1e-5)
    np.testing.assert_allclose(probe(queries[5:6]), want[5:6], atol=1e-5)
    assert probe(queries[:0]).shape == (0, 3)


def test_a_voxel_of_the_bank_is_its_own_nearest_and_a_small_bank_votes_as_a_whole():
    data = blobs(1, scenes=2, rows=5)
    one = collect_neighbours(data, 3, k=1)
    for features, labels in data:
        seen = labels >= 0
        np.testing.assert_array_equal(one(features).argmax(1)[seen], labels[seen])
    assert len(one.bank) < 20
    few = dataclasses.replace(one, k=20)
    whole = dataclasses.replace(one, k=len(one.bank))
    np.testing.assert_array_equal(few(data.pieces[0][0]), whole(data.pieces[0][0]))


def test_the_knn_predictor_answers_for_each_voxel_of_each_cloud():
    scenes = [make_scene(seed, 300) for seed in range(5)]
    extractor = RawFeatures()
    neighbours = collect_neighbours(LabelledVoxels(extractor, scenes[:4], GRID), 3)
    predictor = KnnPredictor(extractor, neighbours)
    assert predictor.classes == 3
    clouds = [voxelize(scene, GRID) for scene in scenes]
    found = list(predictor(clouds))
    for cloud, shares in zip(clouds, found, strict=True):
        assert shares.shape == (len(cloud.grid), 3) and shares.dtype == np.float32
    truth = voxel_labels(scenes[4], clouds[4])
    assert (found[4].argmax(1) == truth)[truth >= 0].mean() > 0.9


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_directions_forget_units_and_offsets_and_channels_that_do_not_vary(seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(50, 4)).astype(np.float32)
    moved = (x * 10 ** draw.uniform(-2, 2, 4) + draw.normal(size=4)).astype(np.float32)
    want = Directions.of(x)(x)
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1, rtol=1e-5)
    moved = with_dead_channels(moved)
    found = Directions.of(moved)(moved)
    np.testing.assert_allclose(found[:, :4], want, atol=1e-2)
    np.testing.assert_array_equal(found[:, 4:], 0)
    np.testing.assert_array_equal(Directions.of(moved[:1])(moved[:1]), 0)


@given(seeds, st.integers(1, 60))
@settings(max_examples=50)
def test_rows_are_drawn_without_repeats_in_order(seed, count):
    there = np.flatnonzero(np.random.default_rng(seed).random(50) < 0.7)
    rows = draw_rows(there, count, (seed, 1))
    assert len(rows) == min(count, len(there)) and np.isin(rows, there).all()
    assert (np.diff(rows) > 0).all()


# The geometric shortcut


def make_surfaces(scenes=6, rows=1500, bins=False, seed=0):
    """Random heights and normals; features that are their bins, or have nothing to do with them."""
    draw = np.random.default_rng(seed)
    codes = draw.normal(size=(432, 12))
    pieces = []
    for _ in range(scenes):
        height = draw.choice([0.0, 0.7, 1.3, 2.5], rows).astype(np.float32)
        normal = np.eye(3, dtype=np.float32)[draw.integers(0, 3, rows)]
        at = bin_of(height, normal) if bins else draw.integers(0, 12, rows)
        features = (codes[at] + 0.01 * draw.normal(size=(rows, 12))).astype(np.float32)
        pieces.append(Surface(features, height, normal))
    return pieces


def test_clusters_that_are_height_and_normal_are_explained_and_others_are_not():
    geometry = measure_shortcut(make_surfaces(bins=True), clusters=12)
    assert geometry.explained > 0.95 and geometry.accuracy > 0.98 and geometry.chance < 0.3
    nothing = measure_shortcut(make_surfaces(bins=False), clusters=12)
    assert -0.05 < nothing.explained < 0.02
    assert abs(nothing.accuracy - nothing.chance) < 0.05
    half = [
        Surface(np.where(np.arange(1500)[:, None] % 2, a.features, b.features), b.height, b.normal)
        for a, b in zip(make_surfaces(bins=False, seed=1), make_surfaces(bins=True), strict=True)
    ]
    assert 0.2 < measure_shortcut(half, clusters=24).explained < 0.7


def test_more_to_remember_does_not_pass_for_an_explanation():
    """Nearly every voxel has a bin of its own: what fits the fitted half must not count."""
    draw = np.random.default_rng(0)
    pieces = [
        Surface(
            draw.normal(size=(100, 6)).astype(np.float32),
            draw.uniform(0, 3, 100).astype(np.float32),
            (lambda n: n / np.linalg.norm(n, axis=1, keepdims=True))(draw.normal(size=(100, 3))),
        )
        for _ in range(4)
    ]
    assert measure_shortcut(pieces).explained < 0.03


def test_the_measure_is_repeatable_and_needs_two_scenes_and_survives_dead_features():
    pieces = make_surfaces(scenes=3, rows=200, bins=True)
    assert measure_shortcut(pieces) == measure_shortcut(iter(pieces))
    with pytest.raises(ValueError, match="expected at least 2, got 1"):
        measure_shortcut(pieces[:1])
    dead = [piece._replace(features=np.ones_like(piece.features)) for piece in pieces]
    found = measure_shortcut(dead)
    assert found.explained == 0 and found.accuracy == found.chance == 1


def test_bins_are_steps_of_height_times_directions():
    up, down, side = np.array([[0, 0, 1], [0, 0, -1], [1, 0, 0]], np.float32)
    nearly_up = np.array([0.1, 0.1, 0.99], np.float32)
    corner, unknown = np.full(3, -(3**-0.5), np.float32), np.zeros(3, np.float32)
    heights = np.array([0.05, 0.05, 0.05, 0.05, 0.05, 0.25, 3.5, 90.0], np.float32)
    normals = np.stack([up, down, side, corner, unknown, up, up, up])
    bins = bin_of(heights, normals)
    assert len(set(bins[:7])) == 7 and bins[6] == bins[7]
    assert bin_of(heights[:1], nearly_up[None]) == bins[0]
    assert bins.min() >= 0 and bins.max() < 16 * 27


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_k_means_finds_well_parted_groups_and_ends_where_every_row_is_nearest(seed):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 5, 200)
    rows = (np.eye(8)[truth] + 0.001 * draw.normal(size=(200, 8))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cluster = spherical_kmeans(rows, 5, seed)
    assert len(np.unique(truth)) == 5
    pairs = {(int(a), int(b)) for a, b in zip(truth, cluster, strict=True)}
    assert len(pairs) == 5
    np.testing.assert_array_equal(cluster, spherical_kmeans(rows, 5, seed))
    same = spherical_kmeans(np.repeat(rows[:3], 9, axis=0), 32, seed)
    assert len(np.unique(same)) <= 3


def test_surfaces_are_drawn_from_every_scene_and_need_neither_labels_nor_normals(monkeypatch):
    monkeypatch.setattr("point_jax.evaluation.shortcut.ROWS", 40)
    assert ROWS > 1000
    scenes = [make_scene(seed) for seed in range(3)]
    bare = [dataclasses.replace(scene, segment=None, normal=None) for scene in scenes]
    for found in (surfaces(RawFeatures(), scenes, GRID), surfaces(RawFeatures(), bare, GRID)):
        for piece, scene in zip(found, scenes, strict=True):
            assert [len(part) for part in piece] == [40, 40, 40]
            # raw features begin with the height itself
            np.testing.assert_allclose(piece.height, piece.features[:, 0], atol=1e-5)
            np.testing.assert_array_equal(piece.normal, piece.features[:, 1:4])
            assert piece.height.max() <= np.ptp(scene.coord[:, 2])
    (doubled, _, _) = surfaces(RawFeatures(), scenes, 2 * GRID, scale=2.0)
    np.testing.assert_allclose(2 * doubled.height, doubled.features[:, 0], atol=1e-5)


# Inside pretraining


SPEC = PTv3Spec(tuple(StageSpec(1, *numbers, 64) for numbers in ((8, 1), (16, 2))))


class StubEncoder(Encoder):
    """An encoder whose network is a fixed mixing of the inputs, and gives two levels."""

    def encode_voxels(self, clouds, depth=None):
        mix = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
        for cloud in clouds:
            rows = np.arange(len(cloud.grid), dtype=np.int32)
            whole = np.tanh(cloud.features @ mix) * self.params["strength"]
            levels = (whole[:, :8], whole[:, 8:])
            yield PointFeatures(cloud.points, cloud.inverse, (cloud.grid,) * 2, (rows,), levels, ())


def write_rooms(root, count, first=0):
    for seed in range(first, first + count):
        write_scene(root / "train" / f"room{seed}", make_scene(seed))
    write_dataset_json(root, "m", "z", ["train"], ["floor", "wall", "clutter"])
    return {"kind": "folder", "root": str(root)}


@pytest.fixture
def probe(tmp_path):
    section = default_probe()
    section.every = 100
    section.train_sources = (write_rooms(tmp_path / "a", 3),)
    section.test_sources = (write_rooms(tmp_path / "b", 1, 7), write_rooms(tmp_path / "c", 2, 10))
    return section


def test_the_probe_scores_an_encoder_that_sees_and_one_that_is_blind(probe):
    probe.voxels = 200
    loaded = load_probe(probe)
    assert isinstance(loaded, ProgressProbe) and loaded.classes == 3
    assert [scene.name for scene in loaded.test] == ["room7", "room10", "room11"]
    encoder = StubEncoder(SPEC, {"strength": np.float32(1)}, GRID)
    sees = loaded.measure(encoder)
    assert set(sees) == {"probe_ridge_mIoU", "probe_knn_mIoU", "probe_shortcut"}
    assert all(isinstance(value, float) for value in sees.values())
    assert sees["probe_ridge_mIoU"] > 0.8 and sees["probe_knn_mIoU"] > 0.7
    assert 0.1 < sees["probe_shortcut"] < 1
    assert sees == loaded.measure(encoder)
    blind = loaded.measure(encoder.with_params({"strength": np.float32(0)}))
    assert max(blind["probe_ridge_mIoU"], blind["probe_knn_mIoU"]) < 0.3
    with pytest.raises(ValueError, match="`inputs` is not known"):
        loaded.measure(dataclasses.replace(encoder, inputs=None))


def test_the_probe_draws_labelled_voxels_and_is_asked_about_scenes_it_was_not_fitted_to(probe):
    loaded = load_probe(probe)
    assert loaded is not None
    encoder = StubEncoder(SPEC, {"strength": np.float32(1)}, GRID)
    train, test = ([thin_labels(s, 0.1, 0) for s in side] for side in (loaded.train, loaded.test))
    most = max(int((scene.segment >= 0).sum()) for scene in train + test)
    few = [ProgressProbe(train, test, voxels).measure(encoder) for voxels in (most, 9999)]
    assert few[0] == few[1] and most < 70
    turned = [
        dataclasses.replace(s, segment=np.where(s.segment < 0, -1, 2 - s.segment)) for s in test
    ]
    wrong = ProgressProbe(train, turned, 9999).measure(encoder)
    assert wrong["probe_ridge_mIoU"] < few[0]["probe_ridge_mIoU"] - 0.2
    assert wrong["probe_knn_mIoU"] < few[0]["probe_knn_mIoU"] - 0.2


def test_the_section_is_off_by_default_and_locked():
    section = default_probe()
    assert load_probe(section) is None
    with pytest.raises(AttributeError, match="every"):
        section.evry = 100


def test_probe_settings_that_cannot_work_say_why(probe, tmp_path):
    def with_(**changes):
        section = probe.copy_and_resolve_references()
        section.update(changes)
        return section

    for changes, error, message in [
        ({"every": -1}, ValueError, "config.probe.every is -1"),
        ({"scenes": (1, 4)}, ValueError, r"config.probe.scenes is \(1, 4\)"),
        ({"voxels": 0}, ValueError, "config.probe.voxels is 0"),
        ({"test_sources": ()}, ValueError, "config.probe.test_sources is empty"),
        ({"test_sources": probe.test_sources[:1]}, ValueError, "test_sources has 1 scene,"),
        ({"train_sources": ({"kind": "fold"},)}, ValueError, r"train_sources\[0\]: 'fold'"),
    ]:
        with pytest.raises(error, match=message):
            load_probe(with_(**changes))
    bare = dataclasses.replace(make_scene(5), segment=None)
    write_scene(tmp_path / "a" / "train" / "room1", bare)
    (tmp_path / "a" / "train" / "room1" / "segment.npy").unlink()
    with pytest.raises(SceneError, match="config.probe.train_sources: room1 has no labels"):
        load_probe(probe)
