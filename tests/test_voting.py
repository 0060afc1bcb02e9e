"""Every point gets the votes that the protocol gives it, and the files that carry them."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.data.checks import SceneError
from point_jax.data.scenes import Scene
from point_jax.evaluation.classes import SCANNET20
from point_jax.evaluation.submission import write_submission
from point_jax.evaluation.voting import TOGETHER, VOTES, Vote, turns, vote
from point_jax.features.voxels import voxelize

GRID = 0.1


def make_scene(seed, places=30, points=60, size=0.4):
    """Points of which several share a voxel and some are the same, with different colours."""
    rng = np.random.default_rng(seed)
    coord = rng.uniform(-size, size, (places, 3))[rng.integers(0, places, points)] + [5, -3, 2]
    normal = rng.standard_normal((points, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return Scene(
        f"scene{seed}",
        coord.astype(np.float32),
        rng.integers(0, 256, (points, 3), np.uint8),
        normal.astype(np.float32),
    )


class Stub:
    """Probabilities that tell every input apart: of a voxel's row, and of the cloud it is in."""

    classes = 3

    def __init__(self, channels=9):
        rng = np.random.default_rng(7)
        self.kernel = rng.standard_normal((channels + 3, 3))
        self.seen = []

    def of(self, grid, features):
        rows = np.concatenate([features, np.sin(grid)], axis=1).astype(np.float64)
        powers = np.exp(rows @ self.kernel + rows.mean(0) @ self.kernel)
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32)

    def __call__(self, clouds):
        self.seen.append(list(clouds))
        for cloud in clouds:
            yield self.of(cloud.grid, cloud.features)


def middle(points, floor):
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    return np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2] if floor else 0.0])


def votes_by_definition(stub, scene, votes, first_grid=None):
    """Voxel by voxel and point by point."""
    start = scene.coord - middle(scene.coord.astype(np.float64), floor=True)
    everyone = start.astype(np.float32)
    representative, kept = list(range(len(everyone))), list(range(len(everyone)))
    if first_grid is not None:
        first = {}
        for i, point in enumerate(everyone):
            cell = tuple(math.floor(x / first_grid) for x in point.tolist())
            representative[i] = first.setdefault(cell, i)
        kept = sorted(set(representative))
    sums = defaultdict(lambda: np.zeros(3))
    for turn, scale, flip in votes:
        angle, sign = turn * math.pi, -1 if flip else 1
        matrix = np.array([
            [sign * math.cos(angle), -sign * math.sin(angle), 0],
            [sign * math.sin(angle), sign * math.cos(angle), 0],
            [0, 0, 1],
        ])  # fmt: skip
        moved = {i: scale * (matrix @ everyone[i].astype(np.float64)) for i in kept}
        cells = {i: tuple(math.floor(x / GRID) for x in moved[i]) for i in kept}
        lowest = np.min(list(cells.values()), axis=0)
        voxels = defaultdict(list)
        for i in kept:
            voxels[cells[i]].append(i)
        for number in range(max(map(len, voxels.values()))):
            chosen = [points[number % len(points)] for points in voxels.values()]
            grid = np.array(list(voxels)) - lowest
            coord = np.array([moved[i] for i in chosen])
            coord -= middle(coord, floor=False)
            color = scene.color[chosen] / 255
            normal = np.array([matrix @ scene.normal[i] for i in chosen])
            part = stub.of(grid, np.concatenate([coord, color, normal], axis=1))
            for i, probabilities in zip(chosen, part, strict=True):
                sums[i] += probabilities
    return np.array([sums[i] for i in representative])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    points=st.integers(2, 60),
    first_grid=st.sampled_from([None, 0.03, 0.05]),
    some=st.lists(
        st.tuples(st.sampled_from([0, 0.5, 1, 1.5, 0.3]), st.floats(0.9, 1.1), st.booleans()),
        min_size=1,
        max_size=2,
    ),
)
def test_votes_are_those_of_the_definition(seed, points, first_grid, some):
    scene = make_scene(seed, points=points)
    wanted = votes_by_definition(Stub(), scene, some, first_grid)
    got = vote(Stub(), scene, GRID, votes=[Vote(*one) for one in some], first_grid=first_grid)
    assert got.dtype == np.float32 and got.shape == (points, 3)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_the_protocol_has_pointcepts_thirteen_votes():
    scene, turns_ = make_scene(3), (0, 0.5, 1, 1.5)
    listed = [(turn, scale, False) for scale in (1, 0.95, 1.05) for turn in turns_]
    wanted = votes_by_definition(Stub(), scene, [*listed, (0, 1, True)])
    assert len(VOTES) == 13
    np.testing.assert_allclose(vote(Stub(), scene, GRID), wanted, rtol=1e-4)


class Uniform:
    """Knows nothing: so the sums count the votes."""

    classes = 2

    def __call__(self, clouds):
        for cloud in clouds:
            yield np.full((len(cloud.grid), 2), 0.5, np.float32)


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=60))
def test_the_points_of_a_voxel_take_turns(cells):
    grid = np.array(cells, np.int32)
    fragments = list(turns(grid))
    _, inverse, count = np.unique(grid, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    assert len(fragments) == count.max()
    for rows in fragments:  # every voxel once, in the same order
        np.testing.assert_array_equal(grid[rows], grid[fragments[0]])
        assert len(set(map(tuple, grid[rows]))) == len(rows) == len(count)
    seen = np.bincount(np.concatenate(fragments), minlength=len(grid))
    assert (seen >= 1).all()
    for voxel in range(len(count)):  # as often as one another, but for one turn; the first first
        of_voxel = seen[inverse == voxel]
        assert of_voxel.sum() == count.max()
        assert (np.diff(of_voxel) <= 0).all() and of_voxel[0] - of_voxel[-1] <= 1


def test_more_fragments_than_are_held_together_all_vote():
    crowd = 2 * TOGETHER + 3
    coord = np.zeros((crowd + 1, 3), np.float32)
    coord[-1] = 1  # alone in its voxel
    got = vote(Uniform(), Scene("crowd", coord), GRID, votes=[Vote()])
    np.testing.assert_array_equal(got, [[0.5, 0.5]] * crowd + [[crowd / 2, crowd / 2]])


def test_a_scene_of_single_points_left_in_place_is_encoded_as_ever():
    scene = make_scene(0, places=10**6, points=50, size=3)
    plain = voxelize(scene, GRID)
    assert len(plain.grid) == 50
    stub = Stub()
    vote(stub, scene, GRID, votes=[Vote()])
    ((cloud,),) = stub.seen
    np.testing.assert_array_equal(cloud.grid, plain.grid)
    np.testing.assert_allclose(cloud.features, plain.features, atol=1e-6)
    np.testing.assert_array_equal(cloud.coord, cloud.features[:, :3])
    order = np.argsort(plain.inverse)  # the point of each voxel
    np.testing.assert_array_equal(cloud.points[cloud.inverse], scene.coord[order])


def test_a_quarter_turn_is_counter_clockwise_and_exact():
    vectors = np.array([[1, 0, 5], [0, 1, 5], [0.1, 0.7, -1]])
    turned = [[0, 1, 5], [-1, 0, 5], [-0.7, 0.1, -1]]
    np.testing.assert_array_equal(Vote(0.5).place(vectors), turned)
    np.testing.assert_array_equal(Vote(-1.5).place(vectors), turned)
    np.testing.assert_array_equal(Vote(4.5, 2.0).place(vectors), np.array(turned) * 2)
    np.testing.assert_array_equal(Vote(0.5, 2.0).direct(vectors), turned)
    for turn in (0.0, 0.3, 1.0):  # mirroring x and y is half a turn
        found = Vote(turn, flip=True).place(vectors)
        np.testing.assert_allclose(found, Vote(turn + 1).place(vectors), atol=1e-12)


def test_the_inputs_asked_for_are_given_and_what_a_scene_lacks_is_zero():
    scene = make_scene(1)
    assert scene.normal is not None and scene.color is not None
    bare = Scene("bare", scene.coord)
    full, some = Stub(), Stub(6)
    vote(full, bare, GRID, votes=[Vote()])
    vote(some, scene, GRID, ("normal", "color"), votes=[Vote(1.0)])
    for cloud in full.seen[0]:
        assert (cloud.features[:, 3:] == 0).all() and (cloud.features[:, :3] != 0).any()
    for cloud in some.seen[0]:
        assert cloud.features.dtype == np.float32 and cloud.features.shape[1] == 6
        rows = [np.flatnonzero((scene.coord == point).all(1)) for point in cloud.points]
        assert all(
            any(np.allclose(row, [*(scene.normal[i] * [-1, -1, 1]), *scene.color[i] / 255.0],
                            atol=1e-6) for i in found)
            for row, found in zip(cloud.features, rows, strict=True)
        )  # fmt: skip


def test_coordinates_are_scaled_before_anything_else():
    scene = make_scene(2)
    half = Scene("half", scene.coord / 2, scene.color, scene.normal)
    wanted, got = vote(Stub(), scene, GRID), vote(Stub(), half, GRID, scale=2.0)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"scale": 0.0}, "scale is 0.0, expected a number above 0"), ({"turn": math.nan}, "turn is")],
)
def test_votes_that_are_none_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        Vote(**bad)


def test_what_cannot_be_voted_on_is_told():
    scene = make_scene(0)
    with pytest.raises(ValueError, match="votes is empty"):
        vote(Stub(), scene, GRID, votes=[])
    with pytest.raises(SceneError, match="scene0: .* are the coordinates in metres"):
        vote(Stub(), scene, 1e-7, votes=[Vote()])
    stub = Stub()
    stub.classes = 4
    with pytest.raises(ValueError, match=r"predictions of shape \(\d+, 3\) for \d+ voxels and 4"):
        vote(stub, scene, GRID, votes=[Vote()])


def test_a_submission_names_the_class_of_every_point_in_their_order(tmp_path):
    scene = make_scene(5, points=7)
    predicted = np.array([0, 19, 12, 12, 15, 3, 0])
    for guess in (np.zeros(7, int), predicted):  # a second run replaces the first
        file = write_submission(tmp_path / "submit", scene, guess, SCANNET20)
    assert file == tmp_path / "submit" / "scene5.txt"
    assert file.read_text() == "1\n39\n14\n14\n28\n4\n1\n"
    assert [path.name for path in file.parent.iterdir()] == ["scene5.txt"]


@pytest.mark.parametrize(
    ("predicted", "says"),
    [
        (np.zeros(6, int), r"scene5: predictions of shape \(6,\) for 7 points"),
        (np.zeros((7, 1), int), r"shape \(7, 1\)"),
        (np.full(7, 20), "int64 from 20 to 20, expected integers from 0 to 19"),
        (np.full(7, -1), "from -1 to -1"),
        (np.zeros(7), "float64"),
    ],
)
def test_a_submission_that_does_not_fit_the_scan_is_not_written(tmp_path, predicted, says):
    with pytest.raises(ValueError, match=says):
        write_submission(tmp_path, make_scene(5, points=7), predicted, SCANNET20)
    assert not list(tmp_path.iterdir())
