"""Views of a scene: sizes, centres and crops by their rules, masks by blocks, any padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_files import shared

from point_jax.data.masks import block_index, choose_blocks, jitter_masked, random_mask
from point_jax.data.views import ViewSpec, crop, crop_views, make_views, view_size

SPEC = ViewSpec(max_size=200)
KEYS = jax.random.split(jax.random.key(0), 8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def surface(rng, points, capacity):
    """A wavy floor, one point a voxel, colours from the place, NaN in the padding."""
    side = int(np.ceil(np.sqrt(points)))
    x, y = np.divmod(rng.permutation(side * side)[:points], side)
    coord = np.column_stack([x, y, np.zeros(points)]) * 0.05 + rng.uniform(0, 0.02, (points, 3))
    normal = np.tile([0.0, 0.6, 0.8], (points, 1))
    arrays = {"coord": coord - 1.0, "color": 255 * coord / (0.05 * side + 0.02), "normal": normal}
    padding = np.full((capacity - points, 3), np.nan)
    scene = {name: np.concatenate([array, padding]) for name, array in arrays.items()}
    scene = {name: array.astype(np.float32) for name, array in scene.items()}
    return scene | {"count": np.int32(points)}


def nearest(coord, centre, size):
    """The rows that a stable sort by distance begins with, as a set."""
    distance = ((coord - centre) ** 2).sum(1, dtype=np.float32)
    return frozenset(np.argsort(distance, kind="stable")[:size].tolist())


class TestCrops:
    def test_crops_equal_the_originals(self):
        """Replays the originals' generator: their draws, our crops, their points."""
        golden = np.load(shared("golden/i_transforms.npz"))
        coord, draws = golden["coord"], np.random.RandomState(3)
        points = len(coord)
        cut = jax.jit(crop)

        def view(centre, share):
            size = int(draws.uniform(*share) * points)
            rows = np.flatnonzero(cut(coord, np.ones(points, bool), centre, size))
            # The originals keep rows by distance, and draw centres by that order.
            distance = np.square(coord[rows] - centre).sum(-1)
            return rows[np.argsort(distance)]

        major = view(coord[draws.choice(np.arange(points))], (0.4, 1.0))
        second = view(coord[major][draws.randint(len(major))], (0.4, 1.0))
        covered, local = np.zeros(len(major), bool), []
        for _ in range(4):
            covered &= not covered.all()
            centre = coord[major][draws.choice(np.flatnonzero(~covered))]
            local.append(view(centre, (0.1, 0.4)))
            covered |= np.isin(major, local[-1])

        for views, name in (([major, second], "global"), (local, "local")):
            offset = golden[f"mv_{name}_offset"]
            expected = np.split(golden[f"mv_{name}_origin_coord"], offset[:-1])
            assert [len(rows) for rows in views] == [len(part) for part in expected]
            for rows, part in zip(views, expected, strict=True):
                np.testing.assert_array_equal(coord[rows], part)

    @pytest.mark.parametrize(
        ("spec", "restarts"),
        [
            (SPEC, False),
            # Few local views of this size cover the major view, so that covering starts anew.
            (ViewSpec(max_size=200, global_share=(0.3, 0.3), local_share=(0.25, 0.25)), True),
        ],
    )
    def test_sizes_and_centres_follow_the_rules(self, rng, spec, restarts):
        coord = np.nan_to_num(surface(rng, 150, 160)["coord"])
        valid = jnp.arange(160) < 150
        cut = jax.jit(jax.vmap(lambda key: crop_views(key, jnp.asarray(coord), valid, spec)))

        def some_centre_gives(view, centres):
            return any(nearest(coord[:150], coord[row], len(view)) == view for row in centres)

        restarted = False
        for batches in zip(*map(np.asarray, jax.tree.leaves(cut(KEYS))), strict=True):
            cuts = []
            for (rows, count), share in zip(
                (batches[:2], batches[2:]), (spec.global_share, spec.local_share), strict=True
            ):
                assert rows.shape[1] == np.ceil(share[1] * 200)
                assert np.all((count >= int(share[0] * 150)) & (count <= share[1] * 150))
                for view, size in zip(rows, count, strict=True):
                    assert np.all(np.diff(view[:size]) > 0) and not np.any(view[size:])
                    cuts.append(frozenset(view[:size].tolist()))

            major, second, *local = cuts
            assert some_centre_gives(major, range(150))
            assert some_centre_gives(second, major)
            covered = set()
            for view in local:
                if not major - covered:
                    covered, restarted = set(), True
                assert some_centre_gives(view, major - covered)
                covered |= view
        assert restarted == restarts

    @pytest.mark.parametrize(
        ("shares", "most", "size"),
        [
            ([0.5] * 10, 200, 100),
            ([0.999999] * 10, 7, 6),
            ([0.1] * 3 + [0.3] * 7, 4, 1),  # int(0.4) = 0 is drawn again
            ([0.1] * 10, 5, 5),  # never above 0: 10 points, or all
            ([0.01] * 10, 50, 10),
            ([0.4] * 10, 1, 1),
            ([0.4] * 10, 0, 0),
        ],
    )
    def test_sizes_of_tiny_scenes(self, shares, most, size):
        assert view_size(jnp.array(shares), jnp.int32(most)) == size


@pytest.fixture(scope="module")
def scenes():
    """A scene, the same with other padding, its first point alone, and none of it."""
    whole = surface(np.random.default_rng(1), 250, 300)
    zeros = {name: np.nan_to_num(array) for name, array in whole.items()}
    return [whole, zeros, whole | {"count": np.int32(1)}, whole | {"count": np.int32(0)}]


@pytest.fixture(scope="module")
def views(scenes):
    """Views of these scenes with the same key, and of the first with another."""
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *scenes, scenes[0])
    keys = jnp.stack([KEYS[0]] * 4 + [KEYS[1]])
    made = jax.jit(jax.vmap(lambda scene, key: make_views(scene, key, SPEC)))(stacked, keys)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, made))
    return [structure.unflatten(parts) for parts in zip(*leaves, strict=True)]


class TestViews:
    """One program makes the views of scenes with any number of points."""

    def test_shapes_and_counts(self, views):
        for made in views:
            assert made.global_.coord.shape == (2, 200, 3)
            assert made.local.coord.shape == (4, 80, 3)
            assert made.overflow == {"grid": 0, "elastic": 0}
            for batch in (made.global_, made.local):
                for view in range(len(batch.count)):
                    for name in ("coord", "origin", "color", "normal"):
                        array = getattr(batch, name)[view]
                        assert np.all(np.isfinite(array))
                        assert not np.any(array[batch.count[view] :])
        assert [made.points for made in views] == [250, 250, 1, 0, 250]
        np.testing.assert_array_equal(views[2].global_.count, [1, 1])
        np.testing.assert_array_equal(views[2].local.count, [1, 1, 1, 1])
        assert not np.any(views[3].global_.count) and not np.any(views[3].local.count)
        assert np.all(views[0].global_.count >= 80) and np.all(views[0].local.count >= 20)

    def test_origins_are_points_of_the_scene(self, scenes, views):
        points = {tuple(point) for point in scenes[0]["coord"][:250].tolist()}
        for batch in (views[0].global_, views[0].local):
            for origin, count in zip(batch.origin, batch.count, strict=True):
                rows = [tuple(point) for point in origin[:count].tolist()]
                assert len(set(rows)) == count and points.issuperset(rows)

    def test_padding_is_not_seen_and_the_key_is(self, views):
        for part, same in zip(*map(jax.tree.leaves, views[:2]), strict=True):
            np.testing.assert_array_equal(part, same)
        assert not np.array_equal(views[0].global_.origin, views[4].global_.origin)

    def test_the_major_view_is_around_a_point_that_an_image_sees(self, scenes, views):
        def with_pixels(seen):
            """Two images; `seen` (300,) says which points the second one sees."""
            pixels = np.full((300, 2, 2), -1, np.float32)
            pixels[seen, 1] = 3.5
            return scenes[0] | {"pixels": pixels}

        coord = scenes[0]["coord"][:250]
        corner = np.zeros(300, bool)
        corner[np.argsort(coord @ [1.0, 1.0, 0.0])[:4]] = True
        beyond = np.arange(300) >= 250  # padding: not points at all
        stacked = [with_pixels(seen) for seen in (corner, corner, corner, corner | beyond, beyond)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *stacked)
        keys = KEYS[np.array([0, 1, 2, 0, 0])]
        make = jax.jit(jax.vmap(lambda scene, key: make_views(scene, key, SPEC).global_))
        made = make(stacked, keys)
        for case in range(4):
            count = int(made.count[case, 0])
            major = frozenset(np.asarray(made.source[case, 0, :count]).tolist())
            centres = coord[np.flatnonzero(corner)]
            assert any(nearest(coord, centre, count) == major for centre in centres)
        # Where images see no point, every draw is the one that there is without images.
        for part, plain in zip(
            jax.tree.leaves(made), jax.tree.leaves(views[0].global_), strict=True
        ):
            np.testing.assert_array_equal(part[4], plain)

    def test_points_stay_within_the_reach_of_the_augmentation(self, views):
        """Scaled by 0.9 to 1.1, jittered by 2 cm and distorted by decimetres, about the centre."""
        for batch in (views[0].global_, views[0].local):
            for coord, origin, normal, count in zip(
                batch.coord, batch.origin, batch.normal, batch.count, strict=True
            ):
                coord, origin = coord[:count], origin[:count]
                before = np.linalg.norm(origin[:, None] - origin[None], axis=-1)
                after = np.linalg.norm(coord[:, None] - coord[None], axis=-1)
                assert np.all(np.abs(after - before) < 0.1 * before + 0.8)
                assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.9
                assert np.abs(np.linalg.norm(normal[:count], axis=1) - 1).max() < 1e-5
                assert np.ptp(normal[:count], axis=0).max() < 1e-6

    def test_global_views_share_one_change_of_colours_and_local_views_do_not(self, scenes, views):
        def colors(batch, view):
            """Colours by place."""
            count = batch.count[view]
            places = map(tuple, batch.origin[view, :count].tolist())
            return dict(zip(places, batch.color[view, :count].tolist(), strict=True))

        made = views[0]
        first, second = (colors(made.global_, view) for view in range(2))
        both = first.keys() & second.keys()
        assert len(both) > 20 and all(first[place] == second[place] for place in both)
        local = [colors(made.local, view) for view in range(4)]
        assert all(min(color) >= 0 and max(color) <= 1 for part in local for color in part.values())
        places = map(tuple, scenes[0]["coord"][:250].tolist())
        before = dict(zip(places, (scenes[0]["color"][:250] / 255).tolist(), strict=True))
        others = [before, first, *local]
        for number, part in enumerate(others):
            for other in others[:number]:
                both = part.keys() & other.keys()
                assert (
                    any(np.abs(np.subtract(part[p], other[p])).max() > 0.01 for p in both)
                    or not both
                )


class TestMasks:
    @staticmethod
    def clouds():
        """The originals' clouds, padded to one capacity with NaN."""
        golden = np.load(shared("golden/f1_sonata_pieces.npz"))
        parts = np.split(golden["mask.coord"], golden["mask.offset"][:-1])
        coord = np.full((len(parts), 320, 3), np.nan, np.float32)
        for row, part in zip(coord, parts, strict=True):
            row[: len(part)] = part
        return golden, coord, ~np.isnan(coord[..., 0])

    def test_blocks_and_masks_equal_the_originals(self):
        golden, coord, valid = self.clouds()
        block, blocks = jax.jit(jax.vmap(block_index, (0, 0, None)))(
            coord, valid, golden["mask.size"]
        )
        # They number the blocks of all clouds jointly, and choose among all of them.
        first = np.cumsum(blocks) - blocks
        joint = np.where(valid, block + first[:, None], -1)
        np.testing.assert_array_equal(joint[valid], golden["mask.point_cluster"])
        assert np.all(np.asarray(block)[~valid] == -1)
        order = golden["mask.randperm"]
        assert np.sum(blocks) == len(order)
        chosen = order[: int(len(order) * float(golden["mask.ratio"]))]
        np.testing.assert_array_equal(np.isin(joint[valid], chosen), golden["mask.point_mask"])

    def test_a_mask_has_its_share_of_whole_blocks(self, rng):
        coord = rng.uniform(-2, 2, (400, 3)).astype(np.float32)
        coord[350:] = np.nan
        valid = np.arange(400) < 350
        mask = jax.jit(random_mask)
        for key, size, ratio in zip(KEYS, [0.1, 0.4, 1.0, 9.0], [0.3, 0.7, 1.0, 0.6], strict=False):
            masked = np.asarray(mask(key, coord, valid, size, ratio))
            assert not np.any(masked[350:])
            cell = (coord[:350] - coord[:350].min(0)) // np.float32(size)
            _, block = np.unique(cell, axis=0, return_inverse=True)
            hits, total = np.bincount(block, masked[:350]), np.bincount(block)
            assert np.all((hits == 0) | (hits == total))
            assert np.sum(hits > 0) == int(np.float32(ratio) * np.float32(len(total)))

    def test_all_blocks_are_equally_likely(self):
        chosen = jax.jit(jax.vmap(lambda key: choose_blocks(key, jnp.int32(10), 0.35, 16)))(
            jax.random.split(jax.random.key(0), 4000)
        )
        assert np.all(np.sum(chosen, axis=1) == 3)
        np.testing.assert_allclose(np.mean(chosen, axis=0), [0.3] * 10 + [0.0] * 6, atol=0.03)

    def test_a_view_without_points_has_no_blocks(self):
        nothing = np.full((8, 3), np.nan, np.float32), np.zeros(8, bool)
        block, blocks = jax.jit(block_index)(*nothing, 0.1)
        assert blocks == 0 and np.all(block == -1)
        assert not np.any(jax.jit(random_mask)(KEYS[0], *nothing, 0.1, 0.5))

    def test_the_jitter_of_masked_points_is_clipped_from_above(self, rng):
        coord = rng.normal(size=(500, 3)).astype(np.float32)
        mask = rng.random(500) < 0.5
        noise = rng.normal(size=(500, 3)).astype(np.float32) * 2
        moved = jitter_masked(coord, mask, noise, 0.01)
        expected = coord + np.where(mask[:, None], np.minimum(0.01 * noise, 0.02), 0)
        np.testing.assert_allclose(moved, expected, atol=1e-6)
        assert (expected - coord).min() < -0.03
        moved = jitter_masked(coord, mask, noise, 0.01, symmetric=True)
        expected = coord + np.where(mask[:, None], np.clip(0.01 * noise, -0.02, 0.02), 0)
        np.testing.assert_allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid_size": 0.0}, "grid_size is 0.0"),
        ({"max_size": 0}, "max_size is 0"),
        ({"global_count": 0}, "global_count is 0"),
        ({"local_share": (0.4, 0.1)}, r"local_share is \(0.4, 0.1\)"),
        ({"global_share": (0.0, 1.0)}, r"global_share is \(0.0, 1.0\)"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ViewSpec(**wrong)
