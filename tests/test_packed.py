"""Packed scenes are the scenes of the folders, bit for bit, and say so when they are not."""

import dataclasses
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_pipeline import assert_equal, config, take, tiny_scene

from data_prep import check, pack
from point_jax.data import pipeline
from point_jax.data.checks import SceneError
from point_jax.data.frames import Frames, write_frames
from point_jax.data.images import FrameImages, Size
from point_jax.data.packed import (
    FORMAT,
    INDEX,
    VERSION,
    PackedDataset,
    Shard,
    decode_arrays,
    encode_arrays,
)
from point_jax.data.pipeline import make_batches
from point_jax.data.scenes import Dataset, write_dataset_json, write_scene
from point_jax.data.sources import build_sources

SPLITS = ("a", "b")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Splits a (5 scenes, some compact) and b (3 scenes, two of them with images)."""
    folder = tmp_path_factory.mktemp("folders")
    draw = np.random.default_rng(0)
    for index in range(8):
        scene = tiny_scene(index)
        place = folder / ("a" if index < 5 else "b") / scene.name
        write_scene(place, scene, compact=True)
        np.save(place / "segment20.npy", scene.segment.astype(np.int64)[:, None] % 3)
        if index < 6:
            continue
        files = ("images/shared.png", f"images/{scene.name}.png")
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            image = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8))
            image.save(folder / file)
        camera = np.tile(np.float64([[2, 0, 5, 0], [0, 2, 4, 0], [0, 0, 0, 1]]), (2, 1, 1))
        sizes, seen = np.array([[16, 12]] * 2), draw.random((2, len(scene.coord))) < 0.5
        write_frames(place, Frames(np.array(files), sizes, camera, seen))
    write_dataset_json(folder, "mm", "z", SPLITS)
    return folder


def run(monkeypatch, capsys, module, *flags: str) -> tuple[int, str]:
    """A command's exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    try:
        module.main()
    except SystemExit as left:
        code = left.code
    else:
        code = 0
    printed = capsys.readouterr()
    return int(code or 0), printed.out + printed.err


@pytest.fixture
def packed(root, tmp_path, monkeypatch, capsys) -> Path:
    """The same scenes in shards of two."""
    flags = [f"--input={root}", f"--output={tmp_path / 'packed'}", "--splits", *SPLITS]
    code, text = run(monkeypatch, capsys, pack, *flags, "--shard_size=2")
    assert code == 0 and "8 scenes packed" in text, text
    return tmp_path / "packed"


def same_scene(got, wanted) -> None:
    assert got.name == wanted.name
    for name in ("coord", "color", "normal", "segment", "instance"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("segment", [None, "segment20"])
def test_every_scene_is_that_of_its_folder(root, packed, segment):
    folders = Dataset(root, SPLITS, segment=segment)
    scenes = PackedDataset(packed, SPLITS, segment)
    assert scenes.names == [folder.name for folder in folders.folders]
    for index in np.random.default_rng(0).permutation(len(folders)):  # in any order
        same_scene(scenes.load(index), folders.load(index))
    assert PackedDataset(packed, "b").names == scenes.names[5:]
    assert len(list(packed.glob("*.arrayrecord"))) == 3 + 2 + 2


def test_every_image_is_that_of_its_file(root, packed):
    folders, scenes = Dataset(root, SPLITS), PackedDataset(packed, SPLITS)
    size, shown = Size(6, 8), 0
    for index in range(len(folders)):
        scene = folders.load(index)
        wanted, got = folders.images(index, scene), scenes.images(index, scene)
        assert (wanted is None) == (got is None) == (index < 6)
        for image in range(len(wanted or ())):
            mine, theirs = got.sight(image, size), wanted.sight(image, size)
            np.testing.assert_array_equal(mine.pixels, theirs.pixels)
            np.testing.assert_array_equal(mine.read(), theirs.read())
            assert got.file(image).relative_to(packed) == wanted.file(image).relative_to(root)
            shown += 1
    assert shown == 4


def test_batches_are_those_of_the_folders_on_one_host_and_on_two(root, packed):
    data = config(root)
    folder = dict(kind="folder", root=str(root))
    shards = dict(kind="packed", root=str(packed))
    data.images.update(count=2, height=6, width=8)

    def batches(kind: dict, **place) -> list[dict[str, np.ndarray]]:
        splits = (dict(splits=("a",), weight=2.0), dict(splits=("b",), weight=1.0))
        data.sources = tuple(kind | split for split in splits)
        return take(make_batches(data, 3, 4, start_batch=1, **place), 4)

    wanted = batches(folder)
    for got, want in zip(batches(shards), wanted, strict=True):
        assert_equal(got, want)
    halves = [batches(shards, process_index=i, process_count=2) for i in range(2)]
    for first, second, want in zip(*halves, wanted, strict=True):
        assert_equal({n: np.concatenate([first[n], second[n]]) for n in first}, want)


def test_records_keep_every_dtype_and_layout():
    arrays = {
        dtype: np.arange(12).reshape(4, 3).astype(dtype)
        for dtype in ("int8", "uint8", "int16", "int64", "float16", "float64", "bool")
    }
    arrays["swapped"] = np.arange(3).astype(">f4")
    arrays["columns"] = np.asfortranarray(arrays["int16"])
    for name, array in decode_arrays(encode_arrays("a", arrays))[1].items():
        assert array.dtype == arrays[name].dtype.newbyteorder("=") and array.flags.writeable
        np.testing.assert_array_equal(array, arrays[name])


def test_two_packings_into_one_folder_are_told(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "one"
    output.mkdir()
    hold = (
        "import sys, pathlib; from point_jax.lock import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(output / pack.LOCK)]
    flags = [f"--input={root}", f"--output={output}", "--splits", *SPLITS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        code, text = run(monkeypatch, capsys, pack, *flags)
        assert code == 1 and f"another packing (process {other.pid}) is writing to" in text
        other.kill()  # which frees the folder
    code, _ = run(monkeypatch, capsys, pack, *flags)
    assert code == 0 and not (output / pack.LOCK).exists()


def test_a_packing_that_was_stopped_is_not_there_and_goes_on(
    root, packed, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "again"
    flags = [f"--input={root}", f"--output={output}", "--splits", *SPLITS]
    write, written = pack.Writer.close, []

    def killed(self) -> int:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(self)
        return write(self)

    with monkeypatch.context() as patched:
        patched.setattr(pack.Writer, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, capsys, pack, *flags, "--shard_size=2")
    assert list(output.glob(".*.tmp-*"))
    entry = output / "a-00000.json"
    whole = entry.read_text()
    for damage in ("{", json.dumps(json.loads(whole) | {"bytes": 3})):
        entry.write_text(damage)
        code, text = run(monkeypatch, capsys, pack, *flags, "--shard_size=2")
        assert code == 1 and "pack anew" in text and "Traceback" not in text
    entry.write_text(whole)
    image = root / "images" / "shared.png"
    changed = image.stat()
    os.utime(image, ns=(changed.st_atime_ns, changed.st_mtime_ns + 1))
    code, text = run(monkeypatch, capsys, pack, *flags, "--shard_size=2")
    assert code == 1 and "its scenes have changed" in text
    os.utime(image, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    with pytest.raises(SceneError, match="packed.json: missing.* the same command goes on"):
        PackedDataset(output, SPLITS)
    code, text = run(monkeypatch, capsys, pack, *flags, "--shard_size=3")
    assert code == 1 and "another packing" in text
    before = (output / "a-00000.arrayrecord").stat().st_mtime_ns
    code, text = run(monkeypatch, capsys, pack, *flags, "--shard_size=2")
    assert code == 0 and "3 shards were there already" in text
    assert (output / "a-00000.arrayrecord").stat().st_mtime_ns == before
    names = sorted(file.name for file in packed.iterdir())
    assert sorted(file.name for file in output.iterdir()) == names
    for name in names:
        assert (output / name).read_bytes() == (packed / name).read_bytes()
    code, text = run(monkeypatch, capsys, pack, *flags)
    assert code == 1 and "packed already" in text


def test_a_damaged_record_is_told_and_the_others_are_read(root, packed):
    file = packed / "a-00000.arrayrecord"
    content = bytearray(file.read_bytes())
    entry = json.loads((packed / INDEX).read_text())["splits"]["a"][0]
    content[content.index(b"coord") + 200] ^= 1  # in the first record: names stay readable
    file.write_bytes(content)
    scenes = PackedDataset(packed, SPLITS)
    with pytest.raises(SceneError, match=rf"{file.name}: record 0 \(scene {entry['scenes'][0]}\)"):
        scenes.load(0)
    same_scene(scenes.load(1), Dataset(root, SPLITS).load(1))


def test_images_are_checked_when_they_are_packed_and_afterwards(
    root, packed, tmp_path, monkeypatch, capsys
):
    file = packed / "b-00001-images.arrayrecord"
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 50] ^= 1
    file.write_bytes(content)
    code, text = run(monkeypatch, capsys, check, str(packed), "--splits", *SPLITS)
    assert code == 1 and "7 of 8 scenes can be used" in text and f"{file.name}: record" in text
    folder = tmp_path / "folders"
    shutil.copytree(root, folder)
    image = folder / "images" / "shared.png"
    image.write_bytes(image.read_bytes()[:-60])
    output = f"--output={tmp_path / 'out'}"
    code, text = run(monkeypatch, capsys, pack, f"--input={folder}", output, "--splits=b")
    assert code == 1 and "shared.png" in text and "data_prep.check" in text


def test_a_scene_is_being_read_until_its_images_are(packed, monkeypatch):
    """A disk that hangs on an image is one that hangs on a scene, by name."""
    data = config(packed, scene_points=64, threads=1)
    data.sources = (dict(kind="packed", root=str(packed), splits=("b",)),)
    data.images.update(count=2, height=6, width=8)
    told = queue.SimpleQueue()

    def patient(batches, limit, reading):
        told.put(reading)
        return batches

    def hangs(self, image, size):
        raise SceneError(told.get(timeout=60)())

    monkeypatch.setattr(pipeline, "Patient", patient)
    monkeypatch.setattr(FrameImages, "sight", hangs)
    batches = make_batches(data, 0, 3)
    with pytest.raises(SceneError, match=r"being read: .*\.arrayrecord"):
        next(batches)
    batches.close()


def test_files_that_may_not_be_open_are_no_damage(packed, monkeypatch):
    """A run must not pass over good scenes because of them."""

    class Full:
        def __getitem__(self, record):
            raise RuntimeError("open() failed: Too many open files; opening shard")

    scenes = PackedDataset(packed, SPLITS)
    scenes._scenes = Full()
    with pytest.raises(OSError, match="ulimit -n"):
        scenes.load(0)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    with pytest.raises(SceneError, match=r"7 shards, and a process may have 200 files open"):
        PackedDataset(packed, SPLITS)


@pytest.mark.parametrize(
    ("root", "told"), [("gs:/bucket/x", "gs://"), ("s3://bucket/x", "mount"), ("az://b/x", "gs://")]
)
def test_a_store_that_cannot_be_used_is_told(root, told):
    with pytest.raises(SceneError, match=told):
        PackedDataset(root)


def test_a_shard_of_another_packing_is_told_though_it_has_the_same_size(packed):
    index = json.loads((packed / INDEX).read_text())
    first, second, *_ = index["splits"]["a"]
    (packed / first["file"]).write_bytes((packed / second["file"]).read_bytes())
    first["bytes"] = second["bytes"]
    (packed / INDEX).write_text(json.dumps(index))
    with pytest.raises(SceneError, match=f"holds the scene '{second['scenes'][0]}', so shard and"):
        PackedDataset(packed, "a").load(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "a-00001.arrayrecord: missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "bytes, packed.json says"),
    ],
)
def test_a_shard_that_is_missing_or_cut_off_is_told_at_the_start(packed, damage, message):
    damage(packed / "a-00001.arrayrecord")
    with pytest.raises(SceneError, match=message):
        build_sources([dict(kind="packed", root=str(packed), splits=("a",))])
    assert len(PackedDataset(packed, "b")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, 'expected an object with "format"'),
        ({"version": 9}, "version 9; this reads 1"),
        ({"units": "ft"}, "not what data_prep.pack wrote"),
        ({"splits": {"a": []}}, "not what data_prep.pack wrote"),
        ({"splits": {"a": [{"file": "x"}]}}, "not what data_prep.pack wrote"),
        ({"splits": [1]}, "not what data_prep.pack wrote"),
    ],
)
def test_an_index_that_is_none_is_told(packed, change, message):
    index = json.loads((packed / INDEX).read_text())
    (packed / INDEX).write_text(json.dumps(index | change))
    with pytest.raises(SceneError, match=message):
        PackedDataset(packed, "a")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_an_index_with_any_value_changed_is_read_or_told(data):
    """Whatever JSON has in the place of a value: an error that names the file, or scenes."""
    shard = Shard("a.arrayrecord", 9, ["x", "y"], "i.arrayrecord", 7, [[0, 1], None])
    index = {"format": FORMAT, "version": VERSION, "units": "m", "up": "z", "classes": ["c"]}
    index |= {"splits": {"a": [dataclasses.asdict(shard)]}}
    entry = data.draw(st.sampled_from([index, index["splits"], index["splits"]["a"][0]]))
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    value = data.draw(st.recursive(leaf, lambda inner: st.lists(inner, max_size=2), max_leaves=4))
    entry[data.draw(st.sampled_from([*entry, "more"]))] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / INDEX).write_text(json.dumps(index))
        for name, size in (("a", 9), ("i", 7)):
            (Path(folder) / f"{name}.arrayrecord").write_bytes(b"?" * size)
        try:
            scenes = PackedDataset(folder, "a")
        except SceneError as error:
            told = str(error)
        else:
            with pytest.raises(SceneError, match="arrayrecord: record 0") as error:
                scenes.load(0)
            told = str(error.value)
    assert folder in told


def test_what_cannot_be_packed_or_read_says_why(root, packed, tmp_path, monkeypatch, capsys):
    with pytest.raises(SceneError, match="no split 'train'; packed are a, b"):
        PackedDataset(packed)
    with pytest.raises(SceneError, match="segment40.npy: missing"):
        PackedDataset(packed, "a", "segment40").load(0)
    bad = tmp_path / "bad"
    write_scene(bad / "train" / "x", tiny_scene(0))
    write_dataset_json(bad, "mm", "z", ["train"])
    output = f"--output={tmp_path / 'out'}"
    code, text = run(monkeypatch, capsys, pack, f"--input={bad}", output)
    assert code == 1 and "coord.npy: extent" in text and "data_prep.check" in text
    code, text = run(monkeypatch, capsys, pack, f"--input={root}", f"--output={root}", "--splits=a")
    assert code == 1 and "is not empty" in text
    code, text = run(monkeypatch, capsys, pack, f"--input={root}", "--output=gs://bucket/x")
    assert code == 2 and "local folder" in text
    code, text = run(monkeypatch, capsys, check, str(packed), "--splits", *SPLITS)
    assert code == 0 and "8 of 8 scenes can be used" in text
