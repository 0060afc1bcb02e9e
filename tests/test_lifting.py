"""Lifted image features equal their definition, and are evaluated as any other features are."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from foreign import foreign
from image_states import DINOV2, dinov2_state
from PIL import Image
from scipy.ndimage import map_coordinates
from test_evaluate import SPEC, run, sources

from configs import segmentation
from launch import command, tabulate
from point_jax.data.checks import SceneError
from point_jax.data.frames import Frames, write_frames
from point_jax.data.images import Sight, Size
from point_jax.data.rooms import CLASSES, RoomSpec, make_room
from point_jax.data.scenes import Scene, write_dataset_json, write_scene
from point_jax.evaluation import lifting
from point_jax.evaluation.candidates import Named, parse
from point_jax.evaluation.features import LabelledVoxels, RawFeatures, extract
from point_jax.evaluation.labelled_scenes import labelled_scenes
from point_jax.evaluation.lifting import (
    JoinedFeatures,
    LiftedFeatures,
    default_lifting,
    load_lifted,
    unseen_share,
)
from point_jax.evaluation.predict import LinearPredictor
from point_jax.evaluation.ridge import fit_ridge
from point_jax.evaluation.voting import Vote, vote
from point_jax.features.voxels import voxelize
from point_jax.interop.image_encoders import to_image_encoder
from point_jax.interop.store import save_weights
from point_jax.training.config import ConfigError, compare_config, settle_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

GRID = 0.25
HEIGHT, WIDTH, STRIDE = 3, 4, 2  # patches, patches, pixels


@dataclasses.dataclass(frozen=True)
class Patches:
    """An image encoder whose features are a patch's mean colour, and how dark it is."""

    stride: int = STRIDE
    channels: int = 4

    def __call__(self, params, images):
        batch, height, width, _ = images.shape
        shape = (batch, height // self.stride, self.stride, width // self.stride, self.stride, 3)
        color = images.reshape(shape).astype(jnp.float32).mean((2, 4)) / 255
        return params["gain"] * jnp.concatenate([color, 1 - color.mean(3, keepdims=True)], axis=3)


class Drawn:
    """Images of one colour a patch, and where they see the points; counts what is read."""

    def __init__(self, patches, pixels):
        self.patches, self.pixels, self.read = patches, pixels, 0

    def __len__(self):
        return len(self.patches)

    def sight(self, image, size):
        assert size == Size(HEIGHT * STRIDE, WIDTH * STRIDE)

        def read():
            self.read += 1
            return self.patches[image].repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)

        return Sight(self.pixels[image].astype(np.float32), read)


def lifted():
    return LiftedFeatures(Patches(), {"gain": np.float32(2)}, HEIGHT, WIDTH)


@dataclasses.dataclass(frozen=True)
class Posed(Scene):
    """A scene that has drawn images."""

    images: Any = None


def posed(seed, images=3, points=200, seen=0.4):
    """A cloud and images that see a random part of it anywhere, up to their very borders."""
    draw = np.random.default_rng(seed)
    coord = draw.uniform(0, 1, (points, 3)).astype(np.float32)
    patches = draw.integers(0, 256, (images, HEIGHT, WIDTH, 3), np.uint8)
    pixels = draw.uniform(0, 1, (images, points, 2)) * [HEIGHT * STRIDE, WIDTH * STRIDE]
    pixels[:, :4] = [[0, 0], [5.999, 7.999], [0, 7.999], [3, 4]]
    pixels[draw.random((images, points)) >= seen] = -1
    return Posed(f"s{seed}", coord, images=Drawn(patches, pixels))


def defined(scene, cloud):
    """Sighting by sighting: features (V, 4), NaN where there is none."""
    found = [[] for _ in cloud.grid]
    for patches, pixels in zip(scene.images.patches, scene.images.pixels, strict=True):
        color = patches / 255
        features = 2 * np.concatenate([color, 1 - color.mean(2, keepdims=True)], axis=2)
        for point in np.flatnonzero(pixels[:, 0] >= 0):
            place = pixels[point] / STRIDE - 0.5
            found[cloud.inverse[point]].append(
                [
                    map_coordinates(channel, place[:, None], order=1, mode="nearest")[0]
                    for channel in np.moveaxis(features, 2, 0)
                ]
            )
    return np.array([np.mean(one, axis=0) if one else [np.nan] * 4 for one in found])


@pytest.mark.parametrize("batch", [2, 8])
def test_a_voxel_has_the_mean_over_the_sightings_of_its_points(monkeypatch, batch):
    monkeypatch.setattr(lifting, "BATCH", batch)
    scenes = [posed(seed, images) for seed, images in enumerate((3, 1, 5))]
    clouds = [voxelize(scene, GRID) for scene in scenes]
    for scene, cloud, got in zip(scenes, clouds, lifted()(clouds), strict=True):
        want = defined(scene, cloud)
        seen = np.isfinite(want[:, 0])
        assert 20 < seen.sum() <= len(got) < len(scene.coord)
        assert got.shape == (len(cloud.grid), 4) and got.dtype == np.float32
        np.testing.assert_allclose(got[seen], want[seen], atol=1e-5)
        assert scene.images.read == len(scene.images)


def test_in_the_middle_of_a_patch_there_is_its_colour_alone():
    scene = posed(0, images=1)
    row, column = np.divmod(np.arange(len(scene.coord)) % (HEIGHT * WIDTH), WIDTH)
    scene.images.pixels[0] = (np.stack([row, column], axis=1) + 0.5) * STRIDE
    cloud = voxelize(scene, 1e-3)  # a voxel a point
    (got,) = lifted()([cloud])
    color = scene.images.patches[0][row, column] / 255
    np.testing.assert_allclose(got[cloud.inverse][:, :3], 2 * color, atol=1e-5)


def test_a_voxel_that_no_image_sees_is_as_the_nearest_that_one_does():
    scene = posed(1, images=2, seen=0.05)
    cloud = voxelize(scene, GRID)
    (got,) = lifted()([cloud])
    want = defined(scene, cloud)
    seen = np.flatnonzero(np.isfinite(want[:, 0]))
    unseen = np.flatnonzero(np.isnan(want[:, 0]))
    assert len(seen) and len(unseen)
    for voxel in unseen:
        far = np.linalg.norm(cloud.grid[seen] - cloud.grid[voxel], axis=1)
        nearest = seen[far == far.min()]
        assert (np.abs(got[nearest] - got[voxel]).max(1) == 0).any()
    share = unseen_share([scene], GRID, lifted().size)
    assert share == len(unseen) / len(cloud.grid)
    both = unseen_share([scene, posed(2, seen=1.0)], GRID, lifted().size)
    assert 0 < both < share
    assert scene.images.read == 2  # the share reads no image


def test_what_cannot_be_lifted_is_told():
    scene = posed(0)
    scene.images.pixels[:] = -1
    with pytest.raises(SceneError, match="none of the 3 images of a scene of 200 points sees any"):
        list(lifted()([voxelize(scene, GRID)]))
    bare = dataclasses.replace(scene, images=None)
    with pytest.raises(ValueError, match="to voxels that came without images"):
        list(lifted()([voxelize(bare, GRID)]))

    predictor = LinearPredictor(lifted(), np.zeros((4, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="fragments of votes .* have none"):
        vote(predictor, posed(0), GRID, votes=[Vote()])


def test_joined_features_are_those_of_the_parts_side_by_side():
    scenes = [posed(seed) for seed in range(3)]
    joined = JoinedFeatures((RawFeatures(), lifted()))
    assert joined.channels == 7 + 4
    found = list(extract(joined, scenes, GRID))
    for part, columns in ((RawFeatures(), slice(0, 7)), (lifted(), slice(7, 11))):
        for (_, _, both), (_, _, alone) in zip(found, extract(part, scenes, GRID), strict=True):
            np.testing.assert_array_equal(both[:, columns], alone)


def colored(seed):
    """Points in rows that look alike but in the images, where classes have colours."""
    scene = posed(seed, images=2, seen=0.8)
    label = np.random.default_rng(seed).integers(0, 3, len(scene.coord)).astype(np.int32)
    scene.images.patches[:] = 0
    for color in range(3):
        scene.images.patches[:, color, :, color] = 250
    scene.images.pixels[..., 0] = np.where(scene.images.pixels[..., 0] < 0, -1, 2 * label + 1)
    coord = np.arange(len(label))[:, None] * np.array([[1, 0, 0]], np.float32)
    return dataclasses.replace(scene, coord=coord, segment=label)


def test_a_ridge_on_lifted_colours_tells_classes_apart_that_raw_input_cannot():
    scenes = [colored(seed) for seed in range(5)]
    sees = fit_ridge(LabelledVoxels(lifted(), scenes, GRID), 3)
    blind = fit_ridge(LabelledVoxels(RawFeatures(), scenes, GRID), 3)
    # A 25th of the points is in no image: their neighbours' colours say nothing of them.
    assert sees.held_out_mIoU > 0.85 and blind.held_out_mIoU < 0.45


@pytest.mark.parametrize(
    ("name", "points", "images"),
    [
        ("runs/a", "runs/a", None),
        ("lifted:weights/b", None, "weights/b"),
        ("runs/a+lifted:weights/b", "runs/a", "weights/b"),
        ("random+lifted:b+c", "random", "b+c"),
        ("./lifted:b", "./lifted:b", None),
        ("runs/my_lifted:b", "runs/my_lifted:b", None),
    ],
)
def test_a_name_tells_points_from_images(name, points, images):
    assert parse(name) == Named(points, images)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A converted DINOv2 with patches of 4 pixels and 24 random channels."""
    folder = tmp_path_factory.mktemp("dinov2")
    weights, _ = to_image_encoder(foreign(folder, dinov2_state(DINOV2), DINOV2))
    save_weights(folder / "weights", weights)
    return folder / "weights"


def read(file):
    return json.loads(file.read_text())


SMALL = ("--config.images.height=3", "--config.images.width=4")


def test_the_table_of_image_features_points_and_both(tmp_path, encoder, capsys):
    for folder, protocol, name in (
        ("image", "ridge", f"lifted:{encoder}"),
        ("raw", "ridge", "raw"),
        ("both", "ridge", f"raw+lifted:{encoder}"),
        ("voted", "knn", f"random+lifted:{encoder}"),
    ):
        assert run(tmp_path / folder, protocol, name, *SMALL) == 0
    found = {file.parent.name: read(file) for file in tmp_path.glob("*/results.json")}
    image, both = found["image"], found["both"]
    assert image["encoder"] == f"lifted:{encoder}" and image["checkpoint"] == str(encoder)
    assert both["encoder"] == f"raw+lifted:{encoder}" and both["checkpoint"] is None
    assert image["grid_size"] == both["grid_size"] == 0.1 and image["tree"] is None
    assert image["unseen"] == both["unseen"] and 0 <= image["unseen"] < 1
    assert found["raw"]["unseen"] is None and found["voted"]["encoder"].startswith("random+")
    assert -1 < image["shortcut"]["explained"] < 1
    assert "No image sees" in (tmp_path / "image" / "results.md").read_text()
    assert "No image sees" not in (tmp_path / "raw" / "results.md").read_text()
    # Another size of the images is another setting, for lifted features alone.
    again, other = tmp_path / "again", ("--config.images.height=6", "--config.images.width=8")
    assert run(again / "image", "ridge", f"lifted:{encoder}", *other) == 0
    assert run(again / "raw", "ridge", "raw", *other) == 0
    changed = [read(again / name / "results.json") for name in ("image", "raw")]
    assert changed[0]["settings"] != image["settings"]
    assert changed[1]["settings"] == found["raw"]["settings"]
    capsys.readouterr()
    paths = [str(tmp_path / name) for name in ("image", "raw", "both")]
    assert command.run(tabulate.main, ["tabulate", *paths], None) == 0
    table = capsys.readouterr().out
    for name in (f"| lifted:{encoder} |", "| raw |", f"| raw+lifted:{encoder} |"):
        assert table.count(name) == 2  # at voxels and at points
    assert "checkpoint" not in table  # the names say it


@pytest.fixture
def folders(tmp_path):
    """Rooms with two images each; the second test scene has none."""
    root, size = tmp_path / "scans", (24, 18)
    camera = np.array([[10.0, 12, 0, 0], [0, 9, -10, 15], [0, 1, 0, 5]])
    (root / "images").mkdir(parents=True)
    Image.fromarray(np.full((18, 24, 3), 99, np.uint8)).save(root / "images" / "a.png")
    for split, seed in (("train", 0), ("train", 1), ("test", 5), ("test", 6)):
        scene = make_room(seed, RoomSpec(**SPEC))
        folder = root / split / f"room{seed}"
        write_scene(folder, scene)
        if seed == 6:
            continue
        seen = np.zeros((2, len(scene.coord)), bool)
        seen[:, :50] = True
        files = np.array(["images/a.png"] * 2)
        write_frames(folder, Frames(files, np.array([size] * 2), np.array([camera] * 2), seen))
    write_dataset_json(root, "m", "z", ("train", "test"), CLASSES)
    return root


def test_scenes_come_with_their_images_only_where_asked_and_one_without_is_named(folders):
    entry = {"kind": "folder", "root": str(folders), "splits": ("train", "test")}
    scenes = labelled_scenes((entry,), "data.sources", images=True)
    assert [len(scenes[i].images or ()) for i in range(3)] == [2, 2, 2]
    assert scenes.with_change(lambda scene: scene)[0].images is not None
    with pytest.raises(SceneError, match="room6: has no images"):
        scenes[3]
    assert labelled_scenes((entry,), "data.sources")[0].images is None


@pytest.mark.parametrize(
    ("protocol", "name", "arguments", "words"),
    [
        ("linear", "lifted:{}", (), "a linear probe of lifted features is logistic"),
        ("scratch", "random+lifted:{}", (), "protocol=scratch trains on points alone"),
        ("ridge", "lifted:{}", ("--config.test.votes=True",), "cannot be voted on"),
        ("ridge", "raw+lifted:{}", ("--config.test.robustness=True",), "are still all its images"),
        ("ridge", "lifted:", (), "expected lifted:DIR with the folder"),
        ("ridge", "+lifted:{}", (), "ENCODER+lifted:DIR for both joined"),
        ("ridge", "lifted:nowhere", (), "nowhere: no such folder"),
        ("ridge", "lifted:{}", ("--config.images.layers=(1,)",), "config.images.layers is (1,)"),
        ("ridge", "lifted:{}", ("--config.images.layers=('x',)",), "layers is for vgg16"),
        ("ridge", "lifted:{}", ("TEST",), "room6: has no images"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path, encoder, folders, capsys, protocol, name, arguments, words
):
    if arguments == ("TEST",):
        arguments = tuple(
            f"--config.{place}.sources={sources(folders, split)}"
            for place, split in (("data", "train"), ("test", "test"))
        )
    assert run(tmp_path / "out", protocol, name.format(encoder), *SMALL, *arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors


def test_the_settings_say_how_large_images_are_and_are_locked(encoder):
    section = default_lifting()
    found = load_lifted(encoder, section)
    assert found.size == Size(30 * 4, 40 * 4) and found.channels == 24
    with pytest.raises(AttributeError, match="hight"):
        section.hight = 3


def test_a_folder_from_before_there_were_lifted_features_goes_on(tmp_path):
    config = segmentation.get_config("protocol=ridge,encoder=tiny")
    settle_config(config, tmp_path)
    old = read(tmp_path / "config.json")
    del old["config"]["images"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert compare_config(config, tmp_path) == []
    config.images.height = 37
    with pytest.raises(ConfigError, match="images.height: 30 -> 37"):
        compare_config(config, tmp_path)
