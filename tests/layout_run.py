"""Ten steps of the smallest real run on some layout of devices, and what they leave.

    python tests/layout_run.py --out=FILE.npz [--fsdp=1] [--processes=2 --process=0 --port=PORT]
    python tests/layout_run.py --table

The first is one process of a layout, on the devices that JAX_NUM_CPU_DEVICES says; the second runs
every layout of docs/scaling.md, one after the other, and prints its table of differences.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10

# (processes, devices of each, fsdp): 8 scenes, so that a device has 8, 4, 2 or 1 of them.
LAYOUTS = [
    (1, 1, 1),
    (1, 8, 1), (1, 8, 2), (1, 8, 8), (1, 4, 1), (1, 4, 4), (1, 2, 2),
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 1, 1), (4, 1, 2), (4, 1, 4),
]  # fmt: skip


def run(out, fsdp, steps=STEPS, process=0, processes=1):
    """Trains on all devices there are; the first process writes."""
    import jax
    import numpy as np
    from small import SCHEDULE, Step, small_batch, small_config

    from point_jax.training.mesh import data_mesh, put_batch, replicated

    config = small_config()
    # By Adam's rule rounding of a gradient that is nearly 0 becomes a step of either sign.
    config.optim.eps = 1e-3
    config.mesh.fsdp, config.mesh.smallest = fsdp, 64
    made = Step(config, data_mesh(fsdp))
    state, told, compiled, began = made.make(), [], None, time.process_time()
    each = 8 // processes
    scheduled = {name: np.float32(value) for name, value in SCHEDULE.items()}
    for number in range(steps):
        batch = {k: x[process * each :][:each] for k, x in small_batch(seed=number).items()}
        arguments = state, put_batch(made.mesh, batch, 8), scheduled, made.key
        if compiled is None:
            options = {"xla_backend_optimization_level": 0}
            lowered = made.step.lower(*arguments)
            print(f"lowered after {time.process_time() - began:.1f} s of CPU", flush=True)
            compiled = lowered.compile(options)
            print(f"compiled after {time.process_time() - began:.1f} s", flush=True)
        state, metrics = jax.block_until_ready(compiled(*arguments))
        told.append({name: float(value) for name, value in metrics.items()})
    print(f"{steps} steps after {time.process_time() - began:.1f} s", flush=True)
    whole = jax.jit(lambda x: x, out_shardings=replicated(made.mesh))(state)
    if process == 0:
        leaves = jax.tree_util.tree_leaves_with_path(whole)
        named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        for name in told[0]:
            named[name] = np.array([metrics[name] for metrics in told])
        np.savez(out, **named)
        Path(out).with_suffix(".hlo").write_text(compiled.as_text())


def start(out, processes, devices, fsdp, steps=STEPS):
    """The processes of a layout, started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "16",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }  # fmt: skip
    arguments = [f"--out={out}", f"--fsdp={fsdp}", f"--steps={steps}", f"--port={port}"]
    return [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, f"--processes={processes}", f"--process={i}"],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(children, timeout=1200):
    """Waits for processes; one that fails ends all and tells what it said."""
    try:
        for child in children:
            said, _ = child.communicate(timeout=timeout)
            if child.returncode:
                raise RuntimeError(said)
    finally:
        for child in children:
            child.kill()  # JAX listens for SIGTERM


def differences(file, reference):
    """Largest relative difference of the losses, largest of the parameters, and of the moments."""
    import numpy as np

    one, other = np.load(reference), np.load(file)
    assert set(one) == set(other)
    loss = np.max(np.abs(one["loss"] - other["loss"]) / np.abs(one["loss"]))
    found = [np.float64(loss)]
    for parts in (("student", "teacher"), ("mu", "nu")):
        names = [name for name in one if any(name.startswith(f"['{part}']") for part in parts)]
        found.append(max(np.abs(one[n] - other[n]).max() for n in names))
    return found


def table():
    """Every layout against the first, as rows of a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "first.npz"
        for layout in LAYOUTS:
            file = Path(folder) / "other.npz" if reference.exists() else reference
            finish(start(file, *layout), timeout=3000)
            cells = [f"{x:.1e}" for x in differences(file, reference)]
            rows = 8 // (layout[0] * layout[1])
            print("|", " | ".join([*map(str, layout), str(rows), *cells]), "|", flush=True)


def main():
    parser = argparse.ArgumentParser()
    for name in ("fsdp", "processes"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in ("process", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        table()
        return
    if given.processes > 1:
        import jax

        address = f"127.0.0.1:{given.port}"
        jax.distributed.initialize(address, given.processes, given.process)
    run(given.out, given.fsdp, given.steps, given.process, given.processes)


if __name__ == "__main__":
    main()
