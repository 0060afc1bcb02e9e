"""The training loop: one function from a config and a folder to a finished run.

Whatever stops the process, starting it again with the same command goes on where the newest
checkpoint is and ends with the same bits: the state, the schedules and the order of the data are
functions of (config, step), and a checkpoint is written only after the metrics up to it are.
"""

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from point_jax import storage
from point_jax.storage import Mirror
from point_jax.training import agreement, checkpoint, mesh, metrics, sharding
from point_jax.training.config import (
    CONFIG,
    Config,
    ConfigError,
    check_config,
    compare_config,
    compare_contents,
    resolved,
    settle_config,
)
from point_jax.training.progress import progress
from point_jax.training.schedules import Schedule
from point_jax.training.signals import StopWaiting, stop_signals
from point_jax.training.state import HasInit, State, init_state
from point_jax.training.workdir import PICTURES, TENSORBOARD, TrainingStopped, only_run_in

Batch = dict[str, np.ndarray]
Values = dict[str, jax.Array]
Step = Callable[..., tuple[State, Values]]
WritePictures = Callable[[Any, Any, Path], None]
Measure = Callable[[int, Any], Mapping[str, float]]

FINISHED, FAILED = 0, 1  # exit codes; a run stopped by a signal gives 128 + its number
LOST = 200  # an object store went away: schedulers shall start again; xpk does from 127 on


def train(
    config: Config,
    workdir: Path,
    *,
    objective: HasInit,
    make_step: Callable[[Any, Config, Mesh], Step],
    make_schedule: Callable[[Config, int], Schedule],
    make_batches: Callable[..., Iterator[Batch]],
    load_initial: Callable[[Path, Any], dict[str, Any]] = checkpoint.load_weights,
    load_frozen: Callable[[Any], dict[str, Any]] | None = None,
    prepare_pictures: Callable[[], WritePictures] | None = None,
    prepare_measure: Callable[[], Measure] | None = None,
    measure_every: int = 1,
) -> int:
    """Trains an objective; starts, resumes or only reports, depending on what the folder holds.

    Everything that can be wrong is looked at before the first step, and `config.json` is written
    only then; it binds the run from its first checkpoint on.

    Args:
        config: the whole config; read here are `seed`, `init_from`, `train`, `checkpoint`, `mesh`,
            `data`.
        workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `pictures/`;
            on this machine, or in an object store, see `storage`.
        objective: has `init(key) -> (student, teacher)` and `scenes_per_row`; the rest is between
            it and `make_step`.
        make_step: `(objective, config, mesh) -> step`, and `step(state, batch, schedule, key) ->
            (state, metrics)` is jitted. The state comes and goes as `sharding.shardings` says,
            `batch` holds global arrays (B, ...) split over the mesh,
            `schedule` float32 scalars, `key` is the run's. `metrics` is a flat dict of float32
            scalars on the device with `loss`, `bad_steps` and `bad_steps_in_a_row` as in the new
            state, and `points`, the number of points of all scenes, for the speed.
        make_schedule: `(config, steps) -> schedule`, see `schedules`.
        make_batches: `(config.data, seed, scenes, start, process_index, process_count) ->` the
            batches of this process from batch number `start` on, one a step, without end.
        load_initial: `(config.init_from, template) -> weights`: `student` and `teacher` that the
            run starts from, or parts of their trees; the rest starts afresh.
        load_frozen: `(template) -> weights`: parts of those trees that a new run has from elsewhere
            in any case, as the weights of an image encoder.
        prepare_pictures: called by the first process before the first step, to load what the
            pictures show. It gives a function that is called once at the end with the untrained
            teacher's parameters, the trained teacher's, and the folder. A run whose pictures fail
            says so and has finished.
        prepare_measure: called by the first process before the first step, to load what it measures
            on. It gives a function of (step, the teacher's parameters): what that returns joins the
            step's metrics.
        measure_every: steps from one such call to the next; 0 for none.

    Returns:
        0 when the run has finished; 143 or 130 when it was stopped by SIGTERM or Ctrl-C and saved.

    Raises:
        ConfigError, CheckpointError, MetricsError, TrainingStopped: with a message for the person
            who started the run; and what `make_batches` raises on a bad scene, after a save.
    """
    with contextlib.ExitStack() as resources:
        # ---- The run's folder: check before anything expensive, never mix two runs.
        check_config(config)
        steps, scenes = config.train.steps, config.train.batch
        devices = mesh.data_mesh(config.mesh.fsdp)
        agreement.check_command(config)
        mesh.check_batch(scenes, devices, objective.scenes_per_row)
        first = jax.process_index() == 0
        say = functools.partial(print, flush=True) if first else _ignore
        files = None
        if first:
            files = resources.enter_context(Mirror(workdir, (CONFIG, metrics.FILE)))
        saved_before, done = False, None
        if files is not None:
            resources.enter_context(only_run_in(files.folder))
            saved_before = checkpoint.any_saved(workdir)
            done = metrics.finished(files.folder)
            binding = bool(done) or saved_before
            for remark in compare_config(config, workdir, files.folder, binding=binding):
                say(remark)
            if done:
                _report(say, workdir, *_result(files.folder, workdir))
        if agreement.everybody_knows(done is not None):
            return FINISHED
        agreement.check_folder(workdir)
        saved_before = agreement.everybody_knows(saved_before)

        # ---- What the run needs from elsewhere: other weights, a state, scenes.
        write_pictures = measure = None
        if first:
            with _for_the_user():
                write_pictures = prepare_pictures() if prepare_pictures else None
                measure = prepare_measure() if prepare_measure else None
        everywhere = mesh.replicated(devices)
        key = jax.jit(jax.random.key, out_shardings=everywhere)(np.uint32(config.seed))
        shapes = jax.eval_shape(lambda key: init_state(objective, key), key)
        lie = sharding.shardings(shapes, config.mesh, devices)
        make_state = jax.jit(lambda key: init_state(objective, key), out_shardings=lie)
        template = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, lie
        )
        # Slices are joined by all processes, though one alone writes.
        whole = jax.jit(lambda tree: tree, out_shardings=everywhere)
        initial = frozen = {}
        parts = {name: template[name] for name in ("student", "teacher")}
        if config.init_from and not saved_before:
            initial = load_initial(storage.place(config.init_from), parts)
        if load_frozen is not None and not saved_before:
            frozen = load_frozen(parts)
        checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
        resources.callback(checkpoints.close)
        found = checkpoints.restore(template, say)
        start = int(found[0]["step"]) if found else 0
        if found and (seen := found[1].get("scenes")) != start * scenes:
            raise checkpoint.CheckpointError(
                f"the checkpoint of step {start} was saved after {seen} scenes, not {start} x "
                f"{scenes}: config.train.batch was another, go on with that one; or the file is "
                "damaged, delete this checkpoint"
            )
        if found and files is not None and not (files.folder / CONFIG).exists():
            source = workdir / checkpoint.FOLDER / str(start)
            for remark in compare_contents(config, found[1], workdir, source):
                say(remark)
        with _for_the_user():
            batches = make_batches(
                config.data, config.seed, scenes, start, jax.process_index(), jax.process_count()
            )
        if close := getattr(batches, "close", None):
            resources.callback(close)  # ends its threads

        # ---- The state, on every device.
        if found:  # go on from this folder's newest checkpoint
            state = found[0]
            say(f"going on after step {start} of {steps}")
        else:  # start, perhaps with another run's student and teacher
            state = _merge(_merge(make_state(key), initial), frozen)
            if initial:
                say(f"starting with the weights of {config.init_from}")
        schedule = make_schedule(config, steps)
        step_function = make_step(objective, config, devices)
        # Several devices of one CPU can deadlock with steps in flight: their collectives share
        # one pool of threads.
        one_at_a_time = devices.size > 1 and devices.devices.flat[0].platform == "cpu"

        # ---- What comes out on the way.
        writer = None
        if files is not None:
            if not found and (before := metrics.read_metrics(files.folder)):
                say(f"no checkpoint here: {metrics.FILE} loses the {len(before)} lines it has")
            settle_config(config, files.folder)
            writer = metrics.MetricsWriter(files.folder, start)
            resources.callback(writer.close)
        show = resources.enter_context(progress(start, steps, visible=first))
        clock = _Clock()

        def log(number: int, values: Values, scheduled: Mapping[str, float]) -> None:
            """Waits for a step's metrics; writes them if they are due; ends a hopeless run."""
            got = {name: float(value) for name, value in jax.device_get(values).items()}
            line = {"loss": got["loss"], **got, **scheduled, **clock.lap(got["points"])}
            bad = got["bad_steps_in_a_row"]
            due = number % config.train.log_every == 0 or number in (1, steps) or bad > 0
            due = due or number in measured
            line |= measured.pop(number, {})
            if due and writer is not None:
                writer.write(number, line)
            show(number, got)
            if bad >= config.train.max_bad_steps:
                raise TrainingStopped(_hopeless(bad, number, got, workdir))

        saved, pending = start, None
        measured: dict[int, Mapping[str, float]] = {}  # by step

        def save(number: int) -> None:
            """Writes down everything up to a step: its metrics first, then its state."""
            nonlocal saved, pending
            if pending is not None:
                log(*pending)
            if files is not None:
                files.push()
            if saved < number:
                checkpoints.save(number, state, {"scenes": number * scenes, **resolved(config)})
            saved, pending = number, None

        kind = devices.devices.flat[0].platform
        say(f"training on {devices.size} {kind} device(s); the first step compiles for a while")
        # ---- The steps.
        with stop_signals(say) as stopped_by:
            for number in range(start + 1, steps + 1):
                told, batch = checkpoints.must_stop(number - 1), None
                try:
                    if not told and stopped_by() is None:
                        with clock.waiting_for_data(), stopped_by.waiting():
                            batch = next(batches)
                except StopWaiting:  # input may hang for longer than who stops this run waits
                    batch = None
                except Exception:
                    if jax.process_count() == 1:  # a save needs all processes
                        save(number - 1)
                        checkpoints.wait()
                    raise
                if batch is None:
                    stop = stopped_by() or signal.SIGTERM
                    save(number - 1)
                    checkpoints.wait()
                    say(f"stopped by {signal.Signals(stop).name} after step {number - 1} of "
                        f"{steps}, saved; the same command goes on from there")  # fmt: skip
                    return 128 + stop
                scheduled = schedule(number - 1)
                state, values = step_function(
                    state,
                    mesh.put_batch(devices, batch, scenes),
                    {name: np.float32(value) for name, value in scheduled.items()},
                    key,
                )
                if one_at_a_time:
                    jax.block_until_ready((state, values))
                if pending is not None:
                    log(*pending)  # of the step before: the devices are busy with the next one
                pending = number, values, scheduled
                if prepare_measure and measure_every and number % measure_every == 0:
                    with clock.paused():
                        teacher = whole(state["teacher"])
                        found = measure(number, teacher) if measure is not None else {}
                        del teacher
                    if found:
                        measured[number] = found
                if number % config.checkpoint.every == 0 or number == steps:
                    save(number)
            checkpoints.wait()

        # ---- The result.
        parts = whole({name: state[name] for name in ("student", "teacher")})
        if write_pictures is not None and files is not None:
            try:
                pictures = files.folder / PICTURES
                pictures.mkdir(exist_ok=True)
                fresh = jax.jit(lambda key: init_state(objective, key)["teacher"])
                untrained = fresh(jax.random.key(config.seed))
                write_pictures(untrained, parts["teacher"], pictures)
            except Exception as error:  # the training is complete, whatever fails here
                fault = f"{type(error).__name__}: {error}"
                print("error: no pictures:", " ".join(fault.split()), file=sys.stderr)
        if writer is not None:
            digest = metrics.params_digest(parts)
            writer.event("done", steps, params_digest=digest)
        result = _result(files.folder, workdir) if files is not None else None
    # Every file is closed and in its place, the bar is gone.
    if result is not None:
        _report(say, workdir, *result)
    return FINISHED


@contextlib.contextmanager
def _for_the_user() -> Iterator[None]:
    """Values of the config that only a data set can refuse."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _hopeless(bad: float, number: int, got: Mapping[str, float], workdir: Path) -> str:
    """What to tell when too many steps in a row were skipped; `got` are the last one's metrics."""
    if got["points"] == 0:
        why = "held no scene that could be read"
        advice = "the warnings above name the scenes"
    else:
        why = f"had a loss or gradient that is not finite (loss {got['loss']})"
        advice = f"look at {workdir / metrics.FILE}; a lower config.optim.lr may help"
    return f"{bad:.0f} steps in a row up to step {number} {why} and were skipped; {advice}"


def _result(folder: Path, workdir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics of a finished run and the names of its pictures, here or in their place."""
    found = (*(folder / PICTURES).glob("*.png"), *(workdir / PICTURES).glob("*.png"))
    return metrics.read_metrics(folder), sorted({picture.name for picture in found})


def _report(
    say: Callable[[str], object],
    workdir: Path,
    lines: Sequence[Mapping[str, Any]],
    pictures: Sequence[str],
) -> None:
    """Says what a finished run has made and where."""
    done = lines[-1]
    losses = [line["loss"] for line in lines if "loss" in line]
    change = f", loss {_number(losses[0])} -> {_number(losses[-1])}" if losses else ""
    say(f"finished: {done['step']} steps{change}")
    say(f"  parameters  sha256 {done['params_digest']}")
    saved = workdir / checkpoint.FOLDER / str(done["step"])
    say(f"  checkpoint  {saved}{'' if saved.exists() else ' is missing: deleted since then'}")
    say(f"  metrics     {workdir / metrics.FILE}, tensorboard --logdir {workdir / TENSORBOARD}")
    for name in pictures:
        say(f"  picture     {workdir / PICTURES / name}")


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _merge(tree: Any, part: Any) -> Any:
    """A tree of nested dicts with the leaves of another, of the same keys or fewer, in place."""
    if not isinstance(part, dict):
        return part
    return tree | {name: _merge(tree[name], value) for name, value in part.items()}


def _ignore(text: str) -> None:
    del text


class _Clock:
    """Measures the time from one step's metrics to the next one's, and the wait for data in it."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def lap(self, points: float) -> dict[str, float]:
        """Since the last lap: seconds, share of them spent waiting for data, points per second."""
        seconds = time.monotonic() - self._since
        waited, self._since, self._waited = self._waited, time.monotonic(), 0.0
        seconds = max(seconds, 1e-9)
        return {
            "step_seconds": seconds,
            "data_wait": min(waited / seconds, 1.0),
            "points_per_second": points / seconds,
        }
