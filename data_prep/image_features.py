"""Encodes the images of a data set once and stores their features beside the scenes.

    python -m data_prep.image_features --input=ROOT --encoder=weights/vgg16 --height=30 --width=40

writes ROOT/image_features/<name>/, a file for every image; docs/pretrain.md says how to train from
them. --height and --width count patches of the encoder. Images are cropped and resized as training
does. The same command again goes on where it stopped.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from data_prep.progress import counted
from point_jax import flags
from point_jax.data.image_features import FeatureSpec, ImageFeatures
from point_jax.data.scenes import Dataset, SceneError
from point_jax.interop.files import read_json
from point_jax.interop.image_encoders import load_image_encoder
from point_jax.interop.store import MANIFEST
from point_jax.models.functional import Params
from point_jax.models.image_encoder import ImageEncoder, NetworkEncoder
from point_jax.models.vgg import VGGSpec
from point_jax.training.checkpoint import CheckpointError


def open_encoder(
    folder: Path, layers: tuple[str, ...], dtype: str, height: int, width: int
) -> tuple[NetworkEncoder, Params, FeatureSpec]:
    """An image encoder, its parameters, and what its features are.

    Args:
        folder: that `launch.convert` wrote.
        layers: of VGG16; () for its default.
        dtype: of the arithmetic, "float32" or "bfloat16".
        height: of an image, patches.
        width: of an image, patches.

    Raises:
        CheckpointError: no image encoder is there.
        ValueError: layers that the encoder does not have, no height or width.
    """
    encoder, params = load_image_encoder(folder, dtype=jnp.dtype(dtype), layers=layers or None)
    manifest, network = read_json(folder / MANIFEST), encoder.network
    spec = FeatureSpec(
        encoder=manifest["digest"],
        variant=manifest["variant"],
        layers=network.layers if isinstance(network, VGGSpec) else (),
        dtype=dtype,
        height=height,
        width=width,
        stride=encoder.stride,
        channels=encoder.channels,
    )
    return encoder, params, spec


def missing_images(
    dataset: Dataset, features: ImageFeatures, progress: Progress, errors: list[str]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Reads the images that have no features yet; each once, however many scenes it belongs to.

    Args:
        dataset: the scenes.
        features: what there is of their images, and the size of these.
        progress: shows how many scenes are done.
        errors: takes what is wrong with scenes and images that cannot be read.

    Yields:
        An image file, and the image (H, W, 3) uint8 as training has it.
    """
    seen = set[Path]()
    for index in counted(progress, range(len(dataset)), "encoding the images of scenes"):
        try:
            images = dataset.images(index, dataset.load(index))
        except SceneError as error:
            errors.append(str(error))
            continue
        if images is None:
            continue
        for number in range(len(images)):
            file = images.file(number)
            if file is None or file in seen:
                continue
            seen.add(file)
            try:
                if features.file(file).exists():
                    continue
                image = images.sight(number, features.spec.size).read()
            except SceneError as error:
                errors.append(str(error))
                continue
            yield file, image


def encode_images(
    encoder: ImageEncoder,
    params: Params,
    images: Iterator[tuple[Path, np.ndarray]],
    features: ImageFeatures,
    batch: int,
) -> int:
    """Encodes images, always so many at a time, and stores their features.

    Returns:
        How many images there were.

    Raises:
        SceneError: features that cannot be stored.
    """
    encode, done = jax.jit(encoder.__call__), 0
    while group := list(itertools.islice(images, batch)):
        block = np.zeros((batch, *features.spec.size, 3), np.uint8)
        block[: len(group)] = [image for _, image in group]
        for (file, _), found in zip(group, np.asarray(encode(params, block)), strict=False):
            features.write(file, found)
        done += len(group)
    return done


def main() -> None:
    """Command line; see the module's docstring."""
    parser = flags.Parser(
        prog="python -m data_prep.image_features", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="root of the scene folders")
    add("--encoder", type=Path, required=True, help="folder that launch.convert wrote")
    add("--name", default="", help="of the features; without it the encoder folder's")
    add("--splits", nargs="+", default=["train"])
    add("--height", type=int, required=True, help="of an image, patches of the encoder")
    add("--width", type=int, required=True, help="of an image, patches of the encoder")
    add("--layers", nargs="+", default=[], help="of VGG16; conv4_3 without it")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    add("--batch", type=int, default=8, help="images encoded at a time")
    add("--units", default="", help="m, cm or mm, where there is no dataset.json")
    add("--up", default="", help="z, -z, y, -y, x or -x, where there is no dataset.json")
    add("--image_splits", action="store_true", help="Pointcept's layout of Concerto's data")
    given = parser.parse_args()
    if given.batch < 1:
        parser.error(f"--batch={given.batch}, expected 1 or more")
    name, errors = given.name or given.encoder.absolute().name, []
    try:
        dataset = Dataset(
            given.input, given.splits, given.units, given.up, image_splits=given.image_splits
        )
        encoder, params, spec = open_encoder(
            given.encoder, tuple(given.layers), given.dtype, given.height, given.width
        )
        features, start = ImageFeatures.create(given.input, name, spec), time.monotonic()
        with Progress() as progress:
            images = missing_images(dataset, features, progress, errors)
            count = encode_images(encoder, params, images, features, given.batch)
    except (ValueError, CheckpointError) as error:
        parser.exit(1, f"error: {error}\n")
    seconds = (time.monotonic() - start) / max(count, 1)
    size = np.prod(spec.content.shape) * spec.content.dtype.itemsize / 1e6
    print(
        f"{count} images of {len(dataset)} scenes encoded, {seconds:.2f} s and {size:.2f} MB each\n"
        f"train with --config.data.images.features={name} --config.images.height={spec.height} "
        f"--config.images.width={spec.width}"
    )
    if errors:
        parser.exit(1, "".join(f"error: {error}\n" for error in errors))


if __name__ == "__main__":
    main()
