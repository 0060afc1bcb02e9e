"""What a compiled program does on one device, kernel by kernel: products, bytes, collectives.

A kernel is an instruction that is started on its own: a fusion, a copy, a product. Its bytes are
those of the arrays in the device's memory that it reads and writes, whole tiles, each once; of an
array that it only cuts, gathers from or writes a part into, that part. What a cache saves is not
known here. Products are counted as in `measure.work`: a multiplication with its addition is two.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from point_jax.measure.hlo import Computation, Instruction, Module, Shape

Precision = Literal["half", "single", "exact"]
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
        *("partition-id", "replica-id", "opt-barrier", "add-dependency", "while", "conditional"),
        *("async-done", "async-update", "copy-done", "slice-done", "dynamic-slice-done"),
        *("dynamic-update-slice-done", "send-done", "recv-done", "all-reduce-done"),
        *("all-gather-done", "collective-permute-done"),
        *("fusion-done", "fusion-update"),
    }
)
# JAX 0.12's programs for GPUs start some fusions beside others and wait for them later.
_FUSIONS = frozenset({"fusion", "fusion-start"})
_MOVES = frozenset({"copy-start", "slice-start", "dynamic-slice-start"})
_PARTIAL = frozenset({"dynamic-slice", "slice", "gather"})  # read a part of their first operand
# Marks of the TPU compiler's own, without work.
_MARKS = re.compile(r"custom_call_target=\"(ConcatBitcast|Assume\w*|AsyncCollective\w*|Sharding)\"")
# Between slices TPUs leave what their share of a collective is to their hosts.
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}.*_xla_megascale_transfer_type="(\w+)"')
_PRODUCTS = re.compile(r"\bproducts_(\d+)\b")
_GEMM = re.compile(r'custom_call_target="__cublas\$')


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
      kind: one of `COLLECTIVES`.
      dtype: of what is sent; several joined by "+".
      size: bytes: the whole array, before a gathered or after a reduced one is cut; between slices
        a device's part of it.
      group: devices that take part; between slices one of each.
      domains: how many slices (TPU) or hosts (GPU) they are of.
      times: how often a step runs it.
    """

    kind: str
    dtype: str
    size: int
    group: int
    domains: int
    times: float


class Kernel(NamedTuple):
    """One kernel of the program.

    Attributes:
      name: of its instruction.
      op_name: JAX's scopes and primitive.
      flops: operations of one run by the precision of its products.
      size: bytes of one run.
      times: how often a step runs it.
      ahead: whether it moves an array to or from the chip's memory while other kernels run.
    """

    name: str
    op_name: str
    flops: dict[Precision, float]
    size: float
    times: float
    ahead: bool = False


@dataclass
class Costs:
    """A step on one device.

    Attributes:
      kernels: in the program's order.
      collectives: likewise.
      unknown: scopes of loops whose length the text does not tell; counted as running once.
      turns: how often a loop that ends where its data say looks whether to go on.
    """

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    turns: float = 0

    @property
    def flops(self) -> dict[Precision, float]:
        """Operations by precision."""
        total: Counter[Precision] = Counter()
        for kernel in self.kernels:
            for precision, count in kernel.flops.items():
                total[precision] += count * kernel.times  # type: ignore[assignment]
        return dict(total)

    @property
    def size(self) -> float:
        """Bytes moved."""
        return sum(kernel.size * kernel.times for kernel in self.kernels)

    @property
    def started(self) -> float:
        """Kernels started."""
        return sum(kernel.times for kernel in self.kernels)


def count(module: Module, domain: int = 0) -> Costs:
    """Counts a program.

    Args:
      module: its text, parsed.
      domain: devices of a slice or host, numbered one after the other; 0: there is one.
    """
    return _Walk(module, domain).run(module.computations[module.entry])


class _Walk:
    """The program from its entry on, loops as often as they run."""

    def __init__(self, module: Module, domain: int):
        self._module, self._domain = module, domain

    def run(self, computation: Computation, times: float = 1) -> Costs:
        found = Costs()
        for instruction in computation:
            self._add(found, instruction, computation, times)
        return found

    def _add(self, found: Costs, this: Instruction, around: Computation, times: float) -> None:
        called = [self._module.computations[name] for name in this.called if name in self]
        match this.opcode:
            case "while":
                trips = self._module.trips(this, around)
                if trips is None:
                    found.unknown.append(this.op_name or this.name)
                if self._module.ends_by_data(this, around):
                    found.turns += times * ((1 if trips is None else trips) + 1)
                for inner in called:
                    _extend(found, self.run(inner, times * (1 if trips is None else trips)))
            case "conditional":
                # The dearest branch: a plan is for what may happen.
                _extend(found, max((self.run(inner, times) for inner in called), key=_weight))
            case "call" | "async-start":
                for inner in called:
                    _extend(found, self.run(inner, times))
            case _:
                self._add_kernel(found, this, around, times)

    def __contains__(self, name: str) -> bool:
        return name in self._module.computations

    def _add_kernel(
        self, found: Costs, this: Instruction, around: Computation, times: float
    ) -> None:
        sent = [i for i in self._sent(this) if i is not None]
        for collective, inside in sent:
            found.collectives.append(self._collective(collective, inside or around, times))
        if this.opcode in _FREE or _MARKS.search(this.attributes) or (sent and sent[0][0] is this):
            return
        if this.opcode == "recv" and _BETWEEN.search(this.attributes):
            return
        size, flops = self._size(this, around), self._flops(this, around)
        if size or flops:
            ahead = this.opcode in _MOVES
            found.kernels.append(Kernel(this.name, this.op_name, flops, size, times, ahead))

    # ---- Collectives.

    def _sent(self, this: Instruction) -> list[tuple[Instruction, Computation | None]]:
        """Collectives of an instruction, and the computation that they lie in if not around it.

        On TPUs one may be spread over fusions that do other work meanwhile: each holds a copy of
        it, and the first one its start.
        """
        if _kind(this.opcode) or (this.opcode == "send" and _BETWEEN.search(this.attributes)):
            return [(this, None)]
        if this.opcode not in _FUSIONS:
            return []
        inner = self._module.computations[this.called[0]]
        starts = any('"AsyncCollectiveStart"' in i.attributes for i in inner)
        whole = not any("async_collective_fusion_config" in i.attributes for i in inner)
        return [(i, inner) for i in inner if _kind(i.opcode) and (starts or whole)]

    def _collective(self, this: Instruction, around: Computation, times: float) -> Collective:
        if this.opcode == "send":
            return _between_slices(this, _operand(this, around, 0), times)
        sent = [shape for name in this.operands if (i := around.get(name)) for shape in i.shapes]
        groups = replica_groups(this.attributes)
        group = len(groups[0]) if groups else 1
        kind = _kind(this.opcode)
        size = sum(shape.size for shape in sent) * (group if kind == "all-gather" else 1)
        domains = (
            {device // self._domain for device in groups[0]} if self._domain and groups else ()
        )
        dtypes = "+".join(dict.fromkeys(shape.dtype for shape in sent))
        return Collective(kind, dtypes, size, group, max(1, len(domains)), times)

    # ---- Products.

    def _flops(self, this: Instruction, around: Computation) -> dict[Precision, float]:
        if this.opcode in _FUSIONS:
            total: Counter[Precision] = Counter()
            for name in this.called:
                inner = self._module.computations[name]
                for instruction in inner:
                    for precision, number in self._flops(instruction, inner).items():
                        total[precision] += number  # type: ignore[assignment]
            return dict(total)
        if this.opcode == "custom-call" and _GEMM.search(this.attributes):
            number = _gemm_flops(this, around)
        elif this.opcode == "custom-call" and (known := _PRODUCTS.search(this.op_name)):
            read = [shape for name in this.operands for shape in _shapes(around, name)]
            return {_precision(this, max(read, key=lambda shape: shape.elements)): float(known[1])}
        elif this.opcode == "dot":
            left = _operand(this, around, 0)
            contracted = math.prod(left.sizes[d] for d in this.numbers("lhs_contracting_dims"))
            number = 2.0 * this.shapes[0].elements * contracted
        elif this.opcode == "convolution":
            number = _convolution_flops(this, _operand(this, around, 0), _operand(this, around, 1))
        else:
            return {}
        return {_precision(this, _operand(this, around, 0)): number}

    # ---- Bytes.

    def _size(self, this: Instruction, around: Computation) -> float:
        if this.opcode in _FUSIONS:
            inner, results = self._module.computations[this.called[0]], this.shapes
            if this.opcode == "fusion-start":  # (operands, results, mark)
                results = results[len(this.operands) : -1]
            read = sum(
                self._read(inner, parameter, _shapes(around, name))
                for parameter, name in zip(inner.parameters, this.operands, strict=False)
            )
            return read + self._written(inner, inner.root, results)
        outputs = _stored(this.shapes)
        operands = [_stored(_shapes(around, name)) for name in this.operands]
        if this.opcode in _PARTIAL:
            return 2 * outputs + sum(operands[1:])
        if this.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if this.opcode == "scatter":
            return 2 * operands[-1] + sum(operands[len(operands) // 2 : -1])
        if this.opcode in _MOVES:  # (result, source, mark), or of a part (source, result, mark)
            part = min(this.shapes[:2], key=lambda shape: shape.stored)
            return sum(part.stored for end in this.shapes[:2] if not end.space)
        return outputs + sum(operands)

    def _read(self, inner: Computation, parameter: str, given: Sequence[Shape]) -> float:
        """Bytes that a fused computation reads of a parameter."""
        whole = _stored(given)
        if not whole:
            return 0
        total = 0.0
        waiting = [parameter]
        while waiting:
            name = waiting.pop()
            for user in inner.users.get(name, ()):
                first = user.operands[0] == name
                if user.opcode in ("bitcast", "custom-call") and (
                    user.opcode == "bitcast" or _MARKS.search(user.attributes)
                ):
                    waiting.append(user.name)
                elif user.opcode in _PARTIAL and first and name not in user.operands[1:]:
                    total += user.shapes[0].stored
                elif user.opcode == "dynamic-update-slice" and first:
                    continue  # written in place
                elif user.opcode == "scatter" and first and name not in user.operands[1:]:
                    total += _stored(_shapes(inner, user.operands[-1]) or given)  # may be added to
                elif user.opcode in _FUSIONS:
                    deeper = self._module.computations[user.called[0]]
                    places = [i for i, operand in enumerate(user.operands) if operand == name]
                    total += sum(self._read(deeper, deeper.parameters[i], given) for i in places)
                elif user.opcode not in ("tuple", "get-tuple-element"):
                    return whole
        return min(total, whole)

    def _written(self, inner: Computation, root: Instruction, given: Sequence[Shape]) -> float:
        """Bytes that a fused computation writes."""
        if root.opcode == "tuple":
            parts = [inner.get(name) for name in root.operands]
            if len(parts) == len(given) and all(parts):
                pairs = zip(parts, given, strict=True)
                return sum(self._written(inner, part, (shape,)) for part, shape in pairs if part)
            return _stored(given)
        while root.opcode == "bitcast" and (source := inner.get(root.operands[0])):
            root = source
        if root.opcode == "dynamic-update-slice" and _stored(given):
            return _stored(_shapes(inner, root.operands[1]) or given)
        if root.opcode == "scatter" and _stored(given) and len(given) == 1:
            return _stored(_shapes(inner, root.operands[-1]) or given)
        if root.opcode == "parameter" and len(given) == 1:
            return 0  # handed through
        return _stored(given)


def _extend(found: Costs, more: Costs) -> None:
    found.kernels += more.kernels
    found.collectives += more.collectives
    found.unknown += more.unknown
    found.turns += more.turns


def _weight(costs: Costs) -> float:
    return sum(costs.flops.values()) + costs.size


def _kind(opcode: str) -> str:
    """The kind of collective that an opcode is or starts; "" for others."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _between_slices(this: Instruction, part: Shape, times: float) -> Collective:
    """The collective whose share between slices an instruction sends, e.g. {1,2}x{0:3}."""
    found = _BETWEEN.search(this.attributes)
    assert found, this.name
    ends = [[int(end) for end in run.split(":")] for run in found[1].split(",")]
    slices = sum(run[-1] - run[0] + 1 for run in ends)
    kind = found[2].lower().replace("_", "-")
    size = part.size * (slices if kind == "all-gather" else 1)
    return Collective(kind, part.dtype, size, slices, slices, times)


def _shapes(around: Computation, name: str) -> tuple[Shape, ...]:
    instruction = around.get(name)
    return instruction.shapes if instruction else ()


def _operand(this: Instruction, around: Computation, place: int) -> Shape:
    return _shapes(around, this.operands[place])[0]


def _stored(shapes: Sequence[Shape]) -> int:
    """Bytes in the device's memory."""
    return sum(shape.stored for shape in shapes if not shape.space)


def _precision(this: Instruction, left: Shape) -> Precision:
    if "operand_precision={highest" in this.attributes:
        return "exact"
    return "single" if left.dtype in ("f32", "f64") else "half"


def _gemm_flops(this: Instruction, around: Computation) -> float:
    """Of a call of cuBLAS, from what its configuration says of the dimensions."""
    left, right = _operand(this, around, 0), _operand(this, around, 1)
    found = re.search(r'"dot_dimension_numbers":(\{.*?\})', this.attributes)
    numbers = json.loads(found[1]) if found else {}
    contracted = math.prod(left.sizes[int(d)] for d in numbers["lhs_contracting_dimensions"])
    shared = math.prod(left.sizes[int(d)] for d in numbers.get("lhs_batch_dimensions", ()))
    return 2.0 * left.elements * right.elements / (contracted * shared)


def _convolution_flops(this: Instruction, left: Shape, right: Shape) -> float:
    """Of a convolution, which is how TPUs' programs write every product of matrices.

    A spatial dimension counts the (output, tap) pairs whose input exists: dimensions of a batch of
    products are spatial ones with one such pair a matrix.
    """
    inputs, kernel, output = re.split(r"_|->", this.attribute("dim_labels"))
    window = dict(part.split("=") for part in this.attribute("window").split() if "=" in part)
    features = right.sizes[kernel.index("i")]
    pairs = 1.0
    for place, label in enumerate(sorted(c for c in output if c.isdigit())):

        def given(name: str, default: str, place: int = place) -> list[int]:
            value = window.get(name, "")
            return [int(n) for n in (value.split("x")[place] if value else default).split("_")]

        taps = right.sizes[kernel.index(label)]
        low, stride = given("pad", "0_0")[0], given("stride", "1")[0]
        base, reach = given("lhs_dilate", "1")[0], given("rhs_dilate", "1")[0]
        edge, outputs = left.sizes[inputs.index(label)], this.shapes[0].sizes[output.index(label)]
        if taps == 1 or outputs == 1:
            pairs *= max(taps, outputs)
            continue
        pairs *= sum(
            not (at := o * stride + t * reach - low) % base and 0 <= at // base < edge
            for o, t in itertools.product(range(outputs), range(taps))
        )
    rows = this.shapes[0].sizes[output.index("b")]
    filters = this.shapes[0].sizes[output.index("f")]
    groups = int(this.attribute("batch_group_count") or 1)
    return 2.0 * rows * filters * features * pairs / groups


def replica_groups(attributes: str) -> list[tuple[int, ...]]:
    """Groups of devices of a collective; [] if it does not say.

    It says them as `{{0,1},{2,3}}`, `[2,2]<=[4]T(0)` or, from JAX 0.12 on, by the axes of a mesh
    along which devices are of one group, `mesh['a'=2,'b'=2] {'b'}`.

    Raises:
      ValueError: some other way.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        axes = [axis.rsplit("=", 1) for axis in found[1].split(",")]
        axes = [(name.strip("'"), size) for name, size in axes]
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        along = [name.strip("'") for name in found[2].split(",") if name]
        if set(along) <= set(names):
            across = [d for d, name in enumerate(names) if name not in along]
            order = [*across, *(names.index(name) for name in along)]
            columns = math.prod(sizes[names.index(name)] for name in along)
            return _cut(sizes, order, columns)
    if found := re.search(r"replica_groups=\{(\{[^=]*?\})\}", attributes):
        groups = re.findall(r"\{([\d,]*)\}", found[1])
        return [tuple(int(n) for n in group.split(",") if n) for group in groups]
    pattern = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(pattern, attributes):
        sizes = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else list(range(len(sizes)))
        return _cut(sizes, order, int(found[2]))
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return [tuple(int(n) for n in found[1].strip("{}").split("},{")[0].split(","))]
    if found := re.search(r"replica_groups=(?!\{\})\S+(?: \{[^}]*\})?", attributes):
        raise ValueError(f"a collective's groups of devices are not understood: {found[0]}")
    return []


def _cut(sizes: Sequence[int], order: Sequence[int], columns: int) -> list[tuple[int, ...]]:
    """Numbers laid out by `sizes`, read with the axes in `order`, in runs of `columns`."""
    strides = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    devices = [
        sum(at * strides[d] for at, d in zip(place, order, strict=True))
        for place in itertools.product(*(range(sizes[d]) for d in order))
    ]
    return [tuple(devices[i : i + columns]) for i in range(0, len(devices), columns)]
