"""How long a step takes at least, from what it does and what a device can do.

Every kernel takes as long as its products at the peak rate or its bytes at the memory's, whichever
is longer, or as starting one takes, where that is known (GPUs); a loop that ends where its data say
waits for the host there. What TPUs move into the chip's memory while kernels run takes the time
that these leave to the memory, and more only where that does not suffice. Collectives take the
bytes that each device must send over its links, and nothing is hidden behind them. That is a bound
from below: what products of few columns waste, and that gathers of short rows and sorts are slower
than straight reading, is not in it.
"""

from collections import Counter
from dataclasses import dataclass

from point_jax.measure.chips import Chip
from point_jax.measure.cost import Collective, Costs, Kernel
from point_jax.measure.parts import OTHER, place_of
from point_jax.measure.topology import Topology

# Beside the parts of `measure.parts`.
COLLECTIVES, TURNS, AHEAD = "collectives", "waits for the host", "moves that nothing hides"
_BOTH_WAYS = ("all-reduce",)  # what is a reduce-scatter and an all-gather


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step.

    Attributes:
      products: all operations at their peak rates.
      memory: all bytes at the memory's rate.
      collectives: over links and network.
      turns: loops that wait for the host.
      kernels: each kernel by the longest of its three, added up, and moves that nothing hides.
      parts: the same by part of the project, the collectives, and the turns and moves where there
        are any.
    """

    products: float
    memory: float
    collectives: float
    turns: float
    kernels: float
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.kernels + self.collectives + self.turns


def estimate(costs: Costs, topology: Topology) -> Roofline:
    """The step of a program on a topology whose chip is known.

    Raises:
      ValueError: it is not.
    """
    chip = topology.chip
    if chip is None:
        raise ValueError(f"{topology}: what a device can do is not known")
    parts: Counter[str] = Counter()
    products = memory = ahead = spare = 0.0
    for kernel in costs.kernels:
        flop, move = _product_seconds(kernel, chip), kernel.size / chip.bandwidth
        products += kernel.times * flop
        memory += kernel.times * move
        if kernel.ahead:
            ahead += kernel.times * move
            continue
        place, longest = place_of(kernel.op_name), max(flop, move, chip.start)
        parts[place.part if place else OTHER] += kernel.times * longest  # type: ignore
        spare += kernel.times * (longest - move)
    if ahead > spare:
        parts[AHEAD] = ahead - spare  # type: ignore
    kernels = float(sum(parts.values()))
    sent = sum(c.times * collective_seconds(c, topology) for c in costs.collectives)
    turns = costs.turns * chip.turn
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1])) | {COLLECTIVES: sent}
    if turns:
        ordered[TURNS] = turns
    return Roofline(products, memory, sent, turns, kernels, ordered)


def _product_seconds(kernel: Kernel, chip: Chip) -> float:
    rates = {
        "half": chip.half_flops,
        "single": chip.single_flops,
        "exact": chip.exact_flops,
    }
    return sum(number / rates[precision] for precision, number in kernel.flops.items())


def collective_seconds(this: Collective, topology: Topology) -> float:
    """One run of a collective.

    Rings: a device sends (n - 1) / n of the array within its slice or host, and of its own share
    the same between them; a sum goes round twice.
    """
    chip = topology.chip
    if chip is None or this.group < 2:
        return 0.0
    rounds = 2 if this.kind in _BOTH_WAYS else 1
    inside = max(1, this.group // this.domains)
    near = rounds * this.size * (inside - 1) / inside / topology.links if inside > 1 else 0.0
    share = this.size / inside
    far = rounds * share * (this.domains - 1) / this.domains / chip.network
    return near + far
