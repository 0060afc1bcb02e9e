"""Augmentations equal the originals' arrays; their random draws follow the recipe's definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_files import shared

from point_jax.data import augment, color, elastic
from point_jax.data.augment import GeometrySpec, draw_geometry, random_drop, random_geometry
from point_jax.data.color import ColorDraw, ColorSpec, change_color, draw_color, jitter_color
from point_jax.geometry.sampling import bounds

# Geometry that changes nothing but the centre; tests switch on one thing at a time.
STILL = GeometrySpec(
    scale=(1.0, 1.0), rotation_probability=0.0, flip_probability=0.0, jitter=0.0, elastic=()
)
jit_geometry = jax.jit(random_geometry, static_argnames=("spec", "cells"))
jit_jitter_color = jax.jit(jitter_color)
jit_elastic = jax.jit(elastic.elastic, static_argnames=("granularity", "magnitude"))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(shared("golden/i_transforms.npz")))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cloud(rng):
    """300 points of a flat box and their unit normals."""
    coord = rng.uniform([-1, 2, 0], [3, 5, 1], (300, 3)).astype(np.float32)
    normal = rng.normal(size=(300, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return coord, normal.astype(np.float32), np.ones(300, bool)


def assert_golden(actual, expected):
    """Equal within 1e-6 of the array's scale."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def draws_of(function, spec, number=20000):
    return jax.jit(jax.vmap(lambda key: function(key, spec)))(
        jax.random.split(jax.random.key(0), number)
    )


def assert_uniform(draws, low, high):
    draws = np.sort(np.asarray(draws, np.float64))
    assert draws[0] >= np.float32(low) and draws[-1] <= np.float32(high)
    expected = np.linspace(low, high, len(draws))
    # Kolmogorov-Smirnov distance, far beyond chance.
    assert np.abs(draws - expected).max() < 2.2 / np.sqrt(len(draws)) * (high - low)


def assert_share(flags, probability):
    np.testing.assert_allclose(np.mean(flags, axis=0), probability, atol=0.02)


class TestGeometryAgainstTheOriginals:
    def test_centre_shift(self, golden):
        valid = np.ones(len(golden["coord"]), bool)
        for apply_z, name in ((True, "CenterShift_z"), (False, "CenterShift_noz")):
            shifted = augment.centre_shift(golden["coord"], valid, apply_z)
            assert_golden(shifted, golden[f"{name}__coord"])

    @pytest.mark.parametrize(
        ("name", "axis", "half_turns"),
        [("z0.3pi_center0", 2, 0.3), ("x0.02pi_centerbbox", 0, 0.02)]
        + [("y-0.02pi_centerbbox", 1, -0.02)],
    )
    def test_rotation(self, golden, name, axis, half_turns):
        coord = golden["coord"]
        low, high = bounds(coord, np.ones(len(coord), bool))
        centre = jnp.zeros(3) if axis == 2 else (low + high) / 2
        matrix = augment.rotation(half_turns * np.pi, axis)
        turned = augment.rotate(coord, matrix, centre)
        assert_golden(turned, golden[f"RandomRotate_{name}__coord"])
        turned = augment.transform(golden["normal"], matrix)
        assert_golden(turned, golden[f"RandomRotate_{name}__normal"])

    def test_mirror(self, golden):
        signs = augment.mirror(jnp.array([True, True]))[None]
        assert_golden(golden["coord"] * signs, golden["RandomFlip_p1__coord"])
        assert_golden(golden["normal"] * signs, golden["RandomFlip_p1__normal"])

    def test_jitter(self, golden):
        coord = golden["coord"]
        noise = np.random.RandomState(1).randn(*coord.shape).astype(np.float32)
        moved = augment.jitter(coord, noise, 0.005, 0.02)
        assert_golden(moved, golden["RandomJitter_s0.005c0.02_seed1__coord"])


class TestElasticDistortion:
    STAGES = ((0.2, 0.4), (0.8, 1.6))

    @staticmethod
    def store(noise, cells, spare):
        """The flat layout of a noise grid in `cells` cells, `spare` in all that do not count."""
        padded = np.pad(noise, ((0, 1), (0, 1), (0, 1), (0, 0)), constant_values=spare)
        flat = np.full((cells, 3), spare, np.float32)
        flat[: padded[..., 0].size] = padded.reshape(-1, 3)
        return flat

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("cells", [1144, 4096])
    def test_equals_the_originals_at_any_capacity(self, golden, stage, cells):
        name = "elastic_{}_{}".format(*stage)
        noise = self.store(golden[f"{name}_noise"], cells, spare=100.0)
        valid = np.ones(len(golden["coord"]), bool)
        moved, overflow = jit_elastic(golden["coord"], valid, noise, *stage)
        assert overflow == 0
        assert_golden(moved, golden[f"{name}_coord"])

    def test_padding_reaches_nothing(self, golden):
        noise = self.store(golden["elastic_0.2_0.4_noise"], 4096, spare=0.0)
        valid = np.arange(4000) < 3000
        coord = np.full((4000, 3), np.nan, np.float32)
        coord[:3000] = golden["coord"]
        moved, overflow = jit_elastic(coord, valid, noise, *self.STAGES[0])
        assert overflow == 0
        assert_golden(moved[:3000], golden["elastic_0.2_0.4_coord"])
        assert np.all(np.isfinite(moved))

    def test_points_beyond_a_full_grid_stay_and_are_counted(self, golden, rng):
        coord, valid = golden["coord"], np.ones(len(golden["coord"]), bool)
        # 12 x 10 x 7 cells are needed; 88 spare ones in each layer of x leave 4 layers.
        moved, overflow = jit_elastic(
            coord, valid, rng.normal(size=(5 * 88, 3)).astype(np.float32), *self.STAGES[0]
        )
        beyond = np.floor((coord[:, 0] - coord[:, 0].min()) / 0.2) >= 2
        assert overflow == beyond.sum() > 0
        np.testing.assert_array_equal(np.all(moved == coord, axis=1), beyond)

    def test_capacity_follows_the_area_of_a_view(self):
        assert elastic.noise_cells(65536, 0.02, 0.2, 50.0) == 32768
        assert elastic.noise_cells(65536, 0.04, 0.2, 50.0) == 4 * 32768
        assert elastic.noise_cells(100, 0.02, 0.2, 50.0) == elastic.FEWEST_CELLS


class TestRandomGeometry:
    DISTORTING = GeometrySpec(
        jitter=1e-4, jitter_clip=4e-4, elastic=((0.2, 0.4),), elastic_probability=1.0
    )

    def test_draws_follow_the_recipe(self):
        draw = draws_of(draw_geometry, GeometrySpec())
        assert_uniform(draw.scale, 0.9, 1.1)
        assert_uniform(draw.angles[:, 0], -np.pi, np.pi)
        assert_uniform(draw.angles[:, 1], -np.pi / 64, np.pi / 64)
        assert_uniform(draw.angles[:, 2], -np.pi / 64, np.pi / 64)
        assert_share(draw.rotates, [0.8, 0.8, 0.8])
        assert_share(draw.flips, [0.5, 0.5])
        assert_share(draw.distort, 0.95)
        flags = np.column_stack([draw.rotates, draw.flips, draw.distort, draw.scale > 1])
        correlation = np.corrcoef(flags.T.astype(float))
        np.testing.assert_allclose(correlation, np.eye(len(correlation)), atol=0.04)

    def test_changes_come_in_the_order_of_the_recipe(self, cloud):
        coord, normal, _ = cloud
        spec = dataclasses.replace(
            STILL,
            scale=(1.07, 1.07),
            turn=(0.3, 0.3),
            tilt=(0.02, 0.02),
            rotation_probability=1.0,
            flip_probability=1.0,
        )
        moved, turned, _ = jit_geometry(jax.random.key(0), *cloud, spec, ())

        middle = (coord.min(0) + coord.max(0)) / 2
        expected = 1.07 * (coord - [middle[0], middle[1], coord[:, 2].min()])
        expected_normal = normal.astype(np.float64)
        for axis, angle in ((2, 0.3 * np.pi), (0, 0.02 * np.pi), (1, 0.02 * np.pi)):
            cos, sin = np.cos(angle), np.sin(angle)
            matrix = np.roll([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], axis, (0, 1))
            middle = 0.0 if axis == 2 else (expected.min(0) + expected.max(0)) / 2
            expected = (expected - middle) @ matrix.T + middle
            expected_normal = expected_normal @ matrix.T
        np.testing.assert_allclose(moved, expected * [-1, -1, 1], atol=2e-6)
        np.testing.assert_allclose(turned, expected_normal * [-1, -1, 1], atol=2e-6)

    def test_nothing_happens_with_probability_zero(self, cloud):
        coord, normal, valid = cloud
        spec = dataclasses.replace(STILL, elastic=((0.2, 0.4),), elastic_probability=0.0)
        moved, turned, overflow = jit_geometry(jax.random.key(0), *cloud, spec, (64,))
        np.testing.assert_allclose(moved, augment.centre_shift(coord, valid), atol=1e-6)
        np.testing.assert_array_equal(turned, normal)
        assert overflow == 0

    def test_jitter_is_clipped_normal_noise(self, rng):
        coord = np.tile([[-1.0, -1, 0], [1, 1, 0]], (5000, 1)).astype(np.float32)
        spec = dataclasses.replace(STILL, jitter=0.005, jitter_clip=0.006)
        moved, _, _ = jit_geometry(jax.random.key(3), coord, coord, np.ones(10000, bool), spec, ())
        noise = (np.asarray(moved) - coord) / 0.005
        assert np.abs(noise).max() == pytest.approx(1.2, abs=1e-4)
        # Of a standard normal, 23.0 % lie beyond 1.2; 38.3 % within 0.5.
        assert np.mean(np.abs(noise) > 1.1999) == pytest.approx(0.230, abs=0.01)
        assert np.mean(np.abs(noise) < 0.5) == pytest.approx(0.383, abs=0.01)
        assert np.abs(noise.mean(0)).max() < 0.03
        np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.04)

    def test_neither_padding_nor_capacity_changes_a_cloud(self, cloud):
        exact = jit_geometry(jax.random.key(5), *cloud, self.DISTORTING, (20000,))
        padded = [np.pad(part, ((0, 100), (0, 0)), constant_values=np.nan) for part in cloud[:2]]
        valid = np.arange(400) < 300
        other = jit_geometry(jax.random.key(5), *padded, valid, self.DISTORTING, (30000,))
        for part, same in zip(exact[:2], other[:2], strict=True):
            np.testing.assert_allclose(same[:300], part, atol=2e-6)
            assert not np.any(same[300:])
        assert exact[2] == other[2] == 0
        # Only the distortion changes ratios of distances by more than the jitter.
        before, after = (
            np.linalg.norm(points[:150] - points[150:300], axis=1)
            for points in (cloud[0], np.asarray(exact[0]))
        )
        assert np.std(after / before) > 0.01

    def test_an_empty_cloud_stays_empty(self):
        nothing = np.full((400, 3), np.nan, np.float32)
        parts = jit_geometry(
            jax.random.key(0), nothing, nothing, np.zeros(400, bool),
            self.DISTORTING, (30000,),
        )  # fmt: skip
        assert not any(np.any(part) for part in parts)

    def test_a_granularity_of_zero_is_refused(self):
        with pytest.raises(ValueError, match="each a number above 0"):
            GeometrySpec(elastic=((0.0, 0.4),))


class TestColor:
    @staticmethod
    def draw(order=(0, 1, 2, 3), factors=(1.3, 0.7, 1.15, 0.015), apply=(True,) * 4):
        return ColorDraw(*map(jnp.array, (order, factors, apply)), jnp.zeros(3))

    @pytest.mark.parametrize(
        ("change", "name"),
        list(enumerate(["brightness_1.3", "contrast_0.7", "saturation_1.15", "hue_0.015"])),
    )
    def test_each_change_equals_the_originals(self, golden, change, name):
        draw = self.draw(apply=np.arange(4) == change)
        valid = np.ones(len(golden["color"]), bool)
        assert_golden(jit_jitter_color(golden["color"], valid, draw), golden[f"adjust_{name}"])

    def test_translation_and_scaling_equal_the_originals(self, golden):
        draws = np.random.RandomState(1)
        draws.rand()  # whether it happens
        shift = ((draws.rand(3) - 0.5) * 255 * 2 * 0.05).astype(np.float32)
        moved = color.translate_color(golden["color"], shift)
        assert_golden(moved, golden["ChromaticTranslation_seed1__color"])
        assert_golden(color.normalize_color(golden["color"]), golden["NormalizeColor__color"])

    def test_stretching_and_noise_equal_the_originals(self, golden):
        valid = np.ones(len(golden["color"]), bool)
        stretched = color.stretch_color(golden["color"], valid, 0.4)
        assert_golden(stretched, golden["ChromaticAutoContrast_b0.4__color"])
        draws = np.random.RandomState(1)
        draws.rand()  # whether it happens
        noise = draws.randn(len(valid), 3).astype(np.float32)
        noisy = color.add_noise(golden["color"], noise, 0.05)
        assert_golden(noisy, golden["ChromaticJitter_seed1__color"])

    def test_stretching_reads_valid_points_alone_and_leaves_even_colours(self, rng):
        start = rng.uniform(50, 200, (40, 3)).astype(np.float32)
        valid = np.arange(40) < 30
        stretched = color.stretch_color(start, valid, 1.0)
        low, high = stretched[valid].min(0), stretched[valid].max(0)
        np.testing.assert_allclose(low, 0, atol=1e-4)
        np.testing.assert_allclose(high, 255, atol=1e-3)
        even = np.full((40, 3), 7, np.float32)
        np.testing.assert_array_equal(color.stretch_color(even, valid, 0.7), even)

    @pytest.mark.parametrize("order", [(3, 1, 0, 2), (2, 3, 1, 0), (1, 0, 2, 3)])
    def test_changes_act_in_the_drawn_order(self, rng, order):
        start = rng.uniform(0, 255, (40, 3)).astype(np.float32)
        valid = np.ones(40, bool)
        expected = start
        for change in order:
            expected = jit_jitter_color(expected, valid, self.draw(apply=np.arange(4) == change))
        together = jit_jitter_color(start, valid, self.draw(order))
        np.testing.assert_allclose(together, expected, atol=1e-3)
        others = jit_jitter_color(start, valid, self.draw(order[::-1]))
        assert np.abs(together - others).max() > 1.0

    def test_a_hue_shift_of_thirds_permutes_the_channels(self, rng):
        start = rng.integers(0, 256, (200, 3)).astype(np.float32)
        start[:4] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0]]
        for shift, turns in ((1 / 3, 1), (-1 / 3, -1), (0.0, 0)):
            turned = color.adjust_hue(start, shift)
            np.testing.assert_allclose(turned, np.roll(start, turns, axis=1), atol=2e-3)

    def test_draws_follow_the_recipe(self):
        draw = draws_of(draw_color, ColorSpec())
        ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.02, 0.02)]
        for change, (low, high) in enumerate(ranges):
            assert_uniform(draw.factors[:, change], low, high)
        assert_share(draw.apply, [0.8] * 4)
        _, counts = np.unique(draw.order, axis=0, return_counts=True)
        assert len(counts) == 24 and np.all(np.abs(counts / 20000 - 1 / 24) < 0.008)
        happens = np.any(draw.translation != 0, axis=1)
        assert_share(happens, 0.95)
        for axis in range(3):
            assert_uniform(draw.translation[happens, axis], -12.75, 12.75)

    def test_spreads_are_cut_at_zero_and_zero_means_never(self):
        spec = ColorSpec(brightness=3.0, contrast=0.0, hue=0.0, translation=0.0)
        draw = draws_of(draw_color, spec)
        assert_uniform(draw.factors[:, 0], 0.0, 4.0)
        assert_share(draw.apply, [0.8, 0.0, 0.8, 0.0])
        assert not np.any(draw.translation)
        with pytest.raises(ValueError, match="hue is 0.7"):
            ColorSpec(hue=0.7)
        with pytest.raises(ValueError, match="contrast is -1"):
            ColorSpec(contrast=-1)

    def test_padding_reaches_nothing(self, rng):
        start = rng.uniform(0, 255, (40, 3)).astype(np.float32)
        padded = np.pad(start, ((0, 9), (0, 0)), constant_values=255.0)
        changed = jit_jitter_color(padded, np.arange(49) < 40, self.draw())
        expected = jit_jitter_color(start, np.ones(40, bool), self.draw())
        np.testing.assert_allclose(changed[:40], expected, atol=1e-3)

        draw = self.draw()._replace(translation=jnp.array([40.0, -9.0, 0.0]))
        expected = change_color(start, np.ones(40, bool), draw)
        padded = np.pad(start, ((0, 9), (0, 0)), constant_values=np.nan)
        changed = change_color(padded, np.arange(49) < 40, draw)
        np.testing.assert_allclose(changed[:40], expected, atol=1e-6)
        assert not np.any(changed[40:])
        assert expected.min() >= 0 and expected.max() <= 1


class TestDropping:
    def drop(self, share, probability, number=2000):
        values = np.pad(np.ones((10, 3), np.float32), ((0, 4), (0, 0)), constant_values=np.nan)
        drop = jax.vmap(
            lambda key: random_drop(key, values, np.arange(14) < 10, share, probability)
        )
        kept = np.asarray(jax.jit(drop)(jax.random.split(jax.random.key(0), number)))
        assert not np.any(kept[:, 10:])
        np.testing.assert_array_equal(kept.min(-1), kept.max(-1))
        return kept[:, :10, 0]

    def test_a_share_of_points_with_a_probability(self):
        kept = self.drop(0.25, 0.5)
        happens = kept.min(1) == 0
        assert_share(happens, 0.5)
        assert np.all(kept[happens].sum(1) == 8)  # int(0.25 * 10) = 2 points go
        np.testing.assert_allclose(kept[happens].mean(0), 0.8, atol=0.06)

    def test_the_whole_cloud(self):
        kept = self.drop(1.0, 0.2)
        assert_share(kept.sum(1) == 0, 0.2)
        assert_share(kept.sum(1) == 10, 0.8)
