"""The real command on tiny rooms: what it leaves, how it survives, and what it says of mistakes."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config, small_batch

from launch import command, train
from point_jax.data.scenes import Scene, write_dataset_json, write_scene
from point_jax.training import mesh
from point_jax.training.metrics import finished, read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config=tests/small.py"
LONG = ("--config.train.steps=24", "--config.checkpoint.every=3")
NO_PICTURES = "--config.data.held_out.scenes=0"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(workdir, *arguments, config=CONFIG):
    """The command in this process: its exit code."""
    return command.run(train.main, ["train", config, f"--workdir={workdir}", *arguments], None)


def start(workdir, *arguments):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.train", CONFIG, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(workdir, step, number):
    """Starts the command, sends a signal when a step is done and one is saved: code, outputs."""
    process = start(workdir, *LONG, NO_PICTURES)
    while not (saved_steps(workdir) and read_metrics(workdir)[-1]["step"] >= step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(), *process.communicate()


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run never stopped, with pictures; one killed and then told to stop, at the same time."""
    folder = tmp_path_factory.mktemp("runs")
    whole, broken = folder / "whole", folder / "broken"

    def interrupt():
        killed = stop(broken, 4, signal.SIGKILL)
        left = saved_steps(broken)
        return killed, left, stop(broken, 8, signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor() as pool:
        patch.chdir(ROOT)
        interrupted = pool.submit(interrupt)
        assert run(whole, *LONG) == 0
        return whole, broken, *interrupted.result()


def test_a_run_leaves_what_is_promised(runs):
    whole = runs[0]
    names = {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "pictures", ".lock"}
    assert {path.name for path in whole.iterdir()} == names
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 25), 24]
    assert set(lines[-1]) == {"event", "step", "params_digest"} and lines[-1]["event"] == "done"
    for line in lines[:-1]:
        assert all(np.isfinite(value) for value in line.values()), line
        assert line["bad_steps"] == line["empty_scenes"] == 0 < line["points"]
    assert saved_steps(whole) == [21, 24]
    assert {path.name for path in (whole / "pictures").iterdir()} == {"curves.png", "pca.png"}
    config = json.loads((whole / "config.json").read_text())["config"]
    assert (config["train"]["steps"], config["objective"]["prototypes"]) == (24, 16)


def test_killed_and_stopped_it_ends_as_if_it_had_never_been(runs, capsys):
    whole, broken, killed, left, stopped = runs
    assert killed[0] == -signal.SIGKILL and left and left[-1] >= 3
    code, out, error = stopped
    assert (code, error) == (143, "")
    assert f"going on after step {left[-1]} of 24" in out
    assert "SIGTERM: saves and stops after this step" in out
    (step,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+) of 24, saved", out))
    assert saved_steps(broken)[-1] == step < 24
    assert run(broken, *LONG, NO_PICTURES) == 0
    assert f"going on after step {step} of 24" in capsys.readouterr().out
    assert [line.get("loss") for line in read_metrics(broken)] == [
        line.get("loss") for line in read_metrics(whole)
    ]
    assert finished(broken) == finished(whole) is not None


def test_a_finished_run_says_so_without_its_data_or_checkpoints(runs, tmp_path, capsys):
    """Nothing but the lines of the result is read: scenes may be gone, pictures may be wanted."""
    whole, done = runs[0], finished(runs[0])
    held_out = "--config.data.held_out.sources=({'kind':'folder','root':'gone'},)"
    assert run(whole, *LONG, held_out) == 0
    out = capsys.readouterr().out
    assert done is not None and f"sha256 {done['params_digest']}" in out
    assert f"checkpoint  {whole}/checkpoints/24\n" in out
    (whole / "checkpoints").rename(tmp_path / "elsewhere")
    try:
        assert run(whole, *LONG) == 0
    finally:
        (whole / "checkpoints").rmdir()
        (tmp_path / "elsewhere").rename(whole / "checkpoints")
    assert "checkpoints/24 is missing: deleted since then" in capsys.readouterr().out


# ---- Mistakes: one line, nothing bound.


def refused(workdir, capsys, *arguments, **options):
    """The line that the command ends with."""
    assert run(workdir, *arguments, **options) == 1
    out, error = capsys.readouterr()
    assert "Traceback" not in error and error.count("\n") == 1 and out == ""
    return error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.seed=-1", "config.seed is -1, expected a whole number from 0"),
        ("--config.views.grid_size=nan", "config.views.grid_size is nan, expected a number above"),
        ("--config.views.global_share=(0.9,)", "global_share is (0.9,), expected (low, high)"),
        ("--config.views.geometry.scale=(1.1,0.9)", "config.views.geometry.scale is (1.1, 0.9)"),
        ("--config.views.geometry.flip_probability=7", "config.views.geometry.flip_probability"),
        ("--config.views.drop_color=((2.0,3.0),)", "config.views.drop_color is ((2.0, 3.0),)"),
        ("--config.views.local_count=0", "needs views.local_count of at least 1"),
        ("--config.network.channels=(8,'x')", "config.network.channels is (8, 'x'), expected"),
        ("--config.network.channels=(8,9)", "config.network, level 1: channels=9 is not a mul"),
        ("--config.network.mlp_ratio=-1", "config.network.mlp_ratio is -1.0, expected a number"),
        ("--config.network.drop_path=1.5", "config.network.drop_path is 1.5"),
        ("--config.network.layer_scale=-1", "config.network.layer_scale is -1.0"),
        ("--config.network.rotary_jitter=0", "config.network.rotary_jitter is 0.0, expected"),
        ("--config.network.dtype=half", "config.network.dtype is 'half', expected one of float32"),
        ("--config.objective.weights=(1.0,1.0)", "is (1.0, 1.0), expected (mask, roll, unmask)"),
        ("--config.objective.weights=(0,0,0)", "config.objective.weights is (0, 0, 0), expected"),
        ("--config.objective.shares=(0.0,0.5)", "config.objective.shares is (0.0, 0.5)"),
        ("--config.objective.match_radius=-1", "config.objective.match_radius is -1.0"),
        ("--config.objective.student_temperature=0", "config.objective.student_temperature is"),
        ("--config.objective.prototypes=0", "config.objective.prototypes is 0, expected"),
        ("--config.objective.hidden=0", "config.objective.hidden is 0, expected a whole number"),
        ("--config.data.cache=-1", "config.data.cache is -1, expected a whole number"),
        ("--config.data.prefetch=-1", "config.data.prefetch is -1"),
        ("--config.data.held_out.scenes=-1", "config.data.held_out.scenes is -1"),
        ("--config.data.sources=scans", "config.data.sources lists 'scans', expected dicts"),
        ("--config.data.sources=({'kind':'folder'})", "with the comma at the end"),
        ("--config.data.sources=({'kind':'folder'},)", "sources[0]: a folder source needs 'root'"),
        ("--config.init_from=nowhere", "no checkpoint in nowhere"),
    ],
)
def test_an_impossible_value_is_named_as_it_was_typed(tmp_path, capsys, argument, message):
    assert message in refused(tmp_path, capsys, argument)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("workdir", ["file", "file/sub", "/proc/nope/x"])
def test_a_workdir_that_cannot_be_one(tmp_path, capsys, workdir):
    (tmp_path / "file").touch()
    place = tmp_path / workdir
    assert f"error: --workdir={place} cannot be used" in refused(place, capsys)
    (tmp_path / "checkpoints").touch()
    assert f"({tmp_path}/checkpoints: File exists)" in refused(tmp_path, capsys)


def test_a_line_of_metrics_that_no_run_wrote(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    assert "metrics.jsonl, line 1: not a line of metrics" in refused(tmp_path, capsys)


def test_a_config_that_takes_no_argument(tmp_path, capsys):
    error = refused(tmp_path, capsys, config="--config=tests/small.py:small")
    assert "takes no argument" in error


def test_a_platform_without_devices(tmp_path):
    command = [sys.executable, "-m", "launch.train", CONFIG, f"--workdir={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "JAX_PLATFORMS": "cuda"}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if process.returncode == 0:
        pytest.skip("there is a GPU")
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: JAX finds no device with JAX_PLATFORMS=cuda")
    assert "Traceback" not in process.stderr


# ---- Data.


def folder(root, scenes=3):
    """A data set of tiny scenes, and the argument that names it."""
    batch = small_batch(scenes)
    for i in range(scenes):
        scene = Scene(f"s{i}", batch["coord"][i], batch["color"][i], batch["normal"][i])
        write_scene(root / "train" / scene.name, scene)
    write_dataset_json(root, units="m", up="z", splits=["train"])
    return f"({{'kind':'folder','root':'{root}'}},)"


def test_held_out_scenes_are_loaded_before_the_first_step(tmp_path, capsys):
    missing = f"({{'kind':'folder','root':'{tmp_path}/missing'}},)"
    error = refused(tmp_path / "w", capsys, f"--config.data.held_out.sources={missing}")
    assert f"config.data.held_out.sources[0]: {tmp_path}/missing: no such folder" in error
    assert not (tmp_path / "w" / "metrics.jsonl").exists()


def test_a_bad_scene_stops_the_run_saved_and_it_may_go_on_without_it(tmp_path, capsys):
    """First a root that is not there, which binds nothing, then the right one with a bad scene."""
    workdir, root = tmp_path / "w", tmp_path / "scans"
    wrong = f"--config.data.sources=({{'kind':'folder','root':'{tmp_path}/missing'}},)"
    assert "config.data.sources[0]" in refused(workdir, capsys, wrong, NO_PICTURES)
    sources = f"--config.data.sources={folder(root, 12)}"
    bad = next_scene(sources, root, step=2)
    (bad / "coord.npy").unlink()
    arguments = (sources, NO_PICTURES, "--config.checkpoint.every=100")
    assert run(workdir, *arguments) == 1
    error = capsys.readouterr().err
    assert f"{bad}/coord.npy: missing" in error and "--config.data.skip_bad=True" in error
    assert saved_steps(workdir) == [1]
    assert run(workdir, *arguments, "--config.data.skip_bad=True") == 0
    out = capsys.readouterr().out
    assert "config changed, data.skip_bad: False -> True" in out
    assert [line.get("empty_scenes") for line in read_metrics(workdir)][1] == 1


def next_scene(sources, root, step):
    """A scene of the batch of a step that is in none before it."""
    from point_jax.data.pipeline import make_batches
    from point_jax.training.config import parse_command_line

    config, _ = parse_command_line(["train", CONFIG, "--workdir=w", sources])
    batches = make_batches(config.data, config.seed, config.train.batch)
    drawn = [next(batches)["scene"] for _ in range(step)]
    new = set(drawn[-1].tolist()) - set(np.concatenate(drawn[:-1]).tolist())
    return sorted((root / "train").iterdir())[min(new)]


def test_the_quickstart_is_a_config_that_the_objective_accepts():
    from configs import quickstart
    from point_jax.objectives.settings import make_sonata
    from point_jax.training.config import check_config

    config = quickstart.get_config()
    check_config(config)
    make_sonata(config)
    assert get_config().keys() == config.keys()


def test_a_run_measures_its_features_on_labelled_scenes(tmp_path, capsys):
    spec = {"frames": 2, "width": 24, "height": 18, "voxel": 0.1}
    train_rooms, test_rooms = (
        ({"kind": "rooms", "spec": spec, "seeds": seeds},) for seeds in ((20, 24), (30, 33))
    )
    probe = (
        f"--config.probe.train_sources={train_rooms}",
        f"--config.probe.test_sources={test_rooms}",
    )
    short = ("--config.train.steps=2", NO_PICTURES, "--config.checkpoint.every=2")
    assert run(tmp_path, *short, *probe, "--config.probe.every=2") == 0
    first, second = (line for line in read_metrics(tmp_path) if "loss" in line)
    names = {"probe_ridge_mIoU", "probe_knn_mIoU", "probe_shortcut"}
    assert not names & first.keys() and names <= second.keys()
    assert 0 < second["probe_ridge_mIoU"] <= 1 and 0 < second["probe_knn_mIoU"] <= 1
    capsys.readouterr()
    assert run(tmp_path / "bad", *short, "--config.probe.every=2") == 1
    assert "config.probe.train_sources is empty" in capsys.readouterr().err


@pytest.mark.devices(2)
def test_what_one_process_runs_alone_runs_on_one_device_of_its_own(monkeypatch, tmp_path):
    """Pictures and probes get weights that lie on all devices of a job."""
    everywhere = mesh.replicated(mesh.data_mesh(1))
    weights = {"backbone": jax.device_put(jnp.ones(3), everywhere)}
    seen = []

    class Recorder:
        def __init__(self, network, params, grid_size):
            self.with_params(params)

        def with_params(self, params):
            seen.extend(leaf.sharding.device_set for leaf in jax.tree.leaves(params))
            return self

        def __call__(self, scenes):
            raise FloatingPointError

    monkeypatch.setattr(train, "Encoder", Recorder)
    monkeypatch.setattr(train, "curves", lambda *arguments: None)
    monkeypatch.setattr(
        train, "load_probe", lambda section: SimpleNamespace(measure=lambda encoder: {"score": 1.0})
    )
    spec: Any = SimpleNamespace(network=None, views=SimpleNamespace(grid_size=0.02))
    scene: Any = object()
    assert train.Probe(spec, None)(1, weights) == {"score": 1.0}
    with pytest.raises(FloatingPointError):
        train.Pictures(spec, [scene], [])({"backbone": jnp.ones(3)}, weights, tmp_path)
    assert len(seen) >= 4 and all(len(devices) == 1 for devices in seen)
