"""The training loop: one function from a config and a folder to a finished run.

Whatever stops the process, starting it again with the same command goes on where the newest
checkpoint is and ends with the same bits: the state, the schedules and the order of the data are
functions of (config, step), and a checkpoint is written only after the metrics up to it are.
"""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from point_jax.training import checkpoint, mesh, metrics
from point_jax.training.config import Config, ConfigError, check_config, resolved, settle_config
from point_jax.training.progress import progress
from point_jax.training.schedules import Schedule
from point_jax.training.state import HasInit, State, init_state

Batch = dict[str, np.ndarray]
Values = dict[str, jax.Array]
Step = Callable[[State, dict[str, jax.Array], dict[str, np.float32]], tuple[State, Values]]

FINISHED, FAILED = 0, 1  # exit codes; a run stopped by a signal gives 128 + its number


class TrainingStopped(RuntimeError):
    """The run cannot go on, and why."""


def train(
    config: Config,
    workdir: Path,
    *,
    objective: HasInit,
    make_step: Callable[[Any, Config, Mesh], Step],
    make_schedule: Callable[[Config, int], Schedule],
    make_batches: Callable[..., Iterator[Batch]],
    write_pictures: Callable[[Any, Any, Path], None] | None = None,
) -> int:
    """Trains an objective; starts, resumes or only reports, depending on what the folder holds.

    Args:
        config: the whole config; read here are `seed`, `init_from`, `train`, `checkpoint`, `data`.
        workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `pictures/`.
        objective: has `init(key) -> student's parameters`; the rest is between it and `make_step`.
        make_step: `(objective, config, mesh) -> step`, and `step(state, batch, schedule) ->
            (state, metrics)` is jitted. `batch` holds global arrays (B, ...) split over the mesh,
            `schedule` float32 scalars. `metrics` is a flat dict of float32 scalars on the device
            with `loss`, `bad_steps` and `bad_steps_in_a_row` as in the new state, and `points`, the
            number of points of all scenes, for the speed.
        make_schedule: `(config, steps) -> schedule`, see `schedules`.
        make_batches: `(config.data, seed, scenes, start, process_index, process_count) ->` the
            batches of this process from batch number `start` on, one a step, without end.
        write_pictures: `(untrained teacher's parameters, trained teacher's, folder)`; called
            once at the end by the first process.

    Returns:
        0 when the run has finished; 143 or 130 when it was stopped by SIGTERM or Ctrl-C and saved.

    Raises:
        ConfigError, CheckpointError, TrainingStopped: with a message for the person who started
            the run.
    """
    with contextlib.ExitStack() as resources:
        # ---- The run's folder: check before anything expensive, never mix two runs.
        first = jax.process_index() == 0
        say = print if first else _ignore
        check_config(config)
        steps, scenes = config.train.steps, config.train.batch
        devices = mesh.data_mesh()
        mesh.check_batch(scenes, devices)
        if first:
            workdir.mkdir(parents=True, exist_ok=True)
            resources.enter_context(_only_run_in(workdir))
            for remark in settle_config(config, workdir):
                say(remark)
        if done := metrics.finished(workdir):
            _report(say, workdir, done)
            return FINISHED

        # ---- The state, on every device.
        everywhere = mesh.replicated(devices)
        make_state = jax.jit(lambda: init_state(objective, config.seed), out_shardings=everywhere)
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(make_state),
        )
        checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
        resources.callback(checkpoints.close)
        # 1. Go on from this folder's newest checkpoint.
        if found := checkpoints.restore(template, say):
            state, start = found[0], int(found[0]["step"])
            if found[1]["scenes"] != start * scenes:
                raise checkpoint.CheckpointError(
                    f"the checkpoint of step {start} was saved after {found[1]['scenes']} scenes, "
                    f"not {start} x {scenes}: config.train.batch was another; go on with that one"
                )
            say(f"going on after step {start} of {steps}")
        # 2. Start with another run's student and teacher; step, moments and data start afresh.
        elif config.init_from:
            parts = {name: template[name] for name in ("student", "teacher")}
            weights = checkpoint.load_weights(Path(config.init_from), parts)
            state, start = {**make_state(), **weights}, 0
            say(f"starting with the weights of {config.init_from}")
        # 3. Start from scratch.
        else:
            state, start = make_state(), 0

        # ---- What turns batches into better states.
        schedule = make_schedule(config, steps)
        step_function = make_step(objective, config, devices)
        try:
            batches = make_batches(
                config.data, config.seed, scenes, start, jax.process_index(), jax.process_count()
            )
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
        if close := getattr(batches, "close", None):
            resources.callback(close)  # ends its threads
        # Several devices of one CPU can deadlock with steps in flight: their collectives share
        # one pool of threads.
        one_at_a_time = devices.size > 1 and devices.devices.flat[0].platform == "cpu"

        # ---- What comes out on the way.
        writer = metrics.MetricsWriter(workdir, start) if first else None
        if writer is not None:
            resources.callback(writer.close)
        show = resources.enter_context(progress(start, steps, visible=first))
        clock = _Clock()

        def log(number: int, values: Values, scheduled: Mapping[str, float]) -> None:
            """Waits for a step's metrics; writes them if they are due; ends a hopeless run."""
            got = {name: float(value) for name, value in jax.device_get(values).items()}
            line = {"loss": got["loss"], **got, **scheduled, **clock.lap(got["points"])}
            bad = got["bad_steps_in_a_row"]
            due = number % config.train.log_every == 0 or number in (1, steps) or bad > 0
            if due and writer is not None:
                writer.write(number, line)
            show(number, got)
            if bad >= config.train.max_bad_steps:
                raise TrainingStopped(
                    f"{bad:.0f} steps in a row up to step {number} had a loss or gradient that is "
                    f"not finite (loss {got['loss']}) and were skipped; look at "
                    f"{workdir / metrics.FILE}; a lower config.optim.lr may help"
                )

        def save(number: int) -> None:
            meta = {"scenes": number * scenes, **resolved(config)}
            checkpoints.save(number, state, meta)

        kind = devices.devices.flat[0].platform
        say(f"training on {devices.size} {kind} device(s); the first step compiles for a while")
        # ---- The steps.
        stopped_by = resources.enter_context(_stop_signals())
        saved, pending = start, None
        for number in range(start + 1, steps + 1):
            stop = stopped_by() or (signal.SIGTERM if checkpoints.must_stop(number - 1) else None)
            if stop is not None:
                if pending is not None:
                    log(*pending)
                if saved < number - 1:
                    save(number - 1)
                checkpoints.wait()
                say(f"stopped by {signal.Signals(stop).name} after step {number - 1} of {steps}, "
                    "saved; the same command goes on from there")  # fmt: skip
                return 128 + stop
            with clock.waiting_for_data():
                batch = next(batches)
            scheduled = schedule(number - 1)
            state, values = step_function(
                state,
                mesh.put_batch(devices, batch, scenes),
                {name: np.float32(value) for name, value in scheduled.items()},
            )
            if one_at_a_time:
                jax.block_until_ready((state, values))
            if pending is not None:
                log(*pending)  # of the step before: the devices are busy with the next one
            pending = number, values, scheduled
            if number % config.checkpoint.every == 0 or number == steps:
                log(*pending)
                saved, pending = number, None
                save(number)
        checkpoints.wait()

        # ---- The result.
        if write_pictures is not None and first:
            untrained = jax.jit(lambda: init_state(objective, config.seed)["teacher"])()
            (workdir / "pictures").mkdir(exist_ok=True)
            write_pictures(untrained, state["teacher"], workdir / "pictures")
        if writer is not None:
            parts = {name: state[name] for name in ("student", "teacher")}
            digest = metrics.params_digest(parts)
            writer.event("done", steps, params_digest=digest)
    # Every file is closed, the bar is gone.
    if first:
        _report(say, workdir, metrics.read_metrics(workdir)[-1])
    return FINISHED


def _report(say: Callable[[str], object], workdir: Path, done: Mapping[str, Any]) -> None:
    """Says what a finished run has made and where."""
    losses = [line["loss"] for line in metrics.read_metrics(workdir) if "loss" in line]
    say(f"finished: {done['step']} steps, loss {_number(losses[0])} -> {_number(losses[-1])}")
    say(f"  parameters  sha256 {done['params_digest']}")
    say(f"  checkpoint  {workdir / checkpoint.FOLDER / str(done['step'])}")
    say(f"  metrics     {workdir / metrics.FILE}, tensorboard --logdir {workdir / 'tensorboard'}")
    for picture in sorted((workdir / "pictures").glob("*.png")):
        say(f"  picture     {picture}")


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


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


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Notes SIGTERM and Ctrl-C for the loop to save and leave; a second one ends at once.

    In a job of several processes JAX listens for SIGTERM itself, so that all processes stop after
    the same step; see `Checkpoints.must_stop`.
    """
    received: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_run_in(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of a folder while this one is alive; a kill frees it.

    Raises:
        TrainingStopped: another process is writing there.
    """
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise TrainingStopped(
                f"another run (process {file.read().strip()}) is writing to {workdir}"
            ) from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
