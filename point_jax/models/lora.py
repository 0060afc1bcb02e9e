"""Low-rank adaptation (LoRA, arXiv:2106.09685) of an encoder's attention.

An adapted layer's kernel is W + alpha / rank * A B with A (inputs, rank) and B (rank, outputs). It
is added up before the network runs, so the network knows nothing of it, and an adapted encoder can
be stored as an ordinary one. The originals also drop 10 % of the inputs of A; that cannot be done
on a kernel and is left out.
"""

import jax
import jax.numpy as jnp

from point_jax.models.functional import Params

RANK, ALPHA = 8, 16.0  # Pointcept's


def start_lora(key: jax.Array, backbone: Params, rank: int = RANK) -> Params:
    """Start values for the qkv layers of an encoder: A random, B zero, so that nothing changes.

    Args:
      key: random key.
      backbone: parameters of a PTv3; read are shapes.
      rank: of the change.

    Returns:
      {"stage0": {"a": (depth, C, rank), "b": (depth, rank, 3 C)}, ...}; A is uniform within
      1 / sqrt(C), as PyTorch starts a linear layer.
    """
    found = {}
    for number, (name, stage) in enumerate(sorted(backbone["enc"].items())):
        depth, inputs, outputs = stage["blocks"]["qkv"]["kernel"].shape
        bound = inputs**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (depth, inputs, rank), minval=-bound, maxval=bound
        )
        found[name] = {"a": a, "b": jnp.zeros((depth, rank, outputs))}
    return found


def add_lora(backbone: Params, lora: Params, alpha: float = ALPHA) -> Params:
    """The backbone with its adapted kernels; a tree like `backbone`."""
    stages = dict(backbone["enc"])
    for name, change in lora.items():
        blocks = stages[name]["blocks"]
        rank = change["a"].shape[-1]
        more = (alpha / rank) * jnp.matmul(change["a"], change["b"], precision="highest")
        qkv = blocks["qkv"] | {"kernel": blocks["qkv"]["kernel"] + more}
        stages[name] = stages[name] | {"blocks": blocks | {"qkv": qkv}}
    return backbone | {"enc": stages}
