"""Which part of the project an instruction of a compiled program belongs to.

The code names its parts with `jax.named_scope`. XLA keeps the names in the metadata of the
instructions, inside the marks of JAX's transformations, as in
`jit(step)/transpose(jvp(losses))/blocks/while/body/closed_call/attention/dot_general`.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

PARTS = (
    *("views", "geometry", "projections", "convolution", "attention", "mlp", "blocks"),
    *("pooling", "heads", "losses", "images", "optimizer"),
)
WHOLE = "images"  # a part that keeps what lies inside it: an image encoder has attention, too
OTHER = "other"  # instructions outside all scopes
Direction = Literal["forward", "recomputed", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "recomputed", "backward")

# They hold other instructions, which have events of their own.
CONTAINERS = frozenset({"while", "conditional", "call"})

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_WORD = re.compile(r"[\w.\-]+")
_NAME = re.compile(r"%([\w.\-]+)")
_FAR = 64  # instructions that are looked at to place one without a scope


class Place(NamedTuple):
    """Where an instruction belongs: a part, or `OTHER`, and a direction."""

    part: str
    direction: Direction


class Instruction(NamedTuple):
    """An instruction of a program and where it belongs."""

    place: Place
    is_container: bool


class _Line(NamedTuple):
    opcode: str
    op_name: str
    called: tuple[str, ...]
    operands: tuple[str, ...]
    computation: str


def place_of(op_name: str) -> Place | None:
    """The place that an `op_name` tells by its innermost scope, or `WHOLE`; None without any."""
    words = [word for word in re.split(r"[/()]", op_name) if word in PARTS]
    if not words:
        return None
    part = WHOLE if WHOLE in words else words[-1]
    if "transpose(" not in op_name:
        return Place(part, "forward")
    again = "rematted_computation" in op_name  # `jax.checkpoint` in the backward pass
    return Place(part, "recomputed" if again else "backward")


def module_name(text: str) -> str:
    """The name of the module that `compiled.as_text()` shows."""
    return text.split(None, 2)[1].rstrip(",")


def instructions(text: str) -> dict[str, Instruction]:
    """Every instruction of a program by its name.

    An instruction without a scope of its own (XLA's copies, constants, parts of sums) belongs where
    most of the instructions inside it do, or else to what it reads, or what reads it, or what
    it lies in.

    Args:
      text: `compiled.as_text()`.
    """
    lines = _lines(text)
    callers = {called: name for name, line in lines.items() for called in line.called}
    users: dict[str, list[str]] = {}
    inside: dict[str, Counter[Place]] = {}
    for name, line in lines.items():
        for operand in line.operands:
            users.setdefault(operand, []).append(name)
        if place := place_of(line.op_name):
            inside.setdefault(line.computation, Counter())[place] += 1

    own: dict[str, Place] = {}
    for name, line in lines.items():
        votes = sum((inside.get(called, Counter()) for called in line.called), Counter())
        likely = [place for place, _ in votes.most_common(1)]
        if place := place_of(line.op_name) or next(iter(likely), None):
            own[name] = place

    def nearest(name: str, ways: Callable[[str], Sequence[str]]) -> Place | None:
        """The first place along operands or users, few steps away."""
        queue, seen = deque(ways(name)), {name}
        while queue and len(seen) < _FAR:
            here = queue.popleft()
            if here in own:
                return own[here]
            if here not in seen:
                seen.add(here)
                queue.extend(ways(here))
        return None

    known: dict[str, Place] = {}

    def find(name: str) -> Place:
        if name not in known:
            place = own.get(name)
            place = place or nearest(name, lambda n: lines[n].operands if n in lines else ())
            place = place or nearest(name, lambda n: users.get(n, ()))
            if place is None:
                caller = callers.get(lines[name].computation)
                place = Place(OTHER, "forward") if caller is None else find(caller)
            known[name] = place
        return known[name]

    return {
        name: Instruction(find(name), line.opcode in CONTAINERS) for name, line in lines.items()
    }


def _lines(text: str) -> dict[str, _Line]:
    found: dict[str, _Line] = {}
    computation = ""
    for text_line in text.splitlines():
        if text_line and not text_line[0].isspace():
            if match := _COMPUTATION.match(text_line):
                computation = match[1]
            continue
        match = _INSTRUCTION.match(text_line)
        if match is None:
            continue
        name, rest = match.groups()
        opcode, op_name = _OPCODE.search(f" {rest}"), _OP_NAME.search(rest)
        called = [word for group in _CALLED.findall(rest) for word in _WORD.findall(group)]
        operands = rest[opcode.end() - 1 :].partition(")")[0] if opcode else ""
        found[name] = _Line(
            opcode[1] if opcode else "",
            op_name[1] if op_name else "",
            tuple(called),
            tuple(_NAME.findall(operands)),
            computation,
        )
    return found
