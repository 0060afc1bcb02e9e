"""Counting operations: by hand, against the structure of rows, and against the loops of the ops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point_jax.geometry.hierarchy import build_hierarchy, sort_row
from point_jax.geometry.pairs import find_pairs
from point_jax.geometry.patches import patches_used
from point_jax.measure import work
from point_jax.models.spec import PTv3Spec, StageSpec
from point_jax.objectives.sonata_spec import OfflineTeacher, SonataSpec
from point_jax.ops import attention_loop, conv_pairs
from point_jax.ops.attention import patch_attention
from point_jax.ops.gather import take_rows
from point_jax.ops.prototypes import points_done
from point_jax.ops.rowwise import by_rows, rows_done

SPEC = PTv3Spec((StageSpec(1, 8, 1, 2), StageSpec(2, 16, 2, 4)))


def test_work_is_what_a_hand_counts():
    """Three voxels in a line, the third apart: 5 pairs; on the next level 2 voxels and 2 pairs."""
    grid = np.array([[0, 0, 0], [1, 0, 0], [4, 0, 0]])
    levels = work.count_levels(grid, (8, 4))
    assert [(level.points, level.pairs) for level in levels] == [(3, 5), (2, 2)]
    assert sorted(levels[0].taps)[-4:] == [0, 1, 1, 3] and levels[0].taps[13] == 3
    got = work.network_work(SPEC, levels)
    assert {part: counted.needed for part, counted in got.items()} == {
        "convolution": 2 * 5 * 8 * 8 + 2 * (2 * 2 * 16 * 16),
        # patches of 2: each of the three points attends to 2; then 2 points to 2, in two blocks
        "attention": 4 * (3 * 2) * 8 + 2 * (4 * (2 * 2) * 16),
        # stem; conv_linear, qkv and proj
        "projections": 2 * 3 * 9 * 8 + 2 * 3 * 5 * 64 + 2 * (2 * 2 * 5 * 256),
        "mlp": 2 * 3 * 8 * 64 + 2 * (2 * 2 * 8 * 256),
        "pooling": 2 * 3 * 8 * 16,
    }
    # Rows of 8 and 4 are single blocks. Two patches of 2 are in use, of the five that hold any
    # cloud of 8: qkv runs over all 10 slots in a single block. Then there is one patch of 4.
    forward = {
        "projections": 2 * 8 * 9 * 8 + 2 * (8 * 2 + 10 * 3) * 64 + 2 * (2 * 4 * 5 * 256),
        "mlp": 2 * 8 * 8 * 64 + 2 * (2 * 4 * 8 * 256),
        "pooling": 2 * 8 * 8 * 16,
        # three taps with a block of 32 pairs each, then the centre alone
        "convolution": 2 * 3 * 32 * 64 + 2 * (2 * 32 * 256),
        # patches x heads x width x width x (8 channels and 2 marks for scores; 8 for mixing
        # and 1 for the sum)
        "attention": 2 * 2 * (2 * 2) * (10 + 9) + 2 * (2 * 2 * (4 * 4) * (10 + 9)),
    }
    assert {part: counted.done for part, counted in got.items()} == forward
    # With gradients two more products each, the stem's input but one; conv_linear, proj and the
    # MLP's first layer once more.
    got = work.network_work(SPEC, levels, trained=True)
    stem, once = 2 * 8 * 9 * 8, 2 * 8 * 64 + 2 * (2 * 4 * 256)
    projections = 3 * forward["projections"] - stem + 2 * once
    assert {part: counted.done for part, counted in got.items()} == {
        "projections": projections,
        "mlp": 3.5 * forward["mlp"],
        "pooling": 3 * forward["pooling"],
        "convolution": 3 * forward["convolution"],
        # two more scores and two products of slopes with one column more, three gradients
        "attention": forward["attention"] * (10 + 9 + 2 * 11 + 2 * 9 + 3 * 8) / (10 + 9),
    }
    # What attention reads again; the MLP's second layer only if a scale follows.
    again = dataclasses.replace(SPEC, remat=True)
    remade = work.network_work(again, levels, trained=True)
    assert remade["projections"].done == projections + forward["projections"] - stem - once
    assert {part for part in got if remade[part] != got[part]} == {"projections"}
    every = work.network_work(dataclasses.replace(SPEC, remat=("all",) * 2), levels, trained=True)
    for part in ("convolution", "attention"):
        assert every[part].done == remade[part].done + forward[part]
    for spec in (SPEC, again):
        scaled = dataclasses.replace(spec, layer_scale=0.1)
        more = work.network_work(scaled, levels, trained=True)
        assert more["mlp"].done == got["mlp"].done + forward["mlp"] / 2


def test_a_step_needs_the_teacher_once_and_the_student_three_times():
    spec = SonataSpec(SPEC, shares=(1.0, 0.5), hidden=32, embed=4, prototypes=10, up_cast=1)
    large = work.count_levels(np.array([[0, 0, 0], [1, 0, 0], [4, 0, 0]]), (8, 4))
    small = work.count_levels(np.array([[0, 0, 0]]), (8, 4))
    got = work.sonata_work(spec, large, large, small)
    one, other = work.network_work(SPEC, large), work.network_work(SPEC, small)
    input_gradient = 2 * (3 + 1) * 9 * 8  # of the stem; not needed
    for part in one:
        needed = 4 * one[part].needed + 3 * other[part].needed
        assert got[part].needed == needed - input_gradient * (part == "projections")
    first, second = 2 * 24 * 32, 2 * 32 * 4  # a point of 8 + 16 channels
    assert got["heads"].needed == (first + second) * (3 * 2 + 3 * 3 + 3 * 1)
    assert got["heads"].done == 8 * (2 + 2 * 3) * (first + second)
    scores = 2 * 10 * 4
    assert got["losses"].needed == scores * (3 * 2 + 3 * 3 + 3 * 1)
    # three losses: three steps of Sinkhorn, 2 products forward, 4 backward
    assert got["losses"].done == scores * 8 * 3 * (3 + 2 + 4)


def test_an_offline_teacher_is_counted_at_its_own_size():
    sizes = dict(shares=(1.0, 0.5), hidden=32, embed=4, prototypes=10, up_cast=1)
    wide = dataclasses.replace(SPEC, encoder=(StageSpec(2, 16, 2, 4), StageSpec(1, 32, 2, 4)))
    levels = work.count_levels(np.array([[0, 0, 0], [1, 0, 0], [4, 0, 0]]), (8, 4))
    online = work.sonata_work(SonataSpec(SPEC, **sizes), *3 * (levels,))
    teacher = OfflineTeacher(wide, hidden=64, embed=6)
    got = work.sonata_work(SonataSpec(SPEC, **sizes, offline=teacher), *3 * (levels,))
    small, large = work.network_work(SPEC, levels), work.network_work(wide, levels)
    for part in small:
        assert got[part].needed == online[part].needed - small[part].needed + large[part].needed
    more = 2 * (48 * 64 + 64 * 6) - 2 * (24 * 32 + 32 * 4)  # of a point, each of two heads
    assert got["heads"].needed == online["heads"].needed + 3 * 2 * more
    assert got["losses"].needed == online["losses"].needed + 2 * 10 * (6 - 4) * 3 * 2
    assert got["losses"].done == online["losses"].done + 2 * 10 * (6 - 4) * 8 * 3 * (3 + 2)


@pytest.mark.parametrize("clouds", [1, 4])
def test_no_less_is_done_than_needed(clouds):
    draw = np.random.default_rng(clouds)
    stages = StageSpec(1, 8, 1, 48), StageSpec(2, 16, 2, 64)
    specs = (PTv3Spec(stages), PTv3Spec(stages, remat=True, layer_scale=1.0))
    for points, capacity in ((1, 16), (100, 100), (150, 1000), (500, 640), (500, 5000)):
        grid, cloud = draw.integers(0, 12, (points, 3)), draw.integers(0, clouds, points)
        fine = work.count_level(grid, cloud, clouds, capacity)
        coarse = work.count_level(grid[::3] >> 1, cloud[::3], clouds, max(16, capacity // 2))
        for spec in specs:
            for trained in (False, True):
                got = work.network_work(spec, (fine, coarse), trained)
                assert all(counted.done >= counted.needed for counted in got.values())
        sonata = SonataSpec(specs[1], shares=(1.0, 0.5), up_cast=1)
        got = work.sonata_work(sonata, *3 * ((fine, coarse),))
        assert all(counted.done >= counted.needed for counted in got.values())


@pytest.fixture(scope="module")
def row():
    """Levels with several clouds: of duplicated voxels in patches that borrow; narrow ones."""
    draw = np.random.default_rng(0)
    grid, cloud = draw.integers(0, 6, (200, 3)), np.sort(draw.integers(0, 3, 200))
    spec = PTv3Spec((StageSpec(1, 8, 1, 16), StageSpec(1, 8, 1, 512)))

    @jax.jit
    def build(grid, cloud):
        order, count, _ = sort_row(grid, cloud, jnp.ones(200, bool), 256)
        shape = spec.hierarchy((256, 128), clouds=3)
        return build_hierarchy(take_rows(grid, order), take_rows(cloud, order), count, shape)

    return build(grid, cloud)


def count(level):
    used = int(level.count)
    grid, cloud = np.asarray(level.grid[:used]), np.asarray(level.cloud[:used])
    return work.count_level(grid, cloud, 3, len(level.cloud))


def test_counts_are_those_of_the_structure(row):
    for level, size in zip(row, (16, 512), strict=True):
        got = count(level)
        assert got.points == int(level.count) and got.sizes == tuple(np.diff(level.starts))
        assert got.taps == tuple(level.pairs.counts)
        assert got.pairs == int((level.neighbours < len(level.cloud)).sum())
        patches, width = patches_used(got.sizes, got.capacity, size)
        layout = level.patches[size]
        assert patches == layout.used and patches * width == layout.used_slots
        assert (width < layout.width) == (level is row[1])


def test_loops_run_as_often_as_is_counted(row, monkeypatch):
    ran = []

    def blocks(function, *arguments):
        ran.clear()
        jax.block_until_ready(jax.jit(function)(*arguments))
        jax.effects_barrier()
        return ran

    def watch(module, name, size):
        function = getattr(module, name)

        def watched(*arguments):
            jax.debug.callback(lambda: ran.append(size(arguments)))
            return function(*arguments)

        monkeypatch.setattr(module, name, watched)

    def layer(weight, x):
        jax.debug.callback(lambda: ran.append(len(x)))
        return x @ weight

    def total(weight, used):
        return by_rows(layer, weight, jnp.ones((512, 4)), used).sum()

    watch(conv_pairs, "_slots", lambda arguments: arguments[-1])
    watch(attention_loop, "_operands", lambda arguments: arguments[-1].width * arguments[-1].heads)
    weight = jnp.ones((4, 4))
    gradient = jax.grad(total)
    for used in (0, 128, 130):  # forward and backward
        assert sum(blocks(gradient, weight, used)) == 2 * rows_done(512, used)
    x, pairs = jnp.ones((256, 4)), row[0].pairs
    kernel = conv_pairs.Kernel(jnp.ones((1, 27, 4, 4)), 0)
    done = conv_pairs.pairs_done(count(row[0]).taps, 256, 4)
    assert sum(blocks(conv_pairs.correlate, x, kernel, pairs)) == done
    assert sum(blocks(conv_pairs.gradients, x, kernel, pairs, x)) == done
    lonely = find_pairs(jnp.where(jnp.arange(27)[:, None] == 13, jnp.arange(256)[None], 256))
    done = conv_pairs.pairs_done(tuple(lonely.counts), 256, 4)
    assert done == 256  # nothing for taps without pairs
    assert sum(blocks(conv_pairs.correlate, x, kernel, lonely)) == done
    assert sum(blocks(conv_pairs.gradients, x, kernel, lonely, x)) == done
    for level, patch_size in zip(row, (16, 512), strict=True):
        counted, layout = count(level), level.patches[patch_size]
        rest = layout.segment, layout.narrow, layout.used

        def attend(qkv, rest=rest, width=layout.width):
            return patch_attention(3, width, qkv, *rest).sum()

        qkv = jnp.ones((len(layout.segment), 3, 2, 4))
        patches, width = patches_used(counted.sizes, counted.capacity, patch_size)
        done = blocks(jax.grad(attend), qkv)  # slots x heads of a tile
        assert sum(done) == width * patches * 2 * 2  # heads, passes
        assert set(done) <= {width, 2 * width}


def test_padding_of_the_last_block_is_done():
    assert [rows_done(1000, used) for used in (0, 1, 256, 257, 1000)] == [0, 256, 256, 512, 1024]
    assert rows_done(8, 3) == 8 and rows_done(8192, 1025) == 2048
    assert conv_pairs.pairs_done((33, 0, 32), 64, 8) == (2 + 1) * 32
    assert conv_pairs.pairs_done((1, 129), 5000, 384) == (1 + 2) * 128
    assert conv_pairs.pairs_done((1, 33), 256, 384) == (1 + 2) * 32
    assert conv_pairs.pairs_done((1, 33), 257, 384) == (1 + 1) * 128
    assert [points_done(300, used) for used in (0, 1, 300)] == [0, 256, 512]
    # four clouds and empty slots are told apart by 5 columns, which the scores have; one more adds
    # up the weights, or takes from scores and slopes what is known of each query
    forward, backward = attention_loop.operations_done(4, 10, 16)
    assert forward == 200 * (21 + 17) and backward == 200 * (2 * 22 + 2 * 17 + 3 * 16)
