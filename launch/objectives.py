"""From a config to what is to be learned, image encoders included.

`make_objective` reads the weights of what stays as it is, an image encoder or a teacher; `outlined`
is for commands that measure a step and need its shapes alone.
"""

from typing import Any

import jax

from point_jax.data.sources import build_sources, with_features
from point_jax.features.load import read_checkpoint, trained_grid_size
from point_jax.interop.image_encoders import load_image_encoder
from point_jax.interop.offline import offline_teacher
from point_jax.interop.store import count
from point_jax.models.image_encoder import NetworkEncoder
from point_jax.models.vit import DINOV2, dinov2_spec
from point_jax.objectives.concerto import Concerto, ImageBranch
from point_jax.objectives.settings import (
    NO_WEIGHTS,
    ONLINE,
    dtype_of,
    encoded_images,
    make_concerto,
    make_sonata,
    sonata_spec,
    stored_images,
)
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.sonata_spec import OFFLINE, OfflineTeacher
from point_jax.training.config import Config

NAMED = "dinov2-with-registers-"
DEFAULT = f"{NAMED}large"


def make_objective(config: Config) -> tuple[Sonata | Concerto, dict[str, Any]]:
    """What a config says is to be learned: with a section `images` Concerto, without it Sonata.

    Returns:
        The objective, and the weights of those parts of its teacher that stay as they are.

    Raises:
        ValueError: a value that does not fit.
        CheckpointError: no image encoder where `config.images.encoder` says, or no teacher where
            `config.teacher` does.
        SceneError: no features of that name beside the scenes.
    """
    offline, frozen = _teacher(config)
    if "images" not in config:
        return make_sonata(config, offline), frozen
    images, params = _image_branch(config)
    frozen |= {} if params is None else {"image": params}
    return make_concerto(config, images, offline), frozen


def outlined(config: Config) -> Sonata | Concerto:
    """The objective without weights: an image encoder may be one of DINOv2's names.

    Errors as in `make_objective`.
    """
    images = config.get("images")
    if images is None or config.data.images.features:
        return make_objective(config)[0]
    encoder = images.encoder or DEFAULT
    if not encoder.startswith(NAMED):
        return make_objective(config)[0]
    size = encoder.removeprefix(NAMED)
    if size not in DINOV2:
        known = ", ".join(NAMED + size for size in DINOV2)
        raise ValueError(f"config.images.encoder is {encoder!r}: known without weights are {known}")
    network = NetworkEncoder(dinov2_spec(size, dtype_of(images, "config.images.")))
    print(f"images: {encoder}, shapes without weights", flush=True)
    return make_concerto(config, encoded_images(config, network), _teacher(config)[0])


def _teacher(config: Config) -> tuple[OfflineTeacher | None, dict[str, Any]]:
    """A config's teacher and what stays as it is, (None, {}) for `ONLINE`; errors as above."""
    path = config.get("teacher", ONLINE)
    if path == ONLINE:
        return None, {}
    weights = read_checkpoint(path)
    student = sonata_spec(config)
    try:
        teacher, params = offline_teacher(weights, student)
    except ValueError as error:
        raise ValueError(f"config.teacher: {path} {error}") from error
    if jax.process_index() == 0:
        file, size = weights.source.get("file", path), count(params) / 1e6
        voxels = trained_grid_size(weights), student.views.grid_size
        print(
            f"teacher: {path} ({file}), {size:.1f} M parameters, stays as it is; it has learned "
            f"from voxels of {voxels[0]} m and sees {voxels[1]} m",
            flush=True,
        )
    return teacher, {OFFLINE: params}


def _image_branch(config: Config) -> tuple[ImageBranch, Any]:
    """The image side of Concerto, and the weights of its encoder or None; errors as above."""
    images, features = config.images, config.data.images.features
    if features:
        _, spec = with_features(build_sources(config.data.sources), features)
        return stored_images(config, spec), None
    if not images.encoder:
        raise ValueError(
            "config.images.encoder is empty: give a folder that launch.convert wrote of an image "
            f"encoder, or {NO_WEIGHTS!r} to try things out"
        )
    dtype = dtype_of(images, "config.images.")
    layers = tuple(images.layers) or None
    if images.encoder == NO_WEIGHTS:
        if layers:
            raise ValueError(f"config.images.layers is for VGG16, not for {NO_WEIGHTS!r}")
        return encoded_images(config, None), None
    encoder, params = load_image_encoder(images.encoder, dtype=dtype, layers=layers)
    return encoded_images(config, encoder), params
