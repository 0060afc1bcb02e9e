"""What a device of each kind can do at best, from its maker's documents.

A device is what JAX calls one: a TPU chip, half a chip of TPU7x, a GPU. Where a v4 is there JAX
joins its two cores to one device; compilers without one take each for itself, as here. Rates are
those of the documents, which no program reaches.

Sources, read in 2026:
  TPU  docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: "Peak compute per chip (bf16)", HBM,
       "Bidirectional ICI bandwidth per chip", of which half goes either way; v4's ICI also in
       arXiv:2304.01433 (six links of 50 GB/s). Between slices: "Data center network bandwidth" of
       these pages, a chip's share (v4 and v6e: of a host's two network cards, as in "How to Scale
       Your Model", jax-ml.github.io/scaling-book, part 2, from which is also that a dimension
       closes to a ring at 16 chips on v5e and v6e, and in whole cubes of 4 on v4, v5p and TPU7x).
  H100 NVIDIA's data sheet of the H100 SXM: dense rates (it prints those with sparsity, twice as
       high), 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways together; between hosts one ConnectX-7
       of 400 Gbit/s a GPU, as in NVIDIA's DGX H100. Memory: what nvidia-smi says of one, times
       the share that JAX takes with XLA_CLIENT_MEM_FRACTION=0.92, as launch/scripts set it (0.75
       where nothing is set).

`start` and `turn` of the H100 are measured: the profile of a base step on an H200 (JAX 0.11.2, CUDA
graphs on) has 30,233 kernels shorter than 3 us, the median 2.0 us from one to the next, and 3,388
turns of loops, on average 26 us with the gap before. TPUs run loops by themselves; what a kernel
costs to start there is not known here.
"""

from dataclasses import dataclass
from typing import Literal

GIGA, TERA, MIB, GIB = 1e9, 1e12, 2**20, 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of device. Rates are a second.

    Attributes:
      platform: JAX's name.
      half_flops: of products of bfloat16 numbers.
      single_flops: of products of float32 numbers as JAX makes them unless told otherwise: TPUs
        round to bfloat16, NVIDIA's to TF32.
      exact_flops: of float32 products at the highest precision: on TPUs six of bfloat16.
      memory: bytes of the device's memory.
      bandwidth: bytes between it and the device.
      links: bytes out of a device to others of its slice (TPU) or host (GPU), over all its links.
      network: bytes out of a device to other slices or hosts.
      axes: dimensions of a slice; 0 where every device reaches every other alike.
      ring: a dimension's links close to a ring where it is a multiple of this.
      per_chip: devices of a chip.
      start: seconds from one short kernel to the next.
      turn: seconds that a loop waits for the host to look whether it goes on.
    """

    platform: Literal["tpu", "cuda", "cpu"]
    half_flops: float
    single_flops: float
    exact_flops: float
    memory: float
    bandwidth: float
    links: float
    network: float
    axes: int = 0
    ring: int = 1
    per_chip: int = 1
    start: float = 0.0
    turn: float = 0.0


def _tpu(
    flops: float, memory: float, bandwidth: float, links: float, network: float, **shape: int
) -> Chip:
    """From TFLOP/s, GiB, GB/s, GB/s both ways and Gbit/s of a device."""
    flops *= TERA
    rates = bandwidth * GIGA, links / 2 * GIGA, network / 8 * GIGA
    return Chip("tpu", flops, flops, flops / 6, memory * GIB, *rates, **shape)


CHIPS = {
    # Half a chip: 275 TFLOP/s, 32 GiB at 1,200 GB/s, ICI of 600 GB/s, DCN of 50 Gbit/s.
    "v4": _tpu(275 / 2, 16, 600, 300, 25, axes=3, ring=4, per_chip=2),
    "v5e": _tpu(197, 16, 819, 400, 25, axes=2, ring=16),
    "v5p": _tpu(459, 95, 2765, 1200, 50, axes=3, ring=4),
    "v6e": _tpu(918, 32, 1638, 800, 100, axes=2, ring=16),
    # Half a chip: 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, ICI of 1,200 GB/s, DCN of 100 Gbit/s.
    "tpu7x": _tpu(2307 / 2, 96, 3690, 600, 50, axes=3, ring=4, per_chip=2),
    "h100": Chip(
        "cuda",
        half_flops=989.4 * TERA,
        single_flops=494.7 * TERA,
        exact_flops=66.9 * TERA,
        memory=0.92 * 81_559 * MIB,
        bandwidth=3352 * GIGA,
        links=450 * GIGA,
        network=50 * GIGA,
        start=2.0e-6,
        turn=26e-6,
    ),
}
