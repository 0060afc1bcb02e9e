"""What an evaluation writes down is what it found, for programs and for people."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from point_jax.evaluation.confusion import scores
from point_jax.evaluation.report import Condition, Report, Result, as_json, dumps, write_results

NAMES = ("wall", "floor | ground", "lamp")


def some_scores(right):
    """Of three classes, the third of which is nowhere; `right` of 1,000 walls are found."""
    return scores(np.array([[right, 1000 - right, 0], [0, 3000, 0], [0, 0, 0]]), NAMES)


MAIN = Result(
    encoder="sonata/tiny",
    protocol="linear",
    seed=7,
    scores={"voxel": some_scores(700), "full": some_scores(800), "voted": some_scores(900)},
    config="configs/segmentation.py:data=rooms,protocol=linear",
    data="rooms",
    train_scenes=("a", "b"),
    test_scenes=("c",),
    checkpoint="runs/tiny/4000",
    steps=4000,
    label_share=0.1,
    train_steps=300,
    shortcut={"explained": 0.123, "accuracy": 0.4, "chance": 0.2},
)
RAW = Result(
    encoder="raw",
    protocol="linear",
    seed=7,
    scores={"full": some_scores(500)},
    config=MAIN.config,
    data="rooms",
    train_scenes=("a", "b"),
    test_scenes=("c",),
)
REPORT = Report(
    MAIN,
    [RAW],
    [Condition("no colour", "sonata/tiny", "ridge", 7, some_scores(600))],
    {"jax": "0.0"},
)


def read(folder, report):
    write_results(folder, report)
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md"]
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


def tables(text):
    """Rows of every Markdown table: lists of cells, without the marks."""
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            cells = line.replace("\\|", "\0").strip("|").split("|")
            found[-1].append([cell.strip().replace("\0", "|") for cell in cells])
        inside = line.startswith("|")
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert set("".join(table.pop(1))) <= set(":-")
    return found


def test_the_json_opens_with_the_main_result_at_every_original_point(tmp_path):
    content, _ = read(tmp_path, REPORT)
    full = MAIN.scores["full"]
    assert (content["mIoU"], content["mAcc"]) == (full.mIoU, full.mAcc)
    assert content["allAcc"] == full.allAcc == (800 + 3000) / 4000
    assert content["per_class"] == {"wall": 0.8, "floor | ground": 3000 / 3200, "lamp": None}
    assert content["counts"] == {"wall": 1000, "floor | ground": 3000, "lamp": 0}
    names = ("protocol", "encoder", "seed", "config", "steps", "label_share", "train_steps")
    assert {name: content[name] for name in names} == {n: getattr(MAIN, n) for n in names}
    assert content["checkpoint"] == "runs/tiny/4000" and content["data"] == "rooms"
    assert (content["train_scenes"], content["test_scenes"]) == (["a", "b"], ["c"])
    assert content["shortcut"] == {"explained": 0.123, "accuracy": 0.4, "chance": 0.2}
    assert content["versions"] == {"jax": "0.0"}


def test_every_resolution_that_was_computed_is_there(tmp_path):
    content, _ = read(tmp_path, REPORT)
    assert list(content["resolution"]) == ["voxel", "full", "voted"]
    for name, found in content["resolution"].items():
        wanted = dataclasses.asdict(MAIN.scores[name])
        assert found == wanted | {"confusion": [list(row) for row in wanted["confusion"]]}
    (floor,) = content["floors"]
    assert list(floor["resolution"]) == ["full"]


def test_a_matrix_takes_a_line_for_each_class(tmp_path):
    read(tmp_path, REPORT)
    lines = (tmp_path / "results.json").read_text().splitlines()
    rows = [line.strip(" ,") for line in lines if line.strip().startswith("[")]
    assert rows.count("[800, 200, 0]") == 1 and rows.count("[0, 3000, 0]") == 4


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.sampled_from("[],1 \n\\\"-")),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)  # fmt: skip
def test_lists_on_one_line_are_the_same_json(content):
    assert json.loads(dumps(content)) == content


def test_what_was_not_said_is_all_labels_and_no_training():
    row = as_json(Report(RAW))
    assert (row["label_share"], row["train_steps"]) == (1.0, None)


def test_the_text_says_what_decided_the_result_beside_its_row(tmp_path):
    told = dataclasses.replace(MAIN, grid_size=0.05, seen=2, unseen=0.25)
    _, text = read(tmp_path, Report(told))
    assert "Voxels of 0.05 m, 10 % of the training labels, 300 steps of training." in text
    assert "pretrained on 2 of the test scenes" in text and "No image sees 25.0 %" in text
    _, text = read(tmp_path, Report(RAW))
    assert "\n100 % of the training labels.\n" in text and "pretrained" not in text


def test_floors_and_conditions_are_rows_of_their_own(tmp_path):
    content, _ = read(tmp_path, REPORT)
    (floor,), (condition,) = content["floors"], content["robustness"]
    assert set(floor) == set(content) - {"floors", "robustness", "versions"}
    assert (floor["encoder"], floor["mIoU"]) == ("raw", RAW.headline.mIoU)
    assert floor["checkpoint"] is floor["steps"] is floor["shortcut"] is None
    assert (condition["condition"], condition["mIoU"]) == ("no colour", some_scores(600).mIoU)
    assert {"protocol", "encoder", "seed", "mAcc", "allAcc", "per_class"} < set(condition)


def test_the_table_has_a_row_for_each_encoder_that_says_what_it_is_of(tmp_path):
    _, text = read(tmp_path, REPORT)
    head, *rows = tables(text)[0]
    main, raw = (dict(zip(head, row, strict=True)) for row in rows)
    assert main == {
        "encoder": "sonata/tiny",
        "protocol": "linear",
        "config": MAIN.config,
        "checkpoint": "runs/tiny/4000",
        "steps": "4,000",
        "seed": "7",
        "mIoU voxel": "80.5",
        "mIoU full": "86.9",
        "mIoU voted": "93.4",
        "mAcc full": "90.0",
        "allAcc full": "95.0",
        "explained by height and normals": "12.3",
    }
    assert raw["encoder"] == "raw" and raw["mIoU full"] == "67.9"
    missing = {name for name, cell in raw.items() if cell == "–"}
    assert missing == {"checkpoint", "steps", "mIoU voxel", "mIoU voted", head[-1]}


def test_classes_and_conditions_have_tables_too(tmp_path):
    _, text = read(tmp_path, REPORT)
    _, classes, conditions = tables(text)
    assert classes == [
        ["class", "labelled points", "sonata/tiny", "raw"],
        ["wall", "1,000", "80.0", "50.0"],
        ["floor | ground", "3,000", "93.8", "85.7"],
        ["lamp", "0", "–", "–"],
    ]
    assert conditions == [
        ["condition", "encoder", "protocol", "seed", "mIoU", "mAcc", "allAcc"],
        ["no colour", "sonata/tiny", "ridge", "7", "74.1", "80.0", "90.0"],
    ]


def test_what_was_not_computed_takes_no_room(tmp_path):
    content, text = read(tmp_path, Report(RAW))
    classes_only = tables(text)
    assert len(classes_only) == 2 and "Robustness" not in text
    assert classes_only[0][0][-3:] == ["mIoU full", "mAcc full", "allAcc full"]
    assert content["floors"] == content["robustness"] == []


def test_a_second_run_replaces_the_first_and_a_bad_number_replaces_nothing(tmp_path):
    first, _ = read(tmp_path, REPORT)
    second, text = read(tmp_path, Report(RAW))
    assert second != first
    broken = dataclasses.replace(MAIN, shortcut={"explained": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path, Report(broken))
    assert (tmp_path / "results.md").read_text() == text
    assert json.loads((tmp_path / "results.json").read_text()) == second


def test_the_json_is_what_as_json_says(tmp_path):
    content, _ = read(tmp_path, REPORT)
    assert content == as_json(REPORT)


@pytest.mark.parametrize("names", [("voxel",), ("full", "points")])
def test_scores_of_an_unknown_resolution_are_refused(names):
    with pytest.raises(ValueError, match="expected 'full'"):
        dataclasses.replace(RAW, scores={name: some_scores(1) for name in names})
