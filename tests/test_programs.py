"""Programs kept on disk: found again, never mistaken for another, made again when damaged."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from point_jax.training import fingerprint, mesh, programs
from point_jax.training.fingerprint import process_start
from point_jax.training.programs import Kept, keep

IMPORTED = time.time()

SOURCE = """
import jax
import jax.numpy as jnp

traced = []

def make(factor, options):
    def step(state, x):
        traced.append(x.shape)
        return {"w": state["w"] + FACTOR * x @ x.T}, jnp.sin(x).sum()

    def solve(state, x):
        traced.append(x.shape)
        return state, jnp.linalg.solve(state["w"], x)

    return jax.jit(solve if options else step, donate_argnums=0)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of JAX's, and sources that are old enough."""
    monkeypatch.setattr(fingerprint, "process_start", lambda: time.time() + 60)
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Start:
    """A start of a program whose source is in a folder: everything in memory is fresh."""

    def __init__(self, folder: Path, factor: int = 2, solve: bool = False) -> None:
        file = folder / "sources" / "step.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(SOURCE.replace("FACTOR", "factor"))
        jax.clear_caches()
        self.module = load(file)
        jitted = self.module.make(factor, solve)
        self.step: Any = keep(jitted, factor, solve, sources=[file.parent])

    def __call__(self, rows: int = 4) -> float:
        """The sum of all results; checks that the state is used up and the values are right."""
        state, x = arguments(rows)
        new, value = self.step(state, x)
        assert state["w"].is_deleted()
        return float(np.asarray(new["w"]).sum() + np.asarray(value).sum())

    @property
    def traced(self) -> bool:
        return bool(self.module.traced)


def arguments(rows: int) -> tuple[dict[str, jax.Array], jax.Array]:
    x = np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)
    return jax.device_put(({"w": np.eye(rows, dtype=np.float32)}, x))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kept_step", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(file.read_text(), file, "exec"), module.__dict__)  # no stale bytecode
    return module


def files(cache: Path) -> list[Path]:
    """The kept files: the long ones are programs."""
    return sorted((cache / programs.FOLDER).iterdir(), key=lambda file: -file.stat().st_size)


def test_second_start_traces_nothing_and_gives_the_same(tmp_path: Path, cache: Path):
    first = Start(tmp_path)
    result = first()
    assert first.traced and len(files(cache)) == 2
    second = Start(tmp_path)
    assert second() == result and second() == result
    assert not second.traced and len(files(cache)) == 2


def in_another_process() -> None:
    """Prints how often a function was traced, and its result."""
    traced = []

    @jax.jit
    def wave(x):
        traced.append(0)
        return jnp.sin(x).sum()

    result = keep(wave, jnp.float32, {"lr": 1e-3})(np.arange(5, dtype=np.float32))
    print(len(traced), float(result).hex())


def test_another_process_finds_the_program(cache: Path):
    code = "import test_programs; test_programs.in_another_process()"
    paths = os.pathsep.join(sys.path)
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    (first, result), (second, again) = (
        subprocess.run(
            command, cwd=folder, env=env, text=True, check=True, stdout=subprocess.PIPE
        ).stdout.split()
        for _ in range(2)
    )
    assert (first, second, result) == ("1", "0", again)


def test_the_plain_function_gives_the_same(tmp_path: Path):
    kept = [Start(tmp_path)(), Start(tmp_path)()]
    plain = Start(tmp_path)
    plain.step = plain.step._function
    assert kept == [plain()] * 2


def test_shapes_like_the_arguments_find_the_program(tmp_path: Path):
    Start(tmp_path)()
    again = Start(tmp_path)
    like = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    assert again.step.prepare(like, jax.ShapeDtypeStruct((4, 3), jnp.float32)) is not None
    assert not again.traced


def test_other_shapes_make_another_program(tmp_path: Path, cache: Path):
    Start(tmp_path)(4)
    other = Start(tmp_path)
    assert other(5) == pytest.approx(reference(5), rel=1e-5)
    assert other.traced and len(files(cache)) == 4


def test_a_call_with_other_shapes_goes_to_the_function(tmp_path: Path):
    Start(tmp_path)(4)
    step = Start(tmp_path)
    for rows in (4, 5, 4):
        assert step(rows) == pytest.approx(reference(rows), rel=1e-5)
    assert len(step.module.traced) == 1


def reference(rows: int, factor: int = 2) -> float:
    x = np.random.default_rng(rows).normal(size=(rows, 3))
    return float((np.eye(rows) + factor * x @ x.T).sum() + np.sin(x).sum())


def test_other_settings_make_another_program(tmp_path: Path):
    Start(tmp_path)()
    other = Start(tmp_path, factor=3)
    assert other() == pytest.approx(reference(4, 3), rel=1e-5)
    assert other.traced


def test_a_changed_source_is_traced_and_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Start(tmp_path)()
    monkeypatch.setattr(f"{__name__}.SOURCE", SOURCE.replace("FACTOR", "5"))
    changed = Start(tmp_path)
    assert changed() == pytest.approx(reference(4, 5), rel=1e-5)
    assert changed.traced


def test_another_file_of_the_sources_counts(tmp_path: Path):
    Start(tmp_path)()
    (tmp_path / "sources" / "constants.py").write_text("")
    changed = Start(tmp_path)
    changed()
    assert changed.traced


def test_a_remark_in_a_source_compiles_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    result = Start(tmp_path)()
    monkeypatch.setattr(f"{__name__}.SOURCE", SOURCE + "# a remark")
    monkeypatch.setattr(programs, "_without_cache", compiles_nothing)
    remarked = Start(tmp_path)
    assert remarked() == result and remarked.traced
    assert len(files(cache)) == 3  # a second way to the one program
    again = Start(tmp_path)
    assert again() == result and not again.traced


def compiles_nothing() -> Any:
    raise AssertionError("compiled")


def test_what_jax_has_loaded_is_not_stored(tmp_path: Path, cache: Path):
    """A program that JAX's cache has given lacks its code when it is stored."""
    plain = Start(tmp_path)
    plain.step = plain.step._function
    result = plain()
    loaded = Start(tmp_path)
    loaded.step._function(*arguments(4))  # from JAX's cache, in this process
    assert loaded() == result
    again = Start(tmp_path)
    assert again() == result and not again.traced


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, changed, lambda data: b"", lambda data: data + b"\0"])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_files_are_made_again(
    tmp_path: Path, cache: Path, damage: Callable[[bytes], bytes], which: int
):
    result = Start(tmp_path)()
    file = files(cache)[which]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    second = Start(tmp_path)
    assert second() == result and second.traced
    assert Start(tmp_path)() == result
    assert len(file.read_bytes()) == pytest.approx(len(whole), rel=0.1)


def test_content_that_cannot_be_loaded_is_made_again(tmp_path: Path, cache: Path):
    """The checksum is right: a program of a library that has changed under its version."""
    result = Start(tmp_path)()
    program = files(cache)[0]
    programs._Files(cache / programs.FOLDER).write(program.name, b"no program")
    assert Start(tmp_path)() == result
    again = Start(tmp_path)
    assert again() == result and not again.traced


def test_a_file_under_another_name_is_not_read(tmp_path: Path):
    store = programs._Files(tmp_path)
    store.write("one", b"content")
    (tmp_path / "one").rename(tmp_path / "other")
    assert store.read("other") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2"),
        lambda patch: patch.setattr(fingerprint, "cpu_features", lambda: ["flags: other"]),
        lambda patch: patch.setattr(os, "sched_getaffinity", lambda pid: {0} | set(range(99))),
        lambda patch: patch.setattr(fingerprint.importlib.metadata, "version", lambda name: "9"),
        lambda patch: jax.config.update("jax_default_matmul_precision", "highest"),
    ],
)
def test_another_machine_or_version_compiles(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
):
    Start(tmp_path)()
    precision = jax.config.values["jax_default_matmul_precision"]
    change(monkeypatch)
    try:
        other = Start(tmp_path)
        assert other() == pytest.approx(reference(4), rel=1e-5)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    assert other.traced and len(files(cache)) == 4


def test_sources_younger_than_the_process_keep_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()  # the real start of this process, before the sources were written
    start = Start(tmp_path)
    assert start() == pytest.approx(reference(4), rel=1e-5)
    assert not (cache / programs.FOLDER).exists()


def test_the_start_of_this_process():
    assert process_start() < IMPORTED < time.time() < process_start() + 86_400


def test_a_program_that_calls_a_library_is_left_to_jax(tmp_path: Path, cache: Path):
    """LAPACK's functions are registered while lowering: a loaded program would not find them."""
    results = []
    for _ in range(2):
        start = Start(tmp_path, solve=True)
        results.append(start())
        assert start.traced and [file.stat().st_size for file in files(cache)] == [32]
    assert results[0] == results[1]


def test_without_a_place_the_function_is_its_own(monkeypatch: pytest.MonkeyPatch):
    function = jax.jit(lambda x: x)
    assert isinstance(keep(function), Kept)
    for name, value in {
        "jax_compilation_cache_dir": None,
        "jax_enable_compilation_cache": False,
        "jax_debug_nans": True,
        "jax_disable_jit": True,
    }.items():
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            assert keep(function) is function
        finally:
            jax.config.update(name, before)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert keep(function) is function


@pytest.mark.parametrize("setting", [object(), np.arange(3), jnp.ones(2), lambda: 0])
def test_settings_must_say_what_they_are(setting: Any):
    with pytest.raises(ValueError, match="settings must say"):
        keep(jax.jit(lambda x: x), {"a": (1, setting)})


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path, cache: Path):
    cache.mkdir()
    (cache / programs.FOLDER).write_text("a file")
    assert Start(tmp_path)() == pytest.approx(reference(4), rel=1e-5)


def test_the_least_recently_used_files_go(tmp_path: Path):
    store = programs._Files(tmp_path / "store")
    for number in range(programs.FILES):
        store.write(f"{number}", b"content")
        os.utime(tmp_path / "store" / f"{number}", (number, number))
    assert store.read("0") == b"content"
    store.write("new", b"content")
    left = {file.name for file in (tmp_path / "store").iterdir()}
    assert left == {str(n) for n in range(programs.FILES) if n != 1} | {"new"}


def test_files_of_another_user_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = programs._Files(tmp_path)
    store.write("key", b"content")
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert store.read("key") is None


@pytest.mark.devices(2)
def test_two_devices(tmp_path: Path):
    """Sums over a mesh; donated, with the same shardings, and the same bits when loaded."""
    devices = mesh.data_mesh()
    split = NamedSharding(devices, PartitionSpec("data"))

    def step(state, x):
        traced.append(0)
        total = jax.lax.psum(x.sum(0), "data")
        return {"w": state["w"] + total}, jax.lax.axis_index("data")[None] + x[:, 0]

    specs = PartitionSpec(), PartitionSpec("data")
    traced, results, firsts = [], [], None
    x = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    for _ in range(2):
        jax.clear_caches()
        sharded = jax.shard_map(step, mesh=devices, in_specs=specs, out_specs=specs)
        kept = keep(jax.jit(sharded, donate_argnums=0))
        state = {"w": jax.device_put(jnp.ones(3), mesh.replicated(devices))}
        rows = jax.device_put(x, split)
        for _ in range(3):
            old, (state, firsts) = state, kept(state, rows)
            assert old["w"].is_deleted()
            assert state["w"].sharding.is_fully_replicated
            assert firsts.sharding.is_equivalent_to(split, 1)
        results.append(jax.device_get((state["w"], firsts)))
    assert len(traced) == 1
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0][0] == pytest.approx(np.ones(3) + 3 * x.sum(0), rel=1e-5)
