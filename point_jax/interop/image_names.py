"""Names and layouts of published image encoders' arrays, against this project's parameters.

A table names every module once; a `Piece` of the network follows for each parameter. Blocks are
stacked here (a leading axis) and numbered there.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from point_jax.interop.files import State
from point_jax.interop.store import leaves
from point_jax.models.functional import Params
from point_jax.models.vgg import CONVOLUTIONS


class Piece(NamedTuple):
    """A parameter and its arrays in the file.

    Attributes:
      place: slashed, in the tree.
      keys: of each block, or of the one module: the arrays that are joined along the last axis.
      shape: of each array in the file.
      form: makes a file's array one of this project.
    """

    place: str
    keys: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    form: Callable[[np.ndarray], np.ndarray]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and shapes in the file."""
        return {key: self.shape for block in self.keys for key in block}

    def read(self, state: State) -> np.ndarray:
        """The parameter, float32."""
        blocks = [
            np.concatenate([self.form(np.asarray(state[key], np.float32)) for key in block], -1)
            for block in self.keys
        ]
        return np.stack(blocks) if self.place.startswith(_BLOCKS) else blocks[0]


class Layout(NamedTuple):
    """How a file holds a network.

    Attributes:
      pieces: all parameters.
      left_out: what else there may be, in words, and what its keys start with.
    """

    pieces: list[Piece]
    left_out: dict[str, tuple[str, ...]]


_BLOCKS = "blocks/"
_LEAF = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}

# Place in the tree (of a module, or of a parameter alone) -> keys; {} is the number of the block.
_DINOV2 = {
    "patch": ("embeddings.patch_embeddings.projection",),
    "class_token": ("embeddings.cls_token",),
    "registers": ("embeddings.register_tokens",),
    "mask_token": ("embeddings.mask_token",),
    "position": ("embeddings.position_embeddings",),
    "blocks/norm1": ("encoder.layer.{}.norm1",),
    "blocks/scale1": ("encoder.layer.{}.layer_scale1.lambda1",),
    "blocks/norm2": ("encoder.layer.{}.norm2",),
    "blocks/scale2": ("encoder.layer.{}.layer_scale2.lambda1",),
    "blocks/mlp/fc1": ("encoder.layer.{}.mlp.fc1",),
    "blocks/mlp/fc2": ("encoder.layer.{}.mlp.fc2",),
    "norm": ("layernorm",),
}
# transformers 5 named attention and SwiGLU anew; files on the hub have the names before that.
_ATTENTION_4 = {
    "blocks/qkv": tuple(
        f"encoder.layer.{{}}.attention.attention.{name}" for name in ("query", "key", "value")
    ),
    "blocks/proj": ("encoder.layer.{}.attention.output.dense",),
}
_ATTENTION_5 = {
    "blocks/qkv": tuple(f"encoder.layer.{{}}.attention.{name}_proj" for name in "qkv"),
    "blocks/proj": ("encoder.layer.{}.attention.o_proj",),
}
_SWIGLU_4 = {
    "blocks/mlp/gate_up": ("encoder.layer.{}.mlp.weights_in",),
    "blocks/mlp/down": ("encoder.layer.{}.mlp.weights_out",),
}
_SWIGLU_5 = {
    "blocks/mlp/gate_up": ("encoder.layer.{}.mlp.gate_proj", "encoder.layer.{}.mlp.up_proj"),
    "blocks/mlp/down": ("encoder.layer.{}.mlp.down_proj",),
}
_SIGLIP = {
    "patch": ("embeddings.patch_embedding",),
    "position": ("embeddings.position_embedding.weight",),
    "blocks/norm1": ("encoder.layers.{}.layer_norm1",),
    "blocks/qkv": tuple(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
    "blocks/proj": ("encoder.layers.{}.self_attn.out_proj",),
    "blocks/norm2": ("encoder.layers.{}.layer_norm2",),
    "blocks/mlp/fc1": ("encoder.layers.{}.mlp.fc1",),
    "blocks/mlp/fc2": ("encoder.layers.{}.mlp.fc2",),
    "norm": ("post_layernorm",),
}
# Axes of length 1 that parameters have in the file and not here.
_LEADING = {
    "embeddings.cls_token": (1, 1),
    "embeddings.register_tokens": (1,),
    "embeddings.mask_token": (1,),
    "embeddings.position_embeddings": (1,),
}


def dinov2_layout(template: Params, state: State) -> Layout:
    """DINOv2 with registers: alone, or in a classifier, whose head is left out.

    Args:
      template: parameters of the network (arrays or `jax.ShapeDtypeStruct`).
      state: the file's arrays; read are keys.
    """
    prefix = _prefix(state, "dinov2_with_registers.")
    attention = any(".attention.attention." in key for key in state)
    swiglu = any(".mlp.weights_" in key for key in state)
    names = _DINOV2 | (_ATTENTION_4 if attention else _ATTENTION_5)
    names |= _SWIGLU_4 if swiglu else _SWIGLU_5
    left_out = {"the classifier": ("classifier.",)} if prefix else {}
    return Layout(list(_pieces(template, names, prefix)), left_out)


def siglip_layout(template: Params, state: State) -> Layout:
    """SigLIP's image tower: alone, or with the text side; see `dinov2_layout`.

    Its pooling head makes one vector of an image and is left out.
    """
    prefix = _prefix(state, "vision_model.")
    left_out = {
        "the text side": ("text_model.", "logit_scale", "logit_bias"),
        "the pooling head": (f"{prefix}head.",),
    }
    if prefix:
        left_out["the classifier"] = ("classifier.",)
    return Layout(list(_pieces(template, _SIGLIP, prefix)), left_out)


def vgg_layout(template: Params, state: State) -> Layout:
    """VGG16 in HED, as Keras stores it; see `dinov2_layout`. What HED adds is left out."""
    del state  # there is one layout
    pieces = []
    for block, count in enumerate(CONVOLUTIONS, 1):
        for number in range(count):
            layer = f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
            here = f"conv{block}_{number + 1}"
            for index, name in enumerate(("kernel", "bias")):
                shape = template[here][name].shape
                key = f"{layer}/{index}"
                pieces.append(Piece(f"{here}/{name}", ((key,),), shape, lambda array: array))
    return Layout(pieces, {"the edge heads": ("dsn", "fuse/")})


def _prefix(state: State, prefix: str) -> str:
    """The prefix, if any key has it."""
    return prefix if any(key.startswith(prefix) for key in state) else ""


def _pieces(template: Params, names: dict[str, tuple[str, ...]], prefix: str) -> Iterator[Piece]:
    for place, leaf in leaves(template):
        module, _, name = place.rpartition("/")
        parts = names[module if name in _LEAF else place]
        stacked = place.startswith(_BLOCKS)
        shape, form = _file_form(place, name, leaf.shape[stacked:], parts)
        keys = tuple(
            tuple(prefix + part.format(block) + _LEAF.get(name, "") for part in parts)
            for block in range(leaf.shape[0] if stacked else 1)
        )
        yield Piece(place, keys, shape, form)


def _file_form(
    place: str, name: str, shape: tuple[int, ...], parts: tuple[str, ...]
) -> tuple[tuple[int, ...], Callable[[np.ndarray], Any]]:
    """Shape of each of a parameter's arrays in the file, and the way from there."""
    if name not in _LEAF:
        return (*_LEADING.get(parts[0], ()), *shape), lambda array: array.reshape(shape)
    outputs = shape[-1] // len(parts)
    if place == "patch/kernel":  # (C, 3, edge, edge)
        edge = math.isqrt(shape[0] // 3)
        wanted = (outputs, 3, edge, edge)
        return wanted, lambda array: array.transpose(2, 3, 1, 0).reshape(-1, outputs)
    return (outputs, *shape[:-1]), np.transpose
