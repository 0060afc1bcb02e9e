"""What a trained segmentation says of a cloud: a class for each of its points."""

from dataclasses import dataclass

import numpy as np

from point_jax.features.maps import PointFeatures


@dataclass(frozen=True)
class SegmentationHead:
    """The linear layer on an encoder's features; `load_head` finds one.

    Attributes:
      kernel: (C, K) float32.
      bias: (K,) float32.
      classes: K names; numbers as text where the checkpoint names none.

    Raises:
      ValueError: arrays whose shapes do not fit together.
    """

    kernel: np.ndarray
    bias: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = len(self.kernel), len(self.classes)
        if self.kernel.shape != shape or self.bias.shape != shape[1:]:
            raise ValueError(
                f"kernel {self.kernel.shape} and bias {self.bias.shape} do not fit "
                f"{len(self.classes)} classes"
            )

    def scores(self, features: PointFeatures) -> np.ndarray:
        """(V, K) float32 logits at the voxels of level 0.

        The layer reads the decoder's finest features; without a decoder the encoder's of all
        levels, carried up and joined.

        Raises:
          ValueError: features of another width than the layer's.
        """
        read = features.decoder().at_voxels() if features.decoded else features.at_voxels()
        if read.shape[1] != len(self.kernel):
            raise ValueError(
                f"features have {read.shape[1]} channels, the layer reads {len(self.kernel)}: "
                "give the features of the encoder that was loaded from the same checkpoint"
            )
        return read @ self.kernel + self.bias

    def __call__(self, features: PointFeatures) -> np.ndarray:
        """(n,) int32, the class of each input point: a place in `classes`."""
        return self.scores(features).argmax(1).astype(np.int32)[features.inverse]
