"""One step function, any layout: the same numbers, and only the traffic that was asked for."""

import re

import jax
import numpy as np
import pytest
from layout_run import differences, finish, start
from small import small_config

from point_jax.objectives.settings import make_sonata
from point_jax.training import sharding

# Processes, devices of each, devices that share a copy of the state. Eight scenes: one device loops
# over all of them, eight have one each. `layout_run.py --table` runs all that the page lists.
ONE, EIGHT, PROCESSES = (1, 1, 1), (1, 8, 2), (2, 2, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Ten steps on each layout, side by side: its file."""
    folder = tmp_path_factory.mktemp("layouts")
    files = {
        layout: folder / f"{place}.npz" for place, layout in enumerate((ONE, EIGHT, PROCESSES))
    }
    finish([child for layout, file in files.items() for child in start(file, *layout)])
    return files


@pytest.mark.parametrize("layout", [EIGHT, PROCESSES])
def test_losses_and_parameters_after_ten_steps_are_the_same(runs, layout):
    loss, params, _ = differences(runs[layout], runs[ONE])
    assert loss < 1e-5 and params < 1e-5
    one, other = np.load(runs[ONE]), np.load(runs[layout])
    assert one["loss"][-1] < one["loss"][0] - 0.5  # there was something to get wrong
    for name in one:
        near = 1e-4 * max(1e-3, np.abs(one[name]).max())
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=near, err_msg=name)


def collectives(text):
    """(kind, shapes of what comes out, whether it runs once a step) of a compiled program."""
    found, once = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            once = line.startswith("ENTRY")
        kind = re.search(
            r" = (.*?) (all-\w+|reduce-scatter|collective-\w+|ragged-\w+)(-start)?\(", line
        )
        if kind:
            shapes = re.findall(r"\w+\[([\d,]*)\]", kind[1])
            sizes = [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]
            found.append((kind[2], sizes, once))
    return found


def test_the_collectives_are_the_gradient_sinkhorns_sums_and_the_metrics(runs):
    config = small_config()
    config.mesh.smallest = 64
    objective, size = make_sonata(config), EIGHT[2]
    student, _ = jax.eval_shape(objective.init, jax.random.key(0))
    cut = jax.tree.leaves(sharding.cuts({"student": student}, config.mesh, size))
    numbers = [leaf.size for leaf in jax.tree.leaves(student)]
    shared = sum(n for n, at in zip(numbers, cut, strict=True) if at != sharding.WHOLE)
    whole = sum(numbers) - shared
    assert shared > 2 * whole > 0

    found = collectives(runs[EIGHT].with_suffix(".hlo").read_text())
    assert all(once for *_, once in found)  # none for every row, piece or block
    by = {kind: [s for k, shapes, _ in found if k == kind for s in shapes] for kind, *_ in found}
    assert set(by) == {"all-gather", "reduce-scatter", "all-reduce"}
    elements = {kind: sum(int(np.prod(s)) for s in shapes) for kind, shapes in by.items()}
    # The student and the teacher once, and nothing else.
    assert elements["all-gather"] == 2 * shared
    assert elements["reduce-scatter"] == shared / size
    # A maximum and a sum in each of three rounds.
    prototypes = config.objective.prototypes
    assert by["all-reduce"].count((3, prototypes)) == 6
    # Of the gradient what is whole and each device's slices, once; the metrics; a few numbers.
    rest = elements["all-reduce"] - 6 * 3 * prototypes - whole - shared / size
    assert 0 < rest < 8 * prototypes + 4 * sum(config.network.channels) + 40
    # What is added up at one place travels together.
    assert sum(kind == "all-reduce" for kind, *_ in found) <= 12
