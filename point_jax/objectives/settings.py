"""Config sections of the objectives, and the objectives that they describe."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict

from point_jax import limits
from point_jax.data.augment import GeometrySpec
from point_jax.data.color import ColorSpec
from point_jax.data.views import ViewSpec
from point_jax.models.spec import PTv3Spec, Rotary, StageSpec
from point_jax.objectives.sonata import Sonata, SonataSpec

Spec = TypeVar("Spec")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_LISTS = ("depths", "channels", "heads")  # with an entry for each level

SECTION_LIMITS = {
    **{name: limits.each(limits.whole(1)) for name in _LISTS},
    "patch_size": limits.whole(1),
    "layer_scale": limits.number(0),
    "rotary_base": limits.number(0),
}


def default_network() -> ConfigDict:
    """The section `network`: Sonata's base encoder, 108.46 M parameters."""
    network = ConfigDict()
    network.depths = (3, 3, 3, 12, 3)
    network.channels = (48, 96, 192, 384, 512)
    network.heads = (3, 6, 12, 24, 32)
    network.patch_size = 1024
    network.mlp_ratio = 4.0
    network.drop_path = 0.3
    network.layer_scale = 0.0  # start value of every branch's scale; 0: no scale
    network.rotary_base = 0.0  # of rotary positions (PT-v3m3; Utonia's is 10); 0: none
    network.rotary_shift = 0.0  # in training coordinates move by up to this many metres,
    network.rotary_jitter = 1.0  # each axis stretches by up to this factor (Utonia's: 1.1)
    network.rotary_rescale = 1.0  # and all together by this one (1.2)
    network.dtype = "float32"  # of the arithmetic; or bfloat16
    network.remat = False  # make activations again in the backward pass instead of keeping them
    return network.lock()


def default_views() -> ConfigDict:
    """The section `views`: Sonata's recipe; see `ViewSpec`, `GeometrySpec` and `ColorSpec`."""
    return _section(ViewSpec(), leave_out=("grid_capacity",))


def default_objective() -> ConfigDict:
    """The section `objective`: Sonata's base recipe; see `SonataSpec`."""
    fields = {f.name: f.default for f in dataclasses.fields(SonataSpec)}
    return ConfigDict({k: v for k, v in fields.items() if k not in ("network", "views")}).lock()


def network_spec(network: Mapping[str, Any]) -> PTv3Spec:
    """The encoder that a section `network` describes.

    Raises:
      ValueError: lists of different lengths, or a value out of range; names the key.
    """
    place = "config.network."
    limits.check(network, SECTION_LIMITS, place)
    lists = {name: tuple(network[name]) for name in _LISTS}
    if len({len(values) for values in lists.values()}) != 1:
        raise ValueError(f"{place}depths, channels and heads need one length, got {lists}")
    if network["dtype"] not in _DTYPES:
        raise ValueError(
            f"{place}dtype is {network['dtype']!r}, expected one of {', '.join(_DTYPES)}"
        )
    rotary = None
    if network["rotary_base"]:
        names = ("base", "shift", "jitter", "rescale")
        with _errors_say(f"{place}rotary_"):
            rotary = Rotary(**{name: network[f"rotary_{name}"] for name in names})
    stages = []
    levels = zip(lists["depths"], lists["channels"], lists["heads"], strict=True)
    for level, (depth, channels, heads) in enumerate(levels):
        with _errors_say(f"config.network, level {level}: "):
            stages.append(StageSpec(depth, channels, heads, network["patch_size"]))
    with _errors_say(place):
        return PTv3Spec(
            encoder=tuple(stages),
            mlp_ratio=network["mlp_ratio"],
            drop_path=network["drop_path"],
            layer_scale=network["layer_scale"] or None,
            rotary=rotary,
            dtype=_DTYPES[network["dtype"]],
            remat=network["remat"],
        )


def make_sonata(config: Any) -> Sonata:
    """The Sonata objective of a config: its sections `network`, `views` and `objective`.

    Raises:
      ValueError: a value that does not fit, and which.
    """
    network = network_spec(config.network)
    views = _tuples(config.views.to_dict())
    with _errors_say("config.views.color."):
        views["color"] = ColorSpec(**views["color"])
    with _errors_say("config.views.geometry."):
        views["geometry"] = GeometrySpec(**_tuples(views["geometry"]))
    with _errors_say("config.views."):
        views = ViewSpec(**views)
    with _errors_say("config.objective."):
        spec = SonataSpec(network=network, views=views, **_tuples(config.objective.to_dict()))
    return Sonata(spec)


@contextlib.contextmanager
def _errors_say(place: str) -> Iterator[None]:
    """Puts the section before the errors of a spec, which begin with the name of a field."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}{error}") from error


def _section(spec: Any, leave_out: tuple[str, ...] = ()) -> ConfigDict:
    """A dataclass's values as a locked section; dataclasses inside become sections inside."""
    section = ConfigDict()
    for field in dataclasses.fields(spec):
        if field.name not in leave_out:
            value = getattr(spec, field.name)
            section[field.name] = _section(value) if dataclasses.is_dataclass(value) else value
    return section.lock()


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists from the command line as tuples, so that specs can be hashed."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

    return {name: freeze(value) for name, value in values.items()}
