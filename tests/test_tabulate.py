"""One table of several evaluations: seeds become a mean, folds a sum, and nothing counts twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from launch import command, tabulate
from point_jax.evaluation.classes import S3DIS, S3DIS_AREAS
from point_jax.evaluation.confusion import scores
from point_jax.evaluation.report import Report, Result, write_results
from point_jax.visual.spread import apart

NAMES = ("wall", "floor", "lamp")


def some_scores(right, names=NAMES):
    """Of 1,000 walls `right` are found, of all else everything."""
    matrix = 2000 * np.eye(len(names), dtype=np.int64)
    matrix[0, :2] = right, 1000 - right
    return scores(matrix, names)


def result(right, seed=0, encoder="runs/a/checkpoints/400", protocol="linear", **changes):
    floor = encoder in ("raw", "random")
    told: dict[str, Any] = {
        "scores": {"voxel": some_scores(right - 10), "full": some_scores(right)},
        "config": f"configs/segmentation.py:data=rooms,protocol={protocol},encoder=tiny",
        "data": "rooms",
        "train_scenes": ("a", "b"),
        "test_scenes": ("c",),
        "checkpoint": None if floor else encoder,
        "steps": None if floor else int(Path(encoder).name),
        "train_steps": 300 if protocol == "linear" else None,
    }
    return Result(encoder, protocol, seed, **told | changes)


def write(folder, main, *floors):
    write_results(folder, Report(main, floors))
    return folder


def edit(folder, change):
    """Changes what a results.json holds."""
    file = folder / "results.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def run(*args):
    return command.run(tabulate.main, ["tabulate", *map(str, args)], tabulate.__doc__)


def rows(tmp_path, *args):
    """What --json says."""
    assert run(*args, f"--json={tmp_path / 'table.json'}") == 0
    return json.loads((tmp_path / "table.json").read_text())["rows"]


def error(capsys, *args):
    assert run(*args) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("skipped")]
    assert line.startswith("error: ")
    return line


def mIoU(right):
    return some_scores(right).mIoU


def test_seeds_become_one_row_with_their_mean_and_spread(tmp_path):
    found = {3: 700, 1: 800, 2: 850}
    for seed, right in found.items():
        write(tmp_path / f"run{seed}", result(right, seed))
    (row,) = rows(tmp_path, tmp_path)
    assert row["seeds"] == [1, 2, 3] and row["steps"] == 400 and row["encoder"] == "runs/a"
    for resolution, less in {"full": 0, "voxel": 10}.items():
        for mean in ("mIoU", "mAcc", "allAcc"):
            values = [getattr(some_scores(right - less), mean) for right in found.values()]
            told = row["resolution"][resolution][mean]
            assert told["mean"] == pytest.approx(np.mean(values))
            middle = sum(values) / 3
            assert told["std"] == pytest.approx((sum((x - middle) ** 2 for x in values) / 2) ** 0.5)
            assert (told["min"], told["max"]) == (min(values), max(values))
            assert told["values"] == dict(zip("312", values, strict=True))
    assert set(row["resolution"]) == {"voxel", "full"}


def test_a_single_seed_has_no_deviation(tmp_path, capsys):
    write(tmp_path / "run", result(800))
    (row,) = rows(tmp_path, tmp_path)
    assert row["resolution"]["full"]["mIoU"]["std"] is None
    assert "±" not in capsys.readouterr().out.partition("## full")[2]


@pytest.mark.parametrize(
    "other",
    [
        {"encoder": "runs/b/checkpoints/400"},
        {"encoder": "runs/a/checkpoints/500"},
        {"protocol": "ridge"},
        {"label_share": 0.1},
        {"train_steps": 301},
        {"data": "s3dis"},
        {"config": "configs/segmentation.py:data=rooms,protocol=linear,encoder=small"},
        {"train_scenes": ("a",)},
        {"test_scenes": ("d",)},
    ],
)
def test_rows_that_differ_in_more_than_the_seed_stay_apart_and_tell_in_what(
    tmp_path, other, capsys
):
    write(tmp_path / "one", result(700, seed=0))
    write(tmp_path / "two", result(800, seed=1, **other))
    found = rows(tmp_path, tmp_path)
    assert sorted(row["seeds"] for row in found) == [[0], [1]]
    lines = capsys.readouterr().out.partition("## full")[2].partition("##")[0].splitlines()
    cells = [line.split("|")[1:-4] for line in lines if line.startswith("|")][2:]
    without_seed = {tuple(row[:-1]) for row in cells}
    assert len(without_seed) == 2


def test_the_newest_checkpoint_is_the_same_by_its_number_and_by_its_run(tmp_path):
    write(tmp_path / "one", result(700, seed=0))
    newest = dataclasses.replace(result(800, seed=1), encoder="runs/a/", checkpoint="runs/a")
    write(tmp_path / "two", newest)
    (row,) = rows(tmp_path, tmp_path)
    assert row["seeds"] == [0, 1]


def test_floors_are_rows_first_and_equal_ones_count_once(tmp_path):
    raw, random = result(300, encoder="raw"), result(500, encoder="random")
    write(tmp_path / "a", result(800), raw, random)
    decoder = "configs/segmentation.py:data=rooms,protocol=decoder,encoder=tiny"
    again = [dataclasses.replace(floor, config=decoder) for floor in (raw, random)]
    write(tmp_path / "b", result(700, protocol="decoder"), *again)
    found = rows(tmp_path, tmp_path)
    order = [(row["encoder"], row["protocol"], row["floor"], len(row["files"])) for row in found]
    assert order == [
        ("raw", "linear", True, 2),
        ("random", "linear", True, 2),
        ("runs/a", "linear", False, 1),
        ("runs/a", "decoder", False, 1),
    ]
    assert [row["encoder"] for row in rows(tmp_path, tmp_path, "--wo_floors")] == ["runs/a"] * 2


def test_rows_of_a_protocol_rise(tmp_path):
    for steps, right in {100: 600, 200: 900, 300: 700}.items():
        write(tmp_path / str(steps), result(right, encoder=f"runs/a/checkpoints/{steps}"))
        write(tmp_path / f"r{steps}", result(right, encoder=f"runs/a/checkpoints/{steps}",
                                             protocol="ridge"))  # fmt: skip
    order = [(row["protocol"], row["steps"]) for row in rows(tmp_path, tmp_path)]
    assert order == [(p, steps) for p in ("ridge", "linear") for steps in (100, 300, 200)]


def test_the_same_seed_twice_is_one_result_or_an_error(tmp_path, capsys):
    one = write(tmp_path / "one", result(800))
    two = write(tmp_path / "two", result(800))
    (row,) = rows(tmp_path, one, two, one, one / "results.json")
    assert row["seeds"] == [0] and len(row["files"]) == 2
    write(two, result(801))
    line = error(capsys, one, two)
    assert str(one / "results.json") in line and str(two / "results.json") in line
    assert "seed 0" in line and "runs/a" in line


def test_equal_means_of_different_matrices_are_different(tmp_path, capsys):
    errors = ([[8, 1, 1], [1, 8, 1], [1, 1, 8]], [[8, 2, 0], [0, 8, 2], [2, 0, 8]])
    for place, matrix in enumerate(errors):
        found = {"full": scores(np.array(matrix), NAMES)}
        write(tmp_path / str(place), result(0, scores=found))
    assert "both hold runs/a" in error(capsys, tmp_path)


def test_a_resolution_that_one_of_two_equal_rows_has_is_kept(tmp_path):
    whole = result(800)
    voted = {**whole.scores, "voted": some_scores(900)}
    write(tmp_path / "a", result(700, protocol="ridge"), result(300, encoder="raw"))
    floor = result(300, encoder="raw")
    write(tmp_path / "b", whole, dataclasses.replace(floor, scores={
        "full": floor.headline, "voted": voted["voted"]}))  # fmt: skip
    raw = rows(tmp_path, tmp_path)[0]
    assert (raw["encoder"], list(raw["resolution"])) == ("raw", ["voxel", "full", "voted"])


def test_files_of_an_older_program_are_read(tmp_path):
    def old(content):
        del content["label_share"], content["train_steps"]
        for found in content["resolution"].values():
            del found["confusion"]

    edit(write(tmp_path / "old", result(800, seed=1, train_steps=None)), old)
    write(tmp_path / "new", result(800, seed=2, train_steps=None))
    (row,) = rows(tmp_path, tmp_path)
    assert row["seeds"] == [1, 2] and row["label_share"] == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.pop("seed"), "seed is missing, expected a whole number"),
        (lambda x: x.update(protocol=3), "protocol is 3, expected a text"),
        (lambda x: x.update(steps=-1), "steps is -1, expected a whole number at least 0 or None"),
        (lambda x: x.update(label_share=0), "label_share is 0, expected a number"),
        (lambda x: x.update(resolution={}), "resolution has nothing, expected full"),
        (lambda x: x["resolution"].update(full=None), "resolution.full is None"),
        (lambda x: x["resolution"]["full"].pop("mAcc"), "resolution.full.mAcc is missing"),
        (lambda x: x["resolution"]["full"].update(mIoU=80.5), "resolution.full.mIoU is 80.5"),
        (lambda x: x["resolution"]["full"].update(mIoU=0.5), "its confusion matrix gives"),
        (lambda x: x["resolution"]["voxel"]["confusion"].pop(), "voxel.confusion does not fit"),
        (lambda x: x["resolution"]["full"].update(confusion=[[1.5]]), "confusion does not fit"),
        (lambda x: x.update(seed=10**400), "int too large"),
        (lambda x: x["resolution"]["voxel"].update(confusion=[[2**70] * 3] * 3), "too large"),
        (lambda x: x["resolution"]["voxel"].update(per_class={"a": 1.0}, confusion=None), "names"),
        (lambda x: x.update(floors=3), "floors is 3"),
        (lambda x: x["floors"][0].pop("encoder"), "floors[0].encoder is missing"),
        (lambda x: x.update(shortcut={"chance": 1}), "shortcut.explained is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_key(tmp_path, capsys, change, says):
    folder = edit(write(tmp_path / "run", result(800), result(1, encoder="raw")), change)
    line = error(capsys, folder)
    assert f"{folder / 'results.json'}: {says}" in line or says in line
    assert str(folder / "results.json") in line


def test_what_is_no_results_is_told(tmp_path, capsys):
    assert "nowhere does not exist" in error(capsys, tmp_path / "nowhere")
    assert "no results.json in" in error(capsys, tmp_path)
    folder = write(tmp_path / "run", result(800))
    deep = "[" * 100_000
    for text, says in {"{": "cannot be read", "[]": "holds a list", deep: "cannot be"}.items():
        (folder / "results.json").write_text(text)
        assert f"{folder / 'results.json'}: {says}" in error(capsys, folder)
    assert "required: paths" in error(capsys)
    assert "expected FILE.png" in error(capsys, folder, "--curve=a.jpg")
    # A file that is named is read, whatever its name.
    kept = write(tmp_path / "kept", result(800)) / "results.json"
    assert run(kept.rename(kept.with_name("old.json"))) == 0


def test_where_nothing_can_be_written_is_told(tmp_path, capsys):
    folder = write(tmp_path / "run", result(800))
    (tmp_path / "there.png").mkdir()
    assert "cannot be written" in error(capsys, folder, f"--curve={tmp_path / 'there.png'}")
    assert "--json" in error(capsys, folder, "--json=gs://bucket/table.json")


def test_an_evaluation_that_still_runs_is_skipped_and_said_so(tmp_path, capsys):
    write(tmp_path / "done", result(800))
    (tmp_path / "running" / "checkpoints").mkdir(parents=True)
    assert run(tmp_path / "done", tmp_path / "running") == 0
    assert capsys.readouterr().err == f"skipped: no results.json in {tmp_path / 'running'}\n"


def test_the_table_that_is_printed_is_written_and_says_once_what_all_rows_share(tmp_path, capsys):
    told: dict[str, Any] = {"shortcut": {"explained": 0.25}}
    for seed, right in enumerate((700, 800)):
        write(tmp_path / f"{seed}", result(right, seed, **told), result(300, seed, "raw"))
    assert run(tmp_path, f"--output={tmp_path / 'new' / 'table.md'}") == 0
    text = (tmp_path / "new" / "table.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    for common in ("- data: rooms", "- probe steps: 300", "- labels: 100 %", "- test scenes: 1 (c"):
        assert common in text
    tables = [part.splitlines() for part in text.split("## ")[1:]]
    assert [lines[0] for lines in tables] == ["full", "voxel"]
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in tables[0][2:] if line]
    assert cells[0] == ["encoder", "protocol", "steps", "seeds", "mIoU full", "mAcc full",
                        "allAcc full", "explained by height and normals"]  # fmt: skip
    low, high = 100 * mIoU(700), 100 * mIoU(800)
    std = abs(high - low) / 2**0.5
    assert [row[0] for row in cells[2:]] == ["raw", "runs/a"]
    assert cells[2][7] == "–"
    assert cells[3][:4] == ["runs/a", "linear", "400", "0, 1"]
    assert cells[3][4] == f"{(low + high) / 2:.1f} ± {std:.1f} ({low:.1f}–{high:.1f})"
    assert cells[3][7] == "25.0 ± 0.0 (25.0–25.0)"


def fold(number, seed, encoder="runs/a/checkpoints/400", **changes):
    rng = np.random.default_rng([number, seed])
    matrix = rng.integers(1, 10 ** int(rng.integers(2, 7)), (13, 13))
    name = f"s3dis-{number}"
    told: dict[str, Any] = {
        "scores": {"full": scores(matrix, S3DIS.names)},
        "config": f"configs/segmentation.py:data={name},protocol=linear,encoder=tiny",
        "data": name,
        "train_scenes": (f"office_{number}",),
        "test_scenes": (f"hall_{number}", "office"),
        "settings": "0a1b2c3d",  # says nothing of the scenes, see `launch.evaluate`
    }
    return result(0, seed, encoder, **told | changes), matrix


def test_six_folds_are_the_scores_of_the_summed_matrices(tmp_path, capsys):
    sums: dict[tuple[str, int], np.ndarray] = {}
    each: dict[tuple[str, int], list[float]] = {}
    for seed in (0, 1):
        for number in range(1, 7):
            main, matrix = fold(number, seed)
            floor, other = fold(number, seed + 10, "raw")
            floor = dataclasses.replace(floor, seed=seed)
            write(tmp_path / f"s3dis-{number}-{seed}", main, floor)
            for name, part in {"runs/a": matrix, "raw": other}.items():
                sums[name, seed] = sums.get((name, seed), 0) + part
                each.setdefault((name, seed), []).append(scores(part, S3DIS.names).mIoU)
    found = rows(tmp_path, "--six_fold", tmp_path)
    assert [row["encoder"] for row in found] == ["raw", "runs/a"]
    for row in found:
        told = row["resolution"]["full"]["mIoU"]["values"]
        for seed in (0, 1):
            wanted = scores(sums[row["encoder"], seed], S3DIS.names)
            assert told[str(seed)] == wanted.mIoU
            for area, value in zip(S3DIS_AREAS, each[row["encoder"], seed], strict=True):
                assert row["areas"][area]["values"][str(seed)] == value
        assert len(row["files"]) == 12 and len(set(row["test_scenes"])) == 12
    text = capsys.readouterr().out
    assert "- data: s3dis, six folds" in text and "## mIoU of each area, full" in text
    mean = 100 * np.mean(each["runs/a", 0] + each["runs/a", 1])
    assert text.rstrip().endswith(f"| {mean:.1f} |")


def test_folds_that_do_not_make_six_areas_are_told(tmp_path, capsys):
    for number in range(1, 6):
        write(tmp_path / f"{number}", fold(number, 0)[0])
    assert "runs/a, linear, seed 0 lacks Area_6" in error(capsys, "--six_fold", tmp_path)
    write(tmp_path / "6", fold(6, 1)[0])
    assert "lacks" in error(capsys, "--six_fold", tmp_path)
    write(tmp_path / "6", fold(6, 0, train_steps=5)[0])
    assert "lacks" in error(capsys, "--six_fold", tmp_path)
    old = write(tmp_path / "6", fold(6, 0)[0])
    edit(old, lambda content: content["resolution"]["full"].pop("confusion"))
    again = write(tmp_path / "new" / "6", fold(6, 0)[0])
    assert len(rows(tmp_path, "--six_fold", tmp_path, again)) == 1  # has what the old one lacks
    line = error(capsys, "--six_fold", tmp_path)
    assert f"{old / 'results.json'}: resolution.full.confusion is missing" in line
    write(tmp_path / "6", fold(5, 0, data="s3dis", train_scenes=())[0])
    assert "are both of Area_5" in error(capsys, "--six_fold", tmp_path)
    same = {"test_scenes": ("hall_5", "office")}  # one override of the test scenes for all
    write(tmp_path / "6", fold(6, 0, **same)[0])
    assert "tested on scenes of the same names" in error(capsys, "--six_fold", tmp_path)
    turned = {"full": scores(np.ones((13, 13), np.int64), S3DIS.names[::-1])}
    write(tmp_path / "6", fold(6, 0, scores=turned)[0])
    assert "have other classes, or in another order" in error(capsys, "--six_fold", tmp_path)
    write(tmp_path / "6", result(800))
    assert "data is 'rooms', expected s3dis-1 to s3dis-6" in error(capsys, "--six_fold", tmp_path)


def many(tmp_path):
    for seed in range(3):
        floors = [result(right + 5 * seed, seed, name, protocol) for protocol, right in
                  (("linear", 200), ("ridge", 150))
                  for name, right in (("raw", right), ("random", right + 100))]  # fmt: skip
        for protocol, start in {"linear": 400, "ridge": 350}.items():
            for place, steps in enumerate((0, 100, 200, 400, 800)):
                right = start + 90 * place + 20 * seed
                main = result(right, seed, f"runs/a/checkpoints/{steps}", protocol)
                write(tmp_path / f"{protocol}-{steps}-{seed}", main, *floors)
    return tmp_path


def drawn(image, color, near=12):
    """(n, 2) rows and columns of the pixels of a colour."""
    return np.argwhere((np.abs(np.asarray(image, int) - color) < near).all(-1))


def test_the_curve_rises_with_the_numbers_and_lies_above_its_floors(tmp_path):
    blue, orange = (0, 114, 178), (213, 94, 0)
    file = tmp_path / "pictures" / "curve.png"
    assert run(many(tmp_path), f"--curve={file}") == 0
    image = Image.open(file)
    for color in (blue, orange):
        found = drawn(image, color)
        found = found[(found[:, 1] > 100) & (found[:, 1] < 700)]
        pixels = drawn(image, color, near=90)[:, 0]  # thin lines are blends with the page
        across = [row for row in range(image.height) if (pixels == row).sum() > 250]
        left, right = (found[(found[:, 1] >= a) & (found[:, 1] < b)] for a, b in
                       ((100, 200), (600, 700)))  # fmt: skip
        assert right[:, 0].min() < left[:, 0].min() - 50
        assert len(across) >= 2 and min(across) > left[:, 0].min()


def test_seeds_of_other_classes_are_other_rows(tmp_path):
    one = write(tmp_path / "one", result(800))
    other = {"full": some_scores(700, NAMES[::-1])}
    assert len(rows(tmp_path, one, write(tmp_path / "two", result(700, 1, scores=other)))) == 2


def test_a_curve_of_nothing_is_an_error(tmp_path, capsys):
    write(tmp_path / "raw", result(300, encoder="raw"))
    assert "no result has `steps`" in error(capsys, tmp_path, f"--curve={tmp_path / 'c.png'}")


@pytest.mark.parametrize("right", [0, 1000])
def test_a_curve_of_one_point_is_drawn(tmp_path, right):
    told: dict[str, Any] = {"scores": {"full": some_scores(right)}}
    write(tmp_path / "run", result(right, **told), result(right, encoder="raw", **told))
    assert run(tmp_path, f"--curve={tmp_path / 'c.png'}") == 0
    assert len(drawn(Image.open(tmp_path / "c.png"), (0, 114, 178))) > 30


@settings(max_examples=60)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_names_keep_their_order_and_do_not_overlap(places):
    places = sorted(places)
    found = apart(places, 8.0, 0.0, 100.0)
    assert (np.diff(found) >= 8 - 1e-9).all()
    assert found[0] >= -1e-9 and found[-1] <= 100 + 1e-9
    if (np.diff(places) >= 8).all():
        np.testing.assert_allclose(found, places)


def test_a_run_joined_with_image_features_is_told_as_the_run_is(tmp_path, capsys):
    joined = "runs/a/checkpoints/400+lifted:weights/b"
    points = result(400)
    both = dataclasses.replace(points, encoder=joined, unseen=0.1)
    image = dataclasses.replace(both, encoder="lifted:weights/b", checkpoint="weights/b")
    for folder, one in (("image", image), ("points", points), ("both", both)):
        write(tmp_path / folder, one)
    assert run(tmp_path) == 0
    table = capsys.readouterr().out
    for name in ("lifted:weights/b", "runs/a+lifted:weights/b", "runs/a"):
        assert table.count(f"| {name} |") == 2
    assert "checkpoint" not in table and "- steps: 400" in table
    edit(tmp_path / "both", lambda content: content.update(unseen=2))
    assert run(tmp_path) == 1
    assert "unseen is 2, expected a number from 0 to 1" in capsys.readouterr().err
