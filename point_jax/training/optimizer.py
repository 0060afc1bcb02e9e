"""AdamW by PyTorch's rule on plain trees: layer-wise learning rates, clipping.

Written out instead of chained from optax because beta1 changes every step here and PyTorch
corrects the bias with the current beta1, in float64: `1 - 0.999 ** 1` in float32 is off by 1e-5.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Tree = Any  # nested dicts of arrays


def layer_scales(params: Tree, decay: float, blocks: float = 1.0) -> Tree:
    """Learning-rate factors of every parameter: layer-wise decay over the encoder's blocks.

    Block b of encoder stage e, with `depth[s]` blocks in stage s, gets
    `decay ** (sum(depth) - sum(depth[:e]) - b - 1)`: 1 for the last block, less for earlier ones.
    Everything else (embedding, pooling, decoder, heads) gets 1, as in the original's recipe.
    Blocks, the decoder's and the changes of LoRA too, have the factor `blocks` besides.

    Args:
        params: the student's parameters. The blocks of a stage are stacked along the leading axis
            of the leaves under `params["backbone"]["enc"]["stage{e}"]["blocks"]`.
        decay: factor from one block to the one before it; 0.9 in Sonata.
        blocks: factor of all blocks of encoder and decoder; 0.1 in Pointcept's segmentation.

    Returns:
        A tree like `params` of float32 NumPy arrays that broadcast against the leaves without
        changing their rank: (depth, 1, ...) for stacked blocks, (1, 1, ...) elsewhere.
    """
    scales = jax.tree.map(lambda leaf: np.ones((1,) * leaf.ndim, np.float32), params)

    def of_blocks(tree: Tree) -> Tree:
        return jax.tree.map(lambda one: one * np.float32(blocks), tree)

    for stage in scales.get("backbone", {}).get("dec", {}).values():
        stage["blocks"] = of_blocks(stage["blocks"])
    if "lora" in scales:  # changes of blocks
        scales["lora"] = of_blocks(scales["lora"])
    stages = params.get("backbone", {}).get("enc", {})
    depths = []
    while "blocks" in stages.get(f"stage{len(depths)}", {}):
        leaves = jax.tree.leaves(stages[f"stage{len(depths)}"]["blocks"])
        depths.append(leaves[0].shape[0])
    for stage, depth in enumerate(depths):
        exponents = sum(depths) - sum(depths[:stage]) - np.arange(depth) - 1
        factors = (blocks * np.float64(decay) ** exponents).astype(np.float32)
        scales["backbone"]["enc"][f"stage{stage}"]["blocks"] = jax.tree.map(
            lambda leaf, factors=factors: factors.reshape((-1,) + (1,) * (leaf.ndim - 1)),
            stages[f"stage{stage}"]["blocks"],
        )
    return scales


def add_leaves(scalars: Tree) -> jax.Array:
    """The sum of a tree of numbers, one of each leaf of another tree."""
    return sum(jax.tree.leaves(scalars), jnp.zeros(()))


def clip_by_global_norm(
    grads: Tree,
    limit: float,
    total: Callable[[Tree], jax.Array] = add_leaves,
    count: ArrayLike = 1.0,
) -> tuple[Tree, jax.Array]:
    """PyTorch's `clip_grad_norm_`: all gradients times min(1, limit / (norm + 1e-6)).

    Args:
        grads: gradients, or what this device has of them; sums of `count` of them, of whose mean
            this is the clipping. So the mean takes no pass of its own over memory.
        limit: of the norm.
        total: adds up what is computed of each leaf, over the devices too if they have slices.
        count: see `grads`.

    Returns:
        The scaled mean and the norm before scaling; the norm is not finite exactly when some
        gradient is not (or the sum of squares overflows).
    """
    norm = jnp.sqrt(total(jax.tree.map(lambda grad: (grad * grad).sum(), grads))) / count
    factor = jnp.minimum(1.0, limit / (norm + 1e-6)) / count
    factor, norm = in_place(factor, norm)  # not made again in the kernels of every leaf
    return jax.tree.map(lambda grad: grad * factor, grads), norm


def adamw(
    params: Tree,
    grads: Tree,
    mu: Tree,
    nu: Tree,
    *,
    count: ArrayLike,
    lr: ArrayLike,
    beta1: ArrayLike,
    wd: ArrayLike,
    scales: Tree,
    beta2: float = 0.999,
    eps: float = 1e-8,
    good: ArrayLike = True,
    total: Callable[[Tree], jax.Array] = add_leaves,
) -> tuple[Tree, Tree, Tree, jax.Array]:
    """One AdamW update (arXiv:1711.05101) by the rule of `torch.optim.AdamW`.

    `p <- p (1 - lr wd)`, then `p <- p - lr / (1 - beta1^t) * mu / (sqrt(nu / (1 - beta2^t)) + eps)`
    with `t = count`. The weight decay reaches every parameter, norms and biases too, as in the
    original's recipe.

    Args:
        params, grads, mu, nu: trees of the same structure, float32.
        count: number of this update, from 1; skipped steps do not count.
        lr: learning rate, times `scales` for each leaf.
        beta1: this step's; the bias correction takes the current value to the power of `count`.
        wd: this step's weight decay; scaled by the leaf's learning rate.
        scales: factors from `layer_scales`.
        beta2, eps: constants, Python floats.
        good: () bool; where False nothing changes, whatever the gradients hold.
        total: as in `clip_by_global_norm`; the trees may be slices then.

    Returns:
        The new params, mu and nu, and the length of the step, () float32, without weight decay.
    """
    count, lr, beta1 = jnp.asarray(count), jnp.asarray(lr), jnp.asarray(beta1)
    correction1 = -jnp.expm1(count * jnp.log(beta1))
    correction2 = -jnp.expm1(count * math.log(beta2))
    # Else the kernels of every leaf make these again.
    lr, beta1, good, correction1, correction2 = in_place(
        lr, beta1, jnp.asarray(good), correction1, correction2
    )

    def update(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, scale: np.ndarray):
        # The barriers keep XLA from making a moment again wherever it is read: it would need the
        # old ones beside the new, which costs a copy of each and three times the time.
        m, g = in_place(m + jnp.where(good, (1.0 - beta1) * (g - m), 0.0), g)
        m, v = in_place(m, jnp.where(good, beta2 * v + (1.0 - beta2) * (g * g), v))
        rate = lr * scale
        step = (rate / correction1) * (m / (jnp.sqrt(v / correction2) + eps))
        moved = jnp.where(good, p * (1.0 - rate * wd) - step, p)
        return *in_place(moved, m, v), jnp.where(good, step * step, 0.0).sum()

    found = jax.tree.map(update, params, grads, mu, nu, scales)
    outer, inner = jax.tree.structure(params), jax.tree.structure((0,) * 4)
    params, mu, nu, squares = jax.tree.transpose(outer, inner, found)
    return params, mu, nu, jnp.sqrt(total(squares))


def in_place(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, finished before anything reads them."""
    return jax.lax.optimization_barrier(arrays)
