"""The ready scripts: what starts again after which exit code, and that they are well formed."""

import ast
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from point_jax.data.sources import SOURCES

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "launch" / "scripts"
ERRORS = (1, 2, 126, 127, 130)  # told, or wanted: the same command would end so again


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Makes commands that note their arguments and run a line of shell."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def make(name: str, line: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        calls.touch()
        file = tmp_path / "bin" / name
        line = line.replace("CALLS", str(calls))
        file.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {calls}\n{line}\n')
        file.chmod(0o755)
        return calls

    return make


def bash(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPTS / script, *arguments], env=os.environ | env, text=True, capture_output=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda file: file.name)
def test_scripts_are_well_formed(script: Path):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, script], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


# --- keep_running.sh ---


def test_a_command_that_was_killed_is_started_again_until_it_has_finished(stub):
    # killed, ended by a signal that came to it alone, then done
    calls = stub("run", "case $(wc -l < CALLS) in 1) exit 137 ;; 2) exit 143 ;; esac")
    done = bash("keep_running.sh", "run", "--a=b c", PAUSE="0")
    assert done.returncode == 0 and "exit code 137, start 2" in done.stderr
    assert calls.read_text() == "--a=b c\n" * 3


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_is_not_tried_again(stub, code):
    calls = stub("run", f"exit {code}")
    assert bash("keep_running.sh", "run", PAUSE="0").returncode == code
    assert len(calls.read_text().splitlines()) == 1


def test_restarts_have_an_end(stub):
    calls = stub("run", "exit 134")
    done = bash("keep_running.sh", "run", PAUSE="0", MAX_RESTARTS="2")
    assert done.returncode == 134 and "after 2 restarts, giving up" in done.stderr
    assert len(calls.read_text().splitlines()) == 3


def test_sigterm_reaches_the_command_which_may_take_its_time(stub):
    calls = stub("run", "trap 'sleep 0.5; exit 143' TERM; echo up; while :; do sleep 0.1; done")
    keeper = subprocess.Popen(
        [SCRIPTS / "keep_running.sh", "run"], stdout=subprocess.PIPE, text=True
    )
    assert keeper.stdout is not None and keeper.stdout.readline() == "up\n"
    time.sleep(0.2)
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(60) == 143
    assert len(calls.read_text().splitlines()) == 1


def test_sigterm_between_two_starts_ends_the_keeper(stub):
    calls = stub("run", "exit 137")
    keeper = subprocess.Popen(
        [SCRIPTS / "keep_running.sh", "run"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PAUSE": "60"},
    )  # fmt: skip
    assert keeper.stderr is not None and "start 2 in 60 s" in keeper.stderr.readline()
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(20) == 137
    assert len(calls.read_text().splitlines()) == 1


def test_a_keeper_without_a_command_says_how_it_is_used():
    for arguments, env in ((), {}), (("true",), {"MAX_RESTARTS": "abc"}):
        done = bash("keep_running.sh", *arguments, **env)
        assert done.returncode == 2 and "keep_running.sh COMMAND..." in done.stderr


# --- slurm.sh ---


def slurm(**env: str) -> subprocess.CompletedProcess:
    return bash("slurm.sh", "--config=c", VENV="", SLURM_JOB_ID="17", **env)


@pytest.mark.parametrize("code", [0, *ERRORS])
def test_a_slurm_job_that_is_over_ends(stub, code):
    runs, queued = stub("srun", f"exit {code}"), stub("scontrol", "")
    assert slurm().returncode == code
    assert runs.read_text() == "--kill-on-bad-exit=1 python -u -m launch.train --config=c\n"
    assert not queued.read_text()


@pytest.mark.parametrize("who", ["node7: task 3", "node[7-9]: tasks 0-2"])
def test_a_slurm_job_whose_others_were_ended_for_an_error_is_over(stub, who):
    """Then srun ends with the signal that it gave the others."""
    stub("srun", f'echo "srun: error: {who}: Exited with exit code 1" >&2; echo out; exit 143')
    queued = stub("scontrol", "")
    done = slurm()
    assert done.returncode == 1 and "launch.train ended with 1" in done.stderr
    assert done.stdout == "out\n" and who in done.stderr
    assert not queued.read_text()


@pytest.mark.parametrize("code", [143, 137, 134])
def test_a_slurm_job_that_was_stopped_or_killed_is_queued_again(stub, code):
    stub("srun", f"exit {code}")
    queued = stub("scontrol", "")
    assert slurm().returncode == 0
    assert queued.read_text() == "requeue 17\n"
    last = slurm(SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert last.returncode == code and "giving up" in last.stderr
    assert queued.read_text() == "requeue 17\n"


# --- tpu_vm.sh ---


def test_tpu_hosts_get_the_arguments_as_they_were_given(stub, tmp_path):
    place = dict(NAME="sonata", ZONE="z", TYPE="v5litepod-32", RUNTIME="r")
    calls = stub("gcloud", 'printf "%s" "${@: -2:1}" > ' + str(tmp_path / "command"))
    sources = "--config.data.sources=({'kind': 'packed', 'root': 'gs://b/x y'},)"
    assert bash("tpu_vm.sh", "start", "--config=c", sources, **place).returncode == 0
    assert calls.read_text().startswith("compute tpus tpu-vm ssh sonata --worker=all --command=")
    command = (tmp_path / "command").read_text().removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", command], check=True)
    # What a host makes of it, with another program in the place of the loop.
    (tmp_path / "point_jax").mkdir()
    stub("setsid", "")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    log = tmp_path / "setsid.calls"
    for _ in range(100):
        if log.read_text():
            break
        time.sleep(0.1)
    assert log.read_text().endswith(f"-m launch.train --config=c {sources}\n")
    pid = tmp_path / "point_jax" / "keep_running.pid"
    assert int(pid.read_text()) > 0
    # While one is going on there is no second one, and nothing is installed over it.
    pid.write_text(str(os.getpid()))
    again = subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, capture_output=True)
    assert again.returncode == 1 and "a run is going on here; stop it first" in again.stderr
    stub("gcloud", f'command=${{@: -2:1}}; cd {tmp_path}; bash -c "${{command#--command=}}"')
    install = bash("tpu_vm.sh", "install", **place)
    assert install.returncode == 1 and "stop it first" in install.stderr
    assert pid.exists()
    calls = stub("gcloud", "")
    assert bash("tpu_vm.sh", "create", SPOT="1", **place).returncode == 0
    assert calls.read_text().splitlines()[-1].endswith("--version=r --spot --zone=z")
    assert bash("tpu_vm.sh", "dance", **place).returncode == 2
    assert "NAME= of the slice" in bash("tpu_vm.sh", "stop", ZONE="z").stderr


# --- Kubernetes ---


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_jobs_of_kubernetes_fit_together(name):
    content = yaml.safe_load((SCRIPTS / name).read_text())
    assert content["kind"] == "JobSet"
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pods = spec["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    # Told errors end the set; other ends of a pod start all pods again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == list(ERRORS)
    (told,) = content["spec"]["failurePolicy"]["rules"]
    assert told["action"] == "FailJobSet" and told["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["backoffLimit"] == 0 and pods["restartPolicy"] == "Never"
    (container,) = pods["containers"]
    assert container["command"] == ["python", "-u", "-m", "launch.train"]
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
    assert (ROOT / flags["config"].split(":")[0]).is_file()
    for source in ast.literal_eval(flags["config.data.sources"]):
        assert source["kind"] in SOURCES
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["volumes"]}
    limits, env = container["resources"]["limits"], {e["name"]: e for e in container["env"]}
    if name == "gke_tpu.yaml":
        topology = pods["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        x, y = map(int, topology.split("x"))
        assert spec["parallelism"] * limits["google.com/tpu"] == x * y
    else:
        assert env["JAX_NUM_PROCESSES"]["value"] == str(spec["parallelism"])
        names = content["metadata"]["name"], job["name"]
        host = env["JAX_COORDINATOR_ADDRESS"]["value"]
        assert re.fullmatch(r"\w+-\w+-0-0\.\w+:\d+", host)
        assert host.startswith(f"{names[0]}-{names[1]}-0-0.{names[0]}:")
