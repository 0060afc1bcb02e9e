"""Scene folders: what is read is what was written, and whatever is wrong says so."""

import contextlib
import dataclasses
import io
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ml_collections import ConfigDict

from point_jax.data.frames import Frames, read_frames, write_frames
from point_jax.data.pipeline import build_sources, default_data
from point_jax.data.scenes import (
    UNITS,
    UP,
    Dataset,
    Scene,
    SceneError,
    load_scene,
    read_dataset_json,
    validate,
    write_dataset_json,
    write_scene,
)


def example(count: int = 200) -> Scene:
    draw = np.random.default_rng(count)
    normal = draw.normal(size=(count, 3))
    normal[:3] = 0  # unknown
    normal[3:] /= np.linalg.norm(normal[3:], axis=1, keepdims=True)
    return Scene(
        "room",
        draw.uniform(-2, 3, (count, 3)).astype(np.float32),
        draw.integers(0, 256, (count, 3)).astype(np.uint8),
        normal.astype(np.float32),
        draw.integers(-1, 5, count).astype(np.int32),
        draw.integers(-1, 9, count).astype(np.int32),
    )


def write_arrays(folder: Path, **arrays: np.ndarray) -> Path:
    """Writes a scene folder as some other program would, without any check."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def assert_same(a: Scene, b: Scene) -> None:
    for name in ("coord", "color", "normal", "segment", "instance"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)


# What is read


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    write_scene(tmp_path / "train" / "room", example())
    write_dataset_json(tmp_path, "m", "z", ["train"], list("abcde"))
    dataset = Dataset(tmp_path)
    assert len(dataset) == 1 and dataset.classes == tuple("abcde")
    assert_same(dataset.load(0), example())


def test_compact_scenes_keep_half_a_millimetre_and_half_a_degree(tmp_path):
    scene = example()
    write_scene(tmp_path, scene, compact=True)
    read = load_scene(tmp_path, "mm", "z")
    assert np.abs(read.coord - scene.coord).max() < 5.1e-4
    known = scene.normal.any(axis=1)
    assert np.sum(read.normal * scene.normal, axis=1)[known].min() > np.cos(np.radians(0.5))
    np.testing.assert_allclose(np.linalg.norm(read.normal[known], axis=1), 1, atol=1e-6)
    assert not read.normal[~known].any()


def test_only_coordinates_are_needed(tmp_path):
    write_arrays(tmp_path, coord=example().coord)
    assert_same(load_scene(tmp_path, "m", "z"), Scene("", example().coord))


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_coordinates_become_metres(tmp_path, units, dtype):
    centimetres = np.random.default_rng(0).integers(-300, 300, (50, 3))
    if units == "m":
        centimetres = centimetres // 100 * 100
    stored = np.rint(centimetres / 100 / UNITS[units])
    write_arrays(tmp_path, coord=stored.astype(dtype))
    np.testing.assert_allclose(load_scene(tmp_path, units, "z").coord, centimetres / 100, rtol=1e-6)


@pytest.mark.parametrize("up", UP)
def test_up_becomes_z_for_points_and_normals_without_mirroring(tmp_path, up):
    scene = example()
    write_arrays(tmp_path, coord=scene.coord, normal=scene.normal)
    read = load_scene(tmp_path, "m", up)
    axis, sign = "xyz".index(up[-1]), -1 if up[0] == "-" else 1
    np.testing.assert_array_equal(read.coord[:, 2], sign * scene.coord[:, axis])
    np.testing.assert_array_equal(read.normal[:, 2], sign * scene.normal[:, axis])
    # A rotation keeps triple products; a mirror flips their sign.
    triple = np.linalg.det(scene.coord[:30].reshape(10, 3, 3).astype(float))
    turned = np.linalg.det(read.coord[:30].reshape(10, 3, 3).astype(float))
    np.testing.assert_allclose(turned, triple, rtol=1e-6)
    mixed = np.sum(scene.coord * scene.normal, axis=1)
    np.testing.assert_allclose(np.sum(read.coord * read.normal, axis=1), mixed, atol=1e-5)


def test_pointcept_folders_need_units_and_up_from_the_config(tmp_path):
    scene = example()
    for name in ("scene0002_00", "scene0001_00"):
        write_arrays(
            tmp_path / "val" / name,
            coord=scene.coord,
            color=scene.color.astype(np.float32),
            normal=scene.normal.astype(np.float64),
            segment20=scene.segment.astype(np.int64)[:, None],
            segment200=np.full(len(scene.coord), 199, np.int16),
            instance=scene.instance.astype(np.int16),
        )
    with pytest.raises(SceneError, match=f"{re.escape(str(tmp_path))}.*units unknown.*'m'.*'mm'"):
        Dataset(tmp_path, "val", up="z")
    with pytest.raises(SceneError, match="up unknown.*'z'"):
        Dataset(tmp_path, "val", units="m")
    dataset = Dataset(tmp_path, "val", units="m", up="z", segment="segment20")
    assert [folder.name for folder in dataset.folders] == ["scene0001_00", "scene0002_00"]
    assert_same(dataset.load(1), scene)
    labels = Dataset(tmp_path, "val", units="m", up="z", segment="segment200").load(0).segment
    assert (labels == 199).all()
    assert Dataset(tmp_path, "val", units="m", up="z").load(0).segment is None


def test_scenes_of_several_splits_follow_one_another(tmp_path):
    for place in ("train/b", "train/a", "val/c", "val/.hidden"):
        write_scene(tmp_path / place, example())
    (tmp_path / "train" / "notes.txt").write_text("not a scene")
    dataset = Dataset(tmp_path, ("val", "train"), units="m", up="z")
    assert [folder.name for folder in dataset.folders] == ["c", "a", "b"]


# What is refused

N = 200
BAD_SCENES = {
    "missing coord": ({"coord": None}, "coord.npy: missing"),
    "missing segment20": ({"segment": "segment20"}, "segment20.npy: missing"),
    "coord of shape (n, 4)": ({"coord": np.zeros((N, 4))}, r"coord.npy: shape \(200, 4\)"),
    "float16 coord": ({"coord": example().coord.astype(np.float16)}, "coord.npy: dtype float16"),
    "text": ({"coord": np.full((N, 3), "1.0")}, "coord.npy: holds <U3"),
    "complex": ({"coord": np.ones((N, 3), complex)}, "coord.npy: holds complex128"),
    "color one row short": ({"color": np.zeros((N - 1, 3), np.uint8)}, "color.npy: 199 rows.*200"),
    "scalar color": ({"color": np.uint8(3)}, "color.npy: no rows"),
    "one NaN": ({"coord": np.where(np.arange(N) == 7, np.nan, 1.0)[:, None] * np.ones(3)},
                "coord.npy: 1 of 200 rows are NaN or infinite, the first is row 7"),
    "infinite": ({"coord": np.where(np.arange(N) == 7, -np.inf, 1.0)[:, None] * np.ones(3)},
                 "coord.npy: 1 of 200 rows"),
    "empty": ({"coord": np.zeros((0, 3), np.float32)}, "coord.npy: 0 points"),
    "single point": ({"coord": np.ones((1, 3), np.float32)}, "coord.npy: 1 points"),
    "all the same point": ({"coord": np.ones((N, 3))}, "coord.npy: all 200 points are the same"),
    "one voxel": ({"coord": np.random.default_rng(0).uniform(0, 0.019, (N, 3))},
                  "coord.npy: extent is 0.01.* within one voxel of 0.02 m"),
    "offset": ({"coord": example().coord + np.float64(4e6)},
               "cannot be held in float32 to a millimetre; subtract an offset"),
    "millimetres": ({"coord": example().coord * 1000}, "extent is 4.* m.*millimetres.*units='mm'"),
    "centimetres": ({"coord": example().coord * 100},
                    "coord.npy: extent is .* m apart.*centimetres.*units='cm'"),
    "one far outlier": ({"coord": np.concatenate([example().coord[1:], [[4000, 0, 0]]])},
                        "coord.npy: extent is 4.*98 % of the points lie within.*outliers"),
    "an outlier in another town": (
        {"coord": np.concatenate([example().coord[1:], [[1e4, 0, 0]]]).astype(np.float64)},
        "coord.npy: coordinates up to 1.*98 % of the points lie within.*outliers"),
    "an outlier in the next street": (
        {"coord": np.concatenate([example().coord[1:], [[400, 0, 0]]])},
        "coord.npy: extent is 4.*98 % of the points lie within.*outliers"),
    "survey coordinates": ({"coord": example().coord + np.array([4e5, 0, 0])},
                           "coord.npy: coordinates up to 4.*subtract an offset"),
    "huge": ({"coord": example().coord * 1e30}, "coord.npy: coordinates up to"),
    "color of 0..1 floats": ({"color": np.random.default_rng(0).random((N, 3))},
                             "color.npy: no value is above 1.* 255"),
    "color of 0..1 bytes": ({"color": np.eye(3, dtype=np.uint8)[np.arange(N) % 3]},
                            "color.npy: no value is above 1"),
    "color of 300": ({"color": np.full((N, 3), 300)}, "color.npy: values from 300 to 300"),
    "negative color": ({"color": np.full((N, 3), -1)}, "color.npy: values from -1"),
    "fractional color": ({"color": np.full((N, 3), 12.5)}, "color.npy: .* not whole numbers"),
    "NaN color": ({"color": np.full((N, 3), np.nan)}, "color.npy: 200 of 200 rows are NaN"),
    "RGBA": ({"color": np.zeros((N, 4), np.uint8)}, r"color.npy: shape \(200, 4\)"),
    "long normals": ({"normal": example().normal * 1.1},
                     "normal.npy: 197 of 200 normals are not of unit length.*row 3 of length 1.1"),
    "tiny normals": ({"normal": np.full((N, 3), 1e-30)}, "normal.npy: 200 of 200 normals"),
    "huge normals": ({"normal": np.full((N, 3), 1e300)}, "normal.npy: 200 of 200 normals"),
    "NaN normals": ({"normal": np.full((N, 3), np.nan)}, "normal.npy: 200 of 200 rows are NaN"),
    "integer normals": ({"normal": np.ones((N, 3), int)}, "normal.npy: dtype int64"),
    "float labels": ({"segment": np.zeros(N)}, "segment.npy: float64 of shape"),
    "one-hot labels": ({"segment": np.zeros((N, 5), int)}, r"segment.npy: int64 of shape \(200, 5"),
    "label -2": ({"segment": np.full(N, -2)}, "segment.npy: ids from -2 to -2"),
    "label 255 of 5 classes": ({"segment": np.full(N, 255)}, "segment.npy.*lists 5 classes"),
    "instance beyond int32": ({"instance": np.full(N, 2**40)}, "instance.npy: ids from 10995"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SCENES)
@pytest.mark.filterwarnings("error")
def test_a_bad_scene_is_refused_by_name(tmp_path, case):
    changes, message = BAD_SCENES[case]
    scene = example(N)
    arrays = {"coord": scene.coord, "color": scene.color, "normal": scene.normal}
    arrays |= {"segment": scene.segment, "instance": scene.instance}
    segment = changes.get("segment") if isinstance(changes.get("segment"), str) else None
    arrays |= {k: v for k, v in changes.items() if not isinstance(v, str)}
    write_arrays(tmp_path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(SceneError, match=message) as caught:
        load_scene(tmp_path, "m", "z", segment, list("abcde"))
    assert str(tmp_path) in str(caught.value)


def test_metres_called_millimetres_are_noticed(tmp_path):
    write_arrays(tmp_path, coord=example().coord)
    with pytest.raises(SceneError, match="extent is 0.00.*units='mm'.*metres.*units='m'"):
        load_scene(tmp_path, "mm", "z")


@pytest.mark.parametrize(
    ("true", "said", "points"), [("cm", "m", 750_000), ("mm", "m", 750_000), ("mm", "cm", 60_000)]
)
def test_a_dense_room_in_a_smaller_unit_is_noticed(tmp_path, true, said, points):
    """Points on the walls of 4 x 3 x 2.5 m. A hall ten times that size may be real, if dense."""
    rng = np.random.default_rng(0)
    coord = rng.uniform(0, [4, 3, 2.5], (points, 3)).astype(np.float32)
    side = rng.integers(0, 3, len(coord))
    coord[np.arange(len(coord)), side] = 0
    write_arrays(tmp_path, coord=coord * {"cm": 100, "mm": 1000}[true])
    assert len(load_scene(tmp_path, true, "z").coord) == len(coord)
    with pytest.raises(SceneError, match="coord.npy: extent is"):
        load_scene(tmp_path, said, "z")


def test_large_scenes_pass_when_they_are_dense(tmp_path):
    street = np.random.default_rng(0).uniform(0, 1, (20_000, 3)) * [150, 20, 0.1]
    write_arrays(tmp_path, coord=street)
    assert len(load_scene(tmp_path, "m", "z").coord) == 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object"),
        ('{"format": "other"}', "expected an object"),
        ({"version": 2}, "version 2; this reads 1"),
        ({"units": None}, '"units" is missing; add one of "m", "cm", "mm"'),
        ({"up": None}, '"up" is missing'),
        ({"units": "inch"}, "units is 'inch'"),
        ({"up": "w"}, "up is 'w'"),
        ({"units": ["m"]}, r"units is \['m'\]"),
        ({"classes": "abc"}, '"classes" must be a list'),
    ],
)
def test_bad_metadata_is_refused_by_name(tmp_path, content, message):
    write_scene(tmp_path / "train" / "room", example())
    write_dataset_json(tmp_path, "m", "z", ["train"])
    file = tmp_path / "dataset.json"
    if isinstance(content, dict):
        stated = json.loads(file.read_text()) | content
        content = json.dumps({k: v for k, v in stated.items() if v is not None or k == "classes"})
    file.write_text(content)
    with pytest.raises(SceneError, match=message) as caught:
        Dataset(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_contradiction_between_config_and_dataset_json_is_refused(tmp_path):
    write_scene(tmp_path / "train" / "room", example())
    write_dataset_json(tmp_path, "mm", "z", ["train"])
    assert Dataset(tmp_path, units="mm", up="z").units == "mm"
    with pytest.raises(SceneError, match="config says units='m', dataset.json says 'mm'"):
        Dataset(tmp_path, units="m")


def test_missing_folders_are_refused_by_name(tmp_path):
    with pytest.raises(SceneError, match="nowhere: no such folder"):
        Dataset(tmp_path / "nowhere")
    (tmp_path / "val").mkdir()
    with pytest.raises(SceneError, match="no split folder 'train'; here are val"):
        Dataset(tmp_path, units="m", up="z")
    with pytest.raises(SceneError, match="val: no scene folders"):
        Dataset(tmp_path, "val", units="m", up="z")
    (tmp_path / "val" / "room").symlink_to(tmp_path / "gone")
    with pytest.raises(SceneError, match="val/room: a link to .*gone, which is not there"):
        Dataset(tmp_path, "val", units="m", up="z")


def test_what_is_not_a_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "coord.npy")
    with pytest.raises(SceneError, match="coord.npy: not a regular file"):
        load_scene(tmp_path, "m", "z")


def test_scenes_in_memory_obey_the_same_rules(tmp_path):
    scene = example()
    assert validate(scene) is scene
    bad = Scene("room", scene.coord.astype(np.float64))
    with pytest.raises(SceneError, match="room/coord: expected a numpy array of float32"):
        validate(bad)
    with pytest.raises(SceneError, match="room/color: shape"):
        write_scene(tmp_path / "x", Scene("room", scene.coord, scene.color[1:]))
    with pytest.raises(SceneError, match="room/normal: .* unit length"):
        validate(Scene("room", scene.coord, None, scene.normal * 2))
    assert not (tmp_path / "x").exists()


# Whatever bytes a file holds: a scene, or a SceneError

NAMES = st.sampled_from(["coord", "color", "normal", "segment", "instance"])


def read_with(name: str, content: bytes) -> None:
    """Reads a good scene of which one file holds `content`."""
    with tempfile.TemporaryDirectory() as folder:
        write_scene(folder, example(20))
        (Path(folder) / f"{name}.npy").write_bytes(content)
        with contextlib.suppress(SceneError):
            validate(load_scene(folder, "m", "z"))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # about names that need a newer format
        np.save(file, array, allow_pickle=True)
    return file.getvalue()


@settings(deadline=None, max_examples=60)
@given(NAMES, st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(name, content):
    read_with(name, content)
    read_with(name, b"\x93NUMPY\x01\x00" + content)
    read_with(name, b"PK\x03\x04" + content)


@settings(deadline=None, max_examples=60)
@given(NAMES, st.floats(0, 1))
def test_truncated_files_raise_a_scene_error(name, share):
    content = npy(getattr(example(20), name))
    with tempfile.TemporaryDirectory() as folder:
        write_scene(folder, example(20))
        file = Path(folder) / f"{name}.npy"
        file.write_bytes(content[: int(share * (len(content) - 1))])
        with pytest.raises(SceneError, match=f"{name}.npy: not a whole npy file"):
            load_scene(folder, "m", "z")


@settings(deadline=None, max_examples=100)
@given(NAMES, st.data())
def test_damaged_bytes_never_raise_anything_else(name, data):
    content = bytearray(npy(getattr(example(20), name)))
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the header, where the parser is.
        content[data.draw(st.integers(0, 140))] = data.draw(st.integers(0, 255))
    read_with(name, bytes(content))


DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.unicode_string_dtypes(max_len=3),
    hnp.array_dtypes(),
    st.just(np.dtype(np.longdouble)),
)


@settings(deadline=None, max_examples=150)
@given(NAMES, st.data())
def test_any_dtype_and_shape_never_raise_anything_else(name, data):
    count = st.sampled_from([0, 1, 20])
    shape = data.draw(st.sampled_from([(), (20,), (20, 3), (3, 20)]) | st.tuples(count, count))
    array = data.draw(hnp.arrays(data.draw(DTYPES), shape))
    read_with(name, npy(array))


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    write_scene(tmp_path, example())
    np.save(tmp_path / "coord.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(SceneError, match="coord.npy: not a whole npy file"):
        load_scene(tmp_path, "m", "z")


@settings(deadline=None, max_examples=60)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x)),
       st.sampled_from(["version", "units", "up", "splits", "classes", "format"]))  # fmt: skip
def test_any_metadata_gives_a_data_set_or_a_scene_error(value, key):
    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder) / "train" / "room", example(20))
        write_dataset_json(folder, "m", "z", ["train"])
        file = Path(folder) / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with contextlib.suppress(SceneError):
            Dataset(folder).load(0)
            read_dataset_json(folder)


# Images of a scene


def frames(points: int, images: int = 2) -> Frames:
    draw = np.random.default_rng(0)
    return Frames(
        np.array([f"images/{i}.jpg" for i in range(images)]),
        np.full((images, 2), (640, 480)),
        draw.normal(size=(images, 3, 4)),
        draw.random((images, points)) < 0.4,
    )


def test_frames_are_read_as_written_and_find_their_pixels(tmp_path):
    scene, written = example(203), frames(203)
    write_frames(tmp_path, written)
    read = read_frames(tmp_path, 203)
    for name in ("files", "size", "camera", "seen"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    index, pixel = read.pixels(1, scene.coord)
    np.testing.assert_array_equal(index, np.flatnonzero(written.seen[1]))
    homogeneous = np.concatenate([scene.coord[index], np.ones((len(index), 1))], 1)
    column, row, depth = written.camera[1] @ homogeneous.T
    np.testing.assert_allclose(pixel, np.stack([column / depth, row / depth], 1), rtol=1e-4)


def test_frames_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(SceneError, match="frames.npz: missing"):
        read_frames(tmp_path, 20)
    write_frames(tmp_path, frames(20))
    with pytest.raises(SceneError, match=r"frames.npz: seen has shape \(2, 3\).*13.*100 points"):
        read_frames(tmp_path, 100)
    for wrong in ({"camera": np.full((2, 3, 4), np.nan)}, {"size": np.zeros((2, 2), int)}):
        write_frames(tmp_path, dataclasses.replace(frames(20), **wrong))
        with pytest.raises(SceneError, match="camera has NaN or infinite values, or size is below"):
            read_frames(tmp_path, 20)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 0.999), st.binary(max_size=8))
def test_damaged_frames_raise_a_scene_error_or_nothing(share, patch):
    with tempfile.TemporaryDirectory() as folder:
        write_frames(folder, frames(20))
        file = Path(folder) / "frames.npz"
        content = file.read_bytes()
        place = int(share * len(content))
        file.write_bytes(content[:place] + patch + content[place + len(patch) :])
        with contextlib.suppress(SceneError):
            read_frames(folder, 20)
        file.write_bytes(content[:place])
        with pytest.raises(SceneError):
            read_frames(folder, 20)


# The page about data


def blocks(language: str) -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_what_the_page_about_data_shows_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, train, frames_of, images, pointcept = blocks("python")
    exec(write, {})
    (shown,) = blocks("json")
    assert json.loads(Path("scans/dataset.json").read_text()) == json.loads(shown)
    assert len(Dataset("scans").load(0).coord) == 20_000
    write_frames("scans/train/office_01", frames(20_000))
    exec(frames_of, {})
    config = ConfigDict({"data": default_data()})
    exec(train, {"config": config})
    config.data.sources = config.data.sources[::2]  # there is no scannet here
    assert [source.size for source in build_sources(config.data.sources)] == [1, 1000]
    exec(images, {"config": config})
    images = {"count": 4, "height": 224, "width": 224, "features": ""}
    assert config.data.images.to_dict() == images
    Path("scannet/splits").mkdir(parents=True)
    entry = {"pointclouds": "data/scannet/train/scene0000_00", "images": [], "correspondences": []}
    for split in ("train", "val"):
        Path(f"scannet/splits/{split}.json").write_text(json.dumps({"scene0000_00_0": entry}))
    exec(pointcept, {"config": config})
    assert [source.size for source in build_sources(config.data.sources)] == [2]


def test_the_error_that_the_page_shows_is_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corner = np.array([[0, 0, 0], [3000, 0, 0]])
    write_arrays(Path("scans/train/office_01"), coord=corner)
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    with pytest.raises(SceneError) as caught:
        load_scene("scans/train/office_01", "m", "z")
    assert f"error: {caught.value}\n" in page
