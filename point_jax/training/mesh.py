"""Devices and processes: a mesh of all devices of all processes, with the axes `data` and `fsdp`.

Scenes are split over both. The devices along `fsdp` share one copy of the state (`sharding`); along
`data` that copy is repeated.
"""

import glob
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from point_jax.training import peers
from point_jax.training.config import ConfigError

DATA, FSDP = "data", "fsdp"


@dataclass(frozen=True)
class Job:
    """What the command line says of the processes of a job; None where it says nothing.

    Attributes:
        coordinator: host:port of the first process, reached by all.
        processes: of the job; 1 keeps a process to itself, whatever the environment says.
        process: this one's number, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def start_processes(job: Job = Job(), env: Mapping[str, str] = os.environ) -> None:
    """Joins this process to the others of its job; does nothing when there are no others.

    Under SLURM (inside `srun`), Open MPI, GKE and other Kubernetes with indexed jobs, and on TPU
    slices, JAX finds the others by itself. Elsewhere every process is told: `job`, or
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. What is told wins over
    what is found. Call it before anything touches a device.

    Raises:
        ConfigError: only a part of the three is given, or they do not fit together.
    """
    told = _told(job, env)
    if told.processes == 1:
        return
    patience: Any = {"heartbeat_timeout_seconds": peers.HEARTBEAT}
    if told.processes is not None:
        jax.distributed.initialize(told.coordinator, told.processes, told.process, **patience)
    elif found := _found(env):
        devices = _all_of_a_host(env) if found in ("SLURM", "Open MPI") else None
        jax.distributed.initialize(local_device_ids=devices, **patience)
    peers.watch()


def _told(job: Job, env: Mapping[str, str]) -> Job:
    """What command line and environment say together; the command line comes first."""
    names = {
        "coordinator": "JAX_COORDINATOR_ADDRESS",
        "processes": "JAX_NUM_PROCESSES",
        "process": "JAX_PROCESS_ID",
    }
    given = vars(job)
    env_says = {key: env.get(name) for key, name in names.items()}
    if all(value is None for value in given.values()):
        # Launchers set the address beside what JAX finds: then it is only where to look.
        if names["processes"] not in env and _found(env):
            return job
        if all(value is None for value in env_says.values()):
            return job
    given = {key: env_says[key] if value is None else value for key, value in given.items()}
    said = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    if given["processes"] in (1, "1"):
        return Job(processes=1)
    missing = [f"--{key} (or {names[key]})" for key, value in given.items() if value is None]
    if missing:
        raise ConfigError(f"{said}: of several processes each needs {' and '.join(missing)} too")
    try:
        number, index = int(str(given["processes"])), int(str(given["process"]))
    except ValueError as error:
        raise ConfigError(f"{said}: processes and process must be whole numbers") from error
    if number < 1:
        raise ConfigError(f"{said}: expected 1 process or more")
    if not 0 <= index < number:
        raise ConfigError(f"{said}: expected a process from 0 to {number - 1}")
    address = str(given["coordinator"])
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{said}: expected a coordinator HOST:PORT, as in {address}:1234")
    return Job(address, number, index)


def _found(env: Mapping[str, str]) -> str:
    """What in the environment says that this process is one of several of a JAX job; "" if nothing.

    JAX's own detection is for jobs: on a laptop or in a batch script it would fail or wait.
    """

    def count(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdigit() else 1

    # Inside `sbatch` without `srun` there are SLURM_NTASKS tasks on paper and one process.
    if count("SLURM_STEP_NUM_TASKS") > 1:
        return "SLURM"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "tpu" in env.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu"):
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
        if "," in hosts or count("MEGASCALE_NUM_SLICES") > 1:
            return "GKE"
        # A TPU virtual machine learns of its pod from the metadata server, not from the
        # environment. JAX asks it; that works on a pod of one host too.
        on_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
        if on_tpu and "TPU_SKIP_MDS_QUERY" not in env and not hosts:
            return "TPU"
    # An indexed job; how many pods it has, JAX asks the cluster.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys() and not env.get(
        "TPU_WORKER_HOSTNAMES"
    ):
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        print(
            "this pod of an indexed job works alone: to join it to the others install jax[k8s], or "
            "give every pod --coordinator=HOST:PORT --processes=N --process=$JOB_COMPLETION_INDEX",
            file=sys.stderr,
            flush=True,
        )
    return ""


def _all_of_a_host(env: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a process that is alone on its host; None where processes share a host.

    JAX gives a process of SLURM or Open MPI the one GPU that has the process's number on the host,
    and would leave the others of the host idle.
    """
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks)
    gpus = [part for part in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    number = len(gpus) or int(env.get("SLURM_GPUS_ON_NODE", "0") or 0)
    if not alone or not number or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    return list(range(number))


def data_mesh(fsdp: int = 1) -> Mesh:
    """All devices as a mesh (`data`, `fsdp`), in a fixed order.

    The devices of a process are together, and so are those of a slice of TPUs: the ones that share
    a copy of the state are neighbours, and a process's scenes are those of its own devices.

    Args:
        fsdp: how many devices share a copy of the state.

    Raises:
        ConfigError: JAX finds no device of the platform that it is told to use, or their number is
            not a multiple of `fsdp`.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts when a platform has no device
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({error})" if str(error) else ""
        raise ConfigError(
            f"JAX finds no device with JAX_PLATFORMS={wanted}{why}: install JAX for that "
            "accelerator, as in pip install -e '.[cuda13]', or unset JAX_PLATFORMS"
        ) from error
    return arrange(devices, fsdp)


def arrange(devices: Sequence[Any], fsdp: int = 1) -> Mesh:
    """The same of given devices, e.g. those of a topology that is not here."""
    if len(devices) % fsdp:
        number = len(devices)
        fitting = [n for n in range(1, number + 1) if number % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - fsdp))
        raise ConfigError(
            f"config.mesh.fsdp={fsdp} does not divide {number} devices; use {nearest}"
        )
    ordered = sorted(
        devices, key=lambda at: (getattr(at, "slice_index", 0) or 0, at.process_index, at.id)
    )
    return Mesh(np.array(ordered).reshape(-1, fsdp), (DATA, FSDP))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(scenes: int, mesh: Mesh, each: int = 1) -> None:
    """A global batch must give every device the same number of rows.

    Args:
        scenes: of the global batch.
        mesh: the devices.
        each: scenes of a row.

    Raises:
        ConfigError: it does not.
    """
    if scenes < 1 or scenes % (mesh.size * each):
        raise ConfigError(
            f"config.train.batch={scenes} scenes cannot be shared equally by {mesh.size} devices"
            f"{f' with {each} scenes a row' if each > 1 else ''}; "
            f"use a multiple of {mesh.size * each}"
        )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], scenes: int) -> dict[str, jax.Array]:
    """Lays this process's scenes onto its devices.

    Args:
        mesh: from `data_mesh`.
        batch: arrays with the scenes of this process along the leading axis.
        scenes: scenes of the global batch, B.

    Returns:
        Global arrays (B, ...), split over the mesh's axes.

    Raises:
        ValueError: the processes' scenes do not add up to the global batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (scenes, *array.shape[1:]))
        for name, array in batch.items()
    }
