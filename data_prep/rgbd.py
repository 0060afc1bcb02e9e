"""An RGB-D recording -> many partial clouds, each fused from some of its frames.

    python -m data_prep.rgbd --input=RECORDING --output=ROOT --clouds=48

reads color/<id>.jpg, depth/<id>.png (uint16 millimetres, 0 = none), cameras.npz (ids, cam2world,
K_color, K_depth, depth_to_color) and meta.json, which says where up is: `gravity` (the direction
down, in the poses' world) or `up_axis_world` ("+y"); fused_2cm.npz, if there, gives the frame
(`world_to_cloud`) instead. It writes ROOT/{train,test,whole}/<scene>/ and ROOT/images/ as
docs/data.md describes. Takes about 5 s a cloud and 8 MB a frame of memory.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from data_prep.cameras import backproject, clean_depth, hidden, sample_color
from data_prep.fuse import finish_cloud, voxel_codes, voxel_mean
from data_prep.images import read_archive, read_color, read_depth
from data_prep.progress import counted
from point_jax import flags
from point_jax.data.cameras import pixel_of, project, sees, transform
from point_jax.data.frames import Frames, write_frames
from point_jax.data.scenes import Scene, SceneError, write_dataset_json, write_scene

FEWEST = 500  # voxels of a frame that is of any use
AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}


@dataclass(frozen=True)
class Recording:
    """Cameras of an RGB-D folder.

    Attributes:
        folder: where it lies.
        ids: names of the frames.
        pose: (F, 4, 4) camera-to-cloud of the depth camera; cloud = metres, z up.
        depth_intrinsics: (3, 3).
        color_intrinsics: (3, 3).
        depth_to_color: (4, 4) from the depth camera's frame to the colour camera's.
    """

    folder: Path
    ids: tuple[str, ...]
    pose: np.ndarray
    depth_intrinsics: np.ndarray
    color_intrinsics: np.ndarray
    depth_to_color: np.ndarray

    def depth(self, frame: int) -> np.ndarray:
        """(H, W) float32 metres, 0 = none."""
        return read_depth(self.folder / "depth" / f"{self.ids[frame]}.png")

    def color(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_color(self.folder / "color" / f"{self.ids[frame]}.jpg")


def open_recording(folder: str | Path) -> Recording:
    """Reads the cameras of an RGB-D folder; images are read when asked for.

    Raises:
        SceneError: names the file, what is wrong and what to do.
    """
    folder = Path(folder)
    file = folder / "cameras.npz"
    wanted: dict[str, tuple[int, ...]]
    wanted = {"cam2world": (4, 4), "K_color": (3, 3), "K_depth": (3, 3), "depth_to_color": (4, 4)}
    cameras = read_archive(file, ("ids", *wanted))
    ids = cameras["ids"]
    wanted["cam2world"] = (len(ids), 4, 4)
    for name, shape in wanted.items():
        if len(ids) == 0 or cameras[name].shape != shape:
            got = cameras[name].shape
            raise SceneError(f"{file}: {name} has shape {got}, expected {shape}, at least one id")
        if not np.isfinite(cameras[name]).all():
            raise SceneError(f"{file}: {name} has NaN or infinite values; drop these frames")
    rotation = cameras["cam2world"][:, :3, :3]
    if np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() > 0.01:
        raise SceneError(f"{file}: cam2world are not rigid poses (rotation times its transpose)")
    return Recording(
        folder,
        tuple(str(name) for name in ids),
        _world_to_cloud(folder) @ cameras["cam2world"],
        cameras["K_depth"],
        cameras["K_color"],
        cameras["depth_to_color"],
    )


def _world_to_cloud(folder: Path) -> np.ndarray:
    """4x4 that turns the poses' world so that z is up, from fused_2cm.npz or from meta.json."""
    fused = folder / "fused_2cm.npz"
    if fused.exists():
        return read_archive(fused, ("world_to_cloud",))["world_to_cloud"]
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text())
        if "gravity" in meta:
            up = -np.array(meta["gravity"], np.float64).reshape(3)
        else:
            axis = meta["up_axis_world"]
            up = np.array(AXES[axis[-1]], np.float64) * (-1 if axis[0] == "-" else 1)
        if not 0 < np.linalg.norm(up) < np.inf:
            raise ValueError("gravity is zero or not finite")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SceneError(
            f"{file}: does not say where up is ({error!r}); add "
            f'"gravity": [x, y, z], the direction down in the world of cam2world'
        ) from error
    return upright(up)


def upright(up: np.ndarray) -> np.ndarray:
    """A rotation, as 4x4, that takes direction `up` (3,) to z."""
    up = up / np.linalg.norm(up)
    side = np.cross(np.eye(3)[np.abs(up).argmin()], up)
    side /= np.linalg.norm(side)
    matrix = np.eye(4)
    matrix[:3, :3] = [side, np.cross(up, side), up]
    return matrix


def frame_points(
    recording: Recording, frame: int, size: float, farthest: float
) -> list[np.ndarray]:
    """The points that one frame sees, averaged over voxels.

    Args:
        recording: from `open_recording`.
        frame: index of the frame.
        size: voxel edge, metres.
        farthest: metres; depth beyond is not used.

    Returns:
        [points (n, 3) metres z up, weight (n,), color (n, 3), towards the camera (n, 3)] float32.
    """
    depth = clean_depth(recording.depth(frame), 0.3, farthest)
    points = backproject(depth, recording.depth_intrinsics)
    image = recording.color(frame)
    beside = transform(points, recording.depth_to_color)
    column, row, distance = project(beside, recording.color_intrinsics)
    keep = pixel_of(column, row, distance, image.shape)[2]
    if np.abs(recording.depth_to_color - np.eye(4)).max() > 1e-6:
        keep &= ~hidden(beside, recording.color_intrinsics, image.shape)
    color = sample_color(image, column[keep], row[keep])
    points = points[keep]
    towards = -points / np.linalg.norm(points, axis=1, keepdims=True)
    # The depth noise of such cameras grows with the square of the distance.
    weight = 1 / np.maximum(points[:, 2], 0.5) ** 2
    pose = recording.pose[frame]
    points, towards = transform(points, pose), towards @ pose[:3, :3].T
    return [a.astype(np.float32) for a in voxel_mean(points, size, weight, color, towards)]


def draw_frames(count: int, key: np.random.Generator) -> np.ndarray:
    """An order in which frames join a cloud: every s-th from somewhere (s <= 4), or at random."""
    if key.random() < 0.5:
        return key.permutation(count)
    start, stride = key.integers(count), key.integers(1, 5)
    return (start + stride * np.arange(-(-count // stride))) % count


def choose_frames(
    points: list[list[np.ndarray]], size: float, key: np.random.Generator, fewest: int, most: int
) -> list[int]:
    """Draws frames that hang together until the voxels that they fill reach a random number.

    Args:
        points: of each frame, from `frame_points`.
        size: voxel edge, metres.
        key: draws the frames, and the number, log-uniform in fewest..most.
        fewest: smallest number of voxels.
        most: largest number; a frame that would go beyond ends the cloud, unless it is the first.

    Returns:
        Indices of the frames, at least one. Each shares a fifth of its surface, in voxels of
        10 cm, with those before it: islands far apart are no scene.
    """
    target = np.exp(key.uniform(np.log(fewest), np.log(most)))
    waiting = list(draw_frames(len(points), key))
    chosen: list[int] = []
    fine, coarse = np.zeros(0, np.int64), np.zeros(0, np.int64)
    while waiting and len(fine) < target:
        for frame in waiting:
            blocks = np.unique(voxel_codes(points[frame][0], 0.1))
            if not chosen or np.isin(blocks, coarse).mean() >= 0.2:
                break
        else:
            break
        union = np.union1d(fine, voxel_codes(points[frame][0], size))
        if chosen and len(union) > most:
            break
        fine, coarse = union, np.union1d(coarse, blocks)
        waiting.remove(frame)
        chosen.append(int(frame))
    return sorted(chosen)


def fuse_frames(
    recording: Recording,
    points: dict[int, list[np.ndarray]],
    chosen: list[int],
    name: str,
    size: float,
) -> tuple[Scene, Frames]:
    """Fuses the chosen frames into a scene, and finds which of its points each image sees.

    Args:
        recording: from `open_recording`.
        points: of each chosen frame, from `frame_points`.
        chosen: indices of the frames.
        name: of the scene.
        size: voxel edge, metres.

    Raises:
        SceneError: when the voxels are too small for the points.
    """
    parts = [np.concatenate(arrays) for arrays in zip(*(points[f] for f in chosen), strict=True)]
    coord, color, normal = finish_cloud(parts[0], parts[1], parts[2], parts[3], size)
    # Whole millimetres, as they are stored: the pixels must be those of the points on disk.
    coord = (np.rint(coord.astype(np.float64) * 1000) / 1000).astype(np.float32)
    cameras, sizes, seen = [], [], []
    for frame in chosen:
        to_depth = np.linalg.inv(recording.pose[frame])
        to_color = recording.depth_to_color @ to_depth
        cameras.append(recording.color_intrinsics @ to_color[:3])
        image = recording.color(frame).shape
        sizes.append(image[1::-1])
        pixel = project(transform(coord, to_color), recording.color_intrinsics)
        near = transform(coord, to_depth)
        visible = sees(near, recording.depth(frame), recording.depth_intrinsics)
        seen.append(visible & pixel_of(*pixel, image)[2])
    files = np.array([f"images/{recording.ids[f]}.jpg" for f in chosen])
    scene = Scene(name, coord, color, normal)
    return scene, Frames(files, np.array(sizes), np.stack(cameras), np.stack(seen))


def convert(
    arguments: argparse.Namespace, progress: Progress
) -> Iterator[tuple[str, Scene, Frames]]:
    """Yields (split, scene, frames) for every cloud that the arguments ask for."""
    recording = open_recording(arguments.input)
    size = arguments.grid
    points = {}
    for frame in counted(progress, range(len(recording.ids)), "reading frames"):
        points[frame] = frame_points(recording, frame, size, arguments.max_depth)
    usable = [frame for frame, arrays in points.items() if len(arrays[0]) >= FEWEST]
    progress.print(f"{len(usable)} of {len(points)} frames have {FEWEST} voxels of depth or more")
    if not usable:
        raise SceneError(f"{arguments.input}/depth: nothing between 0.3 m and --max_depth")
    for cloud in counted(progress, range(arguments.clouds), "fusing clouds"):
        key = np.random.default_rng((arguments.seed, cloud))
        chosen = choose_frames(
            [points[f] for f in usable], size, key, arguments.min_points, arguments.max_points
        )
        split = "test" if cloud < arguments.test else "train"
        frames = [usable[index] for index in chosen]
        yield split, *fuse_frames(recording, points, frames, f"{cloud:04d}", size)
    yield "whole", *fuse_frames(recording, points, usable, "all_frames", 2 * size)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = flags.Parser(
        prog="python -m data_prep.rgbd",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="the recording's folder")
    parser.add_argument("--output", type=Path, required=True, help="root of the scene folders")
    parser.add_argument("--clouds", type=int, default=48, help="how many partial clouds")
    parser.add_argument("--test", type=int, help="how many of them go to split test [4]")
    parser.add_argument("--grid", type=float, default=0.01, help="metres a voxel")
    parser.add_argument("--max_depth", type=float, default=4.0, help="metres; drops depth beyond")
    parser.add_argument("--min_points", type=int, default=60_000, help="voxels of a cloud")
    parser.add_argument("--max_points", type=int, default=250_000, help="voxels of a cloud")
    parser.add_argument("--seed", type=int, default=0, help="draws the frames of each cloud")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"--output={arguments.output} is not empty; remove it or choose another")
    if arguments.test is None:
        arguments.test = min(4, arguments.clouds // 2)
    if not 0 <= arguments.test <= arguments.clouds:
        parser.error(f"--test={arguments.test}, but there are --clouds={arguments.clouds}")
    try:
        with Progress() as progress:
            for split, scene, frames in convert(arguments, progress):
                folder = arguments.output / split / scene.name
                write_scene(folder, scene, compact=True)
                write_frames(folder, frames)
        (arguments.output / "images").mkdir()
        for file in sorted((arguments.input / "color").iterdir()):
            shutil.copy(file, arguments.output / "images" / file.name)
        splits = (
            split for split in ("train", "test", "whole") if (arguments.output / split).exists()
        )
        write_dataset_json(arguments.output, "mm", "z", tuple(splits))
    except SceneError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
