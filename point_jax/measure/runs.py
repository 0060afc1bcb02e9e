"""Everything that is measured of a program, as one record of plain values."""

import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from point_jax.measure.breakdown import IDLE, read_events, record, sweep
from point_jax.measure.memory import measure_peak
from point_jax.measure.parts import DIRECTIONS, OTHER, PARTS, Place, instructions, module_name
from point_jax.measure.programs import Program
from point_jax.measure.timing import (
    cache_in,
    exchange_time,
    machine_speed,
    make,
    seconds,
    start_kept,
)
from point_jax.measure.work import Work

Record = dict[str, Any]

# A CUDA graph is one instruction to the profiler, whatever is in it.
_WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


class Caller:
    """Calls a compiled program, each time with the state that the call before has left."""

    def __init__(self, program: Program, compiled: Any) -> None:
        self._arguments, self._carries = program.arguments, program.carries
        self.compiled = compiled
        self.calls = 0

    def __call__(self) -> Any:
        out = self.compiled(*self._arguments)
        if self._carries:
            self._arguments = (out[0], *self._arguments[1:])
        self.calls += 1
        return out


def measure(
    program: Program,
    warmup: int,
    repeats: int,
    cache: Path | None = None,
    profile: Path | None = None,
) -> Record:
    """Compiles, starts again from the cache, runs and profiles.

    Args:
      program: what to measure; where it carries a state, its first argument is used up.
      warmup: calls before the timed ones, at least 1; memory is measured in the first.
      repeats: timed calls, at least 1.
      cache: where compiled programs are kept; None compiles afresh.
      profile: where the profile is kept; None throws it away.

    Returns:
      A record, described in docs/benchmark.md.
    """
    with ExitStack() as stack:
        fresh = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark_"))
        folder = cache or Path(fresh) / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        profile = profile or Path(fresh) / "profile"
        stack.enter_context(cache_in(folder))
        described = (*jax.tree.map(_describe, program.arguments), *program.static)
        # From one line of the code: the cache's key has the lines of all callers in it.
        made, again = (make(program.function, described, folder) for _ in range(2))
        second = again.lower + again.compile
        if program.settings:
            kept = start_kept(program.function, program.settings, described)
            second = second if math.isnan(kept) else kept
        call = Caller(program, made.compiled)
        _, peak = measure_peak(call, jax.local_devices()[0])
        for _ in range(warmup - 1):
            seconds(call)
        first = call.calls
        # The machine's speed drifts: it is measured between all calls.
        speed, exchange = machine_speed("float32"), exchange_time()
        times, speeds, exchanges = [], [speed()], []
        for _ in range(repeats):
            times.append(seconds(call)[1])
            if exchange:
                exchanges.append(exchange())
            speeds.append(speed())
        timed = range(first, call.calls)
        if jax.local_devices()[0].platform == "gpu":
            lowered = program.function.lower(*described)
            call.compiled = lowered.compile(compiler_options=_WITHOUT_GRAPHS)
            seconds(call)
        text = call.compiled.as_text()
        files = record(call, profile)
        known = instructions(text)
        spent, traced = sweep(read_events(files, module_name(text), known), known)
        work = program.work(timed)
    meanwhile = [t * (a + b) / 2 for t, a, b in zip(times, speeds[:-1], speeds[1:], strict=True)]
    parts = _parts(spent, traced, float(np.median(times)), work)
    needed, machine = parts["flop_needed"], float(np.median(meanwhile))
    return {
        "points": program.points,
        "shapes": program.shapes,
        "lower_s": made.lower,
        "compile_s": made.compile,
        "compiled_from_cache": made.from_cache,
        "second_start_s": second,
        "times_s": times,
        "median_s": float(np.median(times)),
        "min_s": min(times),
        "machine_flop": machine,
        "exchange_s": float(np.median(exchanges)) if exchanges else None,
        "machine_share": needed / machine if needed else None,
        "points_per_s": program.points / float(np.median(times)),
        "memory": _memory(made.compiled)
        | {"peak_bytes": peak.size, "how": peak.how, "parameter_bytes": program.parameters},
        "traced_s": traced,
        **parts,
    }


def _describe(x: Any) -> jax.ShapeDtypeStruct:
    """An argument without its data: a state that is used up can be lowered again."""
    sharding = x.sharding if isinstance(x, jax.Array) else None
    if not isinstance(sharding, NamedSharding):
        sharding = None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _memory(compiled: Any) -> Record:
    """What XLA has planned, in bytes; None where it does not tell."""
    plan = compiled.memory_analysis()
    names = ("temp", "argument", "output", "alias")
    return {f"{name}_bytes": getattr(plan, f"{name}_size_in_bytes", None) for name in names}


def _parts(
    spent: Mapping[Place | str, float], traced: float, median: float, work: Mapping[str, Work]
) -> Record:
    """Rows of the table by part, and their sums.

    The profiled call is slower than the others: its shares are taken, and the median's seconds.
    """
    scale = median / traced if traced else 0.0

    def row(part: str) -> Record:
        by = {way: spent.get(Place(part, way), 0.0) * scale for way in DIRECTIONS}
        total = sum(by.values()) if part != IDLE else spent.get(IDLE, 0.0) * scale
        needed, done = work.get(part, Work(0, 0))
        return {
            "part": part,
            "seconds": total,
            "share": total / median,
            **{f"{way}_s": by[way] for way in DIRECTIONS},
            "flop_needed": needed,
            "flop_done": done,
            "flops": needed / total if total and needed else None,
        }

    rows = [row(part) for part in (*PARTS, OTHER, IDLE)]
    needed = sum(w.needed for w in work.values())
    done = sum(w.done for w in work.values())
    return {
        "parts": [r for r in rows if r["seconds"] or r["flop_needed"]] if traced else [],
        "flop_needed": needed,
        "flop_done": done,
        "flops": needed / median if needed else None,
    }
