"""What decides what a program is: sources, versions, settings of JAX, machine, arguments."""

import hashlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "optax", "einops")
_VARIABLES = ("XLA_", "TF_", "OMP_", "NPROC")  # beginnings of the names of those that XLA reads
_MARGIN = 2.0  # seconds by which the clocks of files and processes may differ


def digest_sources(sources: Sequence[Path]) -> str | None:
    """SHA-256 of all files, with their names; None if one may have changed after it was imported.

    A file that is not older than the process may not be the one that the process runs.
    """
    started = process_start() - _MARGIN
    total = hashlib.sha256()
    for source in sources:
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        for file in files:
            try:
                content = file.read_bytes()
                changed = file.stat().st_ctime  # unlike `st_mtime`, no tool sets it back
            except OSError:
                return None
            if changed > started:
                return None
            name = file.relative_to(source) if source.is_dir() else file.name
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def process_start() -> float:
    """When this process started, in seconds since the epoch."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def surroundings(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Everything but the function that decides what is compiled."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [
        (x.shape, str(x.dtype), getattr(x, "weak_type", False), _sharding(x))
        if hasattr(x, "dtype")
        else type(x)  # a number
        for x in leaves
    ]
    devices = [(d.id, d.device_kind, d.client.platform_version) for d in jax.devices()]
    config = {k: v for k, v in jax.config.values.items() if "_cache" not in k}
    environment = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)}
    versions = [importlib.metadata.version(name) for name in _VERSIONS]
    cores = len(os.sched_getaffinity(0))
    return (
        *(str(tree), shapes, devices, sorted(config.items()), sorted(environment.items())),
        *(versions, sys.version, cores, cpu_features(), jax.sharding.get_abstract_mesh()),
    )


def cpu_features() -> list[str]:
    """Names and instruction sets of the processors: XLA runs what it loads without looking."""
    told = ("model name", "flags", "Features", "CPU ")  # the latter two on ARM
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return sorted({line for line in lines if line.startswith(told)})


def _sharding(x: Any) -> Any:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else getattr(x, "committed", False)


def digest(*parts: Any) -> str:
    """SHA-256 of what the parts' `repr` says."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
