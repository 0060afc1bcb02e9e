"""Self-supervised pretraining of Point Transformer V3 on 3D scenes, in JAX.

    encoder = point_jax.load("runs/quickstart")
    features = encoder([{"coord": coord, "color": color, "normal": normal}])[0].at_points()

README.md says the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from point_jax.features.encoder import Encoder
    from point_jax.features.load import load, load_head
    from point_jax.features.maps import PointFeatures
    from point_jax.interop.image_encoders import load_image_encoder

__all__ = ["Encoder", "PointFeatures", "load", "load_head", "load_image_encoder"]

_HOME = {
    "Encoder": "features.encoder",
    "PointFeatures": "features.maps",
    "load": "features.load",
    "load_head": "features.load",
    "load_image_encoder": "interop.image_encoders",
}


def __getattr__(name: str) -> Any:
    """The parts for users, imported when asked for: importing a submodule stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"point_jax.{_HOME[name]}"), name)
