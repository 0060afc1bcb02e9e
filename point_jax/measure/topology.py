"""Devices that are not there: XLA compiles for their names.

Names:
  v5e:4x8        a TPU slice of so many chips: two dimensions for v5e and v6e, three for v4, v5p and
                 tpu7x; chips of v4 and tpu7x are two devices each
  2*v5e:16x16    two such slices, joined by the network of the data centre
  h100:4x8       four hosts of eight GPUs
  cpu:8          eight virtual devices of this machine's CPU
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from point_jax.measure.chips import CHIPS, Chip

CPU = "cpu"
MOST_CPU = 1024  # virtual devices: each has threads of its own
FORMS = "v5e:4x8, v5p:4x4x4, 2*v5e:16x16, h100:4x8 or cpu:8"

# What XLA asks about a GPU to compile for it: facts of the H100 SXM, compute capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_TARGETS = {"h100": _H100}

# libtpu asks the cloud's metadata and counts chips, unless told not to.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """Devices and how they hang together.

    Attributes:
      kind: a key of `CHIPS`, or "cpu".
      shape: chips of a slice along each dimension (TPU); hosts and GPUs of each; devices (CPU).
      slices: how many, of TPUs.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        many = f"{self.slices}*" if self.slices > 1 else ""
        return f"{many}{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip | None:
        """What a device can do; None for this machine's CPU, of which that is not known."""
        return CHIPS.get(self.kind)

    @property
    def size(self) -> int:
        """Devices, as JAX counts them."""
        per_chip = self.chip.per_chip if self.chip else 1
        return self.slices * math.prod(self.shape) * per_chip

    @property
    def domain(self) -> int:
        """Devices of a slice or host, which have faster links among them."""
        if self.chip is not None and self.chip.platform == "cuda":
            return self.shape[-1]
        return self.size // self.slices

    @property
    def links(self) -> float:
        """Bytes a second out of a device to others of its slice or host.

        Of a torus every dimension has two links a chip, of which a dimension that does not close to
        a ring leaves one for a sum around it.
        """
        chip = self.chip
        if chip is None or not chip.axes:
            return chip.links if chip else math.inf
        used = sum(0 if n == 1 else 1 + (n % chip.ring == 0) for n in self.shape)
        return chip.links * used / (2 * chip.axes) if used else math.inf

    def devices(self) -> list[Any]:
        """JAX's devices: only compiled for, except for a CPU's.

        Raises:
          ValueError: no such devices, or what XLA needs to compile for them is not installed.
        """
        if self.kind == CPU:
            return _cpu_devices(self.size)
        assert self.chip is not None
        found = (_tpu_devices if self.chip.platform == "tpu" else _gpu_devices)(self)
        if len(found) != self.size:
            raise ValueError(f"{self}: XLA makes {len(found)} devices of it, not {self.size}")
        return found


def parse(text: str, slices: int = 1) -> Topology:
    """The topology of a name.

    Args:
      text: see above.
      slices: where the name does not say it.

    Raises:
      ValueError: what is wrong with it, and how it should be.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if not found:
        raise ValueError(f"{text!r} names no topology; expected {FORMS}")
    many, kind, sizes = found.groups()
    if many and slices != 1:
        raise ValueError(f"{text!r} and slices={slices} both say how many slices; leave one out")
    shape, slices = tuple(int(n) for n in sizes.split("x")), int(many or slices)
    if kind not in (CPU, *CHIPS):
        raise ValueError(f"{text!r}: no chip {kind!r}; known are {', '.join((*CHIPS, CPU))}")
    if slices < 1 or min(shape) < 1:
        raise ValueError(f"{text!r}: every size must be at least 1")
    topology = Topology(kind, shape, slices)
    chip = topology.chip
    wanted, what = 1, "cpu:DEVICES"
    if chip is not None:
        wanted = chip.axes or 2
        what = f"{kind}:" + ("x".join("ABC"[:wanted]) if chip.axes else "HOSTSxGPUS")
    if len(shape) != wanted:
        raise ValueError(f"{text!r}: {kind} has {wanted} dimension(s), as in {what}")
    if chip is None and shape[0] > MOST_CPU:
        raise ValueError(f"{text!r}: expected {MOST_CPU} devices of this machine at most")
    if slices > 1 and (chip is None or not chip.axes):
        raise ValueError(f"{text!r}: only TPUs have slices")
    return topology


def _cpu_devices(number: int) -> list[Any]:
    """The first ones of this process; their number is fixed when JAX first asks for them."""
    with contextlib.suppress(RuntimeError):  # they are there already
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices(CPU)
    if len(devices) < number:
        raise ValueError(f"cpu:{number}: this process already has {len(devices)} CPU devices")
    return devices[:number]


def _tpu_devices(topology: Topology) -> list[Any]:
    _need("libtpu", topology, "tpu")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    return _described(
        topology, lambda: topologies.get_topology_desc(name, platform="tpu", **more).devices
    )


def _gpu_devices(topology: Topology) -> list[Any]:
    _need("jax_cuda13_plugin", topology, "dryrun-cuda")
    shape = "x".join(map(str, (1, *topology.shape)))
    target = _TARGETS[topology.kind]
    return _described(
        topology,
        lambda: (
            topologies.get_topology_desc(
                platform="cuda", topology=shape, target_config=target
            ).devices
        ),
    )


def _need(module: str, topology: Topology, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"compiling for {topology} needs {module}, which is not installed: "
            f"pip install 'point_jax[{extra}]' (in an environment of its own; no device is needed)"
        )


def _described(topology: Topology, describe: Callable[[], list[Any]]) -> list[Any]:
    try:
        return list(describe())
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise ValueError(f"{topology}: XLA knows no such topology ({' '.join(why[:1])})") from error
