"""Images of a scene on the host: which are taken, brought to one size, and where they see points.

A place in an image is (row, column) in continuous coordinates: pixel i covers [i, i + 1), so that
its centre is at i + 0.5; -1 for both where the image does not see the point.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from point_jax import limits
from point_jax.data.checks import SceneError
from point_jax.data.frames import Frames

IMAGE_LIMITS = {
    "count": limits.whole(0),
    "height": limits.whole(1),
    "width": limits.whole(1),
    "features": limits.text(),
}


def default_images() -> ConfigDict:
    """The config section `data.images`; locked. By default no image is read."""
    images = ConfigDict()
    images.count = 0  # most images of a scene, I; 0: batches without images
    images.height = 224  # of all of them on the host, pixels
    images.width = 224
    images.features = ""  # name of stored features that batches have in place of images
    return images.lock()


class Size(NamedTuple):
    """Of an image, pixels."""

    height: int
    width: int


class Sight(NamedTuple):
    """What one image of a scene sees.

    Attributes:
        pixels: (n, 2) float32, place of each point of the scene in the resized image; -1 where the
            image does not see it.
        read: makes the resized image, (height, width, 3) uint8, or reads its features where these
            are stored; raises SceneError.
    """

    pixels: np.ndarray
    read: Callable[[], np.ndarray]


class Images(Protocol):
    """The images of one scene; each is opened when it is asked for."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def file(self, image: int) -> Path | None:
        """The file of one of them; None if it is rendered."""
        ...

    def sight(self, image: int, size: Size) -> Sight:
        """What one of them sees at a size; raises SceneError for damaged files."""
        ...


class Content(NamedTuple):
    """What a batch has of every image.

    Attributes:
        name: of the array in the batch.
        size: that an image is brought to, in whose pixels places are.
        shape: of one image's part of the array.
        dtype: of the array.
    """

    name: str
    size: Size
    shape: tuple[int, ...]
    dtype: np.dtype


def pixel_content(size: Size) -> Content:
    """Batches with the images themselves, at a size."""
    return Content("images", size, (*size, 3), np.dtype(np.uint8))


class FrameImages:
    """The image files of a scene with a `frames.npz`."""

    def __init__(
        self,
        root: Path,
        frames: Frames,
        coord: np.ndarray,
        content: Callable[[int], bytes] | None = None,
    ):
        """Keeps one bit a point and image.

        Args:
            root: of the data set, where the files' names start.
            frames: of the scene.
            coord: (n, 3) float32, the scene's points.
            content: image -> what its file holds; None reads the file.
        """
        self._root, self._coord, self._content = root, coord, content
        self._files, self._size, self._camera = frames.files, frames.size, frames.camera
        self._seen = np.packbits(frames.seen, axis=1)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, image: int) -> Path:
        """See `Images`."""
        return self._root / str(self._files[image])

    def sight(self, image: int, size: Size) -> Sight:
        """See `Images`."""
        one, points = slice(image, image + 1), len(self._coord)
        seen = np.unpackbits(self._seen[one], axis=1, count=points).astype(bool)
        frame = Frames(self._files[one], self._size[one], self._camera[one], seen)
        index, pixel = frame.pixels(0, self._coord)
        width, height = map(int, self._size[image])
        pixels = np.full((points, 2), -1, np.float32)
        # In frames.npz pixel centres have whole coordinates.
        pixels[index] = fit_places(pixel[:, ::-1] + 0.5, Size(height, width), size)

        def read() -> np.ndarray:
            content = None if self._content is None else self._content(image)
            return read_image(self.file(image), Size(height, width), size, content)

        return Sight(pixels, read)


def central_crop(full: Size, size: Size) -> tuple[float, float, float]:
    """The largest rectangle in the middle of an image that has the shape of another size.

    The originals crop so, too: things keep their proportions.

    Returns:
        (top, left, scale): its corner in pixels, and how many pixels of the image make one of size.
    """
    scale = min(full.height / size.height, full.width / size.width)
    top, left = (full.height - scale * size.height) / 2, (full.width - scale * size.width) / 2
    return top, left, scale


def fit_places(places: np.ndarray, full: Size, size: Size) -> np.ndarray:
    """Places (k, 2) in an image -> places in what `read_image` makes of it, -1 outside."""
    top, left, scale = central_crop(full, size)
    fitted = ((places - (top, left)) / scale).astype(np.float32)
    inside = np.logical_and(fitted >= 0, fitted < np.array(size))
    return np.where(inside.all(axis=1, keepdims=True), fitted, np.float32(-1))


def image_size(file: Path) -> Size:
    """The size that an image file states; its pixels are not read. Errors as in `read_image`."""
    return _open(file, lambda image: Size(image.height, image.width))


def read_image(file: Path, full: Size, size: Size, content: bytes | None = None) -> np.ndarray:
    """Reads an image file, crops it to the shape of `size`, resizes it with antialiasing.

    Args:
        file: of an RGB image.
        full: what its size must be: that which the camera or the correspondences are for.
        size: of the result.
        content: of the file, where it was read already.

    Returns:
        (height, width, 3) uint8.

    Raises:
        SceneError: names the file: missing, damaged, not RGB, another size.
    """
    top, left, scale = central_crop(full, size)
    # Rounding must not reach beyond the border: pillow refuses that.
    bottom, right = top + scale * size.height, left + scale * size.width
    box = (max(left, 0.0), max(top, 0.0), min(right, full.width), min(bottom, full.height))

    def fit(image: Image.Image) -> np.ndarray:
        if image.mode != "RGB":
            raise SceneError(f"{file}: an image of mode {image.mode}, expected RGB")
        if image.size != full[::-1]:
            raise SceneError(
                f"{file}: {image.width} x {image.height} pixels, but its scene says "
                f"{full.width} x {full.height}"
            )
        return np.asarray(image.resize((size.width, size.height), Image.Resampling.BILINEAR, box))

    return _open(file, fit, content)


def _open(file: Path, use: Callable[[Image.Image], Any], content: bytes | None = None) -> Any:
    try:
        with Image.open(file if content is None else io.BytesIO(content)) as image:
            return use(image)
    except SceneError:
        raise
    except FileNotFoundError as error:
        raise SceneError(f"{file}: missing") from error
    except Exception as error:  # damaged: the decoders raise many kinds
        raise SceneError(f"{file}: not a readable image ({error})") from error


def pad_images(
    images: Images | None,
    keep: np.ndarray | None,
    points: int,
    count: int,
    content: Content,
    key: np.random.Generator,
) -> dict[str, Any]:
    """The image part of a slot of a batch: some of the scene's images, padded to `count`.

    Args:
        images: of the scene; None for a scene without.
        keep: (n,) bool, the points that the slot has; None: all.
        points: capacity P of a slot.
        count: most images, I.
        content: what is taken of each.
        key: draws which are taken, among those that see one of the points kept.

    Returns:
        The array of the content (I, ...), pixels (P, I, 2) float32 of the points kept, image_count
        int32.

    Raises:
        SceneError: for an image that cannot be used.
    """
    slot: dict[str, Any] = {
        content.name: np.zeros((count, *content.shape), content.dtype),
        "pixels": np.full((points, count, 2), -1, np.float32),
    }
    taken = 0
    for image in key.permutation(0 if images is None else len(images)):
        if images is None or taken == count:
            break
        sight = images.sight(int(image), content.size)
        pixels = sight.pixels if keep is None else sight.pixels[keep]
        if (pixels >= 0).any():
            slot[content.name][taken] = sight.read()
            slot["pixels"][: len(pixels), taken] = pixels
            taken += 1
    return slot | {"image_count": np.int32(taken)}
