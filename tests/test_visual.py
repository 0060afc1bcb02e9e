"""Pictures: PCA colours, the point renderer, rows of panels, training curves."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from point_jax.visual import axes, pca, pictures, render
from point_jax.visual.camera import MARGIN, look
from point_jax.visual.classes import KeyEntry, class_colors, class_key, share_text

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def skewed_features(n: int = 400, width: int = 12, seed: int = 0) -> np.ndarray:
    """Features whose components differ clearly in variance and have a clear sign of skew."""
    rng = np.random.default_rng(seed)
    return rng.exponential(size=(n, width)) * 0.7 ** np.arange(width)


def box_room(
    width: float = 4.0, depth: float = 3.0, height: float = 2.6, step: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coord, color, normal of an empty room: red ceiling, green floor, white walls."""
    x, y, z = (np.arange(0, side + step / 2, step) for side in (width, depth, height))
    faces = [
        (np.meshgrid(x, y, [0.0]), (0, 0, 1), GREEN),
        (np.meshgrid(x, y, [height]), (0, 0, -1), RED),
        (np.meshgrid([0.0], y, z), (1, 0, 0), WHITE),
        (np.meshgrid([width], y, z), (-1, 0, 0), WHITE),
        (np.meshgrid(x, [0.0], z), (0, 1, 0), WHITE),
        (np.meshgrid(x, [depth], z), (0, -1, 0), WHITE),
    ]
    coord = [np.stack([axis.ravel() for axis in grid], axis=1) for grid, _, _ in faces]
    sizes = [len(points) for points in coord]
    normal = np.repeat([face[1] for face in faces], sizes, axis=0)
    color = np.repeat([face[2] for face in faces], sizes, axis=0)
    return np.concatenate(coord), color.astype(np.uint8), normal.astype(np.float32)


def share_of(raster: render.Raster, chosen: np.ndarray) -> float:
    """Share of a raster's sub-pixels that show one of the points marked in `chosen`."""
    return float(np.mean(np.append(chosen, False)[raster.index]))


class TestPcaColors:
    def test_are_float32_in_zero_one_and_use_the_whole_range(self):
        colors = pca.pca_colors(skewed_features())
        assert colors.dtype == np.float32
        assert colors.shape == (400, 3)
        np.testing.assert_array_equal(colors.min(axis=0), 0.0)
        np.testing.assert_array_equal(colors.max(axis=0), 1.0)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
    def test_do_not_depend_on_axes_origin_or_scale_of_the_features(self, seed: int, scale: float):
        features = skewed_features(seed=seed)
        rng = np.random.default_rng(seed + 100)
        turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))  # rotations and reflections alike
        moved = scale * (features @ turn + rng.normal(size=12))
        np.testing.assert_allclose(pca.pca_colors(moved), pca.pca_colors(features), atol=1e-6)
        np.testing.assert_allclose(pca.pca_colors(-features), pca.pca_colors(features), atol=1e-6)

    def test_of_one_dimension_are_its_stretch_times_brightness(self):
        x = np.array([0.0, 1.0, 2.0, 4.0, 20.0])[:, None]  # skewed to large values
        red = pca.pca_colors(x, brightness=1.25)[:, 0]
        np.testing.assert_allclose(red, [0, 0.0625, 0.125, 0.25, 1.0], atol=1e-6)

    def test_mix_the_first_three_components_with_the_next_three(self):
        # Orthogonal columns of falling size are their own principal components.
        centred = skewed_features(200, 6, seed=1)
        centred -= centred.mean(axis=0)
        columns, _ = np.linalg.qr(centred)
        columns *= np.sign((columns**3).sum(axis=0)) * [9, 8, 7, 6, 5, 4]
        mixed = 0.6 * columns[:, :3] + 0.4 * columns[:, 3:]
        stretched = (mixed - mixed.min(axis=0)) / np.ptp(mixed, axis=0)
        expected = np.minimum(1.2 * stretched, 1.0)
        np.testing.assert_allclose(pca.pca_colors(columns, brightness=1.2), expected, atol=1e-5)

    def test_of_collapsed_features_are_black_not_amplified_noise(self):
        noise = np.random.default_rng(0).normal(size=(50, 8)) * 1e-9
        np.testing.assert_array_equal(pca.pca_colors(np.ones((50, 8)) + noise), 0.0)
        np.testing.assert_array_equal(pca.pca_colors(np.ones((1, 8))), 0.0)

    def test_fitted_jointly_give_one_feature_one_color_in_every_scene(self):
        first, second = skewed_features(seed=1), 3 * skewed_features(seed=2)
        second[7] = first[11]
        joint = pca.fit_pca_colors([first, second])
        np.testing.assert_allclose(joint(first)[11], joint(second)[7], atol=1e-6)
        assert np.abs(pca.pca_colors(first)[11] - pca.pca_colors(second)[7]).max() > 0.05

    def test_saturation_keeps_an_outlier_from_taking_the_contrast(self):
        features = skewed_features()
        outlier = np.concatenate([features, 1e3 * np.ones((1, 12))])
        assert pca.pca_colors(outlier)[:-1, 0].std() < 0.02
        assert pca.pca_colors(outlier, saturate=0.01)[:-1, 0].std() > 0.1

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.ones(5), r"\(n, E\).*got \(5,\)"),
            (np.ones((0, 4)), r"got \(0, 4\)"),
            (np.array([[1.0, np.nan], [0, 0]]), "1 of 2 points"),
            ([np.ones((3, 4)), np.ones((3, 5))], r"widths \[4, 5\]"),
        ],
    )
    def test_refuse_what_has_no_colors(self, features: object, message: str):
        with pytest.raises(ValueError, match=message):
            pca.fit_pca_colors(features)


class TestCamera:
    @settings(deadline=None, max_examples=40)
    @given(
        azimuth=st.floats(-360, 360),
        elevation=st.floats(5, 90),
        perspective=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_just_holds_the_whole_cloud(
        self, azimuth: float, elevation: float, perspective: bool, seed: int
    ):
        rng = np.random.default_rng(seed)
        coord = rng.normal(size=(30, 3)) * rng.uniform(0.1, 5, 3) + rng.normal(size=3) * 100
        view = look(
            coord,
            azimuth=azimuth,
            elevation=elevation,
            size=(320, 240),
            perspective=perspective,
        )
        pixel, depth = view.project(coord)
        assert depth.min() > 0
        edges = np.array([320, 240]) * MARGIN
        low, high = pixel.min(axis=0), pixel.max(axis=0)
        assert (low >= edges - 1e-3).all()
        assert (high <= np.array([320, 240]) - edges + 1e-3).all()
        touches = np.isclose(high - low, np.array([320, 240]) - 2 * edges, atol=0.1)
        assert touches.any() or depth.min() < 0.2  # no larger picture would hold it

    def test_from_the_top_has_x_to_the_right_and_y_up(self):
        coord = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        view = look(coord, azimuth=-90, elevation=90, size=(100, 100), perspective=False)
        origin, x, y = view.project(coord)[0]
        assert x[0] > origin[0] + 50
        assert y[1] < origin[1] - 50


class TestRasterize:
    @pytest.mark.parametrize("perspective", [True, False])
    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    def test_a_nearer_point_hides_a_farther_one(self, perspective: bool, order: list[int]):
        coord = np.array([[0.0, 0, 0], [0, 0, 1.0]])[order]
        color = np.array([RED, BLUE], np.uint8)[order]  # the blue one is nearer to the top
        view = look(
            np.array([[-1.0, -1, 0], [1, 1, 1]]),
            azimuth=0,
            elevation=90,
            size=(64, 64),
            perspective=perspective,
        )
        (x, y), _ = (values[0] for values in view.project(coord))
        image = np.asarray(render.paint(render.rasterize(coord, view, radius=0.2), color))
        r, g, b = image[int(y), int(x)]
        assert (r, g) == (0, 0)
        assert b > 200

    def test_nearer_points_are_larger_in_perspective_only(self):
        coord = np.array([[-1.0, 0, 0], [1.0, 0, 2.0]])
        for perspective, ratio in ((True, 1.2), (False, 1.0)):
            view = look(coord, azimuth=-90, elevation=90, size=(200, 200), perspective=perspective)
            index = render.rasterize(coord, view, radius=0.1).index
            areas = np.count_nonzero(index == 1) / np.count_nonzero(index == 0)
            assert areas == pytest.approx(ratio, abs=0.1) if ratio == 1.0 else areas > ratio

    def test_is_the_same_picture_again_and_in_any_order_of_the_points(self):
        rng = np.random.default_rng(0)
        coord, color = rng.uniform(0, 2, (500, 3)), rng.integers(0, 256, (500, 3), np.uint8)
        pictures_ = [
            render.paint(render.corner_view(coord[p], size=(80, 60), azimuth=30.0), color[p])
            for p in (np.arange(500), np.arange(500), rng.permutation(500))
        ]
        assert pictures_[0].tobytes() == pictures_[1].tobytes() == pictures_[2].tobytes()

    def test_points_that_face_away_are_left_out(self):
        coord, _, _ = box_room()
        floor = coord[:, 2] == 0
        view = look(coord, azimuth=0, elevation=90, size=(64, 64))
        up, down = np.tile([0.0, 0, 1], (2, len(coord), 1)) * [[[1]], [[-1]]]
        assert share_of(render.rasterize(coord, view, normal=up, keep=floor), floor) > 0.2
        assert share_of(render.rasterize(coord, view, normal=down, keep=floor), floor) == 0

    def test_an_even_plane_is_shaded_evenly_and_a_corner_is_darker(self):
        coord, _, normal = box_room()
        raster = render.corner_view(coord, normal, size=(160, 120))
        floor = (coord[:, 2] == 0) & (np.abs(coord[:, :2] - (2, 1.5)) < 0.7).all(axis=1)
        inside = np.append(floor, False)[raster.index]
        assert np.ptp(raster.shade[inside]) < 0.05
        assert raster.shade[raster.index >= 0].min() < raster.shade[inside].min() - 0.05

    def test_without_any_point_in_view_only_background_is_left(self):
        view = look(np.zeros((1, 3)), azimuth=0, elevation=45, size=(8, 6))
        behind = view.eye[None] - view.axes[2]
        image = render.paint(render.rasterize(behind, view), np.zeros((1, 3)))
        assert image.size == (8, 6)
        assert image.getcolors() == [(48, render.BACKGROUND)]

    def test_float_and_integer_colors_mean_the_same(self):
        coord, color, normal = box_room(step=0.1)
        raster = render.top_view(coord, normal, size=(64, 48))
        assert (
            render.paint(raster, color).tobytes()
            == render.paint(raster, color.astype(np.float32) / 255).tobytes()
        )
        with pytest.raises(ValueError, match="one colour"):
            render.paint(raster, color[:10])


class TestRoomViews:
    @pytest.mark.parametrize("with_normals", [True, False])
    @pytest.mark.parametrize("view", [render.corner_view, render.top_view])
    def test_show_the_floor_and_not_the_ceiling(self, view, with_normals: bool):
        coord, _, normal = box_room()
        raster = view(coord, normal if with_normals else None, size=(160, 120))
        assert share_of(raster, coord[:, 2] >= 2.6) == 0
        assert share_of(raster, coord[:, 2] == 0) > 0.1

    @pytest.mark.parametrize("with_normals", [True, False])
    def test_from_the_corner_show_the_far_walls_and_look_through_the_near_ones(
        self, with_normals: bool
    ):
        coord, _, normal = box_room()
        raster = render.corner_view(
            coord, normal if with_normals else None, size=(160, 120), azimuth=225.0
        )  # the camera stands over the corner at the origin
        middle = (coord[:, 2] > 0.2) & (coord[:, 2] < 2.2)
        far = middle & ((coord[:, 0] == 4.0) | (coord[:, 1] == 3.0))
        near = middle & ((coord[:, 0] == 0.0) | (coord[:, 1] == 0.0)) & ~far
        near &= (coord[:, :2] < (3.5, 2.5)).all(axis=1)
        assert share_of(raster, far) > 0.05
        assert share_of(raster, near) == 0

    def test_keep_flat_clouds_whole(self):
        table = np.random.default_rng(0).uniform((0, 0, 0.7), (1, 1, 0.8), (200, 3))
        assert render.without_ceiling(table).all()

    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_work_for_a_handful_of_points(self, n: int):
        coord = np.linspace(0, 1, 3 * n).reshape(n, 3)
        for view in (render.corner_view, render.top_view):
            assert (view(coord, size=(32, 24)).index >= 0).any()

    def test_refuse_coordinates_that_are_none(self):
        with pytest.raises(ValueError, match=r"\(n, 3\).*got \(0, 3\)"):
            render.corner_view(np.zeros((0, 3)))
        with pytest.raises(ValueError, match="finite"):
            render.top_view(np.full((4, 3), np.nan))


def test_the_key_has_the_classes_that_occur_the_most_frequent_first():
    colors = class_colors(4)
    key = class_key([np.array([2, 2, 0]), np.array([2] * 397)], ["a", "b", "c", "d"], colors)
    assert [(entry.name, entry.share) for entry in key] == [("c", 399 / 400), ("a", 1 / 400)]
    assert key[0].color == tuple(colors[2])
    assert [share_text(entry.share) for entry in key] == ["100 %", "<1 %"]


class TestRows:
    def test_side_by_side_has_one_picture_per_panel_in_its_color(self):
        coord, color, normal = box_room(step=0.1)
        red = np.tile(np.uint8(RED), (len(coord), 1))
        panels = [("as is", coord, color), pictures.Panel("red", coord, red, normal)]
        image = pictures.side_by_side(panels, size=(96, 72), label="room")
        assert image.width == 2 * 96 + 3 * pictures.GAP
        pixels = np.asarray(image).astype(int)
        reddish = (pixels[..., 0] > 60) & (pixels[..., 1:].sum(axis=2) < 20)
        assert not reddish[:, : 96 + pictures.GAP].any()
        assert reddish[:, 96 + 2 * pictures.GAP :].mean() > 0.1
        with pytest.raises(ValueError, match="at least one"):
            pictures.side_by_side([])

    def test_a_key_names_the_colours_below_its_panel_in_as_many_lines_as_it_needs(self):
        coord, color, _ = box_room(step=0.2)
        key = [KeyEntry(name, RED, 0.25) for name in ("wall", "floor", "ceiling", "table")]
        plain, few, many = (
            pictures.side_by_side([pictures.Panel("", coord, color, None, k)], size=(96, 72))
            for k in ((), key[:1], key)
        )
        assert plain.height < few.height < many.height
        below = np.asarray(many)[plain.height - pictures.GAP // 2 :]
        patches = (below == RED).all(axis=2)
        assert patches.sum() == 4 * 12 * 12
        long = [KeyEntry("w" * 200, RED, 0.25)]  # is cut, and its share is there
        panel = pictures.Panel("", coord, color, None, long)
        cut = np.asarray(pictures.side_by_side([panel], size=(96, 72)))
        assert cut.shape == np.asarray(few).shape
        assert (cut[plain.height :, -pictures.GAP :] == cut[-1, -1]).all()
        assert few.tobytes().startswith(plain.tobytes()[: -3 * plain.width * pictures.GAP])

    def test_captions_are_drawn(self):
        coord, color, _ = box_room(step=0.2)
        one, other = (
            pictures.side_by_side([(title, coord, color)], size=(96, 72), label=label)
            for title, label in (("trained", "a"), ("untrained", "b"))
        )
        assert one.crop((0, 0, 120, 30)).tobytes() != other.crop((0, 0, 120, 30)).tobytes()
        assert one.crop((0, 30, 120, 58)).tobytes() != other.crop((0, 30, 120, 58)).tobytes()
        assert one.crop((0, 58, 120, 140)).tobytes() == other.crop((0, 58, 120, 140)).tobytes()

    def test_feature_picture_has_a_row_per_scene_and_a_column_per_network(self):
        rng = np.random.default_rng(0)
        coord, color, normal = box_room(step=0.2)
        scenes = [
            pictures.FeatureScene(
                name, coord, colors, normal, {t: rng.normal(size=(len(coord), 8)) for t in "ab"}
            )
            for name, colors in (("first", color), ("second", None))
        ]
        image = pictures.feature_picture(scenes, size=(96, 72))
        assert image.size == (3 * 96 + 4 * pictures.GAP, 2 * (58 + 72 + pictures.GAP))
        assert image.tobytes() == pictures.feature_picture(scenes, size=(96, 72)).tobytes()
        alone = pictures.feature_picture(scenes, size=(96, 72), joint=False)
        assert image.tobytes() != alone.tobytes()
        odd = pictures.FeatureScene("odd", coord, None, None, {"c": np.ones((len(coord), 8))})
        with pytest.raises(ValueError, match="'odd'.*'c'.*'a', 'b'"):
            pictures.feature_picture([*scenes, odd])


class TestCurves:
    def write(self, path: Path, losses: list[float | None], tail: str = "") -> Path:
        lines = [json.dumps({"step": i, "loss": x, "lr": 1e-4}) for i, x in enumerate(losses)]
        path.write_text("\n".join([*lines, json.dumps({"event": "done", "step": 99})]) + tail)
        return path

    def blue(self, image: Path) -> np.ndarray:
        """Mean height (in rows from the top) of the first line of a chart, by pixel column."""
        pixels = np.asarray(Image.open(image)).astype(int)[35:]  # below the legend
        line = np.abs(pixels - pictures.PALETTE[0]).sum(axis=2) < 120
        rows = np.arange(len(pixels))[:, None]
        return (line * rows).sum(axis=0)[line.any(axis=0)] / line.sum(axis=0)[line.any(axis=0)]

    def test_follow_the_data(self, tmp_path: Path):
        falling = self.write(tmp_path / "a.jsonl", list(np.linspace(9, 1, 30)))
        rising = self.write(tmp_path / "b.jsonl", list(np.linspace(1, 9, 30)))
        first = self.blue(pictures.curves(falling, ["loss"], tmp_path / "new" / "a.png"))
        second = self.blue(pictures.curves(rising, ["loss"], tmp_path / "new" / "b.png"))
        assert len(first) > 300
        assert np.corrcoef(first, np.arange(len(first)))[0, 1] > 0.99
        assert np.corrcoef(second, np.arange(len(second)))[0, 1] < -0.99

    def test_are_the_same_bytes_for_the_same_data_only(self, tmp_path: Path):
        values = list(np.sin(np.arange(300)))
        paths = [
            pictures.curves(
                self.write(tmp_path / "m.jsonl", data), ["loss", ["lr", "loss"]], tmp_path / name
            )
            for name, data in (("a", values), ("b", values), ("c", [*values[:-1], 5.0]))
            for name in [f"{name}.png"]
        ]
        a, b, c = (path.read_bytes() for path in paths)
        assert a == b
        assert a != c

    def test_leave_gaps_where_a_value_is_missing_or_not_finite(self, tmp_path: Path):
        whole = self.write(tmp_path / "a.jsonl", [1.0] * 20)
        holes = self.write(tmp_path / "b.jsonl", [1.0] * 8 + [None, float("nan")] * 2 + [1.0] * 8)
        whole_line = self.blue(pictures.curves(whole, ["loss"], tmp_path / "a.png"))
        holed_line = self.blue(pictures.curves(holes, ["loss"], tmp_path / "b.png"))
        assert 0.5 * len(whole_line) < len(holed_line) < 0.85 * len(whole_line)

    @pytest.mark.parametrize("losses", [[2.5], [0.0, 0.0], [1e9, -1e9], [None, None]])
    def test_draw_degenerate_data(self, tmp_path: Path, losses: list[float | None]):
        path = self.write(tmp_path / "m.jsonl", losses)
        assert Image.open(pictures.curves(path, ["loss"], tmp_path / "m.png")).size == (460, 290)

    def test_ignore_a_line_being_written_but_no_other_damage(self, tmp_path: Path):
        path = self.write(tmp_path / "m.jsonl", [2.0, 1.0], tail='\n{"step": 3, "lo')
        pictures.curves(path, ["loss"], tmp_path / "m.png")
        path.write_text(path.read_text() + '\n{"step": 4, "loss": 1}')
        with pytest.raises(ValueError, match="line 4 is not JSON"):
            pictures.curves(path, ["loss"], tmp_path / "m.png")

    def test_name_a_missing_key_and_those_that_exist(self, tmp_path: Path):
        path = self.write(tmp_path / "m.jsonl", [2.0, 1.0])
        with pytest.raises(ValueError, match=r"\['los'\].*'loss', 'lr'"):
            pictures.curves(path, ["los"], tmp_path / "m.png")

    def test_average_without_lag(self):
        ramp = np.arange(200.0)
        np.testing.assert_allclose(pictures._running_average(ramp, 10), ramp, atol=1e-9)
        noise = np.random.default_rng(0).normal(size=4000)
        assert pictures._running_average(noise, 50).std() < 0.15

    @settings(deadline=None)
    @given(low=st.floats(-1e6, 1e6), span=st.floats(1e-4, 1e6))
    def test_ticks_are_few_inside_the_axis_and_told_apart(self, low: float, span: float):
        values, labels = axes.ticks(low, low + span, 5)
        assert 2 <= len(values) <= 6
        slack = 1e-6 * span + 1e-9 * abs(low)
        assert values[0] >= low - slack
        assert values[-1] <= low + span + slack
        if span > 1e-3 * abs(low):
            assert len(set(labels)) == len(labels)
