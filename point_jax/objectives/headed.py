"""An encoder with the heads that compare its features, as functions of their parameters."""

from collections.abc import Collection

import jax

from point_jax.geometry.hierarchy import Hierarchy
from point_jax.models.functional import Params, functional
from point_jax.models.heads import OnlineCluster, start_prototypes
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.rows import Views
from point_jax.objectives.sonata_spec import HEADS


class HeadedEncoder:
    """A student, or the teacher that it learns from.

    Its parameters are `backbone` and, for each of its heads, an MLP and prototypes.

    Attributes:
      network: the encoder.
      heads: their names, some of `HEADS`.
    """

    def __init__(
        self,
        network: PTv3Spec,
        hidden: int,
        embed: int,
        prototypes: int,
        up_cast: int,
        heads: Collection[str] = HEADS,
    ):
        """The sizes are those of the heads, which read the last `up_cast` + 1 levels together."""
        self.network, self.heads = network, heads
        inputs = sum(stage.channels for stage in network.encoder[-1 - up_cast :])
        self._init_backbone, self._backbone = functional(lambda rngs: PTv3(network, rngs=rngs))
        self._init_head, self._head = functional(
            lambda rngs: OnlineCluster(inputs, hidden, embed, prototypes, network.dtype, rngs=rngs)
        )

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        keys = jax.random.split(key, 5)
        params = {"backbone": self._init_backbone(keys[0])}
        for name, head_key, key in zip(HEADS, keys[1:3], keys[3:], strict=True):
            if name in self.heads:
                head = self._init_head(head_key)
                prototypes = start_prototypes(key, head["prototypes"].shape)
                params[name] = head | {"prototypes": prototypes}
        return params

    def levels(
        self,
        backbone: Params,
        views: Views,
        hierarchy: Hierarchy,
        order_key: jax.Array | None,
        noise_key: jax.Array | None,
    ) -> tuple[jax.Array, ...]:
        """(N, C) features of every level of a row, finest first.

        Args:
          backbone: parameters.
          views, hierarchy: what is seen, and its structure.
          order_key: of the order in which blocks take the curves.
          noise_key: of drop path and moved rotary coordinates; None for neither.
        """
        clouds = len(hierarchy[0].starts) - 1
        return self._backbone(
            backbone,
            views.features,
            hierarchy,
            mask=views.mask if self.network.mask_token else None,
            coord=views.coord,
            order_key=order_key,
            noise_keys=None if noise_key is None else jax.random.split(noise_key, clouds),
        ).levels

    @jax.named_scope("heads")
    def embed(self, head: Params, x: jax.Array, count: jax.Array) -> jax.Array:
        """(A, channels) features -> (A, E) float32 of unit length, for the first `count` rows."""
        return self._head(head, x, count, method="embed")

    @jax.named_scope("heads")
    def directions(self, head: Params) -> jax.Array:
        """(Q, E) float32, a head's prototypes of unit length."""
        return self._head(head, method="directions")
