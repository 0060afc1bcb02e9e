"""The programs that are measured: the encoder, a training step, and the making of their input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from point_jax.data.views import make_views
from point_jax.features.encoder import row_function, single_cloud
from point_jax.features.shapes import Shapes
from point_jax.measure.images import image_arrays, image_work
from point_jax.measure.inputs import Input
from point_jax.measure.work import (
    LevelCount,
    Work,
    add,
    count_level,
    count_levels,
    network_work,
    sonata_work,
)
from point_jax.models.functional import Params, functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.concerto import Concerto, ConcertoRow, point_losses
from point_jax.objectives.rows import SIDES, student
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.sonata_spec import SonataSpec
from point_jax.training.config import Config
from point_jax.training.mesh import data_mesh, put_batch, replicated
from point_jax.training.schedules import sonata_schedule
from point_jax.training.sharding import shardings
from point_jax.training.state import init_state
from point_jax.training.step import make_train_step

Levels = tuple[LevelCount, ...]


def _no_work(calls: Sequence[int]) -> dict[str, Work]:
    del calls
    return {}


@dataclass(frozen=True)
class Program:
    """A jitted function and what to call it with.

    Attributes:
      function: jitted.
      arguments: arrays on the device, or None.
      points: points that a call gets.
      shapes: static sizes, for people.
      static: what follows the arguments when it is lowered, not when it is called.
      carries: whether the first argument of a call is the first result of the call before.
      parameters: bytes of the network's parameters (the whole state in training).
      work: operations of a call by part, the mean over the calls of these numbers (from 0).
      settings: what the function is made from, where the command that uses it keeps its program
        for the next start (`training.programs`).
    """

    function: Any
    arguments: tuple[Any, ...]
    points: int
    shapes: str
    static: tuple[Any, ...] = ()
    carries: bool = False
    parameters: int = 0
    work: Callable[[Sequence[int]], dict[str, Work]] = field(default=_no_work)
    settings: tuple[Any, ...] = ()


def row_capacities(grid: np.ndarray, levels: int) -> tuple[int, ...]:
    """The slots of every level that an `Encoder` chooses for a single cloud of voxels (V, 3).

    Raises:
      ValueError: more voxels along an axis than a row may have.
    """
    if grid.max() >= 1 << 16:
        raise ValueError(f"{grid.max() + 1:,} voxels along an axis; a row has at most {1 << 16:,}")
    count = tuple(level.points for level in count_levels(grid, (0,) * levels))
    shapes = Shapes()
    shapes.grow([count])
    return shapes.find(count)


def forward(spec: PTv3Spec, cloud: Input) -> Program:
    """A cloud through the encoder, as `features.Encoder` runs it."""
    capacities = row_capacities(cloud.grid, len(spec.encoder))
    init, _ = functional(lambda rngs: PTv3(spec, rngs=rngs))
    params = jax.jit(init)(jax.random.key(0))
    coord = cloud.features[:, :3] if spec.rotary else None
    grid, features, coord, count = _padded((cloud.grid, cloud.features, coord), capacities[0])
    return Program(
        row_function(spec),
        (params, grid, features, coord, None, count, None),
        len(cloud.grid),
        _slots(capacities),
        static=(capacities,),
        parameters=_bytes(params),
        work=lambda _: network_work(spec, count_levels(cloud.grid, capacities)),
    )


def geometry(spec: PTv3Spec, cloud: Input) -> Program:
    """The integer structure of a cloud's row alone."""
    capacities = row_capacities(cloud.grid, len(spec.encoder))
    grid, count = _padded((cloud.grid,), capacities[0])

    build = partial(single_cloud, spec=spec.hierarchy(capacities, clouds=1))
    return Program(jax.jit(build), (grid, count), len(cloud.grid), _slots(capacities))


def views(spec: SonataSpec, cloud: Input) -> Program:
    """The views of one scene."""
    scene = jax.device_put(scene_arrays(cloud))

    @jax.named_scope("views")
    def make(scene, key):
        return make_views(scene, key, spec.views)

    arguments = scene, jax.random.key(0)
    return Program(jax.jit(make), arguments, len(cloud.coord), _view_slots(spec))


def train(objective: Sonata | Concerto, config: Config, batch: int, cloud: Input) -> Program:
    """The training step as the loop runs it, on all devices, in the middle of the run.

    Args:
      objective: of the config.
      config: the whole config.
      batch: scenes over all devices.
      cloud: every scene of the batch; their views differ. Images that the objective looks at are
        made for it (`measure.images`).

    Raises:
      ValueError: the devices cannot share the scenes equally.
    """
    mesh = data_mesh(config.mesh.fsdp)
    if batch % mesh.size:
        raise ValueError(f"{batch} scenes cannot be shared equally by {mesh.size} devices")
    key = jax.device_put(jax.random.key(config.seed), replicated(mesh))
    shapes = jax.eval_shape(lambda key: init_state(objective, key), key)
    lie = shardings(shapes, config.mesh, mesh)
    state = jax.jit(lambda key: init_state(objective, key), out_shardings=lie)(key)
    one = scene_arrays(cloud)
    spec, images = point_losses(objective).spec, {}
    if isinstance(objective, Concerto):
        one |= image_arrays(objective, config.data, cloud.coord)
        images = image_work(objective, shapes["teacher"], one)
    scenes = {name: np.stack([array] * batch) for name, array in one.items()}
    schedule = middle_schedule(config)

    def work(steps: Sequence[int]) -> dict[str, Work]:
        """The views of a step are a function of its number: they are made again and counted."""
        counted = []
        for step in steps:
            for slot in range(batch):
                sides = count_sides(objective, one, scene_key(key, step, slot), schedule)
                counted += [sonata_work(spec, *sides), images]
        total = add(*counted)
        return {part: work.times(1 / len(steps)) for part, work in total.items()}

    return Program(
        make_train_step(objective, config, mesh),
        (state, put_batch(mesh, scenes, batch), schedule, key),
        batch * len(cloud.coord),
        f"{batch} x ({_view_slots(spec)}{_image_slots(objective)})",
        carries=True,
        parameters=_bytes(state),
        work=work,
        settings=(
            *(objective, config.optim.copy_and_resolve_references().to_dict()),
            *(config.mesh.to_dict(), dict(mesh.shape)),
        ),
    )


def middle_schedule(config: Config) -> dict[str, np.float32]:
    """The scheduled values of a step in the middle of the run."""
    steps = config.train.steps
    values = sonata_schedule(config, steps)(steps // 2)
    return {name: np.float32(value) for name, value in values.items()}


def scene_key(key: jax.Array, step: int, slot: int) -> jax.Array:
    """The key of a scene in a step, as `training.step` makes it of the run's."""
    pass_key = jax.random.fold_in(jax.random.fold_in(key, step), 0)
    return jax.random.fold_in(pass_key, slot)


def count_sides(
    objective: Sonata | Concerto,
    scene: dict[str, np.ndarray],
    key: jax.Array,
    schedule: dict[str, Any],
) -> tuple[Levels, Levels, Levels]:
    """The levels of the teacher's row, the masked one and that of the local views."""
    found = _grids(objective, scene, key, schedule)
    clouds = point_losses(objective).rows.shape.clouds

    def count(side: str) -> Levels:
        return tuple(
            count_level(np.asarray(grid[:n]), np.asarray(cloud[:n]), clouds, len(grid))
            for grid, cloud, n in found[side]
        )

    return count("teacher"), count("masked"), count("local")


@jax.jit(static_argnums=0)
def _grids(objective, scene, key, schedule):
    scenes = {name: x[None] for name, x in scene.items()}
    row, _ = objective.prepare(scenes, key, schedule)
    row = row.points if isinstance(row, ConcertoRow) else row
    rows = point_losses(objective).rows
    sides = {"teacher": row.teacher, **{side: student(row, side) for side in SIDES}}
    return {
        name: [(level.grid, level.cloud, level.count) for level in rows.structure(side)]
        for name, side in sides.items()
    }


def scene_arrays(cloud: Input) -> dict[str, Any]:
    """A scene as the host ships it, without padding."""
    return {
        "coord": cloud.coord,
        "color": cloud.color,
        "normal": cloud.normal,
        "count": np.int32(len(cloud.coord)),
        "cut": np.float32(0),
        "scene": np.int32(0),
    }


def _padded(arrays: Sequence[np.ndarray | None], capacity: int) -> tuple[Any, ...]:
    """Arrays (V, ...) with zeros up to the capacity, on the device; and V."""
    points = next(len(array) for array in arrays if array is not None)
    more = [(0, capacity - points), (0, 0)]
    padded = tuple(None if array is None else np.pad(array, more) for array in arrays)
    return jax.device_put((*padded, np.int32(points)))


def _bytes(tree: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _slots(capacities: tuple[int, ...]) -> str:
    return f"slots {' '.join(f'{capacity:,}' for capacity in capacities)}"


def _image_slots(objective: Sonata | Concerto) -> str:
    if not isinstance(objective, Concerto):
        return ""
    return f", images of {objective.images.height} x {objective.images.width} patches"


def _view_slots(spec: SonataSpec) -> str:
    view = spec.views
    return (
        f"{view.global_count} views of {view.global_capacity:,} slots, "
        f"{view.local_count} of {view.local_capacity:,}"
    )
