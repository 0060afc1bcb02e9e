"""Checkpoints: the newest states of a run, written by Orbax in the background, atomically.

A step's folder is renamed into place only when it is complete, so a kill leaves at most a
temporary folder, which the next start removes; in an object store, which cannot rename, it has its
name from the start, and a file marks that it is complete. Orbax deletes an old step file by file;
a kill there leaves a folder that lists as a step and cannot be read, which is why `restore` tries
the next one. Orbax notices missing and cut files but not changed bytes: checksums are ours.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from point_jax import storage
from point_jax.training import peers

Tree = Any  # nested dicts of arrays
FOLDER = "checkpoints"
SLOW = 60.0  # seconds after which a save is told of
LATE = 0.5  # seconds in which reads end that go on when one has failed


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written, and why."""


class Checkpoints:
    """The last `keep` states of a run under `<workdir>/checkpoints/<step>`.

    Every process of the run makes one and calls the same methods. `close` it at the end.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self._folder = storage.absolute(workdir / FOLDER)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """Starts writing a state; returns when the arrays are copied, so they may be donated.

        Waits for the previous save first.

        Args:
            step: steps done; not saved before.
            state: nested dicts of arrays.
            meta: JSON values to keep beside it.

        Raises:
            CheckpointError: this save or the previous one failed (disk full, no permission).
            LostError: the same, in an object store.
        """
        sums = {name: int(value) for name, value in checksums(state).items()}
        content = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**meta, "step": step, "checksums": sums}),
        )
        with self._saving():
            self._manager.save(step, args=content, force=True)

    def restore(
        self, template: Tree, say: Callable[[str], object] = print
    ) -> tuple[Tree, dict[str, Any]] | None:
        """Reads the newest state that can be read.

        Unreadable newer ones are reported and renamed to `<step>.unreadable`, once an older one
        has been read.

        Args:
            template: the state's tree of `jax.ShapeDtypeStruct` with shardings.
            say: takes the messages.

        Returns:
            The state and the meta data, or None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or the newest readable
                one is of a different model (all missing, extra and misshapen keys are named).
        """
        broken = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder, fault, found = self._folder / str(step), "", None
            try:
                found = _read(folder, template)
            except CheckpointError:
                raise
            except Exception as error:  # whatever a damaged file makes the libraries raise
                text = (str(error).splitlines() or [""])[0][:200]
                fault = f"{type(error).__name__}: {text}"
            if 0 < len(unable := _unable(found is None)) < jax.process_count():
                raise CheckpointError(
                    f"cannot read checkpoint {folder} ({fault or f'processes {unable} cannot'})"
                )
            if found is None or (fault := _wrong_sums(*found)):
                say(f"cannot read checkpoint {folder} ({fault})")
                broken.append(folder)
                continue
            for bad in broken:
                say(f"going on from step {step}; moved {bad} to {_set_aside(bad)}")
            if broken:
                self._manager.reload()
            return found
        if broken:
            raise CheckpointError(
                f"none of the checkpoints under {self._folder} can be read; to start "
                "from the beginning, delete that folder or use another --workdir"
            )
        return None

    def must_stop(self, step: int) -> bool:
        """Whether a job of several processes is told to stop; true on all after the same step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: a save failed.
            LostError: the same, in an object store.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the background threads; errors as of `wait`."""
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Says of a save that fails, now or in the background, why, and what is there still.

        And of one that hangs, every minute that it does.
        """
        done = threading.Event()
        threading.Thread(target=self._say_if_slow, args=(done,), daemon=True).start()
        try:
            yield
        except Exception as error:  # whatever a full disk makes the libraries raise
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            try:
                steps = complete_steps(self._folder)
            except Exception:  # it is the store itself that cannot be reached
                steps = []
            kept = "none is seen there"
            if steps:
                kept = f"the newest one is that of step {steps[-1].name}"
            kind = storage.LostError if storage.is_remote(self._folder) else CheckpointError
            raise kind(
                f"a checkpoint could not be written under {self._folder} ({why}); {kept}, and once "
                "the cause is removed the same command goes on from the newest one"
            ) from error
        finally:
            done.set()

    def _say_if_slow(self, done: threading.Event) -> None:
        start = time.monotonic()
        while not done.wait(SLOW):
            seconds = time.monotonic() - start
            peers.say(f"waiting for a checkpoint under {self._folder} ({seconds:.0f} s)", "warning")


def load_weights(source: Path, template: Mapping[str, Tree]) -> dict[str, Tree]:
    """Reads parts of another run's newest checkpoint, e.g. its `student` and `teacher`.

    Args:
        source: a workdir, its `checkpoints` folder, or one step's folder.
        template: part -> tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        CheckpointError: no checkpoint there, it cannot be read, or it does not hold exactly the
            template's keys and shapes (all missing, extra and misshapen keys are named).
    """
    folder = _newest(source)
    try:
        state, meta = _read(folder, dict(template))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from error
    if wrong := _wrong_sums(state, meta):
        raise CheckpointError(f"cannot read checkpoint {folder}: {wrong}")
    return state


def saved_shapes(source: Path) -> dict[str, Tree]:
    """Part -> tree of things with shape and dtype; `source` as in `load_weights`.

    Raises:
        CheckpointError: no checkpoint there, or it cannot be read.
    """
    folder = _newest(source)
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "state")).tree
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from error
    return {part: tree for part, tree in saved.items() if isinstance(tree, Mapping)}


def any_saved(workdir: Path) -> bool:
    """Whether a run has left a checkpoint, readable or not, in its folder."""
    return bool(complete_steps(workdir / FOLDER))


def complete_steps(folder: Path) -> list[Path]:
    """The checkpoints in a `checkpoints` folder that were written to their end, the newest last."""
    entries = folder.iterdir() if folder.is_dir() else ()
    steps = sorted((e for e in entries if e.name.isdigit()), key=lambda entry: int(entry.name))
    if not storage.is_remote(folder):
        return steps
    return [step for step in steps if ocp.utils.is_checkpoint_finalized(epath.Path(step))]


def _newest(source: Path) -> Path:
    """The folder of the newest checkpoint at `source`, see `load_weights`."""
    if (source / "state").is_dir():
        return storage.absolute(source)
    steps = complete_steps(source / FOLDER if (source / FOLDER).is_dir() else source)
    if not steps:
        raise CheckpointError(f"no checkpoint in {source}: expected a workdir or {FOLDER}/<step>")
    return storage.absolute(steps[-1])


@contextlib.contextmanager
def _late_reads_unheard() -> Iterator[None]:
    """Keeps traces of TensorStore from stderr, of reads that go on when one has failed.

    Orbax closes their event loop meanwhile, which nobody is there to hear.
    """

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    except Exception:
        time.sleep(LATE)
        raise
    finally:
        sys.unraisablehook = before


@_late_reads_unheard()
def _read(folder: Path, template: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Reads the parts of a checkpoint that the template names, and the meta data."""
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(epath.Path(folder / "state")).tree
    compare_trees(folder, {part: saved.get(part, {}) for part in template}, template)
    # By the handlers alone: `Checkpointer` has who can read wait for who cannot.
    state = handler.restore(
        epath.Path(folder / "state"),
        args=ocp.args.PyTreeRestore(
            item=template,
            restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            partial_restore=True,
        ),
    )
    meta = ocp.JsonCheckpointHandler().restore(
        epath.Path(folder / "meta"), args=ocp.args.JsonRestore()
    )
    for part in state:
        int(meta["checksums"][part])  # none, or no number, is damage as well
    return state, dict(meta)


def _wrong_sums(state: Mapping[str, Tree], meta: Mapping[str, Any]) -> str:
    """What is wrong with the bytes of a state; "" if nothing. All processes take part, or none."""
    sums, saved = checksums(state), meta["checksums"]
    wrong = [repr(part) for part, value in sums.items() if int(value) != saved[part]]
    return f"the bytes of {', '.join(wrong)} are not those that were saved" if wrong else ""


def _unable(failed: bool) -> list[int]:
    """Which processes have failed, known to all; what one alone can read is of no use to it."""
    if jax.process_count() == 1:
        return [0] if failed else []
    return np.flatnonzero(multihost_utils.process_allgather(np.bool_(failed))).tolist()


def compare_trees(folder: Path, saved: Tree, template: Tree) -> None:
    """Raises CheckpointError unless both trees have the same keys, shapes and dtypes; names all."""
    old, new = dict(_flat(saved)), dict(_flat(template))
    faults = [f"missing {key}" for key in sorted(new.keys() - old.keys())]
    faults += [f"extra {key}" for key in sorted(old.keys() - new.keys())]
    faults += [
        f"{key} is {old[key]}, expected {new[key]}"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key]
    ]
    if faults:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(faults)}")


def _flat(tree: Tree, place: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and "dtype shape" of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", f"{jnp.dtype(value.dtype).name} {tuple(value.shape)}"


def _set_aside(folder: Path) -> Path:
    """Renames a folder that cannot be read (by one process, for all)."""
    number, target = 1, folder.with_name(f"{folder.name}.unreadable")
    while target.exists():
        number, target = number + 1, folder.with_name(f"{folder.name}.unreadable{number}")
    if jax.process_index() == 0:
        storage.move(folder, target)
    multihost_utils.sync_global_devices(f"set aside {folder.name}")
    return target


@jax.jit
def checksums(state: Mapping[str, Tree]) -> dict[str, jax.Array]:
    """One uint32 for each part of a state, computed on the device in one pass over the bits.

    The sum modulo 2^32 of a hash of every element's bits and place: the same in any order of
    summation; a change of one element always changes it, other changes all but once in 2^32.
    The hash is the last step of MurmurHash3. Elements have at most 32 bits.
    """

    def bits(array: jax.Array) -> jax.Array:
        width = jnp.dtype(array.dtype).itemsize * 8
        return jax.lax.bitcast_convert_type(array, f"uint{width}").ravel().astype(jnp.uint32)

    def part(tree: Tree) -> jax.Array:
        # One long array: a loop for every leaf took longer to compile than a step to run.
        nothing = jnp.zeros(0, jnp.uint32)  # of a part without arrays
        mixed = jnp.concatenate([nothing, *(bits(leaf) for leaf in jax.tree.leaves(tree))])
        mixed ^= jax.lax.iota(jnp.uint32, mixed.size) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return {name: part(tree) for name, tree in state.items()}
