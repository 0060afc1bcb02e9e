"""The releases' network configs, against this project's `PTv3Spec`.

A release stores the arguments of its network's constructor. Its three modes have different ones;
which mode a state dict belongs to shows in its keys.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from point_jax.geometry.curves import CURVES
from point_jax.models.spec import PTv3Spec, Rotary, StageSpec
from point_jax.ops.rotary import frequencies

Variant = Literal["PT-v3m1", "PT-v3m2", "PT-v3m3"]
VARIANTS: tuple[Variant, ...] = ("PT-v3m1", "PT-v3m2", "PT-v3m3")

# Arguments that every mode has, with the default of its constructor.
_ENCODER: dict[str, Any] = {
    "in_channels": 6,
    "order": ("z", "z-trans"),
    "stride": (2, 2, 2, 2),
    "mlp_ratio": 4,
    "drop_path": 0.3,
    "enc_mode": False,
    "enable_rpe": False,
}
_STAGES: dict[str, dict[str, Any]] = {
    "PT-v3m1": {
        "enc_depths": (2, 2, 2, 6, 2),
        "enc_channels": (32, 64, 128, 256, 512),
        "enc_num_head": (2, 4, 8, 16, 32),
        "enc_patch_size": (48, 48, 48, 48, 48),
        "dec_depths": (2, 2, 2, 2),
        "dec_channels": (64, 64, 128, 256),
        "dec_num_head": (4, 4, 8, 16),
        "dec_patch_size": (48, 48, 48, 48),
    },
    "PT-v3m2": {
        "enc_depths": (3, 3, 3, 12, 3),
        "enc_channels": (48, 96, 192, 384, 512),
        "enc_num_head": (3, 6, 12, 24, 32),
        "enc_patch_size": (1024, 1024, 1024, 1024, 1024),
        "dec_depths": (3, 3, 3, 3),
        "dec_channels": (96, 96, 192, 384),
        "dec_num_head": (6, 6, 12, 32),
        "dec_patch_size": (1024, 1024, 1024, 1024),
    },
}
_STAGES["PT-v3m3"] = _STAGES["PT-v3m2"]
_LAYERS: dict[str, Any] = {"layer_scale": None, "mask_token": False}
_OWN: dict[str, dict[str, Any]] = {
    "PT-v3m1": {},
    "PT-v3m2": _LAYERS,
    "PT-v3m3": _LAYERS
    | {
        "rope_base": None,  # 10 in Utonia's release, 10000 in Pointcept: never guessed
        "dec_rope_enable": True,
        "shift_coords": None,
        "jitter_coords": None,
        "rescale_coords": None,
    },
}
# Arguments that say how to compute, not what: they leave the weights' meaning alone.
_HOW = {
    "attn_drop",
    "enable_flash",
    "freeze_encoder",
    "proj_drop",
    "shuffle_orders",
    "traceable",
    "upcast_attention",
    "upcast_softmax",
}
# Arguments that this project has at one value.
_FIXED: dict[str, Any] = {"qkv_bias": True, "qk_scale": None, "pre_norm": True, "pdnorm_bn": False}
_FIXED |= {"pdnorm_ln": False}
_PROMPTS = {"pdnorm_decouple", "pdnorm_adaptive", "pdnorm_affine", "pdnorm_conditions"}


def variant_of(keys: Collection[str]) -> Variant:
    """The mode of the network that a state dict's keys (without prefix) belong to."""
    if "embedding.stem.conv.weight" in keys:
        return "PT-v3m1"
    if any(key.endswith("attn.rope.inv_freq") for key in keys):
        return "PT-v3m3"
    return "PT-v3m2"


def spec_of(config: Mapping[str, Any], variant: str, dtype: jnp.dtype = jnp.float32) -> PTv3Spec:
    """The network of a release's config.

    Args:
      config: arguments of the release's constructor; what is missing has its default there.
      variant: the mode, one of `VARIANTS`.
      dtype: of the arithmetic.

    Raises:
      ValueError: lists every argument that is unknown, or that asks for what is not built here.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    known = _ENCODER | _STAGES[variant] | _OWN[variant]
    problems = [
        f"{name}={config[name]!r}: not built here, only {value!r}"
        for name, value in _FIXED.items()
        if config.get(name, value) != value
    ]
    ours = set(known) | set(_FIXED) | _HOW | (_PROMPTS if variant == "PT-v3m1" else set())
    problems += [f"{name}: {variant} has no such argument" for name in sorted(set(config) - ours)]
    get = {name: config.get(name, default) for name, default in known.items()}
    order = (get["order"],) if isinstance(get["order"], str) else tuple(get["order"])
    problems += [f"order: no curve {name!r}" for name in order if name not in CURVES]
    if set(get["stride"]) != {2}:
        problems.append(f"stride={tuple(get['stride'])}: not built here, only 2 at every level")
    if variant == "PT-v3m3" and not get["rope_base"]:
        problems.append("rope_base is missing: 10 in Utonia's release")
    if problems:
        raise ValueError(f"this {variant} cannot be built:\n  " + "\n  ".join(problems))

    def stages(part: str) -> tuple[StageSpec, ...]:
        names = ("depths", "channels", "num_head", "patch_size")
        columns = [tuple(get[f"{part}_{name}"]) for name in names]
        if len({len(column) for column in columns}) != 1:
            lengths = {f"{part}_{n}": len(c) for n, c in zip(names, columns, strict=True)}
            raise ValueError(f"the stages' lists have different lengths: {lengths}")
        return tuple(StageSpec(*numbers) for numbers in zip(*columns, strict=True))

    rotary = None
    if variant == "PT-v3m3":
        rotary = Rotary(
            base=float(get["rope_base"]),
            shift=get["shift_coords"] or 0.0,
            jitter=max(get["jitter_coords"] or 1.0, 1.0),
            rescale=max(get["rescale_coords"] or 1.0, 1.0),
            decoder=get["dec_rope_enable"],
        )
    first = variant == "PT-v3m1"
    return PTv3Spec(
        encoder=stages("enc"),
        decoder=() if get["enc_mode"] else stages("dec"),
        inputs=get["in_channels"],
        curves=tuple(curve for name in order for curve in CURVES if curve == name),
        mlp_ratio=float(get["mlp_ratio"]),
        drop_path=float(get["drop_path"]),
        layer_scale=get.get("layer_scale"),
        mask_token=bool(get.get("mask_token", False)),
        stem="conv" if first else "linear",
        norm="batch" if first else "layer",
        pooling="serialized" if first else "grid",
        relative_bias=bool(get["enable_rpe"]),
        rotary=rotary,
        dtype=dtype,
    )


def config_of(spec: PTv3Spec) -> tuple[Variant, dict[str, Any]]:
    """The inverse of `spec_of`: the mode and the arguments of its constructor (JSON values).

    Raises:
      ValueError: a mixture that no release has.
    """
    first = (spec.stem, spec.norm, spec.pooling)
    if first not in (("conv", "batch", "serialized"), ("linear", "layer", "grid")):
        raise ValueError(f"no release has stem={first[0]}, norm={first[1]}, pooling={first[2]}")
    variant: Variant = "PT-v3m2"
    if first[0] == "conv":
        variant = "PT-v3m1"
        if spec.rotary or spec.layer_scale is not None:
            raise ValueError("no release has a convolutional stem with rotary positions or scales")
    elif spec.rotary:
        variant = "PT-v3m3"
    config: dict[str, Any] = {
        "in_channels": spec.inputs,
        "order": list(spec.curves),
        "stride": [2] * (len(spec.encoder) - 1),
        "mlp_ratio": spec.mlp_ratio,
        "drop_path": spec.drop_path,
        "enc_mode": not spec.decoder,
        "enable_rpe": spec.relative_bias,
    }
    if spec.relative_bias:  # the originals' fused attention has no bias
        config["enable_flash"] = False
    for part, stages in (("enc", spec.encoder), ("dec", spec.decoder)):
        if stages:
            config[f"{part}_depths"] = [stage.depth for stage in stages]
            config[f"{part}_channels"] = [stage.channels for stage in stages]
            config[f"{part}_num_head"] = [stage.heads for stage in stages]
            config[f"{part}_patch_size"] = [stage.patch_size for stage in stages]
    if variant != "PT-v3m1":
        config |= {"layer_scale": spec.layer_scale, "mask_token": spec.mask_token}
        config["traceable"] = True
    if spec.rotary:
        config |= {
            "rope_base": spec.rotary.base,
            "shift_coords": spec.rotary.shift or None,
            "jitter_coords": spec.rotary.jitter,
            "rescale_coords": spec.rotary.rescale,
        }
        if not spec.rotary.decoder:  # Utonia's own package does not know the argument
            config["dec_rope_enable"] = False
    return variant, config


def constants(spec: PTv3Spec) -> dict[str, np.ndarray]:
    """Arrays that a release's state dict holds and this project computes or does without.

    Rotary frequencies of every block (float32), and the number of batches that each batch norm has
    seen (int64, 0), by their keys.
    """
    found: dict[str, np.ndarray] = {}
    parts = {"enc": spec.encoder, "dec": spec.decoder}
    if spec.rotary:
        for part, stages in parts.items():
            for level, stage in enumerate(stages):
                if part == "dec" and not spec.rotary.decoder:
                    continue
                turns = frequencies(stage.channels // stage.heads, spec.rotary.base)
                for block in range(stage.depth):
                    found[f"{part}.{part}{level}.block{block}.attn.rope.inv_freq"] = turns
    if spec.norm == "batch":
        norms = ["embedding.stem.norm"]
        norms += [f"enc.enc{level}.down.norm.0" for level in range(1, len(spec.encoder))]
        for level in range(len(spec.decoder)):
            norms += [f"dec.dec{level}.up.proj.1", f"dec.dec{level}.up.proj_skip.1"]
        found |= {f"{norm}.num_batches_tracked": np.zeros((), np.int64) for norm in norms}
    return found
