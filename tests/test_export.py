"""launch.export: programs that give the encoder's features where this project is not there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import point_jax
from launch import command, export
from point_jax.features.encoder import Encoder
from point_jax.features.exported import bucket_capacities, default_shares
from point_jax.features.standalone import Encoder as Exported
from point_jax.features.standalone import ExportError
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, save_weights
from point_jax.models.functional import functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec, Rotary, StageSpec

STAGES = (StageSpec(1, 6, 1, 64), StageSpec(1, 12, 2, 64))
SPEC = PTv3Spec(STAGES)
DECODING = PTv3Spec(STAGES, STAGES[:1], inputs=6, rotary=Rotary(base=10.0))
GRID, SHARES = 0.1, (1, 0.75)


def save(folder: Path, spec: PTv3Spec, **more) -> Path:
    init, _ = functional(lambda rngs: PTv3(spec, rngs=rngs))
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0)))
    variant, config = config_of(spec)
    kind = "segmentor" if more else "encoder"
    source = {"grid_size": GRID, "file": "tiny", "classes": ["floor", "wall"]}
    save_weights(folder, Weights(kind, variant, config, {"backbone": params} | more, {}, source))
    return folder


def run(capsys, *flags: str) -> tuple[int, str, str]:
    code = command.run(export.main, ["export", *flags], export.__doc__)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An export of an encoder in two buckets, for three platforms that need not be here."""
    root = tmp_path_factory.mktemp("export")
    flags = [f"--checkpoint={save(root / 'weights', SPEC)}", f"--output={root / 'out'}"]
    flags += ["--buckets=640,320", f"--shares={SHARES[0]},{SHARES[1]}"]
    assert command.run(export.main, ["export", *flags], None) == 0
    return root / "out"


@pytest.fixture(scope="module")
def exported(folder) -> Exported:
    return Exported(folder)


def cloud(seed: int, points: int = 400) -> dict[str, np.ndarray]:
    """Points of a box's floor and one wall, several in a voxel."""
    draw = np.random.default_rng(seed)
    coord = draw.uniform(0, 1.2, (points, 3))
    coord[::2, 2] = 0
    coord[1::2, 0] = 0
    return {
        "coord": coord.astype(np.float32),
        "color": draw.integers(0, 256, (points, 3), np.uint8),
        "normal": np.tile(np.float32([0, 0, 1]), (points, 1)),
    }


def in_bucket(encoder: Encoder, voxels: int, shares=SHARES) -> Encoder:
    """The encoder, made to use a bucket's capacities for clouds of 257 to 384 voxels or fewer."""
    capacities = bucket_capacities(voxels, shares)
    encoder._shapes._known = dict.fromkeys((256, 384), capacities)
    return encoder


def test_an_export_gives_the_encoders_features_bit_for_bit(folder, exported):
    encoder = in_bucket(point_jax.load(folder.parent / "weights"), 320)
    for seed in (0, 1):
        wanted = encoder([cloud(seed)])[0]
        assert len(wanted.grids[0]) <= 320
        got = exported.encode(**cloud(seed))
        np.testing.assert_array_equal(got.inverse, wanted.inverse)
        for mine, theirs in zip(got.grids, wanted.grids, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(got.at_points(0), wanted.up_cast(0).at_points())
        np.testing.assert_array_equal(exported(**cloud(seed)), wanted.at_points())


def test_what_is_missing_counts_as_zeros_and_places_far_away_are_exact(folder, exported):
    encoder = in_bucket(point_jax.load(folder.parent / "weights"), 320)
    coord = np.round(cloud(2)["coord"].astype(np.float64) * 1024) / 1024
    wanted = encoder([coord])[0].at_points()
    np.testing.assert_array_equal(exported(coord), wanted)
    np.testing.assert_array_equal(exported(coord + [500_000, 4_500_000, 300]), wanted)


def test_the_copied_loader_needs_nothing_of_this_project(folder, exported, tmp_path):
    """In a process where this project and what it is built with cannot be imported."""
    np.savez(tmp_path / "cloud.npz", **cloud(0))
    program = """
import sys
banned = ("point_jax", "launch", "flax", "orbax", "etils", "ml_collections", "grain", "safetensors")
sys.modules |= dict.fromkeys(banned)  # None: importing it is an error
import numpy as np
from encoder import Encoder
features = Encoder()(**np.load(sys.argv[1]))
np.save(sys.argv[2], features)
"""
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    files = [str(tmp_path / name) for name in ("cloud.npz", "features.npy")]
    code = [sys.executable, "-c", program, *files]
    done = subprocess.run(code, cwd=moved, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), exported(**cloud(0)))


def test_a_segmentation_comes_along_with_decoder_positions_and_classes(tmp_path, capsys):
    draw = np.random.default_rng(0)
    head = {"kernel": draw.normal(size=(6, 2)).astype(np.float32), "bias": np.ones(2, np.float32)}
    weights = save(tmp_path / "weights", DECODING, seg_head=head)
    flags = [f"--checkpoint={weights}", f"--output={tmp_path / 'out'}", "--buckets=320"]
    asked = run(capsys, *flags)
    assert asked[0] == 1 and "reads 6 channels a point" in asked[2]
    flags += ["--inputs=color,normal", "--shares=1,0.75", "--platforms=cpu"]
    assert run(capsys, *flags)[0] == 0
    exported = Exported(tmp_path / "out")
    loaded = point_jax.load(weights, inputs=("color", "normal"))
    wanted = in_bucket(loaded, 320)([cloud(0)])[0]
    got = exported.encode(**cloud(0))
    np.testing.assert_array_equal(got.decoded[0], wanted.decoded[0])
    head = point_jax.load_head(weights)
    np.testing.assert_array_equal(got.scores(), head.scores(wanted)[wanted.inverse])
    assert exported.classes == ["floor", "wall"]


def test_the_smallest_bucket_that_holds_every_level_is_taken(exported):
    assert [b["capacities"] for b in exported.manifest["buckets"]] == [[320, 256], [640, 512]]
    for counts, wanted in [([320, 10], 0), ([321, 10], 1), ([300, 257], 1)]:
        assert exported._bucket(counts)[0] == wanted
    with pytest.raises(ValueError, match=r"900 voxels of 0.1 m.* holds 640: cut .*--buckets=900"):
        exported._bucket([900, 300])
    with pytest.raises(ValueError, match=r"\[600, 600\] voxels.*\[640, 512\].*larger --shares"):
        exported._bucket([600, 600])
    assert bucket_capacities(1000, default_shares(3)) == (1000, 512, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coord": np.zeros((4, 2))}, r"coord is float64 of shape \(4, 2\), expected .*\(n, 3\)"),
        ({"coord": np.full((4, 3), np.nan)}, "coord holds NaN or infinity"),
        ({"coord": np.eye(3) * 1e6}, "is it in metres"),
        ({"color": np.zeros((3, 3))}, "color has 3 rows for 4 points"),
        ({"color": np.full((4, 3), 0.5)}, "no value above 1"),
        ({"color": np.full((4, 3), 300)}, "from 300 to 300"),
        ({"color": np.full((4, 3), 2.5)}, "not whole"),
        ({"normal": np.full((4, 3), 2.0)}, "unit length"),
    ],
)
def test_arrays_that_cannot_be_used_say_why(exported, change, message):
    good = {"coord": np.arange(12.0).reshape(4, 3), "color": None, "normal": None}
    given = good | change
    if len(given["coord"]) == 3:
        given = {"coord": given["coord"]}
    with pytest.raises(ValueError, match=message):
        exported(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platforms": ["tpu"]}, "is for tpu, and JAX runs on cpu here: .*--platforms=cpu"),
        ({"calling_convention_version": 99}, "calling convention 99 of jax .*: update jax"),
        ({"calling_convention_version": 1}, "calling convention 1 .*: export again"),
        ({"version": 2}, "version 2, this encoder.py reads 1"),
        ({"format": "other"}, 'expected an object with "format"'),
    ],
)
def test_a_folder_that_jax_cannot_run_here_says_why(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ExportError, match=message):
        Exported(tmp_path / "other")


def test_a_damaged_folder_says_which_file(folder, tmp_path):
    with pytest.raises(ExportError, match="manifest.json: missing"):
        Exported(tmp_path)
    for name in ("parameters.npz", "encoder_320.bin"):
        other = shutil.copytree(folder, tmp_path / name)
        content = bytearray((other / name).read_bytes())
        content[len(content) // 2] ^= 1
        (other / name).write_bytes(content)
        with pytest.raises(ExportError, match=f"{name}: not the file that was exported"):
            Exported(other)(**cloud(0))
    program = folder / "encoder_320.bin"
    other = shutil.copytree(folder, tmp_path / "unreadable")
    (other / program.name).write_bytes(b"?" * 100)
    with pytest.raises(ExportError, match="not the file that was exported"):
        Exported(other)(**cloud(0))


def test_a_command_line_that_makes_no_sense_says_why(folder, tmp_path, capsys):
    weights = folder.parent / "weights"
    good = [f"--checkpoint={weights}", f"--output={tmp_path / 'out'}"]
    for flags, message in [
        ([*good, "--buckets=many"], "--buckets=many: expected numbers of voxels"),
        ([*good, "--buckets=0"], "0, expected numbers of voxels"),
        ([*good, "--platforms=gpu"], "'gpu', expected some of cpu, cuda, tpu, rocm"),
        ([*good, "--shares=1,0.5,0.25"], "--shares has 3 numbers, the network 2 levels"),
        ([*good, "--shares=0.5,0.5"], "level 0 has all"),
        ([*good, "--tree=student"], "--tree is for a pretraining"),
        ([f"--checkpoint={tmp_path / 'no'}", good[1]], "no such folder"),
        ([good[0], f"--output={folder}"], "exists already"),
    ]:
        code, _, err = run(capsys, *flags)
        assert code == 1 and message in err, err
    assert not list(tmp_path.iterdir())
