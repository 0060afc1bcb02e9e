"""Raw recordings -> scene folders: a room whose answer is known, real scans, and bad input."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import KDTree
from shared_files import shared

from data_prep import cameras, check, fuse, rgbd, rooms
from point_jax.data.cameras import pixel_of, project, transform
from point_jax.data.frames import read_frames
from point_jax.data.scenes import Dataset, Scene, SceneError, load_scene

SIZE = np.array([4.0, 3.0, 2.5])  # of a box room with its floor at z = 0
INTRINSICS = np.array([[80, 0, 59.5], [0, 80, 44.5], [0, 0, 1]])
SHAPE = (90, 120)
WALLS = np.array(  # one colour a side: x = 0, x = 4, y = 0, y = 3, floor, ceiling
    [[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [40, 200, 200], [200, 40, 200]],
    np.uint8,
)
# The poses' world is an odd one: up is its -y, and it is shifted. world_of @ cloud = world.
WORLD_OF = np.array([[0, 1, 0, 5], [0, 0, -1, -2], [-1, 0, 0, 1], [0, 0, 0, 1.0]])


def look(eye: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Camera-to-world, z up."""
    forward = (at - eye) / np.linalg.norm(at - eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], 1)
    return pose


def side_of(points: np.ndarray) -> np.ndarray:
    """Which side of the room each point lies on, in the order of WALLS."""
    return np.stack([points, SIZE - points], -1).reshape(len(points), 6).argmin(1)


def render(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) metres and colour (H, W, 3) of the empty room from inside."""
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]].reshape(2, -1)
    ray = np.stack([(u - INTRINSICS[0, 2]) / 80, (v - INTRINSICS[1, 2]) / 80, np.ones(len(u))], 1)
    direction = ray @ pose[:3, :3].T
    with np.errstate(divide="ignore"):
        hit = np.where(direction > 0, SIZE - pose[:3, 3], -pose[:3, 3]) / direction
    depth = hit.min(1)
    color = WALLS[side_of(pose[:3, 3] + direction * depth[:, None])]
    return depth.reshape(SHAPE), color.reshape(*SHAPE, 3)


def write_images(folder: Path, name: str, pose: np.ndarray) -> None:
    depth, color = render(pose)
    for kind in ("color", "depth"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(color).save(folder / "color" / f"{name}.jpg", quality=100, subsampling=0)
    millimetres = np.rint(depth * 1000).astype(np.uint16)
    Image.fromarray(millimetres).save(folder / "depth" / f"{name}.png")


POSES = [
    look(np.array([2 + np.cos(a), 1.5 + 0.8 * np.sin(a), 1.3]), np.array([2, 1.5, 1.0]))
    for a in np.linspace(0, 2 * np.pi, 12, endpoint=False)
]


@pytest.fixture
def recording(tmp_path) -> Path:
    folder = tmp_path / "recording"
    for index, pose in enumerate(POSES):
        write_images(folder, f"f{index:02d}", pose)
    np.savez(
        folder / "cameras.npz",
        ids=np.array([f"f{index:02d}" for index in range(len(POSES))]),
        cam2world=WORLD_OF @ np.stack(POSES),
        K_color=INTRINSICS,
        K_depth=INTRINSICS,
        depth_to_color=np.eye(4),
    )
    (folder / "meta.json").write_text(json.dumps({"gravity": [0, 2, 0]}))
    return folder


def run(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    module.main()


def run_rgbd(monkeypatch, recording: Path, output: Path, *more: str) -> None:
    limits = ("--clouds=3", "--test=1", "--grid=0.03", "--min_points=3000", "--max_points=6000")
    flags = dict(flag.split("=") for flag in (*limits, *more))
    flags |= {"--input": recording, "--output": output}
    run(monkeypatch, rgbd, *(f"{name}={value}" for name, value in flags.items()))


def to_room(scene: Scene) -> np.ndarray:
    """The scene's points in the room's own frame: turned and shifted about the vertical only."""
    to_cloud = rgbd.upright(np.array([0, -2.0, 0]))
    return transform(scene.coord.astype(float), np.linalg.inv(to_cloud @ WORLD_OF))


# RGB-D


def test_a_box_room_comes_out_as_it_is(recording, tmp_path, monkeypatch):
    run_rgbd(monkeypatch, recording, tmp_path / "out")
    dataset = Dataset(tmp_path / "out", ("train", "test", "whole"))
    assert [folder.parent.name for folder in dataset.folders] == ["train"] * 2 + ["test", "whole"]
    for index, folder in enumerate(dataset.folders):
        scene = dataset.load(index)
        points = to_room(scene)
        assert len(points) > 1000
        # On the walls to a few millimetres, but for the corners, which smoothing rounds.
        off = np.stack([points, SIZE - points], -1).reshape(-1, 6)
        inside = np.sort(off, axis=1)[:, 1] > 0.45
        assert np.abs(off.min(1))[inside].max() < 0.004 and np.abs(off.min(1)).max() < 0.1
        side = side_of(points)[inside]
        # Normals are those of the walls, and look into the room.
        inward = np.concatenate([np.eye(3), -np.eye(3)])[[0, 3, 1, 4, 2, 5]]
        turn = np.linalg.inv(rgbd.upright(np.array([0, -2.0, 0])) @ WORLD_OF)
        normal = scene.normal[inside] @ turn[:3, :3].T
        assert np.sum(normal * inward[side], axis=1).min() > 0.99
        # z is up: the floor's points are the lowest, and its normal is +z.
        floor = scene.coord[inside][side == 4]
        assert np.ptp(floor[:, 2]) < 0.01 and scene.coord[:, 2].min() > floor[:, 2].min() - 0.02
        assert scene.normal[inside][side == 4][:, 2].min() > 0.99
        difference = scene.color[inside].astype(int) - WALLS[side]
        assert np.abs(difference).max() <= 6  # JPEG
        check_frames(folder, scene, points, dataset.root)


def check_frames(folder: Path, scene: Scene, points: np.ndarray, root: Path) -> None:
    """Every image sees what the room's geometry says, at pixels of the right colour."""
    frames = read_frames(folder, len(scene.coord))
    assert frames.seen.any(0).mean() > 0.98
    for number, file in enumerate(frames.files):
        index, pixel = frames.pixels(number, scene.coord)
        assert len(index) > 100
        image = np.asarray(Image.open(root / str(file))).astype(int)
        assert tuple(frames.size[number]) == image.shape[1::-1]
        column, row = np.rint(pixel).astype(int).T
        assert column.min() >= 0 and column.max() < SHAPE[1]
        assert row.min() >= 0 and row.max() < SHAPE[0]
        clear = (
            np.sort(np.stack([points, SIZE - points], -1).reshape(-1, 6), axis=1)[index, 1] > 0.2
        )
        expected = WALLS[side_of(points[index])]
        assert np.abs(image[row, column] - expected)[clear].max() <= 6
        # In an empty convex room, in front of a camera and inside its image means seen.
        pose = POSES[int(Path(str(file)).stem[1:])]
        near = transform(points, np.linalg.inv(pose))
        inside = pixel_of(*project(near, INTRINSICS), SHAPE)[2]
        assert (frames.seen[number] <= inside).all() and frames.seen[
            number
        ].sum() > 0.9 * inside.sum()


def test_clouds_are_a_function_of_the_seed(recording, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_rgbd(monkeypatch, recording, tmp_path / name, f"--seed={seed}", "--clouds=2")
    scenes = {n: load_scene(tmp_path / n / "train" / "0001", "mm", "z") for n in "abc"}
    np.testing.assert_array_equal(scenes["a"].coord, scenes["b"].coord)
    assert scenes["a"].coord.shape != scenes["c"].coord.shape


def test_up_may_be_given_as_an_axis(recording):
    (recording / "meta.json").write_text('{"up_axis_world": "-y"}')
    pose = rgbd.open_recording(recording).pose
    np.testing.assert_allclose(pose[:, 2, :3], np.stack(POSES)[:, 2, :3], atol=1e-12)


def break_images(folder: Path) -> None:
    (folder / "depth" / "f03.png").unlink()


def break_depth(folder: Path) -> None:
    Image.fromarray(np.ones(SHAPE, np.uint8)).save(folder / "depth" / "f03.png")


def break_color(folder: Path) -> None:
    (folder / "color" / "f03.jpg").write_bytes(b"no image")


def empty_depth(folder: Path) -> None:
    for file in (folder / "depth").iterdir():
        Image.fromarray(np.zeros(SHAPE, np.uint16)).save(file)


def break_cameras(folder: Path) -> None:
    (folder / "cameras.npz").write_bytes(b"PK\x03\x04")


def change_cameras(folder: Path, **changes: np.ndarray) -> None:
    with np.load(folder / "cameras.npz") as stored:
        arrays = dict(stored) | changes
    np.savez(folder / "cameras.npz", **arrays)


BROKEN = {
    "image missing": (break_images, r"f03.png: missing"),
    "8-bit depth": (break_depth, r"f03.png: uint8 .* expected 16-bit millimetres"),
    "damaged image": (break_color, r"f03.jpg: not a readable image"),
    "no depth": (empty_depth, r"depth: nothing between 0.3 m and --max_depth"),
    "damaged cameras": (break_cameras, r"cameras.npz: not a readable npz"),
    "no gravity": (lambda f: (f / "meta.json").write_text("{}"), r"meta.json: .*where up is"),
    "zero gravity": (
        lambda f: (f / "meta.json").write_text('{"gravity": [0, 0, 0]}'),
        r"meta.json: .*where up is",
    ),
    "a pose too few": (
        lambda f: change_cameras(f, cam2world=np.stack(POSES[1:])),
        r"cameras.npz: cam2world has shape \(11, 4, 4\), expected \(12, 4, 4\)",
    ),
    "NaN pose": (
        lambda f: change_cameras(f, cam2world=np.full((12, 4, 4), np.nan)),
        r"cameras.npz: cam2world has NaN",
    ),
    "scaled poses": (
        lambda f: change_cameras(f, cam2world=np.stack(POSES) * 1.1),
        r"cameras.npz: cam2world are not rigid",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_recording_is_refused_by_name(recording, tmp_path, monkeypatch, capsys, case):
    spoil, message = BROKEN[case]
    spoil(recording)
    with pytest.raises(SystemExit) as caught:
        run_rgbd(monkeypatch, recording, tmp_path / "out")
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and str(recording) in errors
    assert re.search(message, errors), errors


def test_a_grid_finer_than_the_depth_images_is_refused(recording, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_rgbd(monkeypatch, recording, tmp_path / "out", "--grid=0.002")
    assert "choose a larger --grid" in capsys.readouterr().err


def test_frames_without_depth_are_left_out(recording, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.zeros(SHAPE, np.uint16)).save(recording / "depth" / "f03.png")
    run_rgbd(monkeypatch, recording, tmp_path / "out", "--clouds=0", "--test=0")
    assert "11 of 12 frames" in capsys.readouterr().out
    scene = load_scene(tmp_path / "out" / "whole" / "all_frames", "mm", "z")
    assert len(read_frames(tmp_path / "out" / "whole" / "all_frames", len(scene.coord)).files) == 11


def test_only_splits_with_scenes_are_listed_and_more_tests_than_clouds_refused(
    recording, tmp_path, monkeypatch, capsys
):
    run_rgbd(monkeypatch, recording, tmp_path / "out", "--clouds=1", "--test=1")
    stated = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert stated["splits"] == ["test", "whole"]
    with pytest.raises(SystemExit):
        run_rgbd(monkeypatch, recording, tmp_path / "other", "--clouds=1", "--test=2")
    assert "--test=2, but there are --clouds=1" in capsys.readouterr().err


def test_output_is_never_mixed_with_what_is_there(recording, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SystemExit):
        run_rgbd(monkeypatch, recording, tmp_path / "out")
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rgbd_7scenes_redkitchen", "rgbd_hololens_000"])
def test_real_frames_agree_with_the_fused_model(name):
    """Independent of our fusion: the model was fused by other software from the same frames."""
    folder = shared(f"data/{name}")
    recording = rgbd.open_recording(folder)
    points = {f: rgbd.frame_points(recording, f, 0.02, 4.0) for f in (0, 4)}
    scene, frames = rgbd.fuse_frames(recording, points, [0, 4], "two", 0.02)
    with np.load(folder / "fused_2cm.npz") as fused:
        distance, nearest = KDTree(fused["coord"]).query(scene.coord)
        close = distance < 0.04
        agreement = np.sum(fused["normal"][nearest] * scene.normal, axis=1)[close]
        difference = fused["color"][nearest].astype(int) - scene.color
    assert close.mean() > 0.95 and np.median(distance) < 0.015
    assert np.median(agreement) > 0.93 and (agreement > 0).mean() > 0.9
    assert np.median(np.abs(difference)) < 20
    assert frames.seen.any(0).mean() > 0.9


# Parts


def test_flying_pixels_and_far_ones_go():
    depth = np.full((20, 20), 2.0)
    depth[:, 10:] = 3.0  # a jump between columns 9 and 10
    depth[5, 5] = 0  # a hole
    depth[15:, :5] = 9.0
    clean = cameras.clean_depth(depth, 0.3, 5.0)
    assert not clean[:, 9:11].any() and not clean[4:7, 4:7].any() and not clean[15:, :5].any()
    assert (clean[2:4, 2:8] == 2).all() and (clean[:14, 12:] == 3).all()


def test_what_a_chair_hides_from_the_colour_camera_is_hidden():
    v, u = np.mgrid[:48, :64].reshape(2, -1)
    wall = np.stack([(u - 31.5) / 60 * 3, (v - 23.5) / 60 * 3, np.full(len(u), 3.0)], 1)
    chair = wall[(np.abs(u - 32) < 12) & (np.abs(v - 24) < 12)] / 3
    intrinsics = np.array([[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1]])
    gone = cameras.hidden(np.concatenate([wall, chair]), intrinsics, (48, 64))
    behind = (np.abs(u - 32) < 11) & (np.abs(v - 24) < 11)
    assert gone[: len(wall)][behind].all() and not gone[len(wall) :].any()
    far = (np.abs(u - 32) > 16) | (np.abs(v - 24) > 16)
    assert not gone[: len(wall)][far].any()


def test_voxel_means_are_weighted_and_keep_the_total():
    draw = np.random.default_rng(0)
    points, weight, value = (
        draw.normal(size=(500, 3)),
        draw.random(500) + 0.1,
        draw.random((500, 2)),
    )
    mean, total, values = fuse.voxel_mean(points, 0.5, weight, value)
    np.testing.assert_allclose(total.sum(), weight.sum())
    np.testing.assert_allclose((values * total[:, None]).sum(0), weight @ value)
    groups = [np.all(np.floor(points / 0.5) == cell, 1) for cell in np.floor(mean / 0.5)]
    assert np.sum(groups) == 500
    expected = [np.average(points[group], axis=0, weights=weight[group]) for group in groups]
    np.testing.assert_allclose(mean, expected)


def test_stray_points_are_those_alone():
    grid = np.stack(np.meshgrid(*[np.arange(10) * 0.01] * 2, [0]), -1).reshape(-1, 3)
    alone = np.array([[0.5, 0.5, 0], [0.51, 0.5, 0]])
    lone = fuse.stray(np.concatenate([grid, alone]), 0.04, 8)
    assert lone[-2:].all() and not lone[:-2].any()


# Rendered rooms


@pytest.fixture
def room_folder(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / "rooms" / f"room_{number:04d}_box"
        points = []
        for index, pose in enumerate(POSES[:4]):
            write_images(folder, f"{index:03d}", pose)
            depth = render(pose)[0] * (draw.random(SHAPE) < 0.2)
            points.append(transform(cameras.backproject(depth, INTRINSICS), pose))
        points = np.round(np.concatenate(points), 3)
        side = side_of(points)
        inward = np.concatenate([np.eye(3), -np.eye(3)])[[0, 3, 1, 4, 2, 5]]
        np.savez(
            folder / "points.npz",
            coord_mm=np.rint(1000 * points).astype(np.int16),
            color=WALLS[side],
            normal_i8=(inward[side] * 127).astype(np.int8),
            segment=(side >= 4).astype(np.uint8),
            instance=side.astype(np.uint16),
        )
        np.savez(folder / "cameras.npz", cam2world=np.stack(POSES[:4]), K=INTRINSICS)
    (tmp_path / "rooms" / "classes.json").write_text('["wall", "level"]')
    return tmp_path / "rooms"


def test_rooms_keep_their_points_labels_and_images(room_folder, tmp_path, monkeypatch):
    run(monkeypatch, rooms, f"--input={room_folder}", f"--output={tmp_path / 'out'}", "--test=1")
    train, test = (Dataset(tmp_path / "out", split) for split in ("train", "test"))
    assert len(train) == 2 and len(test) == 1 and train.classes == ("wall", "level")
    scene = test.load(0)
    assert scene.name == "room_0002_box"
    side = side_of(np.round(scene.coord.astype(float), 3))
    np.testing.assert_array_equal(scene.instance, side)
    np.testing.assert_array_equal(scene.segment, side >= 4)
    np.testing.assert_array_equal(scene.color, WALLS[side])
    check_frames(test.folders[0], scene, scene.coord.astype(float), test.root)


def test_a_bad_room_is_refused_by_name(room_folder, tmp_path, monkeypatch, capsys):
    (room_folder / "room_0001_box" / "color" / "002.jpg").unlink()
    with pytest.raises(SystemExit):
        run(
            monkeypatch, rooms, f"--input={room_folder}", f"--output={tmp_path / 'out'}", "--test=1"
        )
    assert "room_0001_box: 3 images in color/, 4 poses" in capsys.readouterr().err
    (room_folder / "room_0000_box" / "points.npz").write_bytes(b"")
    with pytest.raises(SceneError, match="points.npz: not a readable npz"):
        rooms.read_room(room_folder / "room_0000_box")


# Checking a data set


def test_check_counts_the_scenes_and_names_the_bad_ones(room_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, rooms, f"--input={room_folder}", f"--output={out}", "--test=1")
    run(monkeypatch, check, str(out), "--splits", "train", "test")
    said = capsys.readouterr().out
    assert "3 of 3 scenes can be used: color in 3, normal in 3, segment in 3" in said
    assert "metres): 3.93 x 3.00, height 1.99" in said
    np.save(out / "test" / "room_0002_box" / "color.npy", np.zeros((5, 3), np.uint8))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, check, str(out), "--splits", "train", "test")
    said = capsys.readouterr()
    assert caught.value.code == 1 and "2 of 3 scenes can be used" in said.out
    assert "room_0002_box/color.npy: 5 rows" in said.err
    with pytest.raises(SystemExit):
        run(monkeypatch, check, str(out), "--units=m")
    assert "dataset.json says 'mm'" in capsys.readouterr().err
