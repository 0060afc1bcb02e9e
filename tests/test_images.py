"""Images on their way to the device: pure functions of seed and position, places that hold."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from shared_files import shared
from test_pipeline import assert_equal, take

from data_prep import rgbd
from data_prep.rooms import read_room
from point_jax.data.frames import Frames, write_frames
from point_jax.data.image_splits import read_correspondence, read_split
from point_jax.data.images import Size, fit_places, read_image
from point_jax.data.pipeline import default_data, make_batches
from point_jax.data.room_images import RoomImages
from point_jax.data.rooms import SMALL, make_room
from point_jax.data.scenes import Dataset, Scene, SceneError, write_dataset_json, write_scene

POINTS, IMAGES, SIZE = 90, 5, (36, 30)  # of a scene, of its images: width and height
HEIGHT, WIDTH = 10, 16
# Looks along +y from (1.5, -2, 1.5): 12 pixels a unit of slope, the middle of the image at 0.
CAMERA = np.array([[12.0, 17.5, 0, 17], [0, 14.5, -12, 47], [0, 1, 0, 2]])


def gradient(number: int) -> np.ndarray:
    """An image whose red and green say where a pixel is, its blue which image it is."""
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    image[..., 0] = 4 * np.arange(SIZE[1])[:, None]
    image[..., 1] = 4 * np.arange(SIZE[0])
    image[..., 2] = 40 * number
    return image


def scene(number: int) -> Scene:
    coord = np.random.default_rng(number).uniform(0, 3, (POINTS, 3)).astype(np.float32)
    return Scene(f"s{number}", coord, np.full((POINTS, 3), number + 2, np.uint8))


def frames(number: int, images: int = IMAGES) -> Frames:
    """Image i sees the points i, i + 7, i + 14, ..."""
    seen = np.arange(POINTS) % 7 == np.arange(images)[:, None]
    files = [f"images/{number}_{image}.png" for image in range(images)]
    return Frames(np.array(files), np.full((images, 2), SIZE), np.stack([CAMERA] * images), seen)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Four scenes; number 3 has no images, number 2 only two of them."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    for number in range(4):
        write_scene(folder / "a" / f"s{number}", scene(number))
        for image in range(IMAGES):
            Image.fromarray(gradient(image)).save(folder / f"images/{number}_{image}.png")
        if number < 3:
            write_frames(folder / "a" / f"s{number}", frames(number, 2 if number == 2 else IMAGES))
    write_dataset_json(folder, "m", "z", ["a"])
    return folder


def config(root: Path, count: int = 3, **changes) -> ConfigDict:
    data = default_data()
    data.update(scene_points=64, threads=2)
    data.sources = (dict(kind="folder", root=str(root), splits=("a",)),)
    data.images.update(count=count, height=HEIGHT, width=WIDTH)
    data.update(changes)
    return data


# Batches


def check_slot(batch: dict, slot: int, images: int) -> None:
    """Every place shows where its point is projected to, in an image that sees the point."""
    number, count = int(batch["scene"][slot]), int(batch["image_count"][slot])
    whole, rows = scene(number), int(batch["count"][slot])
    index = {point.tobytes(): i for i, point in enumerate(whole.coord)}
    points = np.array([index[point.tobytes()] for point in batch["coord"][slot, :rows]])
    assert count == min(3, images)
    taken = [round(batch["images"][slot, i, 5, 5, 2] / 40) for i in range(count)]
    assert len(set(taken)) == count
    for place, image in enumerate(taken):
        pixels = batch["pixels"][slot, :, place]
        seen = pixels[:, 0] >= 0
        assert not seen[rows:].any() and (pixels[~seen] == -1).all() and seen.any()
        assert (points[seen[:rows]] % 7 == image).all()
        homogeneous = np.column_stack([whole.coord[points], np.ones(rows)]).astype(float)
        u, v, w = CAMERA @ homogeneous.T
        # 36 x 30 pixels are cropped to 36 x 22.5 and resized by 16 / 36.
        row, column = ((v / w + 0.5) - 3.75) / 2.25, (u / w + 0.5) / 2.25
        inside = (points % 7 == image) & (row >= 0) & (row < HEIGHT)
        np.testing.assert_array_equal(seen[:rows], inside)
        np.testing.assert_allclose(pixels[seen, 0], row[inside], atol=1e-4)
        np.testing.assert_allclose(pixels[seen, 1], column[inside], atol=1e-4)
    for unused in range(count, 3):
        assert not batch["images"][slot, unused].any()
        assert (batch["pixels"][slot, :, unused] == -1).all()


def test_a_batch_has_images_and_the_places_of_its_points(root):
    (batch,) = take(make_batches(config(root), 0, 4), 1)
    assert batch["images"].shape == (4, 3, HEIGHT, WIDTH, 3) and batch["images"].dtype == np.uint8
    assert batch["pixels"].shape == (4, 64, 3, 2) and batch["pixels"].dtype == np.float32
    assert batch["image_count"].shape == (4,) and batch["image_count"].dtype == np.int32
    for slot, number in enumerate(batch["scene"]):
        check_slot(batch, slot, {2: 2, 3: 0}.get(int(number), IMAGES))


def test_images_change_nothing_else(root):
    plain = config(root, count=0)
    for batch, without in zip(
        take(make_batches(config(root), 5, 2), 3), take(make_batches(plain, 5, 2), 3), strict=True
    ):
        assert batch.keys() - without.keys() == {"images", "pixels", "image_count"}
        assert_equal({name: batch[name] for name in without}, without)


def test_without_a_count_no_image_is_looked_for(root, monkeypatch):
    monkeypatch.setattr(Dataset, "images", None)
    take(make_batches(config(root, count=0), 0, 4), 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_images_of_one_process(root, processes):
    whole = take(make_batches(config(root), 4, 4), 2)
    parts = [take(make_batches(config(root), 4, 4, 0, i, processes), 2) for i in range(processes)]
    for step, batch in enumerate(whole):
        assert_equal({k: np.concatenate([p[step][k] for p in parts]) for k in batch}, batch)


def test_resuming_at_batch_b_gives_its_images_and_a_repeated_scene_others(root):
    run = take(make_batches(config(root), 3, 4), 6)
    (there,) = take(make_batches(config(root, cache=0, threads=0), 3, 4, start_batch=4), 1)
    assert_equal(run[4], there)
    chosen = set()
    for batch in run:
        slot = int(np.flatnonzero(batch["scene"] == 0)[0])
        chosen.add(tuple(sorted(batch["images"][slot, :, 5, 5, 2])))
    assert len(chosen) > 1


def test_images_that_see_no_point_that_was_kept_are_not_taken(tmp_path):
    """Two rooms 10 m apart in one scene, an image of each."""
    coord = np.concatenate([scene(0).coord, scene(1).coord + [10, 0, 0]]).astype(np.float32)
    write_scene(tmp_path / "a" / "pair", Scene("pair", coord))
    camera = np.stack([CAMERA, CAMERA])
    camera[1, :, 3] -= 10 * CAMERA[:, 0]  # the second stands 10 m further on
    seen = np.repeat(np.eye(2, dtype=bool), POINTS, axis=1)
    files = np.array(["images/0.png", "images/1.png"])
    write_frames(tmp_path / "a" / "pair", Frames(files, np.full((2, 2), SIZE), camera, seen))
    (tmp_path / "images").mkdir()
    for image in range(2):
        Image.fromarray(gradient(image)).save(tmp_path / f"images/{image}.png")
    write_dataset_json(tmp_path, "m", "z", ["a"])
    sides = set()
    for batch in take(make_batches(config(tmp_path), 0, 2), 4):
        for slot in range(2):
            side = int(batch["coord"][slot, 0, 0] > 5)
            sides.add(side)
            assert batch["image_count"][slot] == 1
            assert round(batch["images"][slot, 0, 5, 5, 2] / 40) == side
    assert sides == {0, 1}


def test_a_bad_image_is_refused_by_name_or_its_scene_skipped(root, tmp_path):
    for link in ("a", "dataset.json"):
        (tmp_path / link).symlink_to(root / link)
    (tmp_path / "images").mkdir()
    for file in (root / "images").iterdir():
        if not file.name.startswith("0_"):
            (tmp_path / "images" / file.name).symlink_to(file)
    with pytest.raises(SceneError, match=r"images/0_\d.png: missing; .*skip_bad=True"):
        take(make_batches(config(tmp_path), 0, 4), 1)
    (batch,) = take(make_batches(config(tmp_path, skip_bad=True), 0, 4), 1)
    bad = batch["scene"] == 0
    assert not batch["count"][bad].any() and not batch["image_count"][bad].any()
    assert batch["count"][~bad].all() and not batch["images"][bad].any()
    assert (batch["pixels"][bad] == -1).all()


@pytest.mark.parametrize(("name", "value"), [("count", -1), ("height", 0), ("width", 2.5)])
def test_impossible_sizes_are_refused(root, name, value):
    data = config(root)
    with data.images.ignore_type():
        data.images[name] = value
    with pytest.raises(ValueError, match=f"config.data.images.{name} is {value}, expected a whole"):
        make_batches(data, 0, 1)


# Image files


def test_a_resized_image_shows_at_a_place_what_was_there(tmp_path):
    file, full, size = tmp_path / "image.png", Size(SIZE[1], SIZE[0]), Size(12, 9)
    Image.fromarray(gradient(1)).save(file)
    image = read_image(file, full, size)
    row, column = np.mgrid[:12, :9].reshape(2, -1) + 0.5
    # 36 x 30 pixels are cropped to 22.5 x 30.
    before = np.stack([row * 2.5, column * 2.5 + 6.75], axis=1)
    np.testing.assert_allclose(
        fit_places(before, full, size), np.stack([row, column], 1), atol=1e-5
    )
    shown = image[1:-1, 1:-1, :2].astype(float)
    expected = 4 * (before.reshape(12, 9, 2)[1:-1, 1:-1] - 0.5)
    assert np.abs(shown - expected).max() < 0.6
    outside = np.array([[-0.01, 10], [30.1, 10], [10, 6.7], [10, 29.3], [np.nan, 3]])
    assert (fit_places(outside, full, size) == -1).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", SIZE), "an image of mode L, expected RGB"),
        (Image.new("RGBA", SIZE), "an image of mode RGBA"),
        (Image.new("RGB", (30, 36)), "30 x 36 pixels, but its scene says 36 x 30"),
    ],
)
def test_other_images_are_refused(tmp_path, image, message):
    image.save(tmp_path / "image.png")
    with pytest.raises(SceneError, match=f"image.png: {message}"):
        read_image(tmp_path / "image.png", Size(30, 36), Size(4, 4))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["png", "jpeg"]), st.floats(0, 0.99), st.binary(max_size=8))
def test_damaged_images_raise_a_scene_error_or_nothing(kind, share, patch):
    whole = io.BytesIO()
    Image.fromarray(gradient(1)).save(whole, kind)
    content, full = whole.getvalue(), Size(SIZE[1], SIZE[0])
    place = int(share * len(content))
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(content[:place] + patch + content[place + len(patch) :])
        with contextlib.suppress(SceneError):
            assert read_image(path, full, Size(8, 8)).shape == (8, 8, 3)
        path.write_bytes(content[: place // 2])
        with pytest.raises(SceneError, match="not a readable image"):
            read_image(path, full, Size(8, 8))


# Pointcept's layout


@pytest.fixture
def concerto(tmp_path) -> Path:
    """Scene 0 with two groups of images, scene 1 with none, paths as Pointcept writes them."""
    base, split = "data/scannet", {}
    for number in range(2):
        write_scene(tmp_path / "train" / f"s{number}", scene(number))
    for group in range(2):
        files = [f"images/train/s0/{{}}/{2 * group + i}" for i in range(2)]
        for file in files:
            for kind in ("color", "correspondence"):
                (tmp_path / file.format(kind)).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(gradient(group)).save(tmp_path / f"{file.format('color')}.png")
            # Columns and rows of pixels of points 3, 4, 80; point 4 is in two pixels.
            rows = np.array([[5, 7, 3], [20, 13, 4], [21, 14, 4], [35, 2, 80]], np.float64)
            np.save(tmp_path / f"{file.format('correspondence')}.npy", rows)
        split[f"s0_{group}"] = {
            "pointclouds": f"{base}/train/s0",
            "images": [f"{base}/{file.format('color')}.png" for file in files],
            "correspondences": [f"{base}/{file.format('correspondence')}.npy" for file in files],
        }
    np.save(tmp_path / "images/train/s0/correspondence/1.npy", -np.ones((1, 3)))  # sees nothing
    split["s1"] = {"pointclouds": f"{base}/train/s1", "images": [], "correspondences": []}
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.json").write_text(json.dumps(split))
    return tmp_path


def pointcept(root: Path, **changes) -> ConfigDict:
    source = dict(kind="folder", root=str(root), units="m", up="z", image_splits=True)
    return config(root, sources=(source,), scene_points=100, **changes)


def test_pointcepts_layout_is_read_as_it_is(concerto):
    (batch,) = take(make_batches(pointcept(concerto), 0, 3), 1)
    by_entry = dict(zip(batch["scene"].tolist(), range(3), strict=True))
    counts = [int(batch["image_count"][by_entry[entry]]) for entry in range(3)]
    assert counts == [1, 2, 0]  # image 1 sees nothing
    for entry, count in enumerate(counts[:2]):
        slot = by_entry[entry]
        np.testing.assert_array_equal(batch["coord"][slot, :POINTS], scene(0).coord)
        for image in range(count):
            assert round(batch["images"][slot, image, 5, 5, 2] / 40) == entry
            pixels = batch["pixels"][slot, :, image]
            # Pixel centres are whole there; 36 x 30 is cropped to 36 x 22.5, resized by 16 / 36.
            expected = [[(7.5 - 3.75) / 2.25, 5.5 / 2.25], [(14 - 3.75) / 2.25, 21 / 2.25]]
            np.testing.assert_allclose(pixels[[3, 4]], expected, atol=1e-5)
            assert set(np.flatnonzero(pixels[:, 0] >= 0)) == {3, 4}  # 80 is cropped away
    np.testing.assert_array_equal(batch["coord"][by_entry[2], :POINTS], scene(1).coord)


def wrong_entry(**changes):
    def change(root: Path) -> None:
        file = root / "splits" / "train.json"
        content = json.loads(file.read_text())
        content["s0_1"] |= changes
        file.write_text(json.dumps(content))

    return change


def wrong_rows(*rows):
    return lambda root: np.save(root / "images/train/s0/correspondence/3.npy", np.array(rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "splits/train.json").unlink(), "train.json: missing; image_splits=True"),
        (lambda r: (r / "splits/train.json").write_text("{"), "train.json: not readable as JSON"),
        (lambda r: (r / "splits/train.json").write_text("{}"), "expected an object of entries"),
        (wrong_entry(images=[]), "entry 's0_1': 0 images, but 2 correspondences"),
        (wrong_entry(images=[1, 2]), "entry 's0_1': images and correspondences list paths"),
        (wrong_entry(pointclouds=None), "entry 's0_1': pointclouds is a path"),
        (wrong_entry(pointclouds="data/x/no"), "no: no such scene folder"),
        (wrong_rows([1, 2]), r"3.npy: shape \(1, 2\), expected \(rows, 3\)"),
        (wrong_rows([1, 2, 3], [1, 2, 90]), "3.npy: row 1 has point 90, but the cloud has 90"),
        (wrong_rows([1, 2, 0.5]), "3.npy: row 0 has point 0.5"),
        (wrong_rows([36, 2, 5]), "3.npy: row 0 has x, y = 36, 2, but the image has 36 x 30"),
        (wrong_rows([np.nan, 2, 5]), "3.npy: row 0 has x, y = nan, 2"),
        (lambda r: (r / "images/train/s0/correspondence/3.npy").unlink(), "3.npy: missing"),
        (lambda r: (r / "images/train/s0/color/3.png").write_bytes(b"x"), "3.png: not a readable"),
    ],
)
def test_what_is_wrong_with_it_is_said(concerto, damage, message):
    damage(concerto)
    with pytest.raises(SceneError, match=message):
        take(make_batches(pointcept(concerto), 0, 3), 1)


def test_its_bad_scenes_are_skipped(concerto):
    wrong_rows([1, 2, 90])(concerto)
    (batch,) = take(make_batches(pointcept(concerto, skip_bad=True), 0, 3), 1)
    assert {int(s): int(c) > 0 for s, c in zip(batch["scene"], batch["count"], strict=True)} == {
        0: True,
        1: False,
        2: True,
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["pointclouds", "images", "correspondences", "x"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=80)
@given(json_values | st.dictionaries(st.text(max_size=3), json_values), st.binary(max_size=6))
def test_any_other_split_raises_a_scene_error_or_nothing(content, tail):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "splits").mkdir()
        file = Path(folder) / "splits" / "train.json"
        file.write_bytes(json.dumps(content).encode() + tail)
        with contextlib.suppress(SceneError):
            for entry in read_split(Path(folder), "train"):
                assert len(entry.images) == len(entry.correspondences)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(*[st.floats(width=32) | st.integers(-2, 40)] * 3), max_size=4),
    st.sampled_from([np.float64, np.float32, np.int32]),
)
def test_correspondences_are_pixels_and_points_or_refused(rows, dtype):
    with tempfile.TemporaryDirectory() as folder, np.errstate(invalid="ignore"):
        file = Path(folder) / "rows.npy"
        np.save(file, np.array(rows, np.float64).reshape(-1, 3).astype(dtype))
        with contextlib.suppress(SceneError):
            read = read_correspondence(file, Size(30, 36), 20)
            assert ((read > -0.5) & (read < [35.5, 29.5, 20])).all()


# Procedural rooms


def test_a_room_is_seen_along_its_scans_path():
    room = make_room(5, SMALL)
    images, again = (RoomImages(5, SMALL, room.coord) for _ in range(2))
    assert len(images) == SMALL.frames
    size, covered = Size(48, 64), np.zeros(len(room.coord), bool)
    for image in (2, 9):
        sight = images.sight(image, size)
        seen = sight.pixels[:, 0] >= 0
        assert 0.03 < seen.mean() < 0.8 and (sight.pixels[~seen] == -1).all()
        assert (sight.pixels[seen] < size).all()
        assert correlation(sight.read(), sight.pixels, room) > 0.85
        other = again.sight(image, size)
        np.testing.assert_array_equal(other.pixels, sight.pixels)
        np.testing.assert_array_equal(other.read(), sight.read())
        covered |= seen
    assert covered.mean() > 0.1


def test_rooms_come_with_rendered_images():
    data = default_data()
    spec = {"frames": 3, "width": 24, "height": 18, "voxel": 0.1}
    data.update(sources=(dict(kind="rooms", seeds=(0, 2), spec=spec),), scene_points=800)
    data.images.update(count=2, height=12, width=16)
    first, _ = take(make_batches(data, 0, 2), 2)
    assert_equal(take(make_batches(data, 0, 2), 1)[0], first)
    assert (first["image_count"] > 0).all() and first["images"].any()
    seen = (first["pixels"] >= 0).all(-1)
    assert seen.any(1)[np.arange(2) < first["image_count"][:, None]].all()


# Recordings


def correlation(image: np.ndarray, pixels: np.ndarray, of: Scene) -> float:
    """Of the colours of an image, where it sees points, with the points' own."""
    assert of.color is not None
    seen = pixels[:, 0] >= 0
    row, column = pixels[seen].astype(int).T
    shown, own = image[row, column].astype(float), of.color[seen].astype(float)
    return float(np.corrcoef(shown.ravel(), own.ravel())[0, 1])


def check_colors(root: Path, least: float, size: Size) -> None:
    """Points have the colour of their pixel; one pixel beside it they have it less."""
    data = config(root, scene_points=40_000)
    data.sources = (dict(kind="folder", root=str(root), splits=("train",)),)
    data.images.update(count=2, height=size.height, width=size.width)
    (batch,) = take(make_batches(data, 0, 1), 1)
    cut = Scene("cut", batch["coord"][0], batch["color"][0])
    assert batch["image_count"][0] > 0
    for image in range(int(batch["image_count"][0])):
        pixels = batch["pixels"][0, :, image]
        there = correlation(batch["images"][0, image], pixels, cut)
        moved = (pixels >= 3).all(1) & (pixels < np.array(size) - 3).all(1)
        beside = [
            correlation(batch["images"][0, image], np.where(moved[:, None], pixels + step, -1), cut)
            for step in ([2, 0], [-2, 0], [0, 2], [0, -2])
        ]
        assert there > least and max(beside) < there


def test_a_rendered_rooms_points_have_the_colours_of_their_pixels(tmp_path):
    room = min(shared("data/rooms_sweethome").glob("room_*"))
    points, seen_in = read_room(room)
    write_scene(tmp_path / "train" / room.name, points, compact=True)
    write_frames(tmp_path / "train" / room.name, seen_in)
    write_dataset_json(tmp_path, "mm", "z", ["train"])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / room.name).symlink_to((room / "color").resolve())
    check_colors(tmp_path, 0.9, Size(168, 224))


def test_a_recordings_points_have_the_colours_of_their_pixels(tmp_path):
    recording = rgbd.open_recording(shared("data/rgbd_7scenes_redkitchen"))
    chosen = [10, 11]
    points = {frame: rgbd.frame_points(recording, frame, 0.02, 4.0) for frame in chosen}
    fused, seen_in = rgbd.fuse_frames(recording, points, chosen, "k", 0.02)
    write_scene(tmp_path / "train" / "k", fused, compact=True)
    write_frames(tmp_path / "train" / "k", seen_in)
    write_dataset_json(tmp_path, "mm", "z", ["train"])
    (tmp_path / "images").symlink_to((recording.folder / "color").resolve())
    check_colors(tmp_path, 0.9, Size(224, 224))
