"""Features of image files, computed once: `<root>/image_features/<name>/` beside the scenes.

    manifest.json       what made them, and their grid: a `FeatureSpec`
    <image file>.npy    (height, width, C) float16, for every image by its path under the root

An image is cropped and resized by `images.read_image` to `FeatureSpec.size` before it is encoded.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from point_jax import limits
from point_jax.data.checks import SceneError, read_array, read_stated
from point_jax.data.images import Content, Images, Sight, Size

FOLDER, MANIFEST = "image_features", "manifest.json"
FORMAT, VERSION = "point_jax image features", 1

SPEC_LIMITS = {
    "encoder": limits.text(empty=False),
    "variant": limits.text(),
    "layers": limits.each(limits.text()),
    "dtype": limits.text(),
    **{name: limits.whole(1) for name in ("height", "width", "stride", "channels")},
}


@dataclass(frozen=True)
class FeatureSpec:
    """What features are of, and what made them.

    Attributes:
        encoder: digest of the encoder's weights.
        variant: of the encoder, see `interop.image_encoders`.
        layers: whose features they are, where an encoder has a choice; else ().
        dtype: of the encoder's arithmetic.
        height, width: of an image, patches.
        stride: edge of a patch, pixels.
        channels: C, of a patch's features.
    """

    encoder: str
    variant: str
    layers: tuple[str, ...]
    dtype: str
    height: int
    width: int
    stride: int
    channels: int

    def __post_init__(self) -> None:
        limits.check(vars(self), SPEC_LIMITS)

    @property
    def size(self) -> Size:
        """Of the images that were encoded."""
        return Size(self.height * self.stride, self.width * self.stride)

    @property
    def content(self) -> Content:
        """What a batch has of an image."""
        shape = (self.height, self.width, self.channels)
        return Content("features", self.size, shape, np.dtype(np.float16))

    def differences(self, other: "FeatureSpec") -> str:
        """Every field that is not the same in both, in words; empty for equal ones."""
        here, there = vars(self), vars(other)
        return "; ".join(
            f"{name} is {here[name]!r}, not {there[name]!r}"
            for name in here
            if here[name] != there[name]
        )


class ImageFeatures:
    """The features that one data set has under a name.

    Attributes:
        folder: of all of them.
        spec: what they are.
    """

    def __init__(self, root: str | Path, name: str):
        """Opens them.

        Raises:
            SceneError: none are there, or the manifest is not one.
            ValueError: a name that is no folder's.
        """
        self._root, self.folder = Path(root), _folder(root, name)
        self.spec = _read_manifest(self.folder / MANIFEST)

    @classmethod
    def create(cls, root: str | Path, name: str, spec: FeatureSpec) -> "ImageFeatures":
        """A place for features, new or begun before.

        Raises:
            SceneError: other features are there under this name, or no folder can be made.
            ValueError: a name that is no folder's.
        """
        file = _folder(root, name) / MANIFEST
        if not file.exists():
            content = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(spec)
            _write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
        features = cls(root, name)
        if different := features.spec.differences(spec):
            raise SceneError(
                f"{features.folder} holds other features: {different}; choose another name, or "
                "remove the folder"
            )
        return features

    def file(self, image: Path) -> Path:
        """Where the features of an image file are, or belong.

        Raises:
            SceneError: the image is not below the root.
        """
        inside = image.is_relative_to(self._root)
        path = image.relative_to(self._root) if inside else image
        if not inside or ".." in path.parts:
            raise SceneError(f"{image}: lies outside {self._root}, so no features of it are stored")
        return self.folder / path.with_name(f"{path.name}.npy")

    def read(self, image: Path) -> np.ndarray:
        """(height, width, C) float16 of an image file.

        Raises:
            SceneError: names the file: missing, damaged, of another shape or dtype, not finite.
        """
        file = self.file(image)
        if not file.exists():
            raise SceneError(
                f"{file}: missing; data_prep.image_features makes what is not there yet"
            )
        array, content = read_array(file), self.spec.content
        if array.shape != content.shape or array.dtype != content.dtype:
            raise SceneError(
                f"{file}: {array.dtype} of shape {array.shape}, but {MANIFEST} says "
                f"{content.dtype} of {content.shape}; remove it and make it again"
            )
        if not np.isfinite(array).all():
            raise SceneError(f"{file}: has NaN or infinite values; remove it and make it again")
        return array

    def write(self, image: Path, features: np.ndarray) -> None:
        """Stores (height, width, C) float32 features of an image file; the file is whole or absent.

        Raises:
            SceneError: values that float16 cannot hold, or a file that cannot be written.
        """
        content = self.spec.content
        assert features.shape == content.shape, (features.shape, content.shape)
        with np.errstate(over="ignore"):
            half = features.astype(content.dtype)
        if not np.isfinite(half).all():
            raise SceneError(
                f"{image}: features from {features.min():.4g} to {features.max():.4g}, which "
                "float16 cannot hold"
            )
        _write_whole(self.file(image), half)


class FeatureImages:
    """The images of a scene, of which features are taken in place of pixels."""

    def __init__(self, images: Images, features: ImageFeatures):
        self._images, self._features = images, features

    def __len__(self) -> int:
        return len(self._images)

    def file(self, image: int) -> Path | None:
        """See `images.Images`."""
        return self._images.file(image)

    def sight(self, image: int, size: Size) -> Sight:
        """See `images.Images`; `read` gives the stored features."""
        file = self.file(image)
        assert file is not None  # `sources.with_features` sees to it
        pixels = self._images.sight(image, size).pixels
        return Sight(pixels, lambda: self._features.read(file))


def _folder(root: str | Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"image features are called {name!r}, expected the name of one folder")
    return Path(root) / FOLDER / name


def _read_manifest(file: Path) -> FeatureSpec:
    if not file.exists():
        there = sorted(entry.parent.name for entry in file.parent.parent.glob(f"*/{MANIFEST}"))
        raise SceneError(
            f"{file}: missing; data_prep.image_features makes it; here are "
            f"{', '.join(there) or 'no image features'}"
        )
    content = read_stated(file, FORMAT, VERSION)
    names = [field.name for field in dataclasses.fields(FeatureSpec)]
    values: dict[str, Any] = {name: content.get(name) for name in names}
    try:
        limits.check(values, SPEC_LIMITS)
    except ValueError as error:
        raise SceneError(f"{file}: {error}") from error
    values["layers"] = tuple(values["layers"])
    return FeatureSpec(**values)


def _write_whole(file: Path, content: bytes | np.ndarray) -> None:
    """Writes bytes, or an array as npy, beside the file's place and renames it into it."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as out:
                if isinstance(content, bytes):
                    out.write(content)
                else:
                    np.save(out, content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SceneError(f"{file}: cannot be written: {error.strerror or error}") from error
