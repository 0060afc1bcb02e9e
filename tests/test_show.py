"""What launch.show computes and writes: similarity, matches, retrieval, and its files."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import point_jax
from launch import command, show
from launch.show_inputs import load_clouds, parse
from point_jax.features.maps import PointFeatures
from point_jax.visual.clouds import distinct_rows, feature_cloud
from point_jax.visual.codes import cosine_codes
from point_jax.visual.layout import places_in_rows, thin
from point_jax.visual.matching import match_features, matching_accuracy, rigid, sparse_matches
from point_jax.visual.retrieval import (
    descriptors,
    nearest_items,
    objects_of,
    precision,
    scenes_of,
)
from point_jax.visual.similarity import (
    RAMP,
    cosine_similarity,
    heat,
    heat_colors,
    heat_scale,
    nearest_point,
    unit_rows,
)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) cosines by the definition, in double precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def turned(angle: float = 0.7, shift: tuple[float, ...] = (2.0, -1.0, 0.3)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = shift
    return matrix


def room(n: int = 600, seed: int = 0) -> dict[str, np.ndarray]:
    """Points on the floor and two walls; features that tell where a point is, on voxels."""
    rng = np.random.default_rng(seed)
    coord = rng.uniform(0, 1, (n, 3)) * [4.0, 3.0, 2.5]
    side = np.arange(n) % 3
    coord[np.arange(n), [2, 0, 1] * (n // 3) + [2, 0, 1][: n % 3]] = 0.0
    cell = np.floor(coord / 0.4)
    features = np.sin(cell @ np.random.default_rng(9).normal(size=(3, 12)) * 0.4 + np.arange(12))
    return {
        "coord": coord.astype(np.float32),
        "features": features.astype(np.float32),
        "color": rng.integers(0, 256, (n, 3)).astype(np.uint8),
        "segment": side.astype(np.int32),
        "instance": (side + 3 * (coord[:, 0] > 2)).astype(np.int32),
    }


class TestSimilarity:
    def test_is_the_cosine_for_more_points_than_a_block_holds(self):
        rng = np.random.default_rng(0)
        features, queries = rng.normal(size=(20_000, 5)), rng.normal(size=(3, 5))
        np.testing.assert_allclose(
            cosine_similarity(features, queries), cosines(queries, features), atol=1e-6
        )

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
    def test_does_not_depend_on_lengths(self, scale: float):
        features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
        scaled = features * np.float32(scale)
        np.testing.assert_allclose(
            cosine_similarity(scaled, features[:2]), cosine_similarity(features, features[:2]),
            atol=1e-6,
        )  # fmt: skip

    def test_of_zeros_is_zero(self):
        assert cosine_similarity(np.zeros((2, 3)), np.ones((1, 3))).tolist() == [[0.0, 0.0]]
        assert unit_rows(np.zeros((2, 3))).tolist() == [[0.0] * 3] * 2

    def test_scale_has_the_quantiles_of_the_release_at_even_places_of_the_ramp(self):
        values = np.random.default_rng(0).permutation(np.arange(1001) / 1000).astype(np.float32)
        scale = heat_scale(values)
        np.testing.assert_allclose(scale, [0.0, 0.5, 0.9, 0.98, 1.0], atol=1e-6)
        np.testing.assert_allclose(heat(scale, scale), [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 0.75, 1.0]), min_size=1, max_size=30))
    def test_heat_never_falls_as_the_similarity_grows_and_its_best_is_hottest(self, values: list):
        values = np.sort(np.float32(values))
        places = heat(values, heat_scale(values))
        assert (np.diff(places) >= 0).all()
        assert places[-1] == 1.0 and places.min() >= 0.0

    def test_colors_run_along_the_ramp(self):
        stops = np.linspace(0, 1, len(RAMP))
        np.testing.assert_array_equal(heat_colors(stops), RAMP)
        assert heat_colors([-1.0, 2.0]).tolist() == [list(RAMP[0]), list(RAMP[-1])]

    def test_nearest_point_is_nearest(self):
        coord = np.random.default_rng(0).normal(size=(100, 3))
        place = np.array([0.1, 0.2, 0.3])
        assert nearest_point(coord, place) == np.linalg.norm(coord - place, axis=1).argmin()
        with pytest.raises(ValueError, match="three finite numbers"):
            nearest_point(coord, [0.0, np.nan, 0.0])


class TestCodes:
    @pytest.mark.parametrize("width", [4, 16])
    def test_tell_cosines_to_within_the_error_they_state(self, width: int):
        rng = np.random.default_rng(0)
        clouds = [rng.normal(size=(n, 40)) * 0.8 ** np.arange(40) for n in (300, 200)]
        codes = cosine_codes(clouds, width)
        assert all(c.dtype == np.uint8 and c.shape[1] == width for c in codes.codes)
        told = codes.decode(0) @ codes.decode(1).T
        off = np.abs(told - cosines(*clouds))
        assert np.quantile(off, 0.95) < 1.3 * codes.error
        assert off.max() < 1.5 * codes.worst
        # A bound that says nothing would pass, too.
        assert codes.error < (0.3 if width == 4 else 0.03)

    def test_of_few_directions_lose_nothing_but_rounding(self):
        features = np.random.default_rng(0).normal(size=(500, 6))
        assert cosine_codes([features]).worst < 0.03


class TestDistinctRows:
    def test_give_back_the_rows(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(7, 5)).astype(np.float32)[rng.integers(0, 7, 20_000)]
        distinct, owner = distinct_rows(rows)
        assert len(distinct) == 7
        np.testing.assert_array_equal(distinct[owner], rows)

    def test_do_not_mix_rows_that_differ_in_one_bit(self):
        rows = np.ones((3, 4), np.float32)
        rows[1, 2] = np.nextafter(np.float32(1), np.float32(2))
        assert len(distinct_rows(rows)[0]) == 2

    def test_of_a_cloud_have_their_points_mean_as_place_and_a_point_near_it(self):
        scan = room()
        cloud = feature_cloud("a", scan["coord"], scan["features"])
        for row in (0, 5, len(cloud.features) - 1):
            own = scan["coord"][cloud.owner == row]
            np.testing.assert_allclose(cloud.place[row], own.mean(axis=0), atol=1e-5)
            away = np.linalg.norm(own - cloud.place[row], axis=1)
            middle = scan["coord"][cloud.middle[row]]
            assert np.linalg.norm(middle - cloud.place[row]) == pytest.approx(away.min(), abs=1e-6)

    def test_of_a_part_are_those_of_its_points(self):
        scan = room()
        cloud = feature_cloud("a", **{k: scan[k] for k in ("coord", "features", "segment")})
        part = cloud.part(scan["segment"] == 1, "walls")
        np.testing.assert_array_equal(
            part.features[part.owner], scan["features"][scan["segment"] == 1]
        )
        assert part.name == "walls" and set(part.segment) == {1}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": np.ones((4, 2))}, "one row a point"),
            ({"features": np.full((600, 2), np.inf)}, "NaN or infinite"),
            ({"coord": np.zeros((0, 3))}, "n >= 1"),
            ({"color": np.zeros((5, 3))}, r"color must have shape \(600, 3\)"),
        ],
    )
    def test_need_arrays_that_fit(self, change: dict, message: str):
        scan = room() | change
        with pytest.raises(ValueError, match=message):
            feature_cloud("a", **scan)


class TestMatching:
    @pytest.mark.parametrize("block", [16, 50, 4096])
    def test_finds_the_nearest_both_ways_whatever_the_block(self, block: int):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(130, 8)), rng.normal(size=(75, 8))
        truth = cosines(a, b)
        found = match_features(a, b, block=block)
        np.testing.assert_array_equal(found.target, truth.argmax(axis=1))
        np.testing.assert_array_equal(found.back, truth.argmax(axis=0))
        np.testing.assert_allclose(found.score, truth.max(axis=1), atol=1e-6)
        np.testing.assert_allclose(found.back_score, truth.max(axis=0), atol=1e-6)
        mutual = truth.argmax(axis=0)[truth.argmax(axis=1)] == np.arange(130)
        np.testing.assert_array_equal(found.mutual, mutual)
        assert 0 < mutual.sum() < 75

    def test_takes_the_first_of_equal_ones(self):
        found = match_features(np.eye(3), np.tile(np.eye(3), (10, 1)), block=4)
        assert found.target.tolist() == [0, 1, 2]

    def test_sees_no_padding(self):
        # With all cosines negative, the zeros of padded rows would be the best.
        found = match_features(-np.ones((5, 4)), np.ones((3, 4)) + np.eye(3, 4), block=4)
        assert (found.score < 0).all() and (found.target < 3).all()

    def test_accuracy_is_right_under_a_known_motion(self):
        rng = np.random.default_rng(0)
        coord, motion = rng.uniform(0, 4, (200, 3)), turned()
        target = coord @ motion[:3, :3].T + motion[:3, 3]
        matched = target.copy()
        matched[:50] += [0.0, 0.0, 1.0]
        matched[50:80, 0] += 0.04
        truth = matching_accuracy(coord, matched, target, transform=motion, within=0.05)
        assert truth.share() == pytest.approx(0.75)
        np.testing.assert_allclose(truth.distance[:80], [1.0] * 50 + [0.04] * 30, atol=1e-9)
        assert truth.share(np.arange(200) < 50) == 0.0

    def test_points_without_a_counterpart_do_not_count(self):
        coord = np.array([[0.0, 0, 0], [1, 0, 0], [9, 0, 0]])
        truth = matching_accuracy(coord, coord[[0, 0, 0]], coord[:2], within=0.1)
        assert truth.known.tolist() == [True, True, False]
        assert truth.share() == 0.5
        assert np.isnan(truth.share(np.array([False, False, True])))

    @pytest.mark.parametrize(
        "matrix",
        [np.diag([2.0, 2, 2, 1]), np.diag([-1.0, 1, 1, 1]), np.zeros((3, 3)), np.ones((4, 4))],
    )
    def test_truth_must_be_rigid(self, matrix: np.ndarray):
        with pytest.raises(ValueError, match="rigid|rotation"):
            rigid(matrix)

    def test_sparse_matches_are_good_and_spread(self):
        rng = np.random.default_rng(0)
        coord, score = rng.uniform(0, 10, (500, 3)), rng.uniform(0, 1, 500)
        allowed = rng.random(500) < 0.6
        chosen = sparse_matches(coord, score, allowed, 20)
        assert len(set(chosen)) == 20 and allowed[chosen].all()
        assert (score[chosen] >= np.median(score[allowed])).all()

        # No candidate is farther from the chosen ones than these are from one another.
        better = np.flatnonzero(allowed & (score >= np.median(score[allowed])))
        apart = np.linalg.norm(coord[better, None] - coord[None, chosen], axis=2)
        among = np.linalg.norm(coord[chosen, None] - coord[None, chosen], axis=2)
        assert apart.min(axis=1).max() <= among[~np.eye(20, dtype=bool)].min()
        assert len(sparse_matches(coord, score, np.arange(500) < 7, 20)) == 7
        assert len(sparse_matches(coord, score, np.zeros(500, bool), 20)) == 0


class TestRetrieval:
    def clouds(self) -> list:
        return [feature_cloud(name, **room(seed=i)) for i, name in enumerate("abc")]

    def test_descriptors_are_the_mean_direction_of_the_points(self):
        clouds = self.clouds()
        items = objects_of(clouds)
        pooled = descriptors(clouds, items)
        for item, row in zip(items, pooled, strict=True):
            scan = room(seed=item.cloud)
            own = scan["features"][scan["instance"] == item.instance]
            mean = (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(axis=0)
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
            assert item.segment == item.instance % 3
        assert len(items) == 15

    def test_nearest_leaves_out_what_is_to_be_skipped(self):
        clouds = self.clouds()
        base = descriptors(clouds, scenes_of(clouds))
        alone = nearest_items(base, base, 1)
        assert alone.item[:, 0].tolist() == [0, 1, 2]
        others = nearest_items(base, base, 2, skip=np.eye(3, dtype=bool))
        assert all(i not in row for i, row in enumerate(others.item))
        assert (np.diff(others.score, axis=1) <= 0).all()
        with pytest.raises(ValueError, match="asked for 3 .* 2 to find"):
            nearest_items(base, base, 3, skip=np.eye(3, dtype=bool))

    def test_precision_counts_queries_with_a_class_only(self):
        base = np.eye(3, dtype=np.float32)
        found = nearest_items(base, base, 1)
        assert precision(found, [0, 5, None], [0, 1, 2]) == 0.5
        assert np.isnan(precision(found, [None, -1, None], [0, 1, 2]))

    def test_objects_need_instances_of_some_size(self):
        scan = room()
        with pytest.raises(ValueError, match="no instance of 2000"):
            objects_of([feature_cloud("a", **scan)], min_points=2000)
        del scan["instance"]
        with pytest.raises(ValueError, match="'a' has no instance ids"):
            objects_of([feature_cloud("a", **scan)])


class TestLayout:
    @pytest.mark.parametrize("count", [1, 2, 5, 9])
    def test_clouds_stand_apart_on_one_floor(self, count: int):
        rng = np.random.default_rng(count)
        low = rng.uniform(-50, 50, (count, 3))
        boxes = [np.stack([p, p + rng.uniform(1, 5, 3)]) for p in low]
        azimuth = 0.0  # seen along x: clouds are boxes for the camera as well
        placed = [b + s for b, s in zip(boxes, places_in_rows(boxes, azimuth), strict=True)]
        assert len({round(float(b[0, 2]), 6) for b in placed}) == 1
        for i, a in enumerate(placed):
            for b in placed[:i]:
                assert ((a[1, :2] <= b[0, :2]) | (b[1, :2] <= a[0, :2])).any()

    def test_thinning_keeps_the_first_point_of_each_cube_and_what_is_needed(self):
        coord = np.random.default_rng(0).uniform(0, 1, (5000, 3)).astype(np.float32)
        (kept,), cell = thin([coord], 500, [[4999, 4998]])
        assert 400 < len(kept) <= 502 and {4998, 4999} <= set(kept.tolist())
        cube = np.floor((coord - coord.min(axis=0)) / cell).astype(int)
        _, first = np.unique(cube, axis=0, return_index=True)
        assert set(kept.tolist()) == set(first.tolist()) | {4998, 4999}

    def test_nothing_is_thinned_below_the_limit(self):
        (kept,), cell = thin([np.zeros((10, 3), np.float32)], 10, [[]])
        assert kept.tolist() == list(range(10)) and cell == 0.0


class TestCommand:
    @pytest.fixture
    def scans(self, tmp_path: Path) -> Path:
        folder = tmp_path / "scans"
        folder.mkdir()
        for i, name in enumerate(["one", "two", "three"]):
            np.savez(folder / f"{name}.npz", **room(seed=i))
        moved = room()
        motion = turned()
        moved["coord"] = (moved["coord"] @ motion[:3, :3].T + motion[:3, 3]).astype(np.float32)
        np.savez(tmp_path / "moved.npz", **moved)
        np.savetxt(tmp_path / "motion.txt", motion)
        return folder

    def run(self, *arguments: object) -> int:
        return command.run(show.main, ["show", *map(str, arguments)], show.__doc__)

    def files(self, folder: Path) -> set[str]:
        return {file.name for file in folder.iterdir()}

    def colors(self, ply: Path) -> np.ndarray:
        from plyfile import PlyData

        vertex = PlyData.read(str(ply))["vertex"]
        return np.stack([vertex[c] for c in ("red", "green", "blue")], axis=1)

    def test_pca_writes_a_picture_a_page_and_a_ply_for_each_cloud(self, scans: Path):
        out = scans / "out"
        code = self.run("pca", f"--input={scans}/one.npz", f"--input={scans}/two.npz",
                        f"--output={out}")  # fmt: skip
        assert code == 0
        assert self.files(out) == {"pca.png", "pca.html", "pca_one.ply", "pca_two.ply"}
        assert Image.open(out / "pca.png").width > 1000
        # One PCA for both: equal features have equal colours.
        one, two = (room(seed=i)["features"] for i in (0, 1))
        colors = self.colors(out / "pca_one.ply"), self.colors(out / "pca_two.ply")
        same = {row.tobytes(): i for i, row in enumerate(one)}
        pairs = [(same[r.tobytes()], j) for j, r in enumerate(two) if r.tobytes() in same]
        assert len(pairs) > 50
        for i, j in pairs[::10]:
            np.testing.assert_array_equal(colors[0][i], colors[1][j])

    def test_features_come_from_the_checkpoint_at_the_level_asked_for(
        self, scans: Path, monkeypatch: pytest.MonkeyPatch
    ):
        fine, coarse = np.arange(600) // 2, np.arange(300) // 3  # voxels of points and of voxels
        levels = np.eye(300, dtype=np.float32), np.eye(100, dtype=np.float32)[::-1]
        asked = []

        class Fake:
            def stream(self, scans: list) -> list[PointFeatures]:
                asked.extend(scan.name for scan in scans)
                grids = np.zeros((300, 3), np.int32), np.zeros((100, 3), np.int32)
                coord = scans[0].coord
                return [PointFeatures(coord, fine, grids, (coarse,), levels, ())]

        monkeypatch.setattr(point_jax, "load", lambda path: Fake(), raising=False)
        arguments = [f"--input={scans}/one.npz", f"--output={scans}", f"--checkpoint={scans}"]
        for up_cast, expected in (("0", levels[1][coarse][fine]), ("1", None), ("2", None)):
            if expected is None:
                expected = np.concatenate([levels[0], levels[1][coarse]], axis=1)[fine]
            options = parse(["show", "pca", *arguments, f"--up_cast={up_cast}"], ("pca",))
            (cloud,), _ = load_clouds(options)
            np.testing.assert_array_equal(cloud.features[cloud.owner], expected)
            np.testing.assert_array_equal(cloud.coord, room()["coord"])
        assert asked == ["one"] * 3

    def test_similarity_colors_the_picked_point_hottest(self, scans: Path):
        out = scans / "out"
        code = self.run("similarity", f"--input={scans}/one.npz", "--at=17", f"--output={out}")
        assert code == 0
        assert self.files(out) == {"similarity.png", "similarity.html", "similarity.ply"}
        colors = self.colors(out / "similarity.ply")
        assert tuple(colors[17]) == RAMP[-1]
        features = room()["features"]
        least = cosines(features[17:18], features)[0].argmin()
        assert tuple(colors[least]) == RAMP[0]

    def test_similarity_by_place_finds_the_nearest_point(self, scans: Path, capsys):
        coord = room()["coord"]
        x, y, z = coord[33] + 0.001
        self.run("similarity", f"--input={scans}/one.npz", f"--at={x},{y},{z}", "--at=4",
                 f"--output={scans}/out")  # fmt: skip
        assert {"similarity_33.ply", "similarity_4.ply"} <= self.files(scans / "out")

    def test_match_tells_the_accuracy_under_a_motion(self, scans: Path, capsys):
        from plyfile import PlyData

        out, home = scans / "out", scans.parent
        code = self.run("match", f"--input={scans}/one.npz", f"--input={home}/moved.npz",
                        f"--truth={home}/motion.txt", "--lines=12", f"--output={out}")  # fmt: skip
        assert code == 0
        assert "100% of those with a true counterpart" in capsys.readouterr().out
        assert self.files(out) == {"match.png", "match.html", "match.ply"}
        ply = PlyData.read(str(out / "match.ply"))
        edges = ply["edge"]
        assert len(edges.data) == 12 and len(ply["vertex"].data) == 1200
        # The clouds differ in nothing but their place: lines join points of equal features.
        features = room()["features"]
        np.testing.assert_array_equal(features[edges["vertex1"]], features[edges["vertex2"] - 600])

    def test_a_wrong_truth_is_seen(self, scans: Path, capsys):
        self.run("match", f"--input={scans}/one.npz", f"--input={scans.parent}/moved.npz",
                 "--truth=same", "--within=0.2", f"--output={scans}/out")  # fmt: skip
        assert "100% of those" not in capsys.readouterr().out

    def test_retrieve_writes_its_table(self, scans: Path, capsys):
        out = scans.parent / "out"
        code = self.run("retrieve", f"--input={scans}", f"--query={scans}/two.npz", "--count=2",
                        f"--output={out}")  # fmt: skip
        assert code == 0
        assert self.files(out) == {"retrieve.png", "retrieve.html", "retrieve.ply", "retrieve.csv"}
        rows = list(csv.DictReader((out / "retrieve.csv").open()))
        assert [row["rank"] for row in rows] == ["0", "1", "2"]
        assert rows[0]["cloud"] == "two" and {r["cloud"] for r in rows} == {"one", "two", "three"}

    def test_retrieve_objects_names_classes(self, scans: Path, capsys):
        names = scans.parent / "classes.txt"
        names.write_text("floor\nleft wall\nright wall\n")
        code = self.run("retrieve", "--objects", f"--input={scans}", "--query=one:1", "--count=3",
                        f"--classes={names}", f"--output={scans.parent}/out")  # fmt: skip
        said = capsys.readouterr().out
        assert code == 0
        assert "left wall (one:1)" in said and "With each of the 15 objects" in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["pca"], "--input, --output"),
            (["paint", "--input=x", "--output=y"], "choose from"),
            (["pca", "--input={one}", "--output={out}", "--at=3"], "--at belongs to similarity"),
            (["pca", "--input=gone.npz", "--output={out}"], "gone.npz: no such file"),
            (["pca", "--input={one}", "--output={out}", "--saturate=0.7"], "--saturate in"),
            (["similarity", "--input={one}", "--output={out}", "--at=600"], "points 0 to 599"),
            (["similarity", "--input={one}", "--output={out}", "--at=1,2"], "or a place X,Y,Z"),
            (["similarity", "--input={one}", "--output={out}", "--at=x"], "or a place X,Y,Z"),
            (["match", "--input={one}", "--output={out}"], "two clouds, got 1"),
            (["match", "--input={one}", "--input={two}", "--output={out}", "--truth=no.txt"],
             "neither 'same' nor"),
            (["retrieve", "--input={one}", "--output={out}"], "needs --query"),
            (["retrieve", "--input={one}", "--output={out}", "--query=nine"], "expected PATH"),
            (["retrieve", "--input={one}", "--output={out}", "--query=one"], "0 to find"),
            (["retrieve", "--objects", "--input={one}", "--output={out}", "--query=one:77"],
             "no object 77"),
            (["pca", "--input={one}", "--output={out}", "--checkpoint=nowhere"], "nowhere"),
            (["pca", "--input={bare}", "--output={out}"], "no array features"),
        ],
    )  # fmt: skip
    def test_says_what_is_wrong_in_one_line(
        self, scans: Path, capsys, arguments: list[str], message: str
    ):
        np.savez(scans.parent / "bare.npz", coord=room()["coord"])
        names = {"one": scans / "one.npz", "two": scans / "two.npz", "out": scans / "out"}
        names["bare"] = scans.parent / "bare.npz"
        assert self.run(*(text.format(**names) for text in arguments)) == 1
        said = capsys.readouterr().err
        assert said.startswith("error:") and len(said.splitlines()) == 1, said
        assert message in said
        assert not (scans / "out").exists() or not self.files(scans / "out")
