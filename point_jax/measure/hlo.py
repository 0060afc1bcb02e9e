"""The text of a compiled program (`compiled.as_text()`) as computations of instructions.

XLA's own cost analysis counts the body of a loop once, however often it runs (jaxlib 0.10, TPU,
GPU and CPU alike), and says nothing on GPUs. So the text is read here: who calls whom, how often
loops run, which arrays lie in the device's memory and how much of it they take.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(
    r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([\d,]*)(?::((?:[A-Z]+\([^)]*\)|\([^)]*\))*))?\})?"
)
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PLANNED = re.compile(r"\bplanned_(\d+)\)*/while\b")  # also within jvp(...) and the like
_PLANNED_ITSELF = re.compile(_PLANNED.pattern + "$")
_WORD = re.compile(r"[\w.\-]+")


class Shape(NamedTuple):
    """An array: its element type, sizes, sizes of the tile that its minor dimensions fill, space.

    Space 0 is the device's memory; others are on the chip (TPU) or the host's.
    """

    dtype: str
    sizes: tuple[int, ...]
    minor_first: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Numbers that it holds."""
        return math.prod(self.sizes)

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return _bytes(self.dtype, self.elements)

    @property
    def stored(self) -> int:
        """Bytes that it takes: whole tiles."""
        sizes = [self.sizes[d] for d in self.minor_first] or list(self.sizes[::-1])
        for place, edge in enumerate(self.tile[::-1][: len(sizes)]):
            sizes[place] = -(-sizes[place] // edge) * edge
        return _bytes(self.dtype, math.prod(sizes))


def _bytes(dtype: str, elements: int) -> int:
    bits = _BITS.get(dtype) if dtype in _BITS else int((re.search(r"\d+", dtype) or "8")[0])
    return -(-elements * (bits or 0) // 8)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as the text writes it, tuples laid end to end."""
    found = []
    for dtype, sizes, minor, layout in _SHAPE.findall(text):
        tile, space = _TILE.search(layout), _SPACE.search(layout)
        found.append(
            Shape(
                dtype,
                tuple(int(size.strip("<=")) for size in sizes.split(",") if size),
                tuple(map(int, filter(None, minor.split(",")))),
                tuple(int(edge) for edge in tile[1].split(",") if edge.isdigit()) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
      name: of its result.
      opcode: what it does.
      type: of its result, as written.
      inside: what stands in its parentheses: names of operands, a constant's value.
      attributes: what follows.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    type: str
    inside: str
    attributes: str
    root: bool = False

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the result."""
        return shapes(self.type)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return tuple(_NAME.findall(self.inside))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        groups = _CALLED.findall(self.attributes)
        return tuple(itertools.chain.from_iterable(_WORD.findall(group) for group in groups))

    @property
    def op_name(self) -> str:
        """JAX's scopes and primitive; "" where XLA made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The value of `name=...`, without its braces; "" where there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip("{}") if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """The value of `name={1,2}`."""
        return tuple(int(n) for n in self.attribute(name).split(",") if n)


class Computation:
    """Instructions by name, in the text's order."""

    def __init__(self, instructions: dict[str, Instruction]):
        self._by_name = instructions

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Instruction:
        return self._by_name[name]

    def get(self, name: str) -> Instruction | None:
        """The instruction of a name."""
        return self._by_name.get(name)

    @cached_property
    def root(self) -> Instruction:
        """The one that makes the result."""
        return next((i for i in self if i.root), list(self)[-1])

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names by number."""
        found = [i for i in self if i.opcode == "parameter"]
        return tuple(i.name for i in sorted(found, key=lambda i: int(i.inside)))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


@dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      entry: name of the computation that is run.
      computations: all of them.
    """

    entry: str
    computations: dict[str, Computation]

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a `while` runs; None where the text cannot tell.

        XLA writes it down on CPUs and GPUs. A loop that ends where its data say has in its scope
        how often it runs for a full row (`geometry.loops.planned`). On TPUs it follows from the
        start and the bound of the counter; what is in such a scope may have another loop's: a
        search between two bounds looks like a counter that runs from one to the other.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        if itself := _PLANNED_ITSELF.search(loop.op_name):
            return int(itself[1])
        counted = self._counted(loop, around)
        if counted is not None:
            return counted
        planned = _PLANNED.findall(loop.op_name)
        return int(planned[-1]) if planned else None

    def ends_by_data(self, loop: Instruction, around: Computation) -> bool:
        """Whether how often a `while` runs is in its data, not in the program."""
        if _TRIPS.search(loop.attributes):
            return False
        itself = _PLANNED_ITSELF.search(loop.op_name)
        return itself is not None or self._counted(loop, around) is None

    def _counted(self, loop: Instruction, around: Computation) -> int | None:
        """Trips of a loop whose counter starts and ends at constants."""
        condition = self.computations.get(loop.attribute("condition").lstrip("%"))
        if condition is None or condition.root.opcode != "compare":
            return None
        compare, start = condition.root, around.get(next(iter(loop.operands), ""))
        if compare.attribute("direction") != "LT" or start is None:
            return None

        def value(instruction: Instruction | None, computation: Computation) -> int | None:
            while instruction is not None and instruction.opcode in ("copy", "bitcast"):
                instruction = computation.get(instruction.operands[0])
            if instruction is None or instruction.opcode != "constant":
                return None
            number = re.fullmatch(r"-?\d+", instruction.inside.strip())
            return int(number[0]) if number else None

        def of_start(element: Instruction | None) -> int | None:
            if element is None or element.opcode != "get-tuple-element" or start.opcode != "tuple":
                return None
            place = int(element.attribute("index"))
            return value(around.get(start.operands[place]), around)

        counter, bound = (condition.get(name) for name in compare.operands)
        first = of_start(counter)
        last = value(bound, condition)
        last = of_start(bound) if last is None else last
        return None if first is None or last is None else max(0, last - first)


def parse(text: str) -> Module:
    """Reads a program's text.

    Raises:
      ValueError: no computation in it is the entry.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", {}
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head := _COMPUTATION.match(line):
                name, lines = head[2], {}
                entry = name if head[1] else entry
            elif line.startswith("}") and name:
                computations[name] = Computation(lines)
            continue
        if found := _LINE.match(line):
            lines[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("the text holds no ENTRY computation")
    return Module(entry, computations)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    return Instruction(name, opcode, kind, rest[len(opcode) + 1 : close], rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)
