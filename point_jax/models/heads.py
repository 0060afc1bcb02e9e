"""The online clustering head: an MLP to the unit sphere and prototypes on it."""

import jax
import jax.numpy as jnp
from flax import nnx

from point_jax.models.layers import Mlp, in_turn


def unit(x: jax.Array) -> jax.Array:
    """X / max(|x|, 1e-12) along the last axis, in float32, with a finite gradient at 0."""
    x = x.astype(jnp.float32)
    square = (x * x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class OnlineCluster(nnx.Module):
    """Embeds features and holds the prototypes.

    The scores are `embed(x) @ directions().T`: at (points x 4,096) the largest array of the
    objective, so they are never made whole; losses take the two factors. Prototypes are
    weight-normalised with their lengths fixed to 1, and start as PyTorch starts a linear layer
    (REFERENCE quirk 16).
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        embed: int,
        prototypes: int,
        dtype: jnp.dtype = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        self.mlp = Mlp(inputs, hidden, embed, dtype, rngs=rngs)
        self.prototypes = nnx.Param(jnp.zeros((prototypes, embed)))

    def embed(self, x: jax.Array, count: jax.Array) -> jax.Array:
        """(N, inputs) -> (N, E) float32 of unit length, for the first `count` rows."""
        # In two parts, so that the backward pass does not make the hidden layer again: a seventh of
        # the heads' products for an array (N, hidden), whatever the network rematerialises.
        hidden = in_turn([self.mlp.fc1], x, count)
        return unit(in_turn([self.mlp.activation, self.mlp.fc2], hidden, count))

    def directions(self) -> jax.Array:
        """(Q, E) float32, prototypes of unit length."""
        return unit(self.prototypes[...])


def start_prototypes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """(Q, E) start values: uniform within 1 / sqrt(E), as PyTorch starts a linear layer."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
