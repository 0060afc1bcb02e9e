"""Features stored beside the scenes: of which images, in which batches, with which loss."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_states import DINOV2, dinov2_state
from jax.sharding import Mesh
from PIL import Image
from small import Step, put_batch, schedule, small_batch, small_config
from test_images import take

from configs import concerto
from data_prep import image_features
from launch.objectives import make_objective
from point_jax.data.frames import Frames, write_frames
from point_jax.data.image_augment import ImageSpec
from point_jax.data.image_features import FOLDER, MANIFEST, FeatureSpec, ImageFeatures
from point_jax.data.images import Size, read_image
from point_jax.data.pipeline import make_batches
from point_jax.data.scenes import Scene, SceneError, write_dataset_json, write_scene
from point_jax.interop.files import read_file, write_safetensors
from point_jax.interop.image_encoders import load_image_encoder, to_image_encoder
from point_jax.interop.store import save_weights
from point_jax.objectives.images import EncodedImages
from point_jax.objectives.settings import make_concerto

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCENES, IMAGES, FULL = 3, 4, Size(30, 40)  # images of a scene, and their size
ROWS, COLUMNS, STRIDE, CHANNELS = 3, 2, 4, 24  # what features are of: image_states.DINOV2
SPEC = FeatureSpec("0f", "dinov2_with_registers", (), "float32", ROWS, COLUMNS, STRIDE, CHANNELS)


def image_of(number: int) -> str:
    """Images of neighbouring scenes overlap by one: scene s has the images 3 s to 3 s + 3."""
    return f"images/{number:02d}.png"


def write_scans(root: Path) -> Path:
    """Scenes, the images above them, and dataset.json."""
    draw, boxes = np.random.default_rng(0), small_batch(scenes=SCENES, points=200)
    camera = np.array([[FULL.width / 1.2, 0, 0, -0.5], [0, FULL.height / 1.2, 0, -0.5], [0] * 4])
    camera[2, 3] = 1  # looks down from everywhere at once
    (root / "images").mkdir(parents=True)
    for number in range(SCENES * (IMAGES - 1) + 1):
        blocks = draw.integers(0, 256, (3, 4, 3), np.uint8)
        image = Image.fromarray(blocks).resize(FULL[::-1], Image.Resampling.BICUBIC)
        image.save(root / image_of(number))
    for number in range(SCENES):
        arrays = (boxes[name][number] for name in ("coord", "color", "normal"))
        write_scene(root / "train" / f"s{number}", Scene(f"s{number}", *arrays))
        files = [image_of(number * (IMAGES - 1) + image) for image in range(IMAGES)]
        seen = draw.random((IMAGES, 200)) < 0.7
        frames = Frames(
            np.array(files), np.full((IMAGES, 2), FULL[::-1]), np.stack([camera] * 4), seen
        )
        write_frames(root / "train" / f"s{number}", frames)
    write_dataset_json(root, "m", "z", ["train"])
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A DINOv2 of random weights, converted."""
    folder = tmp_path_factory.mktemp("encoder")
    write_safetensors(folder / "hub", DINOV2, dinov2_state(DINOV2))
    save_weights(folder / "tiny", to_image_encoder(read_file(folder / "hub"))[0])
    return folder / "tiny"


@pytest.fixture
def scans(tmp_path) -> Path:
    return write_scans(tmp_path / "scans")


def command(monkeypatch, root: Path, encoder: Path, **flags) -> int:
    """The exit code of `data_prep.image_features`."""
    flags = {"height": ROWS, "width": COLUMNS, "batch": 3} | flags
    arguments = [f"--input={root}", f"--encoder={encoder}"]
    arguments += [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["image_features", *arguments])
    try:
        image_features.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def fill(root: Path, name: str = "drawn", spec: FeatureSpec = SPEC) -> ImageFeatures:
    """Features that say of which image they are."""
    features = ImageFeatures.create(root, name, spec)
    for number in range(SCENES * (IMAGES - 1) + 1):
        array = np.full(spec.content.shape, number, np.float32)
        array[..., 1:] += np.random.default_rng(number).random(array[..., 1:].shape)
        features.write(root / image_of(number), array)
    return features


def config_of(root: Path, features: str = "drawn", **changes):
    """Concerto at the smallest, from stored features."""
    config = small_config(concerto)
    config.network.rotary_base = 0.0
    config.views.drop_color = config.views.drop_normal = ()
    config.data.sources = ({"kind": "folder", "root": str(root)},)
    config.data.scene_points = 192  # scenes are cut
    config.data.threads = 1
    config.data.images.features, config.data.images.count = features, 2
    config.images.height, config.images.width, config.images.up_cast = ROWS, COLUMNS, 1
    config.update_from_flattened_dict(changes)
    return config


# The command


def test_what_is_stored_is_what_the_encoder_says_of_the_image_as_training_has_it(
    scans, encoder, monkeypatch, capsys
):
    assert command(monkeypatch, scans, encoder) == 0
    # Each of the ten images once, though two belong to two scenes.
    assert "10 images of 3 scenes encoded" in capsys.readouterr().out
    features = ImageFeatures(scans, "tiny")
    network, params = load_image_encoder(encoder)
    digest = json.loads((encoder / "manifest.json").read_text())["digest"]
    assert features.spec == FeatureSpec(**vars(SPEC) | {"encoder": digest})
    files = [scans / image_of(number) for number in range(10)]
    images = np.stack([read_image(file, FULL, features.spec.size) for file in files])
    for file, want in zip(files, np.asarray(network(params, images)), strict=True):
        found = features.read(file)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_it_goes_on_where_it_stopped_and_refuses_others(scans, encoder, monkeypatch, capsys):
    fill(scans, "tiny")
    manifest = scans / FOLDER / "tiny" / MANIFEST
    about = json.loads(manifest.read_text())
    digest = json.loads((encoder / "manifest.json").read_text())["digest"]
    assert command(monkeypatch, scans, encoder) == 1
    error = capsys.readouterr().err
    assert f"encoder is '0f', not '{digest}'" in error and "choose another name" in error
    manifest.write_text(json.dumps(about | {"encoder": digest}))
    assert command(monkeypatch, scans, encoder, height=2, dtype="bfloat16") == 1
    error = capsys.readouterr().err
    assert "dtype is 'float32', not 'bfloat16'; height is 3, not 2" in error
    features = ImageFeatures(scans, "tiny")
    gone = features.file(scans / image_of(4))
    gone.unlink()
    assert command(monkeypatch, scans, encoder) == 0
    assert "1 images of 3 scenes encoded" in capsys.readouterr().out
    assert features.read(scans / image_of(5))[0, 0, 0] == 5  # stayed
    assert features.read(scans / image_of(4))[0, 0, 0] != 4


def test_what_cannot_be_read_is_named_and_the_rest_is_done(scans, encoder, monkeypatch, capsys):
    (scans / image_of(1)).write_bytes(b"x")
    (scans / "train" / "s2" / "coord.npy").unlink()
    assert command(monkeypatch, scans, encoder) == 1
    out, err = capsys.readouterr()
    assert "6 images of 3 scenes encoded" in out
    assert "01.png: not a readable image" in err and "s2/coord.npy: missing" in err
    stored = {file.name for file in (scans / FOLDER / "tiny" / "images").iterdir()}
    assert stored == {f"{number:02d}.png.npy" for number in (0, 2, 3, 4, 5, 6)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"height": 0}, "height is 0, expected a whole number at least 1"),
        ({"layers": "conv4_3"}, "layers is for vgg16"),
        ({"name": "a/b"}, "'a/b', expected the name of one folder"),
        ({"encoder": "nothing"}, "nothing: no such folder"),
        ({"splits": "val"}, "no split folder 'val'"),
    ],
)
def test_wrong_flags_are_refused(scans, encoder, monkeypatch, capsys, flags, message):
    assert command(monkeypatch, scans, flags.pop("encoder", encoder), **flags) == 1
    assert message in capsys.readouterr().err
    assert not (scans / FOLDER).exists()


# Batches


def test_a_batch_has_the_features_of_the_images_that_it_would_have(scans):
    features, config = fill(scans), config_of(scans)
    with_images = config_of(scans, "")
    with_images.data.images.height, with_images.data.images.width = SPEC.size
    found = take(make_batches(config.data, 3, 2), 4)
    for batch, want in zip(found, take(make_batches(with_images.data, 3, 2), 4), strict=True):
        assert batch.keys() - want.keys() == {"features"} and batch["features"].dtype == np.float16
        assert batch["features"].shape == (2, 2, ROWS, COLUMNS, CHANNELS)
        for name in want.keys() - {"images"}:
            np.testing.assert_array_equal(batch[name], want[name], err_msg=name)
        assert (batch["image_count"] == 2).all()
        for slot in np.ndindex(2, 2):
            number = int(batch["features"][slot][0, 0, 0])
            file = scans / image_of(number)
            np.testing.assert_array_equal(batch["features"][slot], features.read(file))
            shown = read_image(file, FULL, SPEC.size)
            np.testing.assert_array_equal(want["images"][slot], shown)


def test_the_size_of_images_on_the_host_does_not_matter(scans):
    fill(scans)
    other = {"data.images.height": 7, "data.images.width": 99}
    batches = [take(make_batches(c.data, 0, 3), 1)[0] for c in (
        config_of(scans), config_of(scans, **other)
    )]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *batches)


def rewritten(change):
    """Damages the features of the images of scene 0."""

    def damage(features: ImageFeatures, root: Path) -> None:
        for number in range(IMAGES):
            file = features.file(root / image_of(number))
            np.save(file, change(np.load(file)))

    return damage


def removed(features: ImageFeatures, root: Path) -> None:
    for number in range(IMAGES):
        features.file(root / image_of(number)).unlink()


def cut_off(features: ImageFeatures, root: Path) -> None:
    for number in range(IMAGES):
        file = features.file(root / image_of(number))
        file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed, r"\d.png.npy: missing; data_prep.image_features makes"),
        (cut_off, r"\d.png.npy: not a whole npy file"),
        (rewritten(lambda x: x[1:]), r"shape \(2, 2, 24\), but manifest.json says float16 of \(3"),
        (rewritten(lambda x: x.astype("f4")), r"\d.png.npy: float32 of shape"),
        (rewritten(lambda x: x * np.float16("nan")), r"\d.png.npy: has NaN or infinite"),
    ],
)
def test_bad_features_are_refused_by_name_or_their_scene_skipped(scans, damage, message):
    damage(fill(scans), scans)
    config = config_of(scans)
    with pytest.raises(SceneError, match=f"{message}.*skip_bad=True"):
        take(make_batches(config.data, 0, 3), 1)
    config.data.skip_bad = True
    (batch,) = take(make_batches(config.data, 0, 3), 1)
    bad = batch["scene"] == 0
    assert not batch["count"][bad].any() and not batch["features"][bad].any()
    assert batch["count"][~bad].all() and batch["image_count"][~bad].all()


# Configs


def test_what_does_not_fit_is_said_before_the_run(scans, tmp_path):
    fill(scans)
    other = write_scans(tmp_path / "other")
    fill(other, spec=FeatureSpec(**vars(SPEC) | {"stride": 8, "layers": ("conv4_3",)}))
    bare = write_scans(tmp_path / "bare")
    sources = [{"kind": "folder", "root": str(root)} for root in (scans, other, bare)]
    rooms = {"kind": "rooms", "seeds": (0, 2)}
    for changes, message in (
        ({"images.encoder": "w"}, "features='drawn' and config.images.encoder='w' are both given"),
        ({"images.layers": ("conv4_3",)}, "and config.images.layers=.* are both given"),
        ({"images.height": 37}, "are 37 x 2 patches, but image_features/drawn has features of 3 x"),
        ({"data.images.count": 0}, "features='drawn', but config.data.images.count is 0"),
        ({"data.images.features": "no"}, "no/manifest.json: missing; .* here are drawn"),
        ({"data.images.features": "../no"}, "'../no', expected the name of one folder"),
        ({"data.sources": (sources[0], rooms)}, r"data.sources\[1\] has no folder on this machine"),
        (
            {"data.sources": tuple(sources[:2])},
            r"differ: layers is \('conv4_3',\), not \(\); stride is 8, not 4",
        ),
        ({"data.sources": tuple(sources[::2])}, "bare/.*manifest.json: missing; .* no image feat"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective(config_of(scans, **changes))
    objective, frozen = make_objective(config_of(scans))
    assert frozen == {} and objective.images.channels == CHANNELS
    assert "image" not in jax.eval_shape(objective.init, jax.random.key(0))[1]


# Files


def test_what_float16_cannot_hold_or_lies_elsewhere_is_not_stored(scans, tmp_path):
    features = ImageFeatures.create(scans, "new", SPEC)
    with pytest.raises(SceneError, match="00.png: features from 0 to 7e.04, which float16"):
        features.write(
            scans / image_of(0),
            7e4 * np.eye(ROWS * COLUMNS, CHANNELS, dtype="f4").reshape(SPEC.content.shape),
        )
    assert not features.file(scans / image_of(0)).exists()
    for image in (tmp_path / "x.png", scans / "images" / ".." / ".." / "x.png"):
        with pytest.raises(SceneError, match="x.png: lies outside"):
            features.file(image)


values = st.none() | st.integers(-2, 2) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
names = st.sampled_from([*vars(SPEC), "format", "version"])


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, values, min_size=1), st.binary(max_size=3))
def test_any_other_manifest_raises_a_scene_error_or_nothing(changes, tail):
    with tempfile.TemporaryDirectory() as folder:
        file = ImageFeatures.create(folder, "x", SPEC).folder / MANIFEST
        content = json.loads(file.read_text())
        file.write_bytes(json.dumps(content | changes).encode() + tail)
        with contextlib.suppress(SceneError):
            hash(ImageFeatures(folder, "x").spec)  # a static argument


# The loss


def test_the_same_loss_as_encoding_in_the_step(scans, encoder, monkeypatch):
    """Up to float16, and so the same gradients: the images are cropped in the middle."""
    command(monkeypatch, scans, encoder)
    config, mesh = config_of(scans, "tiny"), Mesh(np.array(jax.devices()[:1]), ("data",))
    stored = Step(config, mesh, make_objective(config)[0])
    network, params = load_image_encoder(encoder)
    plain = EncodedImages(network, ImageSpec.plain(ROWS, COLUMNS, STRIDE))
    encoded = Step(config, mesh, make_concerto(config, plain))

    def run(step, features, frozen, change=lambda batch: batch):
        config.data.images.features = features
        config.data.images.height, config.data.images.width = SPEC.size
        (batch,) = take(make_batches(config.data, 3, 2), 1)
        state = step.make()
        state["teacher"] |= frozen
        placed = put_batch(mesh, change(batch), 2)
        state, metrics = step.step(state, placed, schedule(), step.key)
        return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}

    state, found = run(stored, "tiny", {})
    same, want = run(encoded, "", {"image": params})
    assert want["image_patches"] == found["image_patches"] > 0
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for x, y in zip(*map(jax.tree.leaves, (state["mu"], same["mu"])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-3 * max(1e-3, np.abs(y).max()))
    # The features of another image would not do.
    _, other = run(stored, "tiny", {}, lambda b: b | {"features": b["features"][:, ::-1]})
    assert abs(other["image_loss"] - want["image_loss"]) > 1e-2
