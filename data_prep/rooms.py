"""Rendered, labelled rooms -> scene folders.

    python -m data_prep.rooms --input=ROOMS --output=ROOT --test=8

reads ROOMS/classes.json (class names) and ROOMS/room_*/{points.npz,cameras.npz,color/,depth/}:
points.npz has coord_mm, color, normal_i8, segment, instance; cameras.npz has cam2world (OpenCV
axes, metres, z up) and K; depth is uint16 millimetres of the same cameras as color. It writes
ROOT/{train,test}/<room>/ and ROOT/images/ as docs/data.md describes. Takes about 0.3 s a room.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from rich.progress import Progress

from data_prep.images import read_archive, read_color, read_depth
from data_prep.progress import counted
from point_jax import flags
from point_jax.data.cameras import sees, transform
from point_jax.data.frames import Frames, write_frames
from point_jax.data.scenes import Scene, SceneError, write_dataset_json, write_scene


def read_classes(folder: Path) -> list[str]:
    """Class names of `<folder>/classes.json`.

    Raises:
        SceneError: when it is missing or no list of names.
    """
    file = folder / "classes.json"
    try:
        classes = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SceneError(f"{file}: cannot be read ({error}); expected a list of names") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SceneError(f"{file}: expected a JSON list of class names")
    return classes


def read_room(folder: Path) -> tuple[Scene, Frames]:
    """Reads one room, and finds which of its points each of its images sees.

    Raises:
        SceneError: names the file, what is wrong with it.
    """
    points = read_archive(
        folder / "points.npz", ("coord_mm", "color", "normal_i8", "segment", "instance")
    )
    cameras = read_archive(folder / "cameras.npz", ("cam2world", "K"))
    normal = points["normal_i8"].astype(np.float32)
    # What rounding to int8 took of the length; where the renderer's mean cancelled, zero = unknown.
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1)
    scene = Scene(
        folder.name,
        points["coord_mm"].astype(np.float32) / 1000,
        points["color"],
        normal,
        points["segment"].astype(np.int32),
        points["instance"].astype(np.int32),
    )
    files = sorted((folder / "color").glob("*.jpg"))
    if len(files) != len(cameras["cam2world"]):
        raise SceneError(
            f"{folder}: {len(files)} images in color/, {len(cameras['cam2world'])} poses in "
            f"cameras.npz"
        )
    matrices, sizes, seen = [], [], []
    for file, pose in zip(files, cameras["cam2world"], strict=True):
        depth = read_depth(folder / "depth" / f"{file.stem}.png")
        to_camera = np.linalg.inv(pose)
        matrices.append(cameras["K"] @ to_camera[:3])
        sizes.append(read_color(file).shape[1::-1])
        seen.append(sees(transform(scene.coord, to_camera), depth, cameras["K"]))
    names = np.array([f"images/{folder.name}/{file.name}" for file in files])
    return scene, Frames(names, np.array(sizes), np.stack(matrices), np.stack(seen))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = flags.Parser(
        prog="python -m data_prep.rooms",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="folder with room_*/")
    parser.add_argument("--output", type=Path, required=True, help="root of the scene folders")
    parser.add_argument("--test", type=int, default=8, help="the last rooms, for split test")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"--output={arguments.output} is not empty; remove it or choose another")
    try:
        classes = read_classes(arguments.input)
        rooms = sorted(arguments.input.glob("room_*"))
        if not 0 <= arguments.test < len(rooms):
            parser.error(f"--test={arguments.test}, but {arguments.input} has {len(rooms)} rooms")
        with Progress() as progress:
            for index, room in enumerate(counted(progress, rooms, "converting rooms")):
                scene, frames = read_room(room)
                split = "train" if index < len(rooms) - arguments.test else "test"
                write_scene(arguments.output / split / room.name, scene, compact=True)
                write_frames(arguments.output / split / room.name, frames)
                shutil.copytree(room / "color", arguments.output / "images" / room.name)
        write_dataset_json(arguments.output, "mm", "z", ("train", "test"), classes)
    except SceneError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
