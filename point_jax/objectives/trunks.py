"""What a segmentation's linear layer reads: a network's features, or the input as it is.

A trunk has the `channels` of each level that it gives, finest first, the `shape` of the rows that
it needs, `init(key) -> params`, and is called with parameters, a row, its structure and what of the
parameters trains.
"""

from collections.abc import Collection
from typing import Protocol

import jax
import jax.numpy as jnp

from point_jax.geometry.hierarchy import Hierarchy, HierarchySpec
from point_jax.models.functional import Params, functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.labelled import LabelledRow

RAW = (2, 6, 7, 8, 3, 4, 5)  # of a row's features: height, normal, colour


class Trunk(Protocol):
    """See the module's docstring."""

    channels: tuple[int, ...]
    levels: int

    def shape(self, capacities: tuple[int, ...], clouds: int) -> HierarchySpec:
        """The shape of a row with these capacities, as many as `levels`."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Parameters."""
        ...

    def __call__(
        self,
        params: Params,
        row: LabelledRow,
        hierarchy: Hierarchy,
        order_key: jax.Array,
        trained: Collection[str],
    ) -> tuple[tuple[jax.Array, ...], Params]:
        """Features (N, C) of the first levels, `channels` of them, and `Features.moments`.

        Args:
          params: parameters.
          row, hierarchy: the input, and its structure.
          order_key: of this step, the same on all devices.
          trained: names of the parts of the parameters that gradients move.
        """
        ...


class PTv3Trunk:
    """A PTv3 in training: orders shuffled, drop path on, as the originals' probes have it, too.

    Batch norms of what trains use the row's statistics; of what is frozen, the running ones.
    With a decoder it gives the decoder's finest features; without, the encoder's of every level.
    """

    def __init__(self, spec: PTv3Spec):
        self.spec = spec
        self.levels = len(spec.encoder)
        given = spec.decoder[:1] or spec.encoder
        self.channels = tuple(stage.channels for stage in given)
        self.init, self._apply = functional(lambda rngs: PTv3(spec, rngs=rngs))

    def shape(self, capacities: tuple[int, ...], clouds: int) -> HierarchySpec:
        """See `Trunk`."""
        return self.spec.hierarchy(capacities, clouds)

    def __call__(
        self,
        params: Params,
        row: LabelledRow,
        hierarchy: Hierarchy,
        order_key: jax.Array,
        trained: Collection[str],
    ) -> tuple[tuple[jax.Array, ...], Params]:
        """See `Trunk`."""
        coord = row.features[:, :3]
        out = self._apply(
            params,
            row.features,
            hierarchy,
            coord=coord if self.spec.rotary else None,
            order_key=order_key,
            noise_keys=row.keys,
            row_statistics=trained,
        )
        return out.decoded[:1] or out.levels, out.moments


class RawTrunk:
    """Height, normal and colour of a point, without any network: the floor of every table."""

    channels = (len(RAW),)
    levels = 1

    def shape(self, capacities: tuple[int, ...], clouds: int) -> HierarchySpec:
        """See `Trunk`."""
        return HierarchySpec(capacities, clouds, ((),))

    def init(self, key: jax.Array) -> Params:
        """No parameters."""
        del key
        return {}

    def __call__(
        self,
        params: Params,
        row: LabelledRow,
        hierarchy: Hierarchy,
        order_key: jax.Array,
        trained: Collection[str],
    ) -> tuple[tuple[jax.Array, ...], Params]:
        """See `Trunk`."""
        del params, hierarchy, order_key, trained
        return (row.features[:, jnp.array(RAW)],), {}
