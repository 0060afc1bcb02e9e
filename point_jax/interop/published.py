"""The published networks: names, and the arguments that their constructors were given.

Facts and their places (repositories as of 2026): `pretrain-sonata-v1m1-0-base`,
`pretrain-concerto-v1m1-{0-base,1-large-base}`, `pretrain-utonia-v1m1-0-base_stagev{1,2}`,
`semseg-*-0{a,b,c}-scannet-*` and `scannet/semseg-pt-v3m1-0-base` among Pointcept's configs;
`MODELS`, `demo/2_sem_seg.py` and the READMEs of the packages sonata, concerto and utonia.
Concerto's README gives parameters in millions: small 39, base 108, large 208.

Not from configs: those of the small networks are not published; theirs here are PT-v3m1's default
depths, channels and heads, which make the 38,648,992 parameters that users count in
`sonata_small.pth`. `concerto_large_outdoor` and `concerto_base_siglip` are taken to be large and
base, by their names. A release's file carries its own config, and that counts when one is read;
this table serves files without.
"""

from dataclasses import dataclass
from typing import Any

_CURVES = ["z", "z-trans", "hilbert", "hilbert-trans"]
_PATCH = 1024


@dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
      kind: "encoder" or "linear_head", or "segmentor" for an encoder with a decoder.
      variant: the network's mode; "" for a linear head.
      config: arguments of the constructor, JSON values.
    """

    kind: str
    variant: str
    config: dict[str, Any]


def _encoder(depths: list[int], channels: list[int], heads: list[int]) -> dict[str, Any]:
    return {
        "in_channels": 9,
        "order": _CURVES,
        "stride": [2] * (len(depths) - 1),
        "enc_depths": depths,
        "enc_channels": channels,
        "enc_num_head": heads,
        "enc_patch_size": [_PATCH] * len(depths),
        "mlp_ratio": 4,
        "qkv_bias": True,
        "qk_scale": None,
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "drop_path": 0.3,
        "shuffle_orders": True,
        "pre_norm": True,
        "enable_rpe": False,
        "enable_flash": True,
        "upcast_attention": False,
        "upcast_softmax": False,
        "traceable": True,
        "mask_token": True,
        "enc_mode": True,
    }


def _with_decoder(
    config: dict[str, Any], channels: list[int], heads: list[int], **changes: Any
) -> dict[str, Any]:
    """As Pointcept's segmentation configs have it: no mask token, nothing to trace."""
    decoder = {
        "dec_depths": [2] * len(channels),
        "dec_channels": channels,
        "dec_num_head": heads,
        "dec_patch_size": [_PATCH] * len(channels),
        "traceable": False,
        "mask_token": False,
        "enc_mode": False,
    }
    return config | decoder | changes


_SMALL = _encoder([2, 2, 2, 6, 2], [32, 64, 128, 256, 512], [2, 4, 8, 16, 32])
_BASE = _encoder([3, 3, 3, 12, 3], [48, 96, 192, 384, 512], [3, 6, 12, 24, 32])
_LARGE = _encoder([3, 3, 3, 12, 3], [64, 128, 256, 512, 768], [4, 8, 16, 32, 48])
_UTONIA = _encoder([3, 3, 3, 12, 3], [54, 108, 216, 432, 576], [3, 6, 12, 24, 32]) | {
    "rope_base": 10,
    "shift_coords": None,
    "jitter_coords": 1.1,
    "rescale_coords": 1.2,
}
# PT-v3m1's constructor has no mask token and no tracing.
_FIRST = {
    key: value
    for key, value in _with_decoder(
        _SMALL, [64, 64, 128, 256], [4, 4, 8, 16], in_channels=6
    ).items()
    if key not in ("mask_token", "traceable")
}


def _head(channels: int) -> Published:
    """A linear head on ScanNet's 20 classes, over the encoder's levels all joined."""
    return Published("linear_head", "", {"backbone_out_channels": channels, "num_classes": 20})


PUBLISHED: dict[str, Published] = {
    "sonata": Published("encoder", "PT-v3m2", _BASE),
    "sonata_small": Published("encoder", "PT-v3m2", _SMALL),
    "concerto_small": Published("encoder", "PT-v3m2", _SMALL),
    "concerto_base": Published("encoder", "PT-v3m2", _BASE),
    "concerto_base_siglip": Published("encoder", "PT-v3m2", _BASE),
    "concerto_large": Published("encoder", "PT-v3m2", _LARGE),
    "concerto_large_outdoor": Published("encoder", "PT-v3m2", _LARGE),
    "utonia": Published("encoder", "PT-v3m3", _UTONIA),
    "sonata_linear_prob_head_sc": _head(sum(_BASE["enc_channels"])),
    "concerto_large_linear_prob_head_sc": _head(sum(_LARGE["enc_channels"])),
    "utonia_linear_prob_head_sc": _head(sum(_UTONIA["enc_channels"])),
    # Networks of Pointcept's segmentation configs, for checkpoints that were trained with them.
    "sonata_decoder": Published(
        "segmentor", "PT-v3m2", _with_decoder(_BASE, [64, 96, 192, 384], [4, 6, 12, 24])
    ),
    "concerto_large_decoder": Published(
        "segmentor", "PT-v3m2", _with_decoder(_LARGE, [64, 96, 192, 384], [4, 6, 12, 24])
    ),
    "utonia_decoder": Published(
        "segmentor", "PT-v3m3", _with_decoder(_UTONIA, [54, 108, 216, 432], [3, 6, 12, 24])
    ),
    "ptv3": Published("segmentor", "PT-v3m1", _FIRST),
}
