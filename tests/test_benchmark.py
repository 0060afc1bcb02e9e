"""launch.benchmark and what it measures with, on networks and clouds that compile in seconds."""

import functools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import concerto
from launch import benchmark, command
from launch.objectives import outlined
from point_jax.features.encoder import Encoder
from point_jax.measure import breakdown, memory, parts, programs, runs, timing, work
from point_jax.measure.images import image_arrays, image_work
from point_jax.measure.inputs import room_input
from point_jax.measure.room import furnished_room
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec, StageSpec
from tests.small import small_batch, small_config

SPEC = PTv3Spec((StageSpec(1, 8, 1, 2), StageSpec(2, 16, 2, 4)))
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
# One level and no rotary positions: what a step and the making of its input need to be one.
ONE_LEVEL = (
    *("--config.network.depths=(2,)", "--config.network.channels=(6,)"),
    *("--config.network.heads=(1,)", "--config.network.rotary_base=0.0"),
    *("--config.objective.shares=(1.0,)", "--config.objective.up_cast=0"),
)
RECORD = {
    *("what", "input", "dtype", "points", "shapes", "profile"),
    *("lower_s", "compile_s", "compiled_from_cache", "second_start_s"),
    *("times_s", "median_s", "min_s", "points_per_s", "traced_s"),
    *("memory", "parts", "flop_needed", "flop_done", "flops"),
    *("machine_flop", "machine_share", "exchange_s"),
}
MEMORY = {
    *("peak_bytes", "how", "parameter_bytes"),
    *("temp_bytes", "argument_bytes", "output_bytes", "alias_bytes"),
}
PART = {
    *("part", "seconds", "share", "forward_s", "recomputed_s", "backward_s"),
    *("flop_needed", "flop_done", "flops"),
}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch, quick_compilation):
    """Runs the command; returns its exit code, stdout, stderr and what --json holds.

    What is measured is of no interest here.
    """
    monkeypatch.setattr(
        benchmark, "machine_speed", functools.partial(timing.machine_speed, size=64)
    )

    def start(*flags: str, starts: int = 1):
        """`starts`: how often the program is really made; then what was made is taken again."""
        made = []

        def make(*arguments):
            if len(made) < starts:
                made.append(timing.make(*arguments))
            return made[-1]

        monkeypatch.setattr(runs, "make", make)
        file = tmp_path / "result.json"
        usual = {"--config": "tests/small.py", "--json": file, "--repeats": 2}
        said = {flag.partition("=")[0] for flag in flags}
        usual = [f"{name}={value}" for name, value in usual.items() if name not in said]
        argv = ["benchmark", *usual, *flags]
        code = command.run(benchmark.main, argv, benchmark.__doc__)
        content = json.loads(file.read_text()) if file.exists() else None
        return code, *capsys.readouterr(), content

    return start


def check(content, what: str) -> dict:
    """The single record of a run, whose parts add up."""
    assert set(content) == {"environment", "settings", "records"}
    assert set(content["environment"]["calibration"]) == {"before", "after"}
    assert content["settings"]["what"] == what
    (record,) = content["records"]
    assert set(record) == RECORD and set(record["memory"]) == MEMORY
    assert len(record["times_s"]) == 2 and record["min_s"] == min(record["times_s"])
    assert record["parts"] and all(set(part) == PART for part in record["parts"])
    total = sum(part["seconds"] for part in record["parts"])
    assert total == pytest.approx(record["median_s"], rel=1e-6)
    assert sum(part["share"] for part in record["parts"]) == pytest.approx(1, rel=1e-6)
    for name in ("flop_needed", "flop_done"):
        assert sum(part[name] for part in record["parts"]) == pytest.approx(record[name])
    assert all(part["flop_done"] >= part["flop_needed"] for part in record["parts"])
    return record


def seconds(record: dict) -> dict[str, float]:
    return {part["part"]: part["seconds"] for part in record["parts"]}


# --- The command ---


def test_the_encoder_is_measured_on_rooms_and_files(run, tmp_path):
    profile, cache = tmp_path / "profile", tmp_path / "cache"
    flags = (f"--profile={profile}", f"--cache_dir={cache}")
    # Then the same voxels from a file: the program is there already, for calls from this line.
    room = furnished_room(300, small_config().views.grid_size)
    np.savez(tmp_path / "a.npz", **(room._asdict() | {"grid_coord": room.grid}))
    calls = (("--points=300", 2), (f"--input={tmp_path / 'a.npz'}", 1))
    (code, out, error, content), loaded = (run(cloud, *flags, starts=n) for cloud, n in calls)
    assert (code, error) == (0, "")
    record = check(content, "forward")
    assert record["points"] == 300 and not record["compiled_from_cache"]
    assert record["shapes"] == "slots 384 256"
    assert record["second_start_s"] < record["lower_s"] + record["compile_s"]
    by_part = seconds(record)
    network = {"geometry", "projections", "convolution", "attention", "mlp", "pooling"}
    assert network <= set(by_part) <= network | {"blocks", "other", "idle"}
    assert by_part.get("other", 0) < 0.05 * record["median_s"]
    assert {p["part"] for p in record["parts"] if p["flop_needed"]} == {
        *("projections", "convolution", "attention", "mlp", "pooling")
    }
    assert list(profile.rglob("*.xplane.pb"))
    for word in (
        "second start",
        "points/s",
        "cores exchange",
        "peak memory",
        "convolution",
        "total",
    ):
        assert word in out
    code, out, _, content = loaded
    again = check(content, "forward")
    assert code == 0 and "loaded from --cache_dir" in out and again["compiled_from_cache"]
    assert again["flop_needed"] == record["flop_needed"]


@pytest.mark.parametrize(
    ("what", "flags"), [("geometry", ONE_LEVEL), ("views", (f"--cache_dir={CACHE}",))]
)
def test_the_makers_of_the_input_are_measured_alone(run, what, flags):
    code, _, error, content = run(f"--what={what}", "--points=300", *flags)
    assert (code, error) == (0, "")
    record = check(content, what)
    assert set(seconds(record)) <= {what, "other", "idle"}
    assert seconds(record)[what] > 0.5 * record["median_s"]
    assert record["flops"] is None


def test_training_steps_go_on_from_one_another(run, monkeypatch):
    """The work is counted on the views that the steps have made, by the products of the program."""
    steps, counted, programs_run = [], [], []

    def watch(module, name, keep):
        function = getattr(module, name)

        def watched(*arguments):
            result = function(*arguments)
            keep(arguments, result)
            return result

        monkeypatch.setattr(module, name, watched)

    watch(
        runs,
        "seconds",
        lambda _, timed: steps.append((int(timed[0][0]["step"]), float(timed[0][1]["padding"]))),
    )
    watch(programs, "count_sides", lambda _, sides: counted.append(sides))
    watch(runs, "instructions", lambda arguments, known: programs_run.append((*arguments, known)))
    code, _, error, content = run(
        "--what=train", "--points=300", "--config.network.remat", f"--cache_dir={CACHE}",
        *ONE_LEVEL,
    )  # fmt: skip
    assert (code, error) == (0, "")
    record = check(content, "train")
    by_part = seconds(record)
    for part in ("views", "geometry", "convolution", "attention", "heads", "losses", "optimizer"):
        assert by_part[part] > 0
    assert by_part.get("other", 0) < 0.05 * record["median_s"]
    for part in record["parts"]:
        if part["part"] in ("convolution", "attention", "mlp"):
            assert part["forward_s"] > 0 and part["backward_s"] > 0
        if part["part"] in ("projections", "mlp"):
            assert (part["recomputed_s"] > 0) == (part["part"] == "projections")

    assert [step for step, _ in steps] == [2, 3]
    for (_, padding), sides in zip(steps, counted, strict=True):
        used = sum(side[0].points for side in sides)
        slots = sum(side[0].capacity for side in sides)
        assert padding == pytest.approx(1 - used / slots, abs=1e-6)

    # Teacher and student; `work` has the same numbers. Of the losses XLA takes products out of
    # loops that run once.
    ((text, known),) = programs_run
    assert products(text, known) == {
        ("convolution", "forward"): 2,
        ("convolution", "backward"): 2 * 2,  # of a tap's first block, and of the rest
        # scores, mixing, and the scores again where the largest has to be looked for
        ("attention", "forward"): 2 * 3,
        ("attention", "backward"): 7,
        ("mlp", "forward"): 2 * 2,
        ("mlp", "backward"): 2 * 2 + 1,
        ("heads", "forward"): 3 * 2,
        ("heads", "backward"): 2 * 2,  # their hidden layer is kept
        # stem, conv_linear, qkv, proj; the stem's input has no gradient
        ("projections", "forward"): 2 * 4,
        ("projections", "backward"): 1 + 3 * 2 + 2,  # conv_linear and proj are followed by others
        ("projections", "recomputed"): 2,
    }


def test_the_joint_step_takes_the_images_that_are_made_for_it():
    given, rest = benchmark.parse(
        ["benchmark", "--config=tests/test_concerto.py", "--what=train", "--points=300"]
    )
    config = benchmark.read_config(given, rest)
    (cloud,) = benchmark.inputs(given, config)
    program = benchmark.builder(given, config)(cloud)
    assert program.points == 300 and program.shapes.endswith("images of 2 x 3 patches)")
    state, metrics = jax.eval_shape(program.function, *program.arguments)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), program.arguments[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == described
    assert "image_loss" in metrics


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"encoder": "dinov2-with-registers-huge"}, "registers-huge': known without weights are "),
        ({"encoder": "dinov2-with-registers-small", "dtype": "half"}, "dtype is 'half', expected"),
        ({"encoder": "untrained", "dtype": "half"}, "dtype is 'half', expected one of float32, b"),
    ],
)
def test_an_image_network_without_weights_is_one_that_is_known(images, message):
    config = small_config(concerto)
    config.images.update(images)
    with pytest.raises(ValueError, match=message):
        outlined(config)


def test_images_that_are_made_see_the_cloud_around_them():
    config = small_config(concerto)
    config.data.images.count, config.images.up_cast = 4, 1
    objective = outlined(config)
    coord = np.float32([[2, 0, 0], [0, 2, 0], [-2, 0.5, 0], [0, -2, 0], [0, 0, 2], [0, 0, -2]])
    made = image_arrays(objective, config.data, coord)
    size = config.data.images.height, config.data.images.width
    assert made["images"].shape == (4, *size, 3) and made["image_count"] == 4
    middle = np.float32(size) / 2
    seen = (made["pixels"] >= 0).all(-1)
    np.testing.assert_array_equal(seen, [*np.eye(4, dtype=bool), [False] * 4, [False] * 4])
    np.testing.assert_allclose(made["pixels"][0, 0], middle, rtol=1e-6)
    # y is to the right of who looks along -x
    np.testing.assert_allclose(made["pixels"][2, 2], middle * [1, 1 + 0.25], rtol=1e-6)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))[1]
    scene = {"coord": coord, **made}
    by_hand = 2 * 9 * 4 * (  # conv1 to conv5 of the untrained network, on 4 images
        240 * 320 * (3 * 8 + 8 * 8) + 120 * 160 * (8 * 16 + 16 * 16)
        + 60 * 80 * (16 * 32 + 2 * 32 * 32) + 30 * 40 * (32 * 48 + 2 * 48 * 48)
        + 15 * 20 * (48 * 64 + 2 * 64 * 64)
    )  # fmt: skip
    projection = 3 * 2 * 4 * 15 * 20 * objective.inputs * 64
    assert image_work(objective, shapes, scene)["images"].needed == by_hand + projection


def products(text, known):
    """How many products of matrices each part of a program has, by direction."""
    found = Counter(known[name].place for name in re.findall(r"%([\w.\-]+) = \S+ dot\(", text))
    network = ("convolution", "attention", "mlp", "heads", "projections")
    return {tuple(place): number for place, number in found.items() if place.part in network}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--what=backward",), "--what: invalid choice: 'backward'"),
        (("--points=99",), "at least 100 points"),
        (("--points=many",), "'many' is not numbers"),
        (("--repeats=0",), "'0' is not 1 or more"),
        (("--input=missing.ply",), "missing.ply: no such file"),
        (("--input=,",), "',' names no file"),
        (("--cache_dir=/dev/null/x",), "--cache_dir=/dev/null/x: cannot be made"),
        (("--input=tests/small.py",), "files of this kind are not read"),
        (("--input=a.ply", "--points=100"), "choose one"),
        (("--config.network.depth=(1,)",), "did you mean 'depths'"),
        (("--confg=x",), "not a flag: --confg=x"),
        (("--config.network.patch_size=0",), "config.network.patch_size"),
        (("--what=train", "--dtype=float16"), "--dtype: invalid choice"),
        (("--json=missing/folder/a.json",), "there is no folder missing/folder"),
        (("--json=tests",), "--json=tests: not a file that can be written"),
    ],
)
def test_what_cannot_be_is_one_line(run, flags, told):
    code, _, error, _ = run(*flags)
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert told in error


def test_a_damaged_input_is_one_line(run, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, coord=np.ones((5, 3)), color=np.ones((5, 3)), normal=np.ones((4, 3)),
             grid_coord=np.ones((5, 3), int))  # fmt: skip
    code, _, error, _ = run(f"--input={path}")
    assert code == 1 and "a.npz: normal is float64 of shape (4, 3)" in error
    path.write_bytes(path.read_bytes()[:40])
    code, _, error, _ = run(f"--input={path}")
    assert code == 1 and "a.npz: not a whole npz file" in error and error.count("\n") == 1


# --- The room ---


@pytest.mark.parametrize("points", [100, 101, 2_345, 50_000])
def test_a_room_has_exactly_so_many_voxels(points):
    room = furnished_room(points)
    assert all(array.shape == (points, 3) for array in room)
    assert len(np.unique(room.grid, axis=0)) == points and (room.grid.min(0) == 0).all()
    np.testing.assert_array_equal(np.linalg.norm(room.normal, axis=1), 1)
    for array, again in zip(room, furnished_room(points), strict=True):
        np.testing.assert_array_equal(array, again)
    # a grid that starts at the lowest coordinates is the room's
    steps = (room.coord - room.coord.min(0)) / np.float32(0.02)
    np.testing.assert_array_equal(steps.astype(int), room.grid)


def test_a_room_is_as_dense_as_a_scan():
    """Of the 27 neighbours of a voxel 10 to 14 exist indoors."""
    for level in work.count_levels(furnished_room(20_000).grid, (0, 0, 0)):
        assert 10 < level.pairs / level.points < 14


def test_a_room_of_few_points_is_refused():
    with pytest.raises(ValueError, match="at least 100 points"):
        furnished_room(99)


# --- Programs, parts, memory ---


def test_capacities_are_the_encoders():
    init, _ = functional(lambda rngs: PTv3(SPEC, rngs=rngs))
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init, jax.random.key(0))
    )
    cloud, encoder = room_input(300, 0.02), Encoder(SPEC, params)
    encoder._shapes.grow([tuple(n.points for n in work.count_levels(cloud.grid, (0, 0)))])
    assert programs.row_capacities(cloud.grid, 2) in encoder._shapes._known.values()


@jax.custom_vjp
def product(x):
    return x @ x


product.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ jnp.sin(x).T,))


def test_instructions_belong_to_their_innermost_scope():
    """Loops, recomputation and the backward pass of a custom gradient keep the scopes."""

    def loss(w, x):
        def block(x, w):
            with jax.named_scope("attention"):
                x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
            with jax.named_scope("mlp"):
                return jnp.sin(product(x)), None

        with jax.named_scope("losses"):
            return jax.lax.scan(jax.checkpoint(block), x, w)[0].sum()

    arguments = jnp.ones((2, 64, 64)), jnp.ones((64, 64))
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    known = parts.instructions(text)
    places = {instruction.place for instruction in known.values()}
    for part in ("attention", "mlp"):
        for way in parts.DIRECTIONS:
            assert parts.Place(part, way) in places
    assert any(instruction.is_container for instruction in known.values())
    assert parts.place_of("jit(f)/jvp(losses)/mlp/sin") == ("mlp", "forward")
    assert parts.place_of("jit(f)/transpose(jvp(mlp))/checkpoint/dot") == ("mlp", "backward")
    assert parts.place_of("jit(f)/images/blocks/attention/dot") == ("images", "forward")
    again = "jit(f)/transpose(jvp())/checkpoint/rematted_computation/mlp/sin"
    assert parts.place_of(again) == ("mlp", "recomputed")
    assert parts.place_of("jit(f)/mlps/sin") is None


def test_instructions_without_a_scope_belong_to_what_they_read_or_what_reads_them():
    text = """HloModule jit_f, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/views/add"}
}

ENTRY %main (x: f32[8]) -> (f32[8], f32[8]) {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %constant.1 = f32[8]{0} constant({...})
  %copy.1 = f32[8]{0:T(128)} copy(%constant.1)
  %sine.1 = f32[8]{0} sine(%copy.1), metadata={op_name="jit(f)/transpose(jvp(mlp))/sin"}
  %copy.2 = f32[8]{0} copy(%sine.1)
  %fusion.1 = f32[8]{0} fusion(%copy.2), kind=kLoop, calls=%inner
  %copy.3 = f32[8]{0} copy(%x)
  ROOT %tuple.1 = (f32[8]{0}, f32[8]{0}) tuple(%fusion.1, %copy.3)
}
"""
    assert parts.module_name(text) == "jit_f"
    known = parts.instructions(text)
    mlp, views = parts.Place("mlp", "backward"), parts.Place("views", "forward")
    for name in ("constant.1", "copy.1", "sine.1", "copy.2"):
        assert known[name].place == mlp
    assert known["add.1"].place == known["fusion.1"].place == views
    assert not any(instruction.is_container for instruction in known.values())


def test_no_moment_counts_twice():
    """A loop of two instructions, a second thread, a gap."""
    a, b, loop = (parts.Place(part, "forward") for part in ("mlp", "views", "blocks"))
    known = {
        "a": parts.Instruction(a, False),
        "b": parts.Instruction(b, False),
        "while": parts.Instruction(loop, True),
    }
    events = [
        breakdown.Event("while", 0e9, 10e9),
        breakdown.Event("a", 1e9, 3e9),
        breakdown.Event("b", 4e9, 9e9),
        breakdown.Event("a", 8e9, 12e9),  # another thread
        breakdown.Event("b", 13e9, 14e9),
    ]
    spent, total = breakdown.sweep(events, known)
    assert total == pytest.approx(14)
    assert spent == pytest.approx({loop: 2, a: 2 + 0.5 + 3, b: 4 + 0.5 + 1, breakdown.IDLE: 1})
    assert breakdown.sweep([], known) == ({}, 0)


def test_an_instruction_ends_where_its_thread_goes_on():
    """Its event on a CPU tells when its first thread was free; a later one, when all was told."""

    class Plane(NamedTuple):
        lines: list

    class Line(NamedTuple):
        events: list

    class Event(NamedTuple):
        name: str
        start_ns: float
        end_ns: float
        stats: dict

    here = parts.Instruction(parts.Place("mlp", "forward"), False)
    one = Event("a", 0, 2, {"hlo_op": "a", "_p": 1})
    two = Event("b", 6, 7, {"hlo_op": "b", "_p": 2})
    goes_on = Event("ThunkExecutor::Execute", 5, 30, {})  # from where a ended; b is in it
    ends = Event("end: b", 9, 9, {"_c": 2}), Event("end: a", 31, 31, {"_c": 1})
    plane = Plane([Line([one]), Line([goes_on, two, *ends])])
    found = breakdown._plane_events(plane, "m", {"a": here, "b": here})
    assert sorted(found) == [("a", 0, 5), ("b", 6, 9)]


SIZE = 200 << 20


@pytest.mark.parametrize("can_reset", [True, False])
def test_the_peak_of_memory_is_seen_though_it_is_gone_at_the_end(monkeypatch, can_reset):
    if not can_reset:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)

    def call():
        array = np.ones(SIZE, np.uint8)
        array += 1
        return array[:10].copy()

    result, peak = memory.measure_peak(call, jax.devices("cpu")[0])
    if peak.size is None:
        pytest.skip("no /proc here")
    assert result.tolist() == [2] * 10
    assert 0.95 * SIZE < peak.size < 1.2 * SIZE
    assert ("sampled" in peak.how) >= (not can_reset)


def test_an_allocator_that_counts_is_asked():
    use = iter([(50, 100), (50, 300), (50, 300), (50, 300)])
    names = "bytes_in_use", "peak_bytes_in_use"
    device = SimpleNamespace(memory_stats=lambda: dict(zip(names, next(use), strict=True)))
    assert memory.measure_peak(lambda: 1, device) == (1, (250, "allocator"))
    assert memory.measure_peak(lambda: 1, device) == (1, (250, "allocator, at most"))


def test_the_small_batch_has_what_a_scene_has():
    cloud = room_input(100, 0.02)
    assert set(programs.scene_arrays(cloud)) == set(small_batch(1))
