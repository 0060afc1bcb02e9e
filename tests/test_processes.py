"""Processes of a job: found or told, one of them writes, each says what ends it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import toy_run
from test_checkpoint import cut_file

from launch.command import split_job
from point_jax.training import agreement, checkpoint, mesh, peers
from point_jax.training.config import ConfigError, resolved
from point_jax.training.mesh import Job, start_processes
from point_jax.training.metrics import finished, read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
PODS = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
GKE_TPU = PODS | {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "first:1234"}
TOLD = ADDRESS | {"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7"}
FOUND = {"local_device_ids": None}


@pytest.fixture
def start(monkeypatch):
    """What `jax.distributed.initialize` is called with for an environment; None if it is not."""
    calls = []

    def initialize(*told, heartbeat_timeout_seconds, **found):
        assert heartbeat_timeout_seconds == peers.HEARTBEAT
        calls.append(told or found)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    have = {"libtpu", "kubernetes"}
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: name in have or None)

    def run(env, job=Job(), missing=()):
        have.difference_update(missing)
        start_processes(job, env)
        return calls.pop() if calls else None

    return run


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "4"}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_process_alone_stays_alone(start, env):
    """On a laptop, in a batch script outside `srun`, in a step of one task."""
    assert start(env) is None


@pytest.mark.parametrize("env", [SLURM, OPEN_MPI, PODS, GKE_TPU, SLURM | ADDRESS])
def test_jobs_are_found(start, env):
    assert start(env) == FOUND


def test_a_process_alone_on_its_host_has_all_of_its_gpus(start):
    alone = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}
    assert start(alone) == {"local_device_ids": list(range(8))}
    assert start(alone | {"CUDA_VISIBLE_DEVICES": "2,3"}) == {"local_device_ids": [0, 1]}
    assert start(alone | {"JAX_LOCAL_DEVICE_IDS": "4"}) == FOUND
    assert start(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == FOUND  # no GPUs


def test_what_is_told_wins(start):
    assert start(TOLD) == start(TOLD | SLURM) == ("first:1234", 8, 7)
    told = Job("here:1", 2, 0)
    assert start({}, told) == start(TOLD | SLURM, told) == ("here:1", 2, 0)
    assert start(SLURM, Job(processes=1)) is None
    assert start(TOLD, Job(process=3)) == ("first:1234", 8, 3)  # the rest is in the environment


def test_a_pod_that_cannot_ask_its_cluster_says_so(start, capsys):
    assert start(PODS, missing=["kubernetes"]) is None
    assert "install jax[k8s], or give every pod --coordinator" in capsys.readouterr().err
    told = PODS | ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert start(told) == ("first:1234", 4, 3)


@pytest.mark.parametrize(
    ("env", "job", "said"),
    [
        (ADDRESS, Job(), r"coordinator=first:1234: .* --processes \(or JAX_NUM_PROCESSES\) and"),
        (
            {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"},
            Job(),
            r"processes=4, process=1: .* --coordinator \(or JAX_COORDINATOR_ADDRESS\)",
        ),
        ({}, Job("a:1", 2), r"coordinator=a:1, processes=2: .* --process \(or JAX_PROCESS_ID\)"),
        ({}, Job(process=1), "needs --coordinator .* and --processes"),
        ({}, Job("a:1", 0, 0), "processes=0, process=0: expected 1 process or more"),
        ({}, Job("a:1", 2, 2), "process=2: expected a process from 0 to 1"),
        ({}, Job("a", 2, 1), "expected a coordinator HOST:PORT, as in a:1234"),
        (TOLD | {"JAX_PROCESS_ID": "x"}, Job(), "processes and process must be whole numbers"),
    ],
)
def test_half_of_a_job_is_refused(start, env, job, said):
    with pytest.raises(ConfigError, match=said):
        start(env, job)


def test_the_command_line_tells():
    argv = ["train", "--config=a.py", "--coordinator=a:1", "--processes=2", "--process=1", "--x=3"]
    assert split_job(argv) == (["train", "--config=a.py", "--x=3"], Job("a:1", 2, 1))
    with pytest.raises(ConfigError, match="invalid int value: 'two'"):
        split_job(["train", "--processes=two"])
    with pytest.raises(ConfigError, match="--process is given twice"):
        split_job(["train", "--process=0", "--process", "1"])


def begin(workdir, *arguments, program=toy_run.__file__, processes=2, late=0.0, second=()):
    """Processes of the toy, or of another program, one device each.

    The last may come late, and have words of its own, which replace those of the same name.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={processes}"
    command = [sys.executable, program, f"--config={toy_run.__file__}"]
    here = Path(toy_run.__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    children = []
    for i in range(processes):
        time.sleep(late if i == processes - 1 else 0.0)
        words = [f"--workdir={workdir}", *job, f"--process={i}", *arguments]
        if i == processes - 1:
            own = {word.partition("=")[0] for word in second}
            words = [*second, *(word for word in words if word.partition("=")[0] not in own)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen([*command, *words], **pipes, env=env))
    return children


def together(workdir, *arguments, **changes):
    """Their exit codes, outputs and errors."""
    return ends(begin(workdir, *arguments, **changes))


def ends(children):
    try:
        said = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *both) for child, both in zip(children, said, strict=True)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            ["--config.optim.lr=0.1"],
            r"another config than process 0 \(optim.lr: .*0.1",
        ),
        (["--workdir={other}"], "process 1 does not see there what process 0 has written"),
    ],
)
def test_processes_that_would_not_work_together_are_told_at_the_start(tmp_path, second, said):
    other = tmp_path / "other"
    second = [word.format(other=other) for word in second]
    first, last = together(tmp_path / "run", program=patient_run(tmp_path), second=second)
    assert (first[0], last[0]) == (1, 1), (first, last)
    assert re.search(f"error of process 1 of 2 .*: .*{said}", last[2]), last
    assert re.search(f"process 1 on .* failed: .*{said}", first[2]), first
    assert not checkpoint.any_saved(tmp_path / "run") and not checkpoint.any_saved(other)


def test_processes_with_other_packages_are_told_with_another_python_not(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for name, told in (("jax", True), ("python", False)):
        firsts = resolved(toy_run.get_config())
        firsts["versions"][name] = "0.1"
        monkeypatch.setattr(agreement, "_of_first", lambda mine, firsts=firsts: firsts)
        raises = pytest.raises(ConfigError, match=rf"other packages than process 0 \({name}: 0.1")
        with raises if told else contextlib.nullcontext():
            agreement.check_command(toy_run.get_config())


def patient_run(tmp_path):
    """The toy, with less patience for a shared folder."""
    script = tmp_path / "patient.py"
    script.write_text(
        "import sys, toy_run\nfrom launch import command\n"
        "from point_jax.training import agreement\nagreement.PATIENCE = 2.0\n"
        "sys.exit(command.run(toy_run.main, sys.argv, None))\n"
    )
    return script


def test_a_process_that_comes_late_is_waited_for(tmp_path):
    for code, _, error in together(tmp_path, "--config.train.steps=6", late=8):
        assert code == 0 and "no sign" not in error, error


def test_one_process_writes_and_each_says_what_ends_it(tmp_path):
    first, second = together(tmp_path, "--config.train.steps=6")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "training on 2 cpu device(s)" in first[1] and "finished: 6 steps" in first[1]
    assert "step" not in second[1] and "finished" not in second[1]
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 7), 6]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1

    bad = together(tmp_path / "bad", "--config.data.nan=(2,12)", "--config.train.steps=12")
    for number, (code, _, error) in enumerate(bad):
        wanted = f"error of process {number} of 2 on {socket.gethostname()}: 3 steps in a row"
        assert code == 1 and wanted in error, error
    assert os.listdir(tmp_path / "bad" / "checkpoints")


HANGS = "no batch for 2 s (being read: scene_7)"


@pytest.mark.parametrize(
    ("arguments", "who", "why"),
    [
        (["--config.data.fails=(1,5)"], 1, "scene_7: coord.npy is cut off"),
        (["--config.data.fails=(0,5)"], 0, "scene_7: coord.npy is cut off"),
        (["--config.data.lost=(1,5)"], 1, "s3://bucket cannot be used any more"),
        (["--config.data.hangs=(1,5)", "--config.data.patience=2.0"], 1, HANGS),
    ],
)
def test_a_process_that_fails_takes_the_others_with_it(tmp_path, arguments, who, why):
    """Instead of leaving them in a sum that never ends; all say who it was and why."""
    codes = together(tmp_path, "--config.train.steps=1000", *arguments)
    host, expected = socket.gethostname(), 200 if "lost" in arguments[0] else 1
    for number, (code, _, error) in enumerate(codes):
        whose = why if number == who else f"process {who} on {host} failed: {why}"
        assert code == expected, error
        assert f"error of process {number} of 2 on {host}: {whose}" in error, error
        assert "Traceback" not in error


LONG = "--config.train.steps=100", "--config.data.seconds=0.05"


def test_a_process_that_fails_after_the_others_have_finished_is_heard(tmp_path):
    """Those wait for it, and say why it failed; one that takes long does not end them."""
    code = """
import sys, time
from launch import command
from point_jax.training import mesh, peers
peers.SILENT, peers.PERIOD = 1.0, 0.5
def main(argv):
    argv, job = command.split_job(argv)
    mesh.start_processes(job)
    if job.process == 0:
        time.sleep(4)
        raise command.ConfigError("no space for the last line")
    return 0
sys.exit(command.run(main, sys.argv, None))
"""
    for fails in (True, False):
        script = tmp_path / f"{fails}.py"
        script.write_text(code if fails else code.replace("raise", "return 0;"))
        first, second = ends(begin(tmp_path, program=script))
        assert (first[0], second[0]) == ((1, 1) if fails else (0, 0)), (first, second)
        assert "given no sign" not in first[2]
        assert ("process 0 on" in second[2]) == fails
        assert "Traceback" not in first[2] + second[2]


def test_a_process_that_is_gone_before_its_first_sign_is_named(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text("""
import os, signal, sys, time
from launch import command
from point_jax.training import mesh, peers
peers.SILENT, peers.PERIOD = 1.0, 0.5
_, job = command.split_job(sys.argv)
if job.process == 1:
    peers.watch = lambda: os.kill(os.getpid(), signal.SIGKILL)
mesh.start_processes(job)
time.sleep(3)
peers.end(0)
""")
    (code, _, error), (killed, *_) = ends(begin(tmp_path, program=script))
    assert (code, killed) == (0, -signal.SIGKILL), error
    first = f"warning of process 0 of 2 on {socket.gethostname()}"
    assert f"{first}: process 1 of 2 has given no sign for 1 s" in error


def test_a_sum_whose_other_half_is_gone_may_be_the_fault_of_another_process():
    """Then JAX has its time to notice; also where the error is of a library in between."""
    broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    wrapped = checkpoint.CheckpointError("a checkpoint could not be written")
    wrapped.__cause__ = broken
    assert peers._may_be_another(broken) and peers._may_be_another(wrapped)
    assert peers._may_be_another(jax.errors.JaxRuntimeError("INTERNAL: Barrier failed"))
    assert not peers._may_be_another(ValueError("no space for the last line"))
    assert not peers._may_be_another(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    assert [code for code, *_ in together(workdir, *LONG)] == [0, 0]
    return workdir


@pytest.mark.parametrize(("who", "processes"), [(0, 2), (1, 3)])
def test_a_process_that_is_killed_ends_the_job(tmp_path, who, processes):
    """Within a minute, with a code that schedulers start again; and nothing is lost then."""
    arguments = *LONG, f"--config.train.batch={processes}"
    whole, tmp_path = tmp_path / "whole", tmp_path / "killed"
    assert {code for code, *_ in together(whole, *arguments, processes=processes)} == {0}

    children = begin(tmp_path, *arguments, processes=processes)
    wait_for_a_save(tmp_path)
    children[who].kill()
    killed = time.monotonic()
    codes = ends(children)
    assert time.monotonic() - killed < 60
    assert codes[who][0] == -signal.SIGKILL
    left = [child for i, child in enumerate(codes) if i != who]
    assert {code for code, *_ in left} == {-signal.SIGABRT}, left
    if who == 0:  # it holds what the processes know of one another
        assert all("the leader task was preempted/died" in error for *_, error in left), left
    else:
        host = socket.gethostname()
        named = f"warning of process 0 of 3 on {host}: process 1 of 3 on {host} has given"
        assert named in left[0][2], left
        assert all("unhealthy (stopped sending heartbeats):\n1\n" in e for *_, e in left), left

    assert {code for code, *_ in together(tmp_path, *arguments, processes=processes)} == {0}
    assert digest(tmp_path) == digest(whole)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, unbroken):
    """And one process on as many devices goes on, with the same bits, each step once."""
    children = begin(tmp_path, *LONG)
    wait_for_a_save(tmp_path)
    children[1].terminate()
    first, second = ends(children)
    assert (first[0], second[0]) == (143, 143), (first, second)
    stopped = re.search(r"stopped by SIGTERM after step (\d+) of 100, saved", first[1])
    assert stopped and (tmp_path / "checkpoints" / stopped[1]).is_dir()

    ((code, said, error),) = ends([begin_alone(tmp_path)])
    assert code == 0 and f"going on after step {stopped[1]} of 100" in said, error
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 101), 100]
    assert digest(tmp_path) == digest(unbroken)


def test_what_one_process_began_two_go_on_with_past_a_damaged_checkpoint(tmp_path, unbroken):
    """Both from the one before, with the same bits."""
    alone = begin_alone(tmp_path)
    wait_for_a_save(tmp_path, 2)
    alone.terminate()
    assert [code for code, *_ in ends([alone])] == [143]
    before, newest = saved(tmp_path)[-2:]
    cut_file(newest)

    first, second = ends(begin(tmp_path, *LONG))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "cannot read checkpoint" in first[1] + first[2]
    assert f"going on after step {before.name} of 100" in first[1]
    assert newest.with_name(f"{newest.name}.unreadable").is_dir()
    assert digest(tmp_path) == digest(unbroken)


def begin_alone(workdir):
    """One process with as many devices as `begin` has in all."""
    arguments = f"--config={toy_run.__file__}", f"--workdir={workdir}", *LONG
    return subprocess.Popen(
        [sys.executable, toy_run.__file__, *arguments],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "NPROC": "16"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def saved(workdir):
    return checkpoint.complete_steps(workdir / checkpoint.FOLDER)


def wait_for_a_save(workdir, number=1):
    deadline = time.monotonic() + 120
    while len(saved(workdir)) < number and time.monotonic() < deadline:
        time.sleep(0.1)


def digest(workdir):
    done = finished(workdir)
    assert done is not None
    return done["params_digest"]
