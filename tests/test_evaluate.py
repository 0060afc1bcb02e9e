"""The evaluation command on tiny rooms: what it writes, what it refuses, and that it repeats."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import small_config

import point_jax
from configs import segmentation
from data_prep import pack
from launch import command, evaluate
from point_jax.data.frames import Frames, write_frames
from point_jax.data.rooms import CLASSES, RoomSpec, make_room
from point_jax.data.scenes import write_dataset_json, write_scene
from point_jax.evaluation.candidates import find
from point_jax.evaluation.classes import SCANNET20
from point_jax.evaluation.confusion import confusion, scores
from point_jax.evaluation.labelled_scenes import (
    check_apart,
    class_names,
    identities,
    labelled_scenes,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[1]
SPEC = {"frames": 2, "width": 24, "height": 18, "voxel": 0.1}
KEYS = {"mIoU", "mAcc", "allAcc", "per_class", "protocol", "encoder", "seed"}


def get_config(arg="protocol=linear"):
    """For `--config=tests/test_evaluate.py:protocol=NAME`: a few steps on tiny rooms."""
    config = segmentation.get_config(f"data=rooms,encoder=tiny,{arg}")
    small = small_config()
    config.network = small.network
    config.decoder.depths = (1,)
    config.crops.grid_size = 0.1
    config.crops.max_size = 128
    config.crops.geometry.elastic = ()
    config.objective.shares = (1.0, 0.6)
    config.train.batch, config.train.steps, config.train.log_every = 2, 3, 1
    config.data.scene_points = 256
    config.data.sources = ({"kind": "rooms", "seeds": (0, 3), "spec": SPEC},)
    config.test.sources = ({"kind": "rooms", "seeds": (5, 7), "spec": SPEC},)
    config.test.floors = False
    return config


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(workdir, protocol, encoder, *arguments):
    """The command in this process: its exit code."""
    config = f"--config=tests/test_evaluate.py:protocol={protocol}"
    argv = ["evaluate", config, f"--encoder={encoder}", f"--workdir={workdir}", *arguments]
    return command.run(evaluate.main, argv, None)


def of_rooms(**seeds):
    """Flags that take rooms of some seeds: first and end for `data`, `test` or both."""
    return [
        f"--config.{place}.sources=({{'kind': 'rooms', 'seeds': {some}, 'spec': {SPEC}}},)"
        for place, some in seeds.items()
    ]


def out_of_memory(*arguments):
    raise RuntimeError("out of memory")


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def check(found, protocol, encoder):
    assert found.keys() >= KEYS
    assert (found["protocol"], found["encoder"], found["seed"]) == (protocol, encoder, 0)
    assert 0 < found["mIoU"] <= 1 and 0 < found["mAcc"] <= 1 and 0 < found["allAcc"] <= 1
    known = [iou for iou in found["per_class"].values() if iou is not None]
    assert found["mIoU"] == pytest.approx(np.mean(known))
    assert set(found["train_scenes"]).isdisjoint(found["test_scenes"])


def test_a_trained_probe_goes_on_repeats_and_has_floors(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, "linear", "random", "--config.test.floors=True") == 0
    found = results(whole)
    check(found, "linear", "random")
    raw, random = found["floors"]
    assert [floor["encoder"] for floor in (raw, random)] == ["raw", "random"]
    assert {floor["protocol"] for floor in (raw, random)} == {"logistic"}
    assert raw["mIoU"] > 0 and random["mIoU"] > 0
    assert -1 < found["shortcut"]["explained"] <= 1
    table = (whole / "results.md").read_text()
    assert "| random | linear |" in table and "| raw | logistic |" in table
    # A second start finds the training finished and says the same.
    assert run(broken, "linear", "random") == 0
    first = results(broken)
    assert run(broken, "linear", "random") == 0
    assert results(broken) == first
    assert first["per_class"] == found["per_class"]


def test_a_network_with_a_decoder_is_trained_and_voted(tmp_path, capsys):
    assert run(tmp_path, "scratch", "random") == 0
    first = results(tmp_path)
    check(first, "scratch", "random")
    # What is measured of a trained network may be asked for later.
    assert run(tmp_path, "scratch", "random", "--config.test.votes=True") == 0
    found = results(tmp_path)
    assert set(found["resolution"]) == {"voxel", "full", "voted"}
    assert found["per_class"] == first["per_class"]
    # Network and layer together predict what was scored.
    encoder, head = point_jax.load(tmp_path), point_jax.load_head(tmp_path)
    assert head is not None and head.classes == CLASSES and encoder.grid_size == 0.1
    counts = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for seed in (5, 6):
        scene = make_room(seed, RoomSpec(**SPEC))
        counts += confusion(head(encoder([scene])[0]), scene.segment, len(CLASSES))
    assert scores(counts, CLASSES).per_class == first["per_class"]
    # Its encoder is evaluated on scenes of which it does not know the labels.
    segmentor = tmp_path / "segmentor"
    assert run(tmp_path / "again", "ridge", segmentor) == 0
    assert results(tmp_path / "again")["seen"] == 0
    swapped = of_rooms(test=(1, 7), data=(7, 9))
    assert run(tmp_path / "taught", "ridge", segmentor, *swapped) == 1
    assert "has learned the labels of 2 scenes of config.test.sources" in capsys.readouterr().err
    assert run(tmp_path / "run", "ridge", tmp_path) == 1
    assert "segmentor is what it trained" in capsys.readouterr().err


def test_a_checkpoint_gives_every_protocol_its_encoder(tmp_path, checkpoint, capsys):
    newest = str(checkpoint / "checkpoints" / "2")
    for protocol in ("ridge", "knn", "lora"):
        workdir = tmp_path / protocol
        assert run(workdir, protocol, checkpoint) == 0
        found = results(workdir)
        check(found, protocol, newest)
        assert found["steps"] == 2 and found["checkpoint"] == newest
        assert found["grid_size"] == 0.1 and found["tree"] == "teacher"
    first = checkpoint / "checkpoints" / "1"
    assert run(tmp_path / "first", "ridge", first) == 0
    assert results(tmp_path / "first")["steps"] == 1
    # A folder's results are of one encoder and one protocol.
    capsys.readouterr()
    assert run(tmp_path / "lora", "lora", first) == 1
    assert run(tmp_path / "ridge", "ridge", first) == 1
    assert run(tmp_path / "ridge", "knn", checkpoint) == 1
    errors = capsys.readouterr().err
    assert errors.count("was started with another config (encoder: ") == 2, errors
    assert "protocol: ridge -> knn" in errors
    assert run(tmp_path / "ridge", "ridge", "raw") == 1
    assert "checkpoints/2 -> raw" in capsys.readouterr().err


def test_training_starts_at_the_best_layer_if_that_is_asked_for(tmp_path, checkpoint):
    still = ("--config.head=logistic", "--config.optim.lr=1e-12")
    for encoder, protocols in (("raw", ("linear",)), (checkpoint, ("linear", "lora"))):
        name = Path(encoder).name
        assert run(tmp_path / name / "logistic", "logistic", encoder) == 0
        best = results(tmp_path / name / "logistic")["per_class"]
        for protocol in protocols:
            assert run(tmp_path / name / protocol, protocol, encoder, *still) == 0
            found = results(tmp_path / name / protocol)
            assert found["per_class"] == pytest.approx(best, abs=1e-3)


def test_robustness_tells_what_is_missing(tmp_path):
    floors = tmp_path / "floors"
    more = "--config.test.floors=True"
    assert run(floors, "ridge", "raw", "--config.test.robustness=True", more) == 0
    assert run(tmp_path, "ridge", "raw", "--config.test.robustness=True") == 0
    found = results(tmp_path)
    everything = results(floors)["robustness"]
    assert [row for row in everything if row["encoder"] == "raw"] == found["robustness"]
    random = [row for row in everything if row["encoder"] == "random"]
    assert random[0]["mIoU"] == results(floors)["floors"][0]["mIoU"]
    assert len(random) == len(found["robustness"])
    conditions = {row["condition"]: row["mIoU"] for row in found["robustness"]}
    assert conditions["everything"] == found["mIoU"]
    assert {"no colour", "no normals", "neither", "1% of the labels"} <= conditions.keys()
    fewer = tmp_path / "fewer"
    arguments = ("--config.test.robustness=True", "--config.labels.share=0.05")
    assert run(fewer, "ridge", "raw", *arguments) == 0
    found = {row["condition"]: row["mIoU"] for row in results(fewer)["robustness"]}
    assert found.keys() == conditions.keys() - {f"{n}% of the labels" for n in (5, 10, 20)}
    assert found["no normals"] != conditions["no normals"]
    assert results(fewer)["settings"] != results(tmp_path)["settings"]


def test_robustness_leaves_out_what_no_frame_shows_and_never_the_result(
    tmp_path, folders, capsys, monkeypatch
):
    for seed in (5, 6):  # so few points are no view
        room = folders / "test" / f"room{seed}"
        points = len(np.load(room / "coord.npy"))
        np.save(room / "segment.npy", np.zeros(points, np.int32))
        seen = np.arange(points)[None] < 10
        frames = Frames(np.array(["a.jpg"]), np.array([[4, 4]]), np.eye(4)[None, :3], seen)
        write_frames(room, frames)
    arguments = both(folders)
    assert run(tmp_path / "a", "ridge", "raw", *arguments, "--config.test.robustness=True") == 0
    told = capsys.readouterr().out
    assert "one frame, camera axes: no labelled points, no row" in told
    conditions = [row["condition"] for row in results(tmp_path / "a")["robustness"]]
    assert "neither" in conditions and not any("frame" in name for name in conditions)

    monkeypatch.setattr(evaluate, "robustness", out_of_memory)
    assert run(tmp_path / "b", "ridge", "raw", *arguments, "--config.test.robustness=True") == 1
    assert results(tmp_path / "b")["mIoU"] == results(tmp_path / "a")["mIoU"]


def test_results_that_differ_in_scenes_places_and_speed_alone_have_one_digest(folders):
    """So that seeds of two machines, and the folds of a data set, come together."""

    def digest(protocol, train="train", test="test", root=folders, **changes):
        config = get_config(f"protocol={protocol}")
        for place, split in (("data", train), ("test", test)):
            config[place].sources = ({"kind": "folder", "root": str(root), "splits": (split,)},)
        config.update_from_flattened_dict(changes)
        return evaluate.Evaluation(config).digest(find("random", config), protocol)

    moved = folders.with_name("elsewhere")
    shutil.copytree(folders, moved)
    for protocol in ("linear", "ridge"):
        one = digest(protocol)
        assert one == digest(protocol, "test", "train") == digest(protocol, root=moved)
        harmless = {"data.threads": 1, "network.remat": True, "train.log_every": 7}
        assert one == digest(protocol, **harmless, seed=3, dataset="s3dis-2")
        assert one != digest(protocol, **{"labels.share": 0.5})
        assert (one == digest(protocol, **{"train.steps": 4})) == (protocol == "ridge")
        assert (one == digest(protocol, **{"crops.max_size": 96})) == (protocol == "ridge")


def test_what_decides_a_result_changes_the_digest(folders):
    rooms = {"kind": "rooms", "seeds": (7, 9), "spec": SPEC}

    def digest(protocol, weight=1.0, **changes):
        config = get_config(f"protocol={protocol}")
        root = {"kind": "folder", "root": str(folders), "splits": ("train",), "weight": weight}
        config.data.sources = (root, rooms)
        config.labels.classes = "rooms"
        config.update_from_flattened_dict(changes)
        return evaluate.Evaluation(config).digest(find("random", config), protocol)

    # How often a source is drawn from matters to what is trained, not to what is fitted.
    assert digest("linear") != digest("linear", weight=9.0)
    assert digest("ridge") == digest("ridge", weight=9.0)
    thin, votes = {"test.first_grid": 0.3}, {"test.votes": True}
    assert digest("ridge", **votes) == digest("ridge", **thin) != digest("ridge", **thin, **votes)


def test_the_config_s_argument_has_one_spelling(tmp_path):
    asked = "configs/segmentation.py:encoder=tiny,protocol=ridge,data=rooms"
    few = of_rooms(test=(5, 7), data=(0, 3))
    few += ["--config.crops.grid_size=0.1", "--config.test.floors=False", "--encoder=raw"]
    for config in (asked, "configs/segmentation.py:protocol=ridge,encoder=tiny"):
        argv = ["evaluate", f"--config={config}", f"--workdir={tmp_path}", *few]
        assert command.run(evaluate.main, argv, None) == 0
        told = results(tmp_path)["config"]
        assert told == "configs/segmentation.py:data=rooms,protocol=ridge,encoder=tiny"


def test_a_result_is_kept_whatever_happens_to_its_floors(tmp_path, capsys, monkeypatch):
    (one,) = of_rooms(data=(0, 1))
    assert run(tmp_path, "linear", "raw", one, "--config.test.floors=True") == 1
    assert "floors beside linear are fitted by logistic" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()  # said before anything is trained
    monkeypatch.setattr(evaluate, "floors", out_of_memory)
    assert run(tmp_path, "ridge", "raw", "--config.test.floors=True") == 1
    assert results(tmp_path)["mIoU"] > 0 and results(tmp_path)["floors"] == []


def test_classes_that_a_benchmark_knows_have_its_ids(folders):
    write_dataset_json(folders, "m", "z", ("train", "test"), SCANNET20.names)
    scenes = labelled_scenes(({"kind": "folder", "root": str(folders)},), "data.sources")
    assert class_names(scenes.sources, "") == SCANNET20


def test_packed_scenes_are_known_by_their_shard(tmp_path, folders, capsys, monkeypatch):
    packed = tmp_path / "packed"
    argv = ["pack", f"--input={folders}", f"--output={packed}", "--splits", "train", "test"]
    monkeypatch.setattr("sys.argv", argv)
    pack.main()
    capsys.readouterr()
    entries = [
        ({"kind": "packed", "root": str(packed), "splits": (s,)},) for s in ("train", "test")
    ]
    train, test = (labelled_scenes(entry, "data.sources") for entry in entries)
    assert identities(train.sources) == [
        f"{packed.resolve()}/train-00000.arrayrecord/room{seed}" for seed in (0, 1)
    ]
    assert class_names((*train.sources, *test.sources), "").names == CLASSES
    check_apart(train.sources, test.sources, ("a", "b"))
    arguments = [f"--config.{place}.sources={entries[0]!r}" for place in ("data", "test")]
    assert run(tmp_path / "out", "ridge", "raw", *arguments) == 1
    assert "has 2 scenes that config.data.sources has" in capsys.readouterr().err


def test_test_scenes_that_the_encoder_was_pretrained_on_are_counted(tmp_path, checkpoint):
    assert run(tmp_path, "ridge", checkpoint, *of_rooms(test=(2, 7), data=(7, 9))) == 0
    assert results(tmp_path)["seen"] == 2  # of 0 to 3
    assert "pretrained on 2 of the test scenes" in (tmp_path / "results.md").read_text()


@pytest.fixture
def folders(tmp_path):
    """Two splits of a folder of rooms whose classes are named, the second without labels."""
    root = tmp_path / "scans"
    for split, seeds in (("train", (0, 1)), ("test", (5, 6))):
        for seed in seeds:
            scene = make_room(seed, RoomSpec(**SPEC))
            scene = dataclasses.replace(scene, segment=scene.segment if split == "train" else None)
            write_scene(root / split / f"room{seed}", scene)
    write_dataset_json(root, "m", "z", ("train", "test"), CLASSES)
    return root


def entries(root, split, **more):
    return ({"kind": "folder", "root": str(root), "splits": (split,), **more},)


def sources(root, split, **more):
    return repr(entries(root, split, **more))


def both(root):
    """Flags that train on one split and test on the other."""
    sides = (("data", "train"), ("test", "test"))
    return [f"--config.{place}.sources={sources(root, split)}" for place, split in sides]


def test_scenes_without_labels_are_submitted_and_nothing_else(tmp_path, folders, capsys):
    arguments, workdir = both(folders), tmp_path / "out"
    assert run(workdir, "ridge", "raw", *arguments) == 1
    assert "room5: has no labels" in capsys.readouterr().err
    assert run(workdir, "ridge", "raw", *arguments, "--config.test.submission=True") == 0
    lines = (workdir / "submission" / "room5.txt").read_text().splitlines()
    assert len(lines) == len(make_room(5, RoomSpec(**SPEC)).coord)
    assert set(map(int, lines)) <= set(range(len(CLASSES)))
    assert not (workdir / "results.json").exists()
    # Another evaluation there leaves the files of its own scenes alone.
    (folders / "test" / "room5").rename(folders / "test" / "room9")
    labels = np.zeros(len(make_room(6, RoomSpec(**SPEC)).coord), np.int32)
    np.save(folders / "test" / "room6" / "segment.npy", labels)
    assert run(workdir, "ridge", "raw", *arguments, "--config.test.submission=True") == 0
    assert {file.name for file in (workdir / "submission").iterdir()} == {"room6.txt", "room9.txt"}
    assert results(workdir)["test_scenes"] == ["room6"]  # room9 has no labels to score
    np.save(folders / "test" / "room6" / "segment.npy", labels + 99)
    write_dataset_json(folders, "m", "z", ("train", "test"))  # without names of classes
    arguments, workdir = [*arguments, "--config.labels.classes=rooms"], tmp_path / "unnamed"
    assert run(workdir, "ridge", "raw", *arguments, "--config.test.submission=True") == 1
    assert "room6: a label is 99" in capsys.readouterr().err
    for room in (folders / "test").iterdir():
        np.save(room / "segment.npy", np.full(len(np.load(room / "coord.npy")), -1, np.int32))
    assert run(workdir, "ridge", "raw", *arguments) == 1
    assert "no point of any test scene has a label" in capsys.readouterr().err


def test_scenes_that_would_prove_nothing_are_refused(tmp_path, folders, capsys):
    train = f"--config.data.sources={sources(folders, 'train')}"
    same = f"--config.test.sources={sources(folders, 'train')}"
    assert run(tmp_path / "out", "ridge", "raw", train, same) == 1
    assert "has 2 scenes that config.data.sources has, too" in capsys.readouterr().err
    twice = f"--config.test.sources={2 * entries(folders, 'test')!r}"
    assert run(tmp_path / "out", "ridge", "raw", train, twice) == 1
    assert "config.test.sources has 2 scenes more than once" in capsys.readouterr().err
    shutil.copytree(folders / "test", folders.with_name("copy") / "test")
    write_dataset_json(folders.with_name("copy"), "m", "z", ("test",), CLASSES)
    two = entries(folders, "test") + entries(folders.with_name("copy"), "test")
    both_copies = (f"--config.test.sources={two!r}", "--config.test.submission=True")
    assert run(tmp_path / "out", "ridge", "raw", train, *both_copies) == 1
    assert "has 2 names of several scenes, as room5" in capsys.readouterr().err
    assert run(tmp_path / "out", "linear", "raw", train, "--config.labels.classes=s3dis") == 1
    line = capsys.readouterr().err
    assert "scans: its classes are wall, floor" in line and "labels.classes=s3dis are" in line
    write_dataset_json(folders, "m", "z", ("train", "test"), CLASSES[::-1])
    assert run(tmp_path / "out", "ridge", "raw", train, "--config.labels.classes=") == 1
    assert "2 different lists of classes" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["tiny", "small", "base", "v3m1"])
def test_sizes_fit_the_devices_that_they_are_meant_for(size):
    config = segmentation.get_config(f"data=rooms,encoder={size}")
    assert (
        config.train.batch % (config.objective.scenes_per_row * (1 if size == "tiny" else 8)) == 0
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of the pretraining, two steps."""
    from launch import train

    workdir = tmp_path_factory.mktemp("pretraining")
    rotary = "--config.network.rotary_base=0.0"
    argv = ["train", "--config=tests/small.py", f"--workdir={workdir}", rotary]
    argv += ["--config.train.steps=2", "--config.checkpoint.every=1"]
    argv += ["--config.data.held_out.scenes=0"]
    assert command.run(train.main, argv, None) == 0
    return workdir


@pytest.mark.parametrize(
    ("protocol", "encoder", "arguments", "words"),
    [
        ("linear", "", (), "--encoder=DIR, --encoder=random or --encoder=raw"),
        ("linear", "nowhere", (), "nowhere: no such folder"),
        ("decoder", "raw", (), "without a network there is only the linear protocol"),
        ("lineer", "raw", (), "protocol=lineer: expected one of linear"),
        ("linear", "raw", ("--config.labels.share=0",), "config.labels.share is 0"),
        ("linear", "raw", ("--config.labels.classes=ade",), "config.labels.classes is 'ade'"),
        ("linear", "raw", ("--config.crops.max_size=4",), "config.crops.max_size is 4, expected"),
        ("scratch", "random", ("--config.head=logistic",), "take one of linear, lora"),
        ("linear", "raw", ("--config.head=ridge",), "config.head is 'ridge', expected one of"),
        ("linear", "raw", ("--config.train.batch=3",), "with 2 scenes a row"),
        ("ridge", "raw", ("--config.crops.grid_size=-1.0",), "config.crops.grid_size is -1.0"),
        ("ridge", "raw", ("--config.seed=-1",), "config.seed is -1, expected"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, protocol, encoder, arguments, words):
    assert run(tmp_path, protocol, encoder, *arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors
