"""Running statistics of batch norms, apart from the parameters that gradients move.

They are the leaves `mean` and `var` of a network's parameters. All functions take and give nested
dicts of arrays.
"""

import jax
import jax.numpy as jnp

from point_jax.models.functional import Params

LEAVES = ("mean", "var")
MOMENTUM = 0.01  # PT-v3m1's


def split(params: Params) -> tuple[Params, Params]:
    """Parameters without running statistics, and the running statistics alone."""

    def choose(tree: Params, statistics: bool) -> Params:
        return {
            name: choose(branch, statistics) if isinstance(branch, dict) else branch
            for name, branch in tree.items()
            if isinstance(branch, dict) or (name in LEAVES) == statistics
        }

    return choose(params, False), without_empty(choose(params, True))


def join(first: Params, second: Params) -> Params:
    """All leaves of two trees; where both have one, the second's."""
    shared = {
        name: join(first[name], branch)
        for name, branch in second.items()
        if isinstance(branch, dict) and name in first
    }
    return first | second | shared


def among(tree: Params, like: Params) -> Params:
    """The leaves of a tree whose names another tree has, too."""
    return {
        name: among(tree[name], branch) if isinstance(branch, dict) else tree[name]
        for name, branch in like.items()
        if name in tree
    }


def without_empty(tree: Params) -> Params:
    """A tree without the branches that hold nothing."""
    found = {
        name: without_empty(branch) if isinstance(branch, dict) else branch
        for name, branch in tree.items()
    }
    return {
        name: branch for name, branch in found.items() if not isinstance(branch, dict) or branch
    }


def follow(running: Params, moments: Params, good: jax.Array) -> Params:
    """Running statistics after a step with these moments, by PyTorch's rule.

    Args:
      running: all of them.
      moments: mean and unbiased variance of the norms that used those of a batch; others stay.
      good: () bool; where False nothing moves, whatever the moments hold.
    """
    moved = jax.tree.map(
        lambda old, new: jnp.where(good, old + MOMENTUM * (new - old), old),
        among(running, moments),
        moments,
    )
    return join(running, moved)
