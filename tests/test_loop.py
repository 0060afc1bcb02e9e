"""The training loop with a toy in the objective's place: kills, signals, bad steps, resuming."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import kill_run
import numpy as np
import pytest
import toy_run
from full_disk import no_file_above, on_small_disk
from jax.sharding import Mesh
from ml_collections import ConfigDict

from point_jax.training.checkpoint import CheckpointError
from point_jax.training.config import ConfigError
from point_jax.training.loop import TrainingStopped
from point_jax.training.mesh import check_batch
from point_jax.training.metrics import MetricsError, finished, read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config(**changes: object) -> ConfigDict:
    """The toy's config; `a__b=1` sets `a.b`."""
    result = toy_run.get_config()
    result.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return result


def run(workdir, **changes):
    return toy_run.run(config(**changes), workdir)


def start(workdir, *arguments):
    """The same in a process of its own."""
    command = [sys.executable, toy_run.__file__, f"--config={toy_run.__file__}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(workdir, step, process):
    while (lines := read_metrics(workdir) if Path(workdir).exists() else []) is not None:
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def digest(workdir):
    done = finished(workdir)
    assert done is not None
    return done["params_digest"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of 12 steps; do not change it."""
    workdir = tmp_path_factory.mktemp("unbroken")
    assert run(workdir) == 0
    return workdir


def test_a_run_leaves_what_was_promised(unbroken):
    lines = read_metrics(unbroken)
    assert [line["step"] for line in lines] == [*range(1, 13), 12]
    assert set(lines[-1]) == {"event", "step", "params_digest"}
    assert {p.name for p in (unbroken / "checkpoints").iterdir()} == {"8", "12"}
    assert (unbroken / "config.json").exists()
    assert list((unbroken / "tensorboard").iterdir())
    for line in lines[:-1]:
        assert {"loss", "lr", "wd", "momentum", "mask_size", "points_per_second"} <= set(line)
        assert 0 <= line["data_wait"] <= 1
        assert line["step_seconds"] > 0


def test_a_finished_run_prints_its_result_and_changes_nothing(unbroken, capsys):
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.name != ".lock"}
    assert run(unbroken) == 0
    assert f"sha256 {digest(unbroken)}" in (out := capsys.readouterr().out)
    assert str(unbroken / "checkpoints" / "12") in out
    assert before == {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.name != ".lock"}


def test_log_every_keeps_the_first_and_the_last_step(tmp_path):
    run(tmp_path, train__log_every=5, checkpoint__every=100)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 5, 10, 12, 12]


def test_another_seed_is_another_run(unbroken, tmp_path):
    run(tmp_path, seed=1)
    assert digest(tmp_path) != digest(unbroken)


def test_killed_anywhere_the_same_command_ends_with_the_same_bits(tmp_path):
    """20 times. Saves at every step and keeps one: most moments are amid a save or a deletion."""
    changes = {
        "train.steps": 200,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
        "data.seconds": 0.01,
    }
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, **changes) == 0
    process = subprocess.run(
        [sys.executable, kill_run.__file__, f"--workdir={killed}", "--kills=20", *arguments],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    told = process.stdout.splitlines()
    assert len(told) == 20 and any("a save" in line for line in told)
    assert digest(killed) == digest(whole)
    losses = [[line.get("loss") for line in read_metrics(folder)] for folder in (killed, whole)]
    assert losses[0] == losses[1]
    assert [line["step"] for line in read_metrics(killed)] == [*range(1, 201), 200]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tmp_path, number, code, unbroken, capsys, monkeypatch):
    """Inside this process: the signal comes while the 6th step begins."""
    original = toy_run.make_step

    def make_step(*arguments):
        step, calls = original(*arguments), itertools.count(1)

        def interrupted(*arguments):
            if next(calls) == 6:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # as launchers do: to the process, to its group
            return step(*arguments)

        return interrupted

    monkeypatch.setattr(toy_run, "make_step", make_step)
    handler = signal.getsignal(number)
    assert run(tmp_path, checkpoint__every=100) == code
    assert signal.getsignal(number) is handler
    out = capsys.readouterr().out
    assert out.count(f"{number.name}: saves and stops after this step") == 1
    assert f"stopped by {number.name} after step 6 of 12, saved" in out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    assert run(tmp_path, checkpoint__every=100) == 0
    assert digest(tmp_path) == digest(unbroken)


def test_a_kill_before_the_first_save_starts_over(unbroken, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2')
    assert run(tmp_path) == 0
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 13), 12]
    assert digest(tmp_path) == digest(unbroken)


def test_a_kill_between_the_last_save_and_the_last_line_only_needs_the_end(unbroken, tmp_path):
    run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    assert finished(tmp_path) is None
    assert run(tmp_path) == 0
    assert digest(tmp_path) == digest(unbroken)
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 13), 12]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    assert run(tmp_path, data__nan=(4, 6)) == 0
    lines = read_metrics(tmp_path)[:-1]
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [i in (4, 5) for i in range(12)]
    assert lines[4]["nonfinite"]["loss"] == "nan"
    assert np.isfinite([line["loss"] for line in lines[6:]]).all()


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(TrainingStopped, match=r"3 steps in a row up to step 8 had a loss"):
        run(tmp_path, data__nan=(5, 12), train__log_every=100)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 6, 7, 8]  # bad ones are always logged
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_another_runs_weights(unbroken, tmp_path, capsys):
    assert (
        run(tmp_path, init_from=str(unbroken), optim__lr=1e-12, schedule__momentum=(1.0, 1.0)) == 0
    )
    assert "starting with the weights of" in capsys.readouterr().out
    first, last = read_metrics(tmp_path)[0], read_metrics(unbroken)[0]
    assert first["step"] == 1
    assert first["loss"] != last["loss"]  # other weights, the same first batch
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(tmp_path / "other", init_from=str(tmp_path / "nowhere"))


def test_a_started_run_keeps_its_config(unbroken):
    with pytest.raises(ConfigError, match=r"train\.steps: 12 -> 20"):
        run(unbroken, train__steps=20)


def test_the_data_goes_on_where_the_checkpoint_was(tmp_path):
    """The position in the data is part of the checkpoint, even if config.json was lost."""
    with pytest.raises(TrainingStopped):
        run(tmp_path, data__nan=(5, 12))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"step 4 was saved after 8 scenes, not 4 x 4"):
        run(tmp_path, train__batch=4)


def test_a_checkpoint_keeps_its_config_if_config_json_was_lost(tmp_path):
    with pytest.raises(TrainingStopped):
        run(tmp_path, data__nan=(5, 12))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"another config \(optim.lr: .* -> 0.1; seed: 0 -> 5\)"):
        run(tmp_path, data__nan=(5, 12), optim__lr=0.1, seed=5)


def test_a_start_from_the_beginning_says_that_older_metrics_go(tmp_path, capsys):
    """As after a kill before the first save, or when somebody has removed the checkpoints."""
    assert run(tmp_path, checkpoint__every=4) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # not the last: "done"
    shutil.rmtree(tmp_path / "checkpoints")
    capsys.readouterr()
    assert run(tmp_path, checkpoint__every=4) == 0
    out = capsys.readouterr().out
    assert "no checkpoint here: metrics.jsonl loses the 12 lines it has" in out
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[-1] == lines[-1]


def test_metrics_that_are_deleted_meanwhile_end_the_run(tmp_path):
    """Instead of going to a file that nobody sees."""
    process = start(tmp_path, "--config.train.steps=10000", "--config.data.seconds=0.05")
    wait_for_step(tmp_path, 1, process)
    (tmp_path / "metrics.jsonl").unlink()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "metrics.jsonl (it was deleted while the run was writing to it)" in error


def test_a_signal_while_input_hangs_saves_the_step_before(tmp_path):
    process = start(tmp_path, "--config.data.hangs=(0,6)", "--config.checkpoint.every=100")
    wait_for_step(tmp_path, 5, process)
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "stopped by SIGTERM after step 6 of 12, saved" in out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number, code):
    """With a code that says whether to start again, as after the first."""
    code_of_it = (
        "import time; from point_jax.training.signals import SAME, stop_signals\n"
        "with stop_signals(lambda text: print(text, flush=True)):\n"
        "    print(SAME, flush=True); time.sleep(60); time.sleep(60); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_it],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    same = float(process.stdout.readline())
    process.send_signal(number)
    assert "once more ends at once" in process.stdout.readline()
    time.sleep(1.5 * same)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "ended at once, without saving" in error


def test_two_runs_do_not_share_a_folder(tmp_path):
    process = start(tmp_path, "--config.train.steps=10000", "--config.data.seconds=0.05")
    try:
        wait_for_step(tmp_path, 1, process)
        with pytest.raises(TrainingStopped, match=f"another run .process {process.pid}. is writ"):
            run(tmp_path, train__steps=10000, data__seconds=0.05)
    finally:
        process.kill()
        process.communicate()


def test_an_error_is_one_line_and_a_code(tmp_path):
    process = start(tmp_path, "--config.optim.lrr=1")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error == "error: no key 'lrr' in config.optim; did you mean 'lr'?\n"


def test_the_progress_needs_no_terminal(unbroken, tmp_path, capsys):
    run(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "training on 1 cpu device(s); the first step compiles for a while"
    assert out[1].startswith("step 1/12  loss 0.")
    assert out[2].startswith("step 12/12  loss 0.")
    assert out[3].startswith("finished: 12 steps, loss 0.")
    assert out[4] == f"  parameters  sha256 {digest(unbroken)}"


def test_pictures_get_the_untrained_and_the_trained_teacher(tmp_path, capsys):
    seen = []

    def write_pictures(before, after, folder):
        seen.extend((before, after))
        (folder / "scene.png").write_bytes(b"")

    assert toy_run.run(config(), tmp_path, lambda: write_pictures) == 0
    np.testing.assert_array_equal(seen[0]["head"]["weight"], 1.0)
    assert (np.asarray(seen[1]["head"]["weight"]) != 1.0).all()
    assert str(tmp_path / "pictures" / "scene.png") in capsys.readouterr().out


def test_training_counts_when_its_pictures_fail(tmp_path, unbroken, capsys):
    def write_pictures(*arguments):
        raise OSError("no space left")

    assert toy_run.run(config(), tmp_path, lambda: write_pictures) == 0
    out, error = capsys.readouterr()
    assert error == "error: no pictures: OSError: no space left\n"
    assert "finished: 12 steps" in out and digest(tmp_path) == digest(unbroken)


def test_what_pictures_need_is_looked_at_before_the_first_step(tmp_path):
    def prepare_pictures():
        raise ValueError("config.data.held_out.sources is empty")

    with pytest.raises(ConfigError, match="config.data.held_out.sources is empty"):
        toy_run.run(config(), tmp_path, prepare_pictures)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_start_that_fails_binds_nothing(tmp_path, capsys, monkeypatch):
    """Wrong values may be mended until there is something to go on from."""
    monkeypatch.setattr(toy_run, "make_batches", fails_at(0, ValueError("config.data.x is 1")))
    with pytest.raises(ConfigError, match="config.data.x is 1"):
        run(tmp_path, seed=5)
    assert not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(toy_run, "make_batches", fails_at(1, KeyError("s2")))
    with pytest.raises(KeyError):
        run(tmp_path, seed=5, checkpoint__every=100)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "checkpoints")
    assert run(tmp_path, seed=6) == 0
    assert "config changed, seed: 5 -> 6" in capsys.readouterr().out


def fails_at(number, error):
    """The toy's batches with an error in the place of one of them; 0: of all."""
    original = toy_run.make_batches

    def make_batches(data, seed, scenes, begin, *processes):
        if number == 0:
            raise error

        def batches():
            for at, batch in enumerate(original(data, seed, scenes, begin, *processes), begin):
                if at == number:
                    raise error
                yield batch

        return batches()

    return make_batches


def test_a_bad_batch_saves_before_it_ends_the_run(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(toy_run, "make_batches", fails_at(6, KeyError("s2")))
    with pytest.raises(KeyError, match="s2"):
        run(tmp_path, checkpoint__every=100)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    assert run(tmp_path, checkpoint__every=100) == 0
    assert digest(tmp_path) == digest(unbroken)


def test_steps_without_scenes_end_the_run_by_their_name(tmp_path):
    with pytest.raises(TrainingStopped, match=r"3 steps in a row up to step 8 held no scene that"):
        run(tmp_path, data__nan=(5, 12), data__points=0)


def test_a_final_checkpoint_is_enough_to_end_a_run(tmp_path, unbroken, capsys):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.jsonl").unlink()
    assert run(tmp_path) == 0
    assert "finished: 12 steps\n" in capsys.readouterr().out
    assert digest(tmp_path) == digest(unbroken)


def test_what_is_measured_joins_the_metrics_of_its_step(tmp_path, unbroken):
    weights = {}

    def measure(step, teacher):
        weights[step] = float(teacher["head"]["weight"][0])
        return {"probe": weights[step]} if step % 5 == 0 else {}

    wanted = config(train__log_every=4)
    assert toy_run.run(wanted, tmp_path, prepare_measure=lambda: measure) == 0
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "loss" in line}
    assert set(lines) == {1, 4, 5, 8, 10, 12} and list(weights) == list(range(1, 13))
    found = {step: line["probe"] for step, line in lines.items() if "probe" in line}
    assert found == {5: weights[5], 10: weights[10]} and weights[5] != weights[10]
    assert digest(tmp_path) == digest(unbroken)


def test_a_batch_that_the_devices_cannot_share():
    eight = cast(Mesh, SimpleNamespace(size=8))
    check_batch(16, eight)
    with pytest.raises(ConfigError, match=r"config.train.batch=12 scenes cannot be shared .* by 8"):
        check_batch(12, eight)
    with pytest.raises(ConfigError, match="with 2 scenes a row; use a multiple of 16"):
        check_batch(8, eight, each=2)


@pytest.mark.devices(2)
def test_several_devices_resume_to_the_same_bits(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    monkeypatch.setattr(toy_run, "make_batches", fails_at(9, SystemExit("as a kill would")))
    with pytest.raises(SystemExit, match="as a kill"):
        run(tmp_path / "broken")
    assert {p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()} == {"4", "8"}
    monkeypatch.undo()
    run(tmp_path / "broken")
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")


@pytest.mark.devices(3)
def test_a_run_goes_on_where_devices_share_the_state_otherwise(tmp_path, monkeypatch, capsys):
    """In three slices up to step 9, whole from the checkpoint of step 8 on: the same weights."""
    sliced = {"train.batch": 3, "mesh.fsdp": 3, "mesh.smallest": 0}
    seen = []

    def measure(step, teacher):
        seen.append(teacher["backbone"]["enc"]["stage0"]["blocks"]["weight"].sharding)
        return {}

    run(tmp_path / "whole", **{"train.batch": 3})
    monkeypatch.setattr(toy_run, "make_batches", fails_at(9, SystemExit("as a kill would")))
    with pytest.raises(SystemExit, match="as a kill"):
        toy_run.run(config(**sliced), tmp_path / "broken", prepare_measure=lambda: measure)
    assert len(seen) == 9 and all(at.is_fully_replicated for at in seen)
    monkeypatch.undo()
    run(tmp_path / "broken", **sliced | {"mesh.fsdp": 1})
    assert "config changed, mesh.fsdp: 3 -> 1" in capsys.readouterr().out
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name)[:12]]
        for name in ("whole", "broken")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    """And when there is space again the same command goes on from the newest checkpoint."""
    changes = {"train__steps": 100, "checkpoint__every": 20}
    full, whole = tmp_path / "full", tmp_path / "whole"
    assert run(whole, **changes) == 0
    size = (whole / "metrics.jsonl").stat().st_size // 2
    with no_file_above(size), pytest.raises(MetricsError, match="File too large.*goes on"):
        run(full, **changes)
    assert 20 <= read_metrics(full)[-1]["step"] < 80
    assert run(full, **changes) == 0
    assert digest(full) == digest(whole)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(tmp_path):
    """And with space again the same command ends with the same bits."""
    changes = {"train.steps": 60, "checkpoint.every": 2, "checkpoint.keep": 30}
    assert run(tmp_path / "whole", **changes) == 0
    arguments = " ".join(f"--config.{key}={value}" for key, value in changes.items())
    toy = f"{sys.executable} {toy_run.__file__} --config={toy_run.__file__} {arguments}"
    disk = tmp_path / "disk"
    disk.mkdir()
    said = on_small_disk(
        disk,
        "300k",
        f"""
        {toy} --workdir="$DISK/run" && exit 2
        echo "code $?"
        mount -o remount,size=30m "$DISK"
        {toy} --workdir="$DISK/run" || exit 3
    """,
    )
    assert said.returncode == 0, said
    step = re.search(
        r"(?m)^error: a checkpoint could not be written .*No space left on device.*of step (\d+),",
        said.stderr,
    )
    assert step and "code 1\n" in said.stdout, said
    assert f"going on after step {step[1]} of 60" in said.stdout
    assert digest(tmp_path / "whole") in said.stdout
