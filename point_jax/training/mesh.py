"""Devices and processes: one mesh axis, `data`, over all devices of all processes."""

import glob
import importlib.util
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from point_jax.training.config import ConfigError

AXIS = "data"


def _several_processes(env: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several of a JAX job."""

    def count(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdigit() else 1

    # Inside `sbatch` without `srun` there are SLURM_NTASKS tasks on paper and one process.
    if count("SLURM_STEP_NUM_TASKS") > 1 or count("OMPI_COMM_WORLD_SIZE") > 1:
        return True
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu") or not importlib.util.find_spec("libtpu"):
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or count("MEGASCALE_NUM_SLICES") > 1:
        return True
    # A TPU virtual machine learns of its pod from the metadata server, not from the environment.
    # JAX asks it; that works on a pod of one host too.
    on_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return on_tpu and "TPU_SKIP_MDS_QUERY" not in env


def start_processes(env: Mapping[str, str] = os.environ) -> None:
    """Joins this process to the others of the job; does nothing when there are no others.

    SLURM steps, Open MPI, GKE and TPU pods are found by JAX. By hand, give every process
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it before
    anything touches a device.

    Raises:
        ConfigError: JAX_COORDINATOR_ADDRESS is set and the other two are not.
    """
    if "JAX_COORDINATOR_ADDRESS" in env and not _several_processes(env):
        try:
            number, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"integers too ({type(error).__name__}: {error})"
            ) from error
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], number, index)
    elif _several_processes(env):
        jax.distributed.initialize()


def data_mesh() -> Mesh:
    """All devices along one axis `data`, each process's devices together, in a fixed order.

    Raises:
        ConfigError: JAX finds no device of the platform that it is told to use.
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
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: a whole copy on every device."""
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
        Global arrays (B, ...), split over the mesh's axis.

    Raises:
        ValueError: the processes' scenes do not add up to the global batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (scenes, *array.shape[1:]))
        for name, array in batch.items()
    }
