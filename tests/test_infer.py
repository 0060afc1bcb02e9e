"""launch.infer: files in, files of features out, by the contract that docs/features.md states."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData

import point_jax
from launch import command, infer
from launch.infer_inputs import names
from point_jax.data.normals import estimate_normals
from point_jax.data.readers import read_cloud
from point_jax.data.scenes import Scene, write_dataset_json, write_scene
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, load_weights, save_weights
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec, StageSpec
from point_jax.visual.files import write_ply

CHANNELS = (8, 16, 24)
SPEC = PTv3Spec(tuple(StageSpec(1, c, h, 64) for c, h in zip(CHANNELS, (1, 2, 3), strict=True)))
GRID = 0.1
UTM = np.array([500_000.0, 4_500_000.0, 0.0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    init, _ = functional(lambda rngs: PTv3(SPEC, rngs=rngs))
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0)))
    variant, config = config_of(SPEC)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_weights(folder, Weights("encoder", variant, config, {"backbone": params}))
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return point_jax.load(checkpoint, grid_size=GRID)


def cloud(seed: int, points: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates, colours and normals of a box's floor and one wall."""
    draw = np.random.default_rng(seed)
    coord = draw.uniform(0, 2, (points, 3)).astype(np.float32)
    coord[::2, 2] = 0
    coord[1::2, 0] = 0
    normal = np.where(np.arange(points)[:, None] % 2, [1.0, 0, 0], [0, 0, 1.0])
    return coord, draw.integers(0, 256, (points, 3), np.uint8), normal.astype(np.float32)


@pytest.fixture
def scans(tmp_path) -> Path:
    """A folder with a PLY, an NPZ of the same name, and a scene folder."""
    root = tmp_path / "scans"
    (root / "more").mkdir(parents=True)
    write_ply(root / "a.ply", *cloud(0))
    np.savez(root / "a.npz", **dict(zip(("coord", "color", "normal"), cloud(1), strict=True)))
    write_scene(root / "more" / "b", Scene("b", *cloud(2)))
    return root


loaded = functools.cache(infer.load)


def load_once(path, *, weights, **settings):
    """Runs with equal settings share their encoder, and so what it has compiled."""
    del weights  # those of the path
    return loaded(path, **settings)


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """Runs the command; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(infer, "load", load_once)

    def start(
        *flags: str, output: str = "out", grid: bool = True, checkpoint: object = checkpoint
    ) -> tuple[int, str, str]:
        argv = ["infer", f"--checkpoint={checkpoint}", f"--output={tmp_path / output}", *flags]
        argv += [f"--grid_size={GRID}"] if grid else []
        code = command.run(infer.main, argv, infer.__doc__)
        return code, *capsys.readouterr()

    return start


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


# --- The contract ---


def test_a_folder_becomes_an_npz_each_with_a_row_a_point(run, scans, tmp_path, encoder):
    code, out, _ = run(f"--input={scans}")
    assert code == 0 and "3 encoded" in out
    written = sorted(p.relative_to(tmp_path / "out").as_posix()
                     for p in (tmp_path / "out").rglob("*.npz"))  # fmt: skip
    assert written == ["a.npz.npz", "a.ply.npz", "more/b.npz"]
    for seed, name in ((0, "a.ply.npz"), (1, "a.npz.npz"), (2, "more/b.npz")):
        coord, color, normal = cloud(seed)
        got = arrays(tmp_path / "out" / name)
        assert got["coord"].dtype == got["features"].dtype == np.float32
        np.testing.assert_array_equal(got["coord"], coord)
        np.testing.assert_array_equal(got["color"], color)
        np.testing.assert_array_equal(got["normal"], normal)
        wanted = encoder([{"coord": coord, "color": color, "normal": normal}])[0]
        close(got["features"], wanted.at_points())
        assert set(got) == {"coord", "features", "color", "normal"}


def test_a_segmentation_tells_the_class_of_every_point(run, scans, tmp_path, checkpoint, encoder):
    draw = np.random.default_rng(0)
    weights = load_weights(checkpoint)
    coord, color, normal = cloud(0)
    features = encoder([{"coord": coord, "color": color, "normal": normal}])[0].at_points()
    kernel = draw.normal(size=(sum(CHANNELS), 3)).astype(np.float32)
    head = {"kernel": kernel, "bias": -(features @ kernel).mean(0)}
    source = {"classes": ["wall", "floor", "lamp"]}
    params = weights.params | {"seg_head": head}
    save_weights(
        tmp_path / "segmentor",
        Weights("segmentor", weights.variant, weights.config, params, source=source),
    )
    given = {"checkpoint": tmp_path / "segmentor"}
    code, _, _ = run(f"--input={scans / 'a.ply'}", "--format=npz,png,html", **given)
    assert code == 0
    got = arrays(tmp_path / "out" / "a.npz")
    logits = got["features"] @ head["kernel"] + head["bias"]
    np.testing.assert_array_equal(got["segment"], logits.argmax(1))
    assert got["segment"].dtype == np.int32 and len(np.unique(got["segment"])) > 1
    assert got["classes"].tolist() == source["classes"]
    assert "predicted classes" in (tmp_path / "out" / "a.html").read_text()
    assert point_jax.load_head(checkpoint) is None


def test_levels_and_up_cast(run, scans, tmp_path, encoder):
    code, _, _ = run(f"--input={scans / 'a.ply'}", "--levels", "--up_cast=1")
    assert code == 0
    got = arrays(tmp_path / "out" / "a.npz")
    coord, color, normal = cloud(0)
    wanted = encoder([{"coord": coord, "color": color, "normal": normal}])[0]
    close(got["features"], wanted.up_cast(1).at_points())
    for i in range(3):
        level = wanted.level(i)
        np.testing.assert_array_equal(got[f"level{i}_grid"], level.grid)
        np.testing.assert_allclose(got[f"level{i}_coord"], level.coord, atol=1e-6)
        close(got[f"level{i}_features"], level.features)
        assert f"level{i}_offset" not in got
    assert "offset" not in got
    # every voxel's coordinate is the mean of the points in it
    assert np.abs(got["level0_coord"].mean(0) - coord.mean(0)).max() < 0.1


def test_outputs_are_in_the_frame_of_the_input(run, tmp_path):
    coord, color, normal = cloud(0)
    there = (coord.astype(np.float64)[:, [0, 2, 1]] * [1, 1, -1] + UTM) * 1000  # y up, millimetres
    path = tmp_path / "a.npz"
    turned = normal[:, [0, 2, 1]] * np.float32([1, 1, -1])
    np.savez(path, coord=there, color=color, normal=turned)
    flags = ("--units=mm", "--up=y", "--levels", "--format=npz,ply")
    code, out, _ = run(f"--input={path}", *flags)
    assert code == 0 and "computed relative to 5000009" in out
    got = arrays(tmp_path / "out" / "a.npz")
    assert got["coord"].dtype == np.float64
    np.testing.assert_allclose(got["coord"], there, rtol=0, atol=1e-3)
    np.testing.assert_allclose(got["normal"], turned, atol=1e-6)
    low, high = there.min(0) - 1e-3, there.max(0) + 1e-3
    assert ((got["level1_coord"] >= low) & (got["level1_coord"] <= high)).all()
    vertex = PlyData.read(str(tmp_path / "out" / "a.ply"))["vertex"]
    np.testing.assert_allclose(np.stack([vertex[a] for a in "xyz"], 1), there, rtol=0, atol=1e-3)
    # the same cloud without an offset, upright and in metres has the same features but for voxels
    # that rounding fills otherwise
    np.savez(path, coord=coord, color=color, normal=normal)
    run(f"--input={path}", output="plain")
    other = arrays(tmp_path / "plain" / "a.npz")["features"]
    assert np.median(np.abs(got["features"] - other)) < 1e-3 * np.abs(other).max()


def prepared(encoder, seeds=(0, 1)) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(9)
    grids = [np.unique((cloud(seed)[0] / GRID).astype(np.int32), axis=0) for seed in seeds]
    grid = np.concatenate(grids)
    return {
        "grid_coord": grid,
        "feat": draw.normal(size=(len(grid), 9)).astype(np.float32),
        "offset": np.cumsum([len(g) for g in grids]),
        "depth": np.array([5, 4, 3]),
    }


def test_prepared_arrays_are_encoded_as_they_are(run, tmp_path, encoder):
    given = prepared(encoder)
    np.savez(tmp_path / "p.npz", **given, coord=given["grid_coord"] * np.float32(GRID))
    code, _, _ = run(f"--input={tmp_path / 'p.npz'}", "--levels", "--format=npz,png,ply,html")
    assert code == 0
    got = arrays(tmp_path / "out" / "p.npz")
    wanted = encoder.encode_prepared(
        given["grid_coord"], given["feat"], given["offset"], depth=given["depth"]
    )
    close(got["features"], np.concatenate([w.at_points() for w in wanted]))
    np.testing.assert_array_equal(got["offset"], given["offset"])
    np.testing.assert_array_equal(got["coord"], given["grid_coord"] * np.float32(GRID))
    for i in range(3):
        ends = np.cumsum([len(w.level(i).grid) for w in wanted])
        np.testing.assert_array_equal(got[f"level{i}_offset"], ends)
        grids = np.concatenate([w.level(i).grid for w in wanted])
        np.testing.assert_array_equal(got[f"level{i}_grid"], grids)
    with Image.open(tmp_path / "out" / "p.png") as picture:
        assert picture.height > picture.width / 2  # one row a cloud
    assert "cloud 1" in (tmp_path / "out" / "p.html").read_text()


def test_prepared_arrays_that_do_not_fit_name_their_file(run, tmp_path, encoder):
    given = prepared(encoder) | {"feat": np.zeros((3, 9))}
    np.savez(tmp_path / "p.npz", **given)
    code, _, error = run(f"--input={tmp_path / 'p.npz'}")
    assert code == 1 and "p.npz: feat is float64 of shape (3, 9)" in error


# --- What the network is given ---


def test_colours_and_normals_can_be_left_out_or_estimated(run, scans, tmp_path, encoder):
    path = scans / "a.ply"
    coord, color, normal = cloud(0)
    cases = {
        "bare": (("--wo_color", "--wo_normal"), {"coord": coord}),
        "own": (("--estimate_normals",), {"coord": coord, "color": color, "normal": normal}),
        "up": (
            ("--wo_normal", "--estimate_normals", "--neighbours=8"),
            {"coord": coord, "color": color, "normal": estimate_normals(coord, 8)},
        ),
        "place": (
            ("--wo_normal", "--estimate_normals", "--normals_towards=1,1,1"),
            {"coord": coord, "color": color,
             "normal": estimate_normals(coord, towards=np.ones(3))},
        ),
        "middle": (
            ("--wo_normal", "--estimate_normals", "--normals_towards=middle"),
            {"coord": coord, "color": color,
             "normal": estimate_normals(coord, towards=(coord.min(0) + coord.max(0)) / 2)},
        ),
    }  # fmt: skip
    for name, (flags, given) in cases.items():
        assert run(f"--input={path}", *flags, output=name)[0] == 0
        got = arrays(tmp_path / name / "a.npz")
        close(got["features"], encoder([given])[0].at_points())
        assert set(got) == set(given) | {"features"}


def test_dropped_points_are_told(run, tmp_path):
    coord, color, _ = cloud(0)
    coord[7] = np.nan
    np.savez(tmp_path / "a.npz", coord=coord, color=color)
    code, _, error = run(f"--input={tmp_path / 'a.npz'}")
    assert code == 1 and "a.npz: 1 of 500 points have NaN" in error and "--drop_invalid" in error
    code, out, _ = run(f"--input={tmp_path / 'a.npz'}", "--drop_invalid")
    got = arrays(tmp_path / "out" / "a.npz")
    assert code == 0 and "not finite: dropped" in out and len(got["features"]) == 499
    np.testing.assert_array_equal(got["coord"], coord[got["rows"]])


# --- Pictures ---


def test_every_format_is_written(run, scans, tmp_path):
    code, _, _ = run(f"--input={scans / 'a.ply'}", "--format=ply,png,html", "--up_cast=1")
    assert code == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["a.html", "a.ply", "a.png", "infer.json"]
    coord, color, _ = cloud(0)
    scan = read_cloud(out / "a.ply")
    np.testing.assert_array_equal(scan.coord, coord)
    assert (scan.color != color).any() and len(np.unique(scan.color, axis=0)) > 20
    with Image.open(out / "a.png") as picture:
        assert picture.width > 1000 and len(set(picture.get_flattened_data())) > 100
    page = (out / "a.html").read_text()
    assert "Features of a" in page and "<script" in page


# --- Once more, and what is bad ---


def test_results_that_are_there_stay_unless_overwritten(run, scans, tmp_path):
    flag = f"--input={scans}"
    assert run(flag)[0] == 0
    out = tmp_path / "out"
    (out / "more" / "b.npz").write_bytes(b"mine")
    (out / "a.ply.npz").unlink()
    code, said, _ = run(flag)
    assert code == 0 and "2 of 3 have their results already" in said and "1 encoded" in said
    assert (out / "more" / "b.npz").read_bytes() == b"mine" and (out / "a.ply.npz").exists()
    assert "3 of 3" in run(flag)[1]
    assert "3 encoded" in run(flag, "--overwrite")[1]
    assert "features" in arrays(out / "more" / "b.npz")
    # another format is made without a second NPZ
    before = (out / "a.ply.npz").stat().st_mtime_ns
    assert run(flag, "--format=npz,ply", "--pattern=a.ply")[0] == 0
    assert (out / "a.ply").exists() and (out / "a.ply.npz").stat().st_mtime_ns == before


def test_results_of_other_settings_are_not_mixed(run, scans, tmp_path):
    assert run(f"--input={scans / 'a.ply'}", "--up_cast=1")[0] == 0
    code, _, error = run(f"--input={scans / 'more'}", "--wo_color")
    assert code == 1 and "--up_cast=1" in error and "--wo_color=False" in error
    assert run(f"--input={scans / 'more'}", "--wo_color", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "infer.json").read_text())["settings"]["wo_color"] is True
    (tmp_path / "out" / "infer.json").write_text("[]")
    code, _, error = run(f"--input={scans}")
    assert code == 1 and "infer.json: not what this command writes" in error


def test_results_of_other_weights_are_not_mixed(run, scans, tmp_path):
    assert run(f"--input={scans / 'a.ply'}")[0] == 0
    record = tmp_path / "out" / "infer.json"
    content = json.loads(record.read_text())
    assert len(content["weights"]) == 64
    record.write_text(json.dumps(content | {"weights": "0" * 64}))  # as if it had trained on
    code, _, error = run(f"--input={scans / 'more'}")
    assert code == 1 and "results of other weights" in error
    assert run(f"--input={scans / 'more'}", "--overwrite")[0] == 0


def test_an_output_that_cannot_be_made_is_told_before_the_network_is_loaded(run, scans, tmp_path):
    (tmp_path / "file").touch()
    code, _, error = run(f"--input={scans}", output="file/out")
    assert code == 1 and error.startswith("error: --output=") and "cannot be made" in error


def test_a_checkpoint_that_is_not_there_is_named(run, scans):
    code, _, error = run(f"--input={scans}", checkpoint="nowhere")
    assert code == 1 and error.startswith("error: nowhere: no such folder; expected the --workdir")
    assert error.count("\n") == 1


def test_a_misspelt_flag_is_named_though_a_needed_one_is_missing(capsys):
    code = command.run(infer.main, ["infer", "--imput=a", "--checkpoint=b", "--output=c"], "")
    assert code == 1 and "--imput=a; did you mean --input?" in capsys.readouterr().err


def test_an_input_of_the_same_name_is_not_taken_for_done(run, scans):
    assert run(f"--input={scans / 'a.ply'}")[0] == 0
    code, _, error = run(f"--input={scans / 'a.npz'}")
    assert code == 1 and "a.npz: made from" in error and "a.ply" in error
    assert "1 encoded" in run(f"--input={scans / 'a.npz'}", "--overwrite")[1]
    assert "1 of 1" in run(f"--input={scans / 'a.npz'}")[1]


def test_a_bad_file_ends_the_run_or_is_counted(run, scans, tmp_path):
    (scans / "bad.ply").write_bytes((scans / "a.ply").read_bytes()[:-9])
    np.savez(scans / "far.npz", coord=np.array([[0, 0, 0], [3e5, 0, 0.0]]))
    code, _, error = run(f"--input={scans}", "--any_size")
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert "bad.ply: not a whole PLY file" in error and "--skip_bad" in error
    code, out, error = run(f"--input={scans}", "--any_size", "--skip_bad", output="skip")
    assert code == 0 and not error
    assert "3 encoded, 2 skipped" in out and "far.npz" in out and "bad.ply" in out
    assert len(list((tmp_path / "skip").rglob("*.npz"))) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--unit=mm",), "not a flag: --unit=mm; did you mean --units?"),
        (("--units=feet",), "argument --units: invalid choice: 'feet'"),
        (("--format=npz,pdf",), "--format has 'pdf'; expected some of npz,ply,png,html"),
        (("--up_cast=9",), "--up_cast is 9; the network has 3 levels: expected 0 to 2"),
        (("--up_cast=-1",), "--up_cast is -1"),
        (("--normals_towards=left",), "--normals_towards is 'left'; expected up, middle, or X,Y,Z"),
        (("--grid_size=0",), "--grid_size: 0 is not a number above 0"),
        (("--batch=none",), "--batch: invalid"),
        (("--inputs=coord,smell",), "--inputs is coord,smell"),
        (("--inputs=coord",), "reads 9 channels a point"),
        (("--pattern=*.las",), "no clouds that are called *.las"),
        (("--checkpoint=nowhere",), "--checkpoint is given twice"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(run, scans, flags, says):
    code, _, error = run(f"--input={scans}", *flags, grid=False)
    assert code == 1 and says in error and error.count("\n") == 1


def test_results_never_replace_or_become_inputs(run, scans, tmp_path):
    code, _, error = run(f"--input={scans}", output="scans/out")
    assert code == 1 and "the next run would take the results for clouds" in error
    before = (scans / "a.npz").read_bytes()
    code, _, error = run(f"--input={scans / 'a.npz'}", "--overwrite", output="scans")
    assert code == 1 and "a.npz is an input" in error and (scans / "a.npz").read_bytes() == before


def test_names_tell_inputs_apart():
    paths = ["a.ply", "a.las", "A.npz", "b.ply", "c/a.ply", "b.PLY.npz", "scene.v2", "d.ply.npz"]
    given = names([Path(path) for path in paths])
    assert given == ["a.ply", "a.las", "A.npz", "b", "c/a", "b.PLY", "scene.v2", "d.ply"]
    clash = names([Path(path) for path in ("a.ply", "a.las", "a.ply.npz")])
    assert clash == ["a.ply", "a.las", "a.ply.npz"]


def test_units_of_a_data_set_are_taken_from_it(run, tmp_path):
    coord, color, normal = cloud(0)
    write_scene(tmp_path / "set" / "train" / "s", Scene("s", coord, color, normal), compact=True)
    write_dataset_json(tmp_path / "set", "mm", "z", ["train"])
    assert run(f"--input={tmp_path / 'set'}")[0] == 0
    got = arrays(tmp_path / "out" / "train" / "s.npz")
    np.testing.assert_allclose(got["coord"], coord * 1000, atol=0.6)
