"""Checkpoints survive what a kill or a bad disk leaves behind, and never load the wrong thing."""

import shutil
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_above

from point_jax.training import checkpoint
from point_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    checksums,
    load_weights,
)


def make_state(step):
    key = jax.random.key(step)
    weights = {"blocks": {"w": jax.random.normal(key, (2, 40, 30))}, "b": jnp.arange(3.0)}
    return {"step": jnp.int32(step), "student": weights, "teacher": jax.tree.map(jnp.sin, weights)}


def template(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)))


def restore(workdir, keep=3) -> tuple[Any, Any, list[str]]:
    """What a new process would find: (state, meta, messages); the first two may be None."""
    said = []
    checkpoints = Checkpoints(workdir, keep)
    try:
        found = checkpoints.restore(template(make_state(0)), said.append)
    finally:
        checkpoints.close()
    state, meta = found or (None, None)
    return state, meta, said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 4, 8 and 12; do not change it."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, 3)
    for step in (4, 8, 12):
        checkpoints.save(step, make_state(step), {"scenes": 2 * step})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of `saved` to damage."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def steps(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path) == (None, None, [])


def test_the_newest_state_comes_back_bit_for_bit(saved):
    state, meta, said = restore(saved)
    assert same(state, make_state(12))
    assert (meta["step"], meta["scenes"], said) == (12, 24, [])


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in range(1, 6):
        checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    assert steps(tmp_path) == ["4", "5"]


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    """On a CPU the arrays handed to Orbax share memory with the device's."""
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    state = {"student": {"w": jnp.ones((500, 2000))}}
    shape = template(state)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = spoil(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    found = checkpoints.restore(shape)
    checkpoints.close()
    assert found is not None
    np.testing.assert_array_equal(found[0]["student"]["w"], 1.0)


def cut_file(folder):
    file = largest_file(folder / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_one_bit(folder):
    file = largest_file(folder / "state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove_data(folder):
    largest_file(folder / "state").unlink()


def remove_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def remove_state(folder):
    shutil.rmtree(folder / "state")


def remove_meta(folder):
    shutil.rmtree(folder / "meta")


def tear_meta(folder):
    (folder / "meta" / "metadata").write_text('{"step": 1')


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [
    *(cut_file, change_one_bit, remove_data, remove_manifest),
    *(remove_state, remove_meta, tear_meta, empty),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_takes_long_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SLOW", 0.05)
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", lambda: time.sleep(0.5))
    checkpoints.wait()
    told = capsys.readouterr().err.splitlines()
    assert len(told) > 1
    line = f"warning: waiting for a checkpoint under {tmp_path}/checkpoints ("
    assert all(one.startswith(line) for one in told)
    time.sleep(0.2)
    assert not capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path):
    """Found by the next save or wait, and told with the reason."""
    state = {"student": {"w": jax.random.normal(jax.random.key(0), (100, 1000))}}
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with no_file_above(100_000):
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError, match="File too large.*newest one is that of step 1"):
            checkpoints.wait()
    again = Checkpoints(tmp_path, 2)
    found = again.restore(template(state))
    assert found is not None and same(found[0], state)
    again.save(2, state, {})
    again.close()
    assert steps(tmp_path) == ["1", "2"]


# Orbax leaves coroutines behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_newest_is_reported_and_the_one_before_used(workdir, damage):
    damage(workdir / "checkpoints" / "12")
    state, meta, said = restore(workdir)
    assert same(state, make_state(8))
    assert meta["step"] == 8
    assert "cannot read checkpoint" in said[0]
    assert "going on from step 8" in said[1]
    assert steps(workdir) == ["12.unreadable", "4", "8"]


def test_reads_that_come_too_late_are_not_heard_of(monkeypatch):
    """Others are."""
    heard: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(str(found.exc_value)))
    with checkpoint._late_reads_unheard():
        for text in ("Event loop is closed", "another"):
            sys.unraisablehook(cast(Any, SimpleNamespace(exc_value=RuntimeError(text))))
    sys.unraisablehook(cast(Any, SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))))
    assert heard == ["another", "Event loop is closed"]


def test_the_step_of_an_unreadable_checkpoint_can_be_saved_again(workdir):
    empty(workdir / "checkpoints" / "12")
    checkpoints = Checkpoints(workdir, 3)
    checkpoints.restore(template(make_state(0)), lambda text: None)
    checkpoints.save(12, make_state(12), {})
    checkpoints.close()
    assert same(restore(workdir)[0], make_state(12))


def test_all_unreadable_is_an_error_not_a_fresh_start(workdir):
    for step in (4, 8, 12):
        empty(workdir / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        restore(workdir)
    assert steps(workdir) == ["12", "4", "8"]


def test_what_a_kill_leaves_is_swept(workdir):
    """In the middle of a write: a temporary folder. In the middle of a deletion: half a step."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "12", folder / "16.orbax-checkpoint-tmp")
    (folder / "16.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    remove_data(folder / "4")
    checkpoints = Checkpoints(workdir, 2)
    found = checkpoints.restore(template(make_state(0)), lambda text: None)
    assert found is not None
    assert same(found[0], make_state(12))
    checkpoints.save(16, make_state(16), {})
    checkpoints.close()
    assert steps(workdir) == ["12", "16"]


def test_a_state_of_another_model_is_an_error_that_names_every_key(workdir):
    wanted = template(make_state(0))
    wanted["student"]["blocks"]["w"] = jax.ShapeDtypeStruct((2, 40, 31), jnp.float32)
    wanted["student"]["new"] = wanted["student"].pop("b")
    checkpoints = Checkpoints(workdir, 3)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(wanted)
    checkpoints.close()
    text = str(caught.value)
    assert "missing student.new" in text
    assert "extra student.b" in text
    assert "student.blocks.w is float32 (2, 40, 30), expected float32 (2, 40, 31)" in text
    assert steps(workdir) == ["12", "4", "8"]


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/12"])
def test_weights_of_another_run(saved, place):
    wanted = {name: template(make_state(0))[name] for name in ("student", "teacher")}
    weights = load_weights(saved / place, wanted)
    assert set(weights) == {"student", "teacher"}
    assert same(weights, {name: make_state(12)[name] for name in weights})


def test_weights_of_another_run_are_strict(workdir, tmp_path_factory):
    whole = {name: template(make_state(0))[name] for name in ("student", "teacher")}
    wanted = {**whole, "student": {"b": whole["student"]["b"]}}
    with pytest.raises(CheckpointError, match=r"extra student\.blocks\.w"):
        load_weights(workdir, wanted)
    with pytest.raises(CheckpointError, match="missing heads"):
        load_weights(workdir, {"heads": wanted["student"]})
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_weights(tmp_path_factory.mktemp("empty"), wanted)
    cut_file(workdir / "checkpoints" / "12")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_weights(workdir, whole)


def test_checksums_tell_places_and_bits_apart():
    array = jnp.arange(12, dtype=jnp.float32)
    others = [array.at[jnp.array([3, 4])].set(jnp.array([4.0, 3.0]))]  # two places swapped
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    others += [
        jax.lax.bitcast_convert_type(bits.at[5].set(bits[5] ^ np.uint32(1 << bit)), jnp.float32)
        for bit in (0, 15, 31)
    ]
    others += [-jnp.zeros(12), jnp.zeros(12)]
    sums = [int(checksums({"student": {"w": a}})["student"]) for a in [array, *others]]
    assert len(set(sums)) == len(sums)


@pytest.mark.devices(4)
def test_a_state_on_several_devices_comes_back_on_all_of_them(tmp_path):
    from point_jax.training.mesh import data_mesh, replicated

    everywhere = replicated(data_mesh())
    state = jax.device_put(make_state(3), everywhere)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    found = checkpoints.restore(template(state))
    checkpoints.close()
    assert found is not None
    assert same(found[0], make_state(3))
    assert found[0]["student"]["b"].sharding == everywhere
    assert len(found[0]["student"]["b"].addressable_shards) == 4


@pytest.mark.devices(8)
def test_a_state_comes_back_on_another_mesh(tmp_path):
    """Saved in slices, read whole, saved whole, read in other slices: the same bits."""
    from point_jax.training.config import default_config
    from point_jax.training.mesh import data_mesh
    from point_jax.training.sharding import shardings

    config = default_config()
    config.mesh.smallest = 0
    tree = {"w": np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)}
    state: Any = dict.fromkeys(("student", "teacher", "mu", "nu"), tree) | {"step": np.int32(1)}
    first, shards = state, []
    for step, fsdp in enumerate((4, 1, 2, 8), 1):
        lie = shardings(state, config.mesh, data_mesh(fsdp))
        checkpoints = Checkpoints(tmp_path, 4)
        if step == 1:
            state = jax.device_put(state, lie)
        else:
            wanted = jax.tree.map(
                lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, lie
            )
            found = checkpoints.restore(wanted)
            assert found is not None and found[1]["step"] == step - 1
            state = found[0]
        shards.append(state["mu"]["w"].addressable_shards[0].data.shape)
        assert state["mu"]["w"].sharding == lie["mu"]["w"]
        jax.tree.map(np.testing.assert_array_equal, state, first)
        checkpoints.save(step, state, {})
        checkpoints.wait()
        checkpoints.close()
    assert shards == [(8, 3, 4), (8, 3, 16), (8, 3, 8), (8, 3, 2)]
