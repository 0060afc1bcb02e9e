"""State dicts as the published files have them: their keys, shapes of a size for tests."""

import functools

import jax
import numpy as np

from point_jax.interop.convert import backbone_template
from point_jax.interop.files import Foreign
from point_jax.interop.pointcept import to_state_dict
from point_jax.interop.published import PUBLISHED
from point_jax.interop.release import constants, spec_of


def same(a, b):
    """Whether two state dicts have the same keys, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def small_config(name):
    """A published config with all its depths and heads, and the fewest channels a head can have."""
    entry = PUBLISHED[name]
    config, width = dict(entry.config), 6 if entry.variant == "PT-v3m3" else 2
    for part in ("enc", "dec"):
        if f"{part}_num_head" in config:
            config[f"{part}_channels"] = [heads * width for heads in config[f"{part}_num_head"]]
    return config


@functools.cache
def shapes(name, full=False):
    """Key -> shape, and the fixed arrays, of a published network."""
    entry = PUBLISHED[name]
    spec = spec_of(entry.config if full else small_config(name), entry.variant)
    nothing = jax.tree.map(
        lambda s: np.broadcast_to(np.float32(0), s.shape), backbone_template(spec)
    )
    return {k: v.shape for k, v in to_state_dict(nothing).items()}, constants(spec)


def random_state(name, seed=0, full=False, prefix=""):
    """A state dict of a published network or linear head with random values."""
    rng = np.random.default_rng(seed)
    if PUBLISHED[name].kind == "linear_head":
        inputs, classes = PUBLISHED[name].config.values()
        found, fixed = {"seg_head.weight": (classes, inputs), "seg_head.bias": (classes,)}, {}
    else:
        found, fixed = shapes(name, full)
    state = {k: rng.standard_normal(s, np.float32) for k, s in found.items()}
    return {prefix + key: array for key, array in (state | fixed).items()}


def head_state(prefix, inputs=20, hidden=12, embed=8, prototypes=16, seed=0):
    """A prototype head of a pretraining."""
    rng = np.random.default_rng(seed)
    found = {
        "mlp.0.weight": (hidden, inputs),
        "mlp.0.bias": (hidden,),
        "mlp.2.weight": (embed, hidden),
        "mlp.2.bias": (embed,),
        "prototype.parametrizations.weight.original1": (prototypes, embed),
    }
    state = {prefix + k: rng.standard_normal(s, np.float32) for k, s in found.items()}
    ones = np.ones((prototypes, 1), np.float32)
    return state | {f"{prefix}prototype.parametrizations.weight.original0": ones}


def pretraining_state(name="sonata_small", prefix="module."):
    """Student and teacher, different, with their heads, as Pointcept has them."""
    state = {}
    for seed, tree in enumerate(("student", "teacher")):
        state |= random_state(name, seed, prefix=f"{prefix}{tree}.backbone.")
        for head in ("mask_head", "unmask_head"):
            state |= head_state(f"{prefix}{tree}.{head}.", seed=seed)
    return state


def foreign(tmp_path, state, config=None, **changes):
    """What reading a file with this content would give."""
    (tmp_path / "source.pth").write_bytes(b"stands for the file, whose sha256 is kept")
    return Foreign(config, state, "pth", tmp_path / "source.pth", **changes)
