"""Seconds of a call by part, from a profile of it.

JAX's profiler writes an event for every instruction that runs, with its name: on CPU one for every
"thunk", on the thread that ran it (jaxlib 0.10), on accelerators one for every kernel. A sweep over
time gives each moment to the instructions that run in it, in equal shares where several threads or
streams run some; a loop's event counts only where none of its instructions runs. So no moment
counts twice, and the parts add up to the time from the first instruction to the last.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from point_jax.measure.parts import Instruction, Place

_FILES = "*.xplane.pb"
_FOLLOWS = "ThunkExecutor::Execute"  # on CPU, of some instructions one after the other
IDLE = "idle"  # moments without any instruction


class Event(NamedTuple):
    """An instruction that ran, times in nanoseconds."""

    name: str
    start: float
    end: float


def record(call: Callable[[], Any], folder: Path) -> list[Path]:
    """Runs `call` under the profiler until what it returns is ready.

    Returns:
      The files of this profile, in `folder`, as TensorBoard and Perfetto read it; it may hold
      others.
    """
    before = set(folder.rglob(_FILES))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        jax.block_until_ready(call())
    return sorted(set(folder.rglob(_FILES)) - before)


def read_events(
    files: Sequence[Path], module: str, known: Mapping[str, Instruction]
) -> list[Event]:
    """The events of a module's instructions in a profile.

    Args:
      files: of `record`.
      module: name of the program, see `parts.module_name`.
      known: the program's instructions.

    Returns:
      Those of the accelerators if there are any, else those of the host's threads.
    """
    host: list[Event] = []
    accelerator: list[Event] = []
    for file in files:
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            found = _plane_events(plane, module, known)
            (accelerator if plane.name.startswith("/device:") else host).extend(found)
    return accelerator or host


def _plane_events(plane: Any, module: str, known: Mapping[str, Instruction]) -> list[Event]:
    """Events of a device or of the host's threads.

    On CPU an instruction that goes on in other threads has an event until its own thread is free
    again, and a second one, "end: ...", when all is done: "_p" of the first is "_c" of the second.
    Before that second one the thread that did the last of it may go on with what follows, in an
    event of its own: then the instruction ended when that began.
    """
    found: list[tuple[Event, Any]] = []
    done: dict[Any, tuple[float, float]] = {}
    for line in plane.lines:
        follows = -1.0
        for event in sorted(line.events, key=lambda event: event.end_ns):
            stats = dict(event.stats)
            name = str(stats.get("hlo_op", ""))
            if name in known and stats.get("hlo_module", module) == module:
                found.append((Event(name, event.start_ns, event.end_ns), stats.get("_p")))
            elif event.name.startswith("end: ") and "_c" in stats:
                done[stats["_c"]] = follows, event.end_ns
            elif event.name == _FOLLOWS:
                follows = event.start_ns

    def whole(event: Event, mark: Any) -> Event:
        follows, end = done.get(mark, (event.end, event.end))
        return event._replace(end=max(event.end, follows if follows > event.start else end))

    return [whole(event, mark) for event, mark in found]


def sweep(
    events: list[Event], known: Mapping[str, Instruction]
) -> tuple[dict[Place | str, float], float]:
    """Seconds by place and `IDLE`; and their sum, from the first event to the end of the last."""
    moments = sorted(
        [(event.start, 1, i) for i, event in enumerate(events)]
        + [(event.end, 0, i) for i, event in enumerate(events)]
    )
    spent: dict[Place | str, float] = {}
    leaves: dict[int, Place] = {}
    loops: dict[int, Place] = {}  # in the order of their starts: the last is the innermost
    before = moments[0][0] if moments else 0.0
    for now, starts, i in moments:
        if now > before:
            active: list[Place | str] = list(leaves.values())
            if not active:
                active = [next(reversed(loops.values()))] if loops else [IDLE]
            for place in active:
                spent[place] = spent.get(place, 0.0) + (now - before) / len(active) * 1e-9
            before = now
        instruction = known[events[i].name]
        group = loops if instruction.is_container else leaves
        if starts:
            group[i] = instruction.place
        else:
            group.pop(i, None)
    return spent, sum(spent.values())
