"""A training step compiled for devices that are not there, and what can be known of it."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from point_jax.data.pipeline import batch_shapes
from point_jax.measure import cost, hlo, roofline
from point_jax.measure.images import image_arrays, image_work
from point_jax.measure.inputs import room_input
from point_jax.measure.programs import count_sides, scene_arrays, scene_key
from point_jax.measure.topology import Topology
from point_jax.measure.traced import kept_bytes
from point_jax.measure.work import add, sonata_work
from point_jax.objectives.concerto import Concerto, point_losses
from point_jax.objectives.sonata import Sonata
from point_jax.training.config import Config
from point_jax.training.mesh import arrange, check_batch, replicated
from point_jax.training.schedules import sonata_schedule
from point_jax.training.sharding import shardings
from point_jax.training.state import init_state
from point_jax.training.step import make_train_step

Record = dict[str, Any]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) (?:hbm|HBM)")
_EXCEEDS = re.compile(r"\(([\d.]+)([KMGT]?)\w*\) exceeds available \w+ \(([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and the shapes that it is called with.

    Attributes:
      objective: of the config.
      config: the whole config.
      topology: the devices' name.
      function: jitted.
      arguments: `jax.ShapeDtypeStruct`s with shardings: state, batch, schedule, key.
    """

    objective: Sonata | Concerto
    config: Config
    topology: Topology
    function: Any
    arguments: tuple[Any, ...]

    @property
    def rows(self) -> int:
        """Scenes of each device."""
        return self.config.train.batch // self.topology.size


def make_step(objective: Sonata | Concerto, config: Config, topology: Topology) -> Step:
    """The step as `launch.train` makes it, on a topology's devices.

    Raises:
      ValueError: no such devices.
      ConfigError: they cannot share the batch equally.
    """
    mesh = arrange(topology.devices(), config.mesh.fsdp)
    check_batch(config.train.batch, mesh, objective.scenes_per_row)
    everywhere, spread = replicated(mesh), NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def lying(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda x: lying(x, sharding), tree)

    key = jax.eval_shape(jax.random.key, np.uint32(0))
    state = jax.eval_shape(lambda key: init_state(objective, key), key)
    shapes = batch_shapes(config.data, config.train.batch)
    batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    schedule = {name: np.float32(0) for name in sonata_schedule(config, config.train.steps)(0)}
    arguments = (
        jax.tree.map(lying, state, shardings(state, config.mesh, mesh)),
        placed(batch, spread),
        placed(schedule, everywhere),
        placed(key, everywhere),
    )
    function = make_train_step(objective, config, mesh)
    return Step(objective, config, topology, function, arguments)


def dry_run(step: Step, draws: int) -> tuple[Record, str]:
    """Compiles and counts.

    Args:
      step: from `make_step`.
      draws: of a scene's views, over which needed operations are averaged; 0: not counted.

    Returns:
      A record of plain values, described in docs/scaling.md, and the program's text, "" where it
      does not fit.
    """
    topology, chip = step.topology, step.topology.chip
    record: Record = {
        "topology": str(topology),
        "devices": topology.size,
        "chips": topology.size // (chip.per_chip if chip else 1),
        "batch": step.config.train.batch,
        "scenes_per_device": step.rows,
        "scene_points": step.config.data.scene_points,
        "constants": dataclasses.asdict(chip) | {"links": topology.links} if chip else None,
        "memory": _state_memory(step),
    }
    started = time.perf_counter()
    lowered = step.function.lower(*step.arguments)
    record["lower_s"] = time.perf_counter() - started
    record["memory"]["activations"] = activation_bytes(step)
    started = time.perf_counter()
    limit = chip.memory if chip else None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needs = too_much(str(error))
        if needs is None:
            raise
        record["compile_s"] = time.perf_counter() - started
        record["memory"] |= {"needed": needs[0], "limit": needs[1], "fits": False}
        return record, ""
    record["compile_s"] = time.perf_counter() - started
    record["memory"] |= _planned(compiled, record["memory"], limit)
    text = compiled.as_text()
    record |= counted(text, topology)
    record |= _work(step, draws)
    record |= _rates(record)
    return record, text


def counted(text: str, topology: Topology) -> Record:
    """What a program's text tells: operations, bytes, collectives, and the roofline."""
    costs = cost.count(hlo.parse(text), topology.domain if topology.size > topology.domain else 0)
    merged: dict[tuple[Any, ...], list[float]] = {}
    for one in costs.collectives:
        total = merged.setdefault((one.kind, one.dtype, one.group, one.domains), [0.0, 0.0])
        total[0] += one.times
        total[1] += one.times * one.size
    line = roofline.estimate(costs, topology) if topology.chip else None
    return {
        "flop_done": sum(costs.flops.values()),
        "flop_by_precision": costs.flops,
        "bytes_moved": costs.size,
        "kernels": costs.started,
        "turns": costs.turns,
        "loops_of_unknown_length": sorted(set(costs.unknown)),
        "collectives": [
            dict(zip(("kind", "dtype", "group", "domains"), key, strict=True))
            | {"times": times, "bytes": size}
            for key, (times, size) in merged.items()
        ],
        "roofline": dataclasses.asdict(line) | {"seconds": line.seconds} if line else None,
    }


def too_much(message: str) -> tuple[float, float] | None:
    """Bytes needed and bytes there, of XLA's error that memory does not suffice; else None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = _TOO_MUCH.search(message) or _EXCEEDS.search(message)
    if not found:
        return None
    needs, needs_unit, has, has_unit = found.groups()
    return float(needs) * _UNITS[needs_unit], float(has) * _UNITS[has_unit]


def _bytes(tree: Any) -> int:
    """Of a tree of shapes, on one device."""
    leaves = jax.tree.leaves(tree)
    keys = jax.dtypes.prng_key
    return sum(
        math.prod(x.sharding.shard_shape(x.shape))
        * (8 if jnp.issubdtype(x.dtype, keys) else x.dtype.itemsize)
        for x in leaves
    )


def _state_memory(step: Step) -> Record:
    """Bytes on a device of what is there before the step runs, and of the gradient, whole."""
    state, batch = step.arguments[:2]
    return {
        "student": _bytes(state["student"]),
        "teacher": _bytes(state["teacher"]),
        "optimizer": _bytes((state["mu"], state["nu"])),
        "batch": _bytes(batch),
        "gradients": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["student"])),
    }


def activation_bytes(step: Step) -> int:
    """Bytes that are kept for the backward pass of one piece; pieces come one after the other."""
    objective = step.objective
    state, batch, schedule, key = step.arguments
    one = objective.scenes_per_row
    scene = {n: jax.ShapeDtypeStruct((one, *x.shape[1:]), x.dtype) for n, x in batch.items()}

    def row_of(scene: Any, key: Any, schedule: Any) -> Any:
        return jax.tree.map(lambda x: x[None], objective.prepare(scene, key, schedule)[0])

    rows = jax.eval_shape(row_of, scene, key, schedule)

    def targets_of(teacher: Any, rows: Any, key: Any, schedule: Any) -> Any:
        targets = objective.targets(teacher, rows, key, schedule, None)
        return jax.tree.map(lambda x: x[0], targets.pieces), targets.shared

    piece, shared = jax.eval_shape(targets_of, state["teacher"], rows, key, schedule)
    return kept_bytes(objective.loss, state["student"], piece, shared, key, schedule)


def _planned(compiled: Any, known: Mapping[str, Any], limit: float | None) -> Record:
    """What XLA has planned on a device."""
    plan = compiled.memory_analysis()
    fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
    needed = plan.argument_size_in_bytes + fresh + plan.temp_size_in_bytes
    needed += plan.generated_code_size_in_bytes
    state = sum(known[name] for name in ("student", "teacher", "optimizer", "batch"))
    rest = plan.temp_size_in_bytes - known["gradients"] - known["activations"]
    return {
        "arguments": plan.argument_size_in_bytes,
        "padding": max(0, plan.argument_size_in_bytes - state),  # unused ones are left out
        "outputs": fresh,
        "temporaries": plan.temp_size_in_bytes,
        "other_temporaries": max(0, rest),
        "code": plan.generated_code_size_in_bytes,
        "needed": needed,
        "limit": limit,
        "fits": limit is None or needed <= limit,
    }


def _work(step: Step, draws: int) -> Record:
    """Operations that are needed for the batch, and how full rows are: of a furnished room."""
    if not draws:
        return {"flop_needed": None, "flop_needed_by_part": {}, "rows_full": None}
    objective, config = step.objective, step.config
    spec = point_losses(objective).spec
    scene = scene_arrays(room_input(config.data.scene_points, config.views.grid_size))
    images = {}
    if isinstance(objective, Concerto):
        scene |= image_arrays(objective, config.data, scene["coord"])
        images = image_work(objective, step.arguments[0]["teacher"], scene)
    scheduled = sonata_schedule(config, config.train.steps)(config.train.steps // 2)
    schedule = {name: np.float32(value) for name, value in scheduled.items()}
    drawn, full = [], []
    for draw in range(draws):
        key = scene_key(jax.random.key(config.seed), draw, 0)
        sides = count_sides(objective, scene, key, schedule)
        drawn.append(add(sonata_work(spec, *sides), images))
        full.append([[level.points / level.capacity for level in side] for side in sides])
    parts = {part: work.needed / draws for part, work in add(*drawn).items()}
    parts = {part: config.train.batch * number for part, number in parts.items() if number}
    return {
        "flop_needed": sum(parts.values()),
        "flop_needed_by_part": parts,
        "rows_full": np.mean(full, axis=(0, 1)).tolist(),  # by level
    }


def _rates(record: Record) -> Record:
    """Points a second and utilisation at the roofline's step time."""
    line = record["roofline"]
    if not line or not line["seconds"]:
        return {"points_per_s": None, "utilisation_done": None, "utilisation_needed": None}
    peak = line["seconds"] * record["constants"]["half_flops"]
    needed = record["flop_needed"]
    return {
        "points_per_s": record["batch"] * record["scene_points"] / line["seconds"],
        "utilisation_done": record["flop_done"] / peak,
        "utilisation_needed": needed and needed / (peak * record["devices"]),
    }
