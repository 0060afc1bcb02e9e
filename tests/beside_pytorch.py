"""The released PyTorch encoder and this one, forward or in a training step, in the same minutes.

    git clone https://github.com/facebookresearch/sonata
    pip install torch==2.13.0 addict
    python tests/beside_pytorch.py --sonata=sonata [--input=FILE | --points=N] [--dtype=bfloat16]
    python tests/beside_pytorch.py --sonata=sonata --what=train --points=50000

Two machines, or two hours of one, differ by more than the two programs do. So processes of either
take turns, and the ratio is that of their medians. Each also multiplies two matrices of 2,048 x
2,048: their libraries are not equally good on every processor. `pytorch_sonata.py` has PyTorch's
side. With `--what=train` both take the same steps, on two views of 8,000 points and four of 3,000,
nothing rematerialised; ours also makes the views and matches, PyTorch's is given them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("jax", "pytorch")
GRID_SIZE = 0.02  # metres
WARM = 2  # calls that are not counted
STEP = (
    "--config.network.remat=False",
    "--config.views.max_size=8000",
    "--config.views.global_share=(1.0,1.0)",
    "--config.views.local_share=(0.375,0.375)",
)


def pytorch_call(cloud, given):
    """A call of PyTorch's program, and a function that says how fast PyTorch multiplies."""
    import pytorch_sonata
    import torch

    matrix = torch.rand(2048, 2048).to(getattr(torch, given.dtype))

    def speed():
        best = min(seconds(lambda: matrix @ matrix) for _ in range(5))
        return 2 * len(matrix) ** 3 / best

    if given.what == "forward":
        return pytorch_sonata.forward(cloud, given.dtype, given.sonata), speed
    views = drawn_views(cloud, given, WARM + given.calls)
    return pytorch_sonata.step(views, given.dtype, given.sonata), speed


def read_config(given):
    """What `launch.benchmark` reads of a command line, and the config."""
    from launch import benchmark

    overrides = STEP if given.what == "train" else ()
    flags, rest = benchmark.parse(
        ["", f"--what={given.what}", f"--dtype={given.dtype}", *overrides]
    )
    return flags, benchmark.read_config(flags, rest)


def drawn_views(cloud, given, steps):
    """What teacher and student see in our first steps, duplicated voxels and all."""
    import jax

    from launch.objectives import outlined
    from point_jax.measure.programs import middle_schedule, scene_arrays, scene_key
    from point_jax.objectives.rows import SIDES as SIDES_OF_STUDENT
    from point_jax.objectives.rows import student

    _, config = read_config(given)
    objective, schedule = outlined(config), middle_schedule(config)
    scenes = {name: np.asarray(array)[None] for name, array in scene_arrays(cloud).items()}
    prepare = jax.jit(lambda *arguments: objective.prepare(*arguments)[0])

    def read(views):
        used = int(views.used)
        arrays = {name: np.asarray(getattr(views, name))[:used] for name in ("grid", "features")}
        counts = np.bincount(np.asarray(views.cloud)[:used])
        return arrays | {"mask": np.asarray(views.mask)[:used], "counts": counts}

    found = []
    for step in range(steps):
        key = scene_key(jax.random.key(config.seed), step, 0)
        row = prepare(scenes, key, schedule)
        students = (student(row, side) for side in SIDES_OF_STUDENT)
        found.append([read(views) for views in (row.teacher, *students)])
    return found


def jax_call(cloud, given):
    """The same of ours, as `launch.benchmark` measures it."""
    import jax

    from launch import benchmark
    from point_jax.measure.runs import Caller
    from point_jax.measure.timing import machine_speed

    program = benchmark.builder(*read_config(given))(cloud)
    call = Caller(program, program.function.lower(*program.arguments, *program.static).compile())
    return lambda: jax.block_until_ready(call()), machine_speed(given.dtype)


def seconds(call):
    """How long it takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(given):
    """What a child finds: seconds of each call, and FLOP/s."""
    from point_jax.measure.inputs import Input

    with np.load(given.input) as arrays:
        cloud = Input(given.input.stem, **arrays)
    call, speed = (pytorch_call if given.side == "pytorch" else jax_call)(cloud, given)
    taken = [seconds(call) for _ in range(WARM + given.calls)][WARM:]
    return {"seconds": taken, "speed": speed()}


def in_turn(cloud, given):
    """What the children of each side found."""
    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cloud.npz"
        np.savez(file, **{name: x for name, x in vars(cloud).items() if name != "name"})
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": folder}
        for _ in range(given.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
                command += [f"--input={file}"]
                said = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE)
                if said.returncode:
                    sys.exit(said.returncode)
                found[side].append(json.loads(said.stdout.splitlines()[-1]))
                median, speed = _middle(found[side][-1:])
                print(f"{side} {median:.3f} s, {speed / 1e9:.0f} GFLOP/s", flush=True)
    return found


def _middle(found):
    """Medians of the processes' medians of a call's seconds, and of their FLOP/s."""
    medians = [statistics.median(one["seconds"]) for one in found]
    return statistics.median(medians), statistics.median(one["speed"] for one in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sonata", required=True, help="the released code's folder")
    parser.add_argument("--what", choices=("forward", "train"), default="forward")
    parser.add_argument("--input", type=Path, help="as for launch.benchmark")
    parser.add_argument("--points", type=int, default=20_000, help="of a room, without --input")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--calls", type=int, default=5, help="of each process")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of a child
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.side:
        print(json.dumps(measure(given)))
        return 0
    if not (Path(given.sonata) / "sonata" / "model.py").is_file():
        parser.error(f"--sonata={given.sonata} has no sonata/model.py")

    from point_jax.measure.inputs import file_input, room_input

    here = given.input
    cloud = file_input(here, GRID_SIZE) if here else room_input(given.points, GRID_SIZE)
    found = in_turn(cloud, given)
    ours, theirs = (_middle(found[side]) for side in SIDES)
    print(
        f"{given.what}, {cloud.name}, {len(cloud.grid):,} voxels, {given.dtype}: "
        f"here {ours[0]:.3f} s, PyTorch {theirs[0]:.3f} s, ratio {ours[0] / theirs[0]:.2f}; "
        f"products {ours[1] / 1e9:.0f} and {theirs[1] / 1e9:.0f} GFLOP/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
