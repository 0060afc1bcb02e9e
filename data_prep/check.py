"""Reads every scene of a data set as training would, and lists what is wrong.

    python -m data_prep.check ROOT --splits train val [--units=m --up=z --segment=segment20]

Units and up are needed where ROOT has no dataset.json. ROOT may be what data_prep.pack wrote. Exit
code 0 when all scenes can be used.
"""

from collections import Counter

import numpy as np
from rich.progress import Progress

from data_prep.progress import counted
from point_jax import flags
from point_jax.data.images import Images, Size
from point_jax.data.packed import PackedDataset, is_packed
from point_jax.data.scenes import Dataset, SceneError

ANY_SIZE = Size(64, 64)  # that images are brought to, to see whether they can be read


def check_images(images: Images | None) -> int:
    """Reads all images of a scene; returns how many there are.

    Raises:
        SceneError: one that is damaged, or not what is said of it.
    """
    if images is None:
        return 0
    for image in range(len(images)):
        images.sight(image, ANY_SIZE).read()
    return len(images)


def check(dataset: Dataset | PackedDataset, progress: Progress) -> tuple[str, list[str]]:
    """Loads all scenes.

    Returns:
        (summary of the scenes that can be used, the messages of those that cannot).
    """
    points, extents, errors = [], [], []
    has: Counter[str] = Counter()
    for index in counted(progress, range(len(dataset)), "reading scenes"):
        try:
            scene = dataset.load(index)
            images = check_images(dataset.images(index, scene))
        except SceneError as error:
            errors.append(str(error))
            continue
        points.append(len(scene.coord))
        extents.append(np.ptp(scene.coord, axis=0))
        for name in ("color", "normal", "segment", "instance"):
            has[name] += getattr(scene, name) is not None
        has["images"] += images > 0
    if not points:
        return "no scene can be used", errors
    low, middle, high = np.percentile(points, (0, 50, 100)).astype(int)
    x, y, z = np.median(extents, axis=0)
    parts = ", ".join(f"{name} in {count}" for name, count in has.items())
    summary = (
        f"{len(points)} of {len(dataset)} scenes can be used: {parts}\n"
        f"points: {low:,} to {high:,}, median {middle:,}\n"
        f"extent (median, metres): {x:.2f} x {y:.2f}, height {z:.2f}"
    )
    return summary, errors


def main() -> None:
    """Command line; see the module's docstring."""
    parser = flags.Parser(
        prog="python -m data_prep.check", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("root", help="folder with <split>/<scene>/coord.npy")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--units", default="", help="m, cm or mm")
    parser.add_argument("--up", default="", help="z, -z, y, -y, x or -x")
    parser.add_argument("--segment", default=None, help="stem of the label file")
    given = parser.parse_args()
    try:
        if is_packed(given.root):
            if given.units or given.up:
                parser.error(f"{given.root} is packed and says units and up itself")
            dataset = PackedDataset(given.root, given.splits, given.segment)
        else:
            dataset = Dataset(given.root, given.splits, given.units, given.up, given.segment)
    except SceneError as error:
        parser.exit(1, f"error: {error}\n")
    with Progress() as progress:
        summary, errors = check(dataset, progress)
    print(summary)
    if errors:
        parser.exit(1, "".join(f"error: {error}\n" for error in errors))


if __name__ == "__main__":
    main()
