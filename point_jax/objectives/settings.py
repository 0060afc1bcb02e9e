"""Config sections of the objectives, and the objectives that they describe."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict

from point_jax import limits
from point_jax.data.augment import GeometrySpec
from point_jax.data.color import ColorSpec
from point_jax.data.image_augment import IMAGE_SPEC_LIMITS, ImageSpec
from point_jax.data.image_features import FOLDER, FeatureSpec
from point_jax.data.views import ViewSpec
from point_jax.models.image_encoder import NetworkEncoder
from point_jax.models.spec import REMAT, PTv3Spec, Rotary, StageSpec
from point_jax.models.vgg import VGGSpec
from point_jax.objectives.concerto import Concerto, ConcertoSpec, ImageBranch
from point_jax.objectives.images import EncodedImages, StoredImages
from point_jax.objectives.labelled import CropSpec
from point_jax.objectives.segmentation import (
    Divide,
    Segmentation,
    SegmentationSpec,
    decoder,
    everything,
    lora,
    only_head,
)
from point_jax.objectives.sonata import Sonata
from point_jax.objectives.sonata_spec import OfflineTeacher, SonataSpec
from point_jax.objectives.trunks import PTv3Trunk, RawTrunk

Spec = TypeVar("Spec")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ONLINE = "online"  # the teacher that is the student's moving average
NO_WEIGHTS = "untrained"  # the image encoder that has learned nothing:
UNTRAINED = VGGSpec(("conv5_3",), (8, 16, 32, 48, 64))
_LISTS = ("depths", "channels", "heads")  # with an entry for each level

SECTION_LIMITS = {
    **{name: limits.each(limits.whole(1)) for name in _LISTS},
    "remat_levels": limits.each(limits.one_of(*REMAT)),
    "patch_size": limits.whole(1),
    "layer_scale": limits.number(0),
    "rotary_base": limits.number(0),
}


def default_network() -> ConfigDict:
    """The section `network`: Sonata's base encoder, 108.46 M parameters."""
    network = ConfigDict()
    network.depths = (3, 3, 3, 12, 3)
    network.channels = (48, 96, 192, 384, 512)
    network.heads = (3, 6, 12, 24, 32)
    network.patch_size = 1024
    network.mlp_ratio = 4.0
    network.drop_path = 0.3
    network.layer_scale = 0.0  # start value of every branch's scale; 0: no scale
    network.stem = "linear"  # of PT-v3m1 "conv", "batch" and "serialized": see `PTv3Spec`
    network.norm = "layer"
    network.pooling = "grid"
    network.rotary_base = 0.0  # of rotary positions (PT-v3m3; Utonia's is 10); 0: none
    network.rotary_shift = 0.0  # in training coordinates move by up to this many metres,
    network.rotary_jitter = 1.0  # each axis stretches by up to this factor (Utonia's: 1.1)
    network.rotary_rescale = 1.0  # and all together by this one (1.2)
    network.dtype = "float32"  # of the arithmetic; or bfloat16
    network.remat = False  # make activations again in the backward pass instead of keeping them
    network.remat_levels = ()  # or one word a level, "none", "cheap" (as True) or "all": `PTv3Spec`
    return network.lock()


def default_views() -> ConfigDict:
    """The section `views`: Sonata's recipe; see `ViewSpec`, `GeometrySpec` and `ColorSpec`."""
    return _section(ViewSpec(), leave_out=("grid_capacity",))


def default_objective() -> ConfigDict:
    """The section `objective`: Sonata's base recipe; see `SonataSpec`."""
    fields = {f.name: f.default for f in dataclasses.fields(SonataSpec)}
    left_out = ("network", "views", "shared_head", "offline")  # see `sonata_spec`
    return ConfigDict({k: v for k, v in fields.items() if k not in left_out}).lock()


def default_images() -> ConfigDict:
    """The section `images` of a joint objective; see `ImageSpec` and `ConcertoSpec`.

    Where batches have stored features (`data.images.features`) there is no encoder and nothing is
    augmented: `encoder`, `layers`, `dtype` and `augment` are for images that are encoded in the
    step.
    """
    images = ConfigDict()
    images.encoder = ""  # folder that launch.convert wrote; or "untrained", to try things out
    images.layers = ()  # of VGG16: which layers' features; (): conv4_3
    images.dtype = "float32"  # of the encoder's arithmetic; or bfloat16
    images.up_cast = 3  # levels that points' features are carried up before they meet patches
    images.weight = 0.5  # of the image loss
    images.height, images.width = 37, 37  # patches
    augment = _section(ImageSpec(1, 1), leave_out=("height", "width", "stride"))
    images.augment = augment
    return images.lock()


def default_decoder() -> ConfigDict:
    """The section `decoder`, of the protocols that have one: lists with an entry a level.

    Empty lists of channels and heads mean the encoder's.
    """
    section = ConfigDict({"depths": (2, 2, 2, 2), "channels": (), "heads": ()})
    return section.lock()


def default_crops() -> ConfigDict:
    """The section `crops`: Pointcept's recipe for ScanNet; see `CropSpec` and `GeometrySpec`.

    `grid_size` 0 means the one that the encoder was trained with; 0.02 m without one.
    """
    crops = _section(CropSpec())
    crops.grid_size = 0.0
    return crops


def default_segmentation() -> ConfigDict:
    """The section `objective` of a segmentation; see `SegmentationSpec`."""
    fields = {f.name: f.default for f in dataclasses.fields(SegmentationSpec)}
    return ConfigDict({k: v for k, v in fields.items() if k not in ("classes", "crops")}).lock()


def dtype_of(section: Mapping[str, Any], place: str) -> Any:
    """The dtype of the arithmetic that a section names.

    Args:
      section: with a key "dtype".
      place: what errors say before that key.

    Raises:
      ValueError: none of `DTYPES`.
    """
    name = section["dtype"]
    if name not in DTYPES:
        raise ValueError(f"{place}dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def network_spec(network: Mapping[str, Any]) -> PTv3Spec:
    """The encoder that a section `network` describes.

    Raises:
      ValueError: lists of different lengths, or a value out of range; names the key.
    """
    place = "config.network."
    limits.check(network, SECTION_LIMITS, place)
    lists = {name: tuple(network[name]) for name in _LISTS}
    if len({len(values) for values in lists.values()}) != 1:
        raise ValueError(f"{place}depths, channels and heads need one length, got {lists}")
    remat = tuple(network["remat_levels"])
    if len(remat) not in (0, len(lists["depths"])):
        levels = len(lists["depths"])
        raise ValueError(f"{place}remat_levels has {len(remat)} words for {levels} levels: {remat}")
    dtype = dtype_of(network, place)
    rotary = None
    if network["rotary_base"]:
        names = ("base", "shift", "jitter", "rescale")
        with _errors_say(f"{place}rotary_"):
            rotary = Rotary(**{name: network[f"rotary_{name}"] for name in names})
    stages = []
    levels = zip(lists["depths"], lists["channels"], lists["heads"], strict=True)
    for level, (depth, channels, heads) in enumerate(levels):
        with _errors_say(f"config.network, level {level}: "):
            stages.append(StageSpec(depth, channels, heads, network["patch_size"]))
    with _errors_say(place):
        return PTv3Spec(
            encoder=tuple(stages),
            mlp_ratio=network["mlp_ratio"],
            drop_path=network["drop_path"],
            layer_scale=network["layer_scale"] or None,
            mask_token=network["stem"] == "linear",
            stem=network["stem"],
            norm=network["norm"],
            pooling=network["pooling"],
            rotary=rotary,
            dtype=dtype,
            remat=remat or network["remat"],
        )


def make_sonata(config: Any, offline: OfflineTeacher | None = None) -> Sonata:
    """The Sonata objective of a config: its sections `network`, `views` and `objective`.

    Args:
      config: the whole config.
      offline: the teacher that it names, if it is offline.

    Raises:
      ValueError: a value that does not fit, and which.
    """
    if "images" in config:
        raise ValueError("the config has a section images: it is Concerto's, not Sonata's")
    if config.data.get("images", {}).get("count", 0):
        raise ValueError(
            "config.data.images.count is above 0, but Sonata looks at no image; take "
            "configs/concerto.py, or set it to 0"
        )
    return Sonata(sonata_spec(config, offline))


def make_concerto(
    config: Any, images: ImageBranch, offline: OfflineTeacher | None = None
) -> Concerto:
    """The Concerto objective of a config: Sonata's sections and `images`.

    Args:
      config: the whole config.
      images: from `encoded_images` or `stored_images`.
      offline: as for `make_sonata`.

    Raises:
      ValueError: a value that does not fit, and which.
    """
    points = sonata_spec(config, offline)
    with _errors_say("config.images."):
        spec = ConcertoSpec(points, config.images.up_cast, config.images.weight)
        return Concerto(spec, images)


def encoded_images(config: Any, encoder: NetworkEncoder | None) -> EncodedImages:
    """Images that are encoded in the step, as the section `images` of a config says.

    Args:
      config: the whole config.
      encoder: the image encoder; None for the untrained one.

    Raises:
      ValueError: a value that does not fit, and which.
    """
    images = config.images
    if config.data.images.count == 0:
        raise ValueError(
            "config.data.images.count is 0: no image is taken; give the most images of a scene"
        )
    encoder = encoder or NetworkEncoder(UNTRAINED)
    size = {"height": images.height, "width": images.width}
    augment = _tuples(images.augment.to_dict())
    with _errors_say("config.images."):
        limits.check(size, IMAGE_SPEC_LIMITS)
    with _errors_say("config.images.augment.color."):
        augment["color"] = ColorSpec(**augment["color"])
    with _errors_say("config.images.augment."):
        spec = ImageSpec(**size, stride=encoder.stride, **augment)
    return EncodedImages(encoder, spec)


def stored_images(config: Any, features: FeatureSpec) -> StoredImages:
    """Features that batches have in place of images.

    Args:
      config: the whole config.
      features: what they are.

    Raises:
      ValueError: what the config says of images does not fit them.
    """
    name, images = config.data.images.features, config.images
    place = f"config.data.images.features={name!r}"
    encoder = images.encoder not in ("", NO_WEIGHTS)
    if encoder or images.layers:
        key = "encoder" if encoder else "layers"
        raise ValueError(
            f"{place} and config.images.{key}={images[key]!r} are both given: images are encoded "
            "in the step, or their features come with the scenes; leave one out"
        )
    if config.data.images.count == 0:
        raise ValueError(f"{place}, but config.data.images.count is 0: no image is taken")
    grid = features.height, features.width
    if (images.height, images.width) != grid:
        raise ValueError(
            f"config.images.height and width are {images.height} x {images.width} patches, but "
            f"{FOLDER}/{name} has features of {grid[0]} x {grid[1]}: set them to these, or make "
            "others with data_prep.image_features"
        )
    return StoredImages(features)


def sonata_spec(config: Any, offline: OfflineTeacher | None = None) -> SonataSpec:
    """The point losses of Sonata, or of Concerto; arguments and errors as for `make_sonata`."""
    network = network_spec(config.network)
    if network.stem == "conv" or network.norm == "batch":
        raise ValueError(
            f"config.network has stem={network.stem!r} and norm={network.norm!r}: pretraining "
            "needs 'linear', which can be masked, and 'layer', since only supervised training has "
            "statistics of a batch"
        )
    views = _tuples(config.views.to_dict())
    with _errors_say("config.views.color."):
        views["color"] = ColorSpec(**views["color"])
    with _errors_say("config.views.geometry."):
        views["geometry"] = GeometrySpec(**_tuples(views["geometry"]))
    with _errors_say("config.views."):
        views = ViewSpec(**views)
    with _errors_say("config.objective."):
        return SonataSpec(
            network=network,
            views=views,
            shared_head="images" in config,
            offline=offline,
            **_tuples(config.objective.to_dict()),
        )


# What trains beside the linear layer.
PROTOCOLS: dict[str, Divide] = {
    "linear": only_head,
    "decoder": decoder,
    "lora": lora,
    "full": everything,
    "scratch": everything,
}
WITH_DECODER = ("decoder", "full", "scratch")


def make_segmentation(
    config: Any, protocol: str, classes: int, network: PTv3Spec | None
) -> Segmentation:
    """A segmentation objective: sections `crops`, `objective` and `decoder` of a config.

    Args:
      config: the whole config.
      protocol: a key of `PROTOCOLS`.
      classes: K.
      network: the encoder; None for height, normal and colour without one.

    Raises:
      ValueError: a value that does not fit, and which.
    """
    if network is None and protocol != "linear":
        raise ValueError(f"without a network there is only the linear protocol, not {protocol}")
    crops = _tuples(config.crops.to_dict())
    with _errors_say("config.crops.geometry."):
        crops["geometry"] = GeometrySpec(**_tuples(crops["geometry"]))
    with _errors_say("config.crops."):
        crops = CropSpec(**crops)
    with _errors_say("config.objective."):
        spec = SegmentationSpec(classes=classes, crops=crops, **_tuples(config.objective.to_dict()))
        if network is None:
            return Segmentation(spec, RawTrunk(), PROTOCOLS[protocol])
        if protocol in WITH_DECODER:
            network = with_decoder(network, config.decoder)
        return Segmentation(spec, PTv3Trunk(network), PROTOCOLS[protocol])


def with_decoder(network: PTv3Spec, section: Mapping[str, Any]) -> PTv3Spec:
    """The encoder with the decoder that a section `decoder` describes.

    Raises:
      ValueError: lists of wrong lengths, or a value out of range; names the key.
    """
    place = "config.decoder."
    limits.check(section, SECTION_LIMITS, place)
    wanted = len(network.encoder) - 1
    lists = {
        "depths": tuple(section["depths"]),
        "channels": tuple(section["channels"]) or tuple(s.channels for s in network.encoder[:-1]),
        "heads": tuple(section["heads"]) or tuple(s.heads for s in network.encoder[:-1]),
    }
    for name, values in lists.items():
        if len(values) != wanted:
            raise ValueError(
                f"{place}{name} is {values}: an encoder of {wanted + 1} levels needs {wanted}"
            )
    with _errors_say(place):
        stages = tuple(
            StageSpec(depth, channels, heads, below.patch_size)
            for depth, channels, heads, below in zip(
                *lists.values(), network.encoder[:-1], strict=True
            )
        )
        return dataclasses.replace(network, decoder=stages)


@contextlib.contextmanager
def _errors_say(place: str) -> Iterator[None]:
    """Puts the section before the errors of a spec, which begin with the name of a field."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}{error}") from error


def _section(spec: Any, leave_out: tuple[str, ...] = ()) -> ConfigDict:
    """A dataclass's values as a locked section; dataclasses inside become sections inside."""
    section = ConfigDict()
    for field in dataclasses.fields(spec):
        if field.name not in leave_out:
            value = getattr(spec, field.name)
            section[field.name] = _section(value) if dataclasses.is_dataclass(value) else value
    return section.lock()


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists from the command line as tuples, so that specs can be hashed."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

    return {name: freeze(value) for name, value in values.items()}
