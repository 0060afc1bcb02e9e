"""Rules say along which dimension a parameter is cut; slices are joined and added up exactly."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import small_config

from configs import sonata
from point_jax.geometry.hierarchy import build_hierarchy, sort_row
from point_jax.models.ptv3 import up_cast
from point_jax.objectives.settings import make_sonata
from point_jax.objectives.sonata import HEADS
from point_jax.training import sharding
from point_jax.training.config import ConfigError, check_config, default_config
from point_jax.training.mesh import DATA, FSDP, arrange, data_mesh
from point_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclass(frozen=True)
class Device:
    process_index: int
    id: int


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


STUDENT = {
    "backbone": {"enc": {"stage0": {"blocks": {"qkv": {"kernel": leaf(4, 8, 24)}}}}},
    "head": {"kernel": leaf(8, 6), "bias": leaf(64)},
}


def section(*rules, smallest=0):
    config = default_config()
    config.mesh.smallest = smallest
    if rules:
        config.mesh.rules = rules
    check_config(config)
    return config.mesh


def cut(*rules, size=2, smallest=0):
    found = sharding.cuts({"student": STUDENT}, section(*rules, smallest=smallest), size)["student"]
    qkv = found["backbone"]["enc"]["stage0"]["blocks"]["qkv"]["kernel"]
    return qkv, found["head"]["kernel"], found["head"]["bias"]


def test_without_other_rules_the_largest_dimension_is_cut():
    assert cut() == (2, 0, sharding.WHOLE)  # a vector stays whole
    assert cut(size=3) == (2, 1, sharding.WHOLE)  # of those that are divided
    assert cut(size=4) == (2, 0, sharding.WHOLE)  # the depth is 4, but stays whole
    assert cut(size=5) == (sharding.WHOLE,) * 3
    assert cut(size=1) == (sharding.WHOLE,) * 3
    assert cut(smallest=100) == (2, sharding.WHOLE, sharding.WHOLE)


def test_the_first_rule_that_matches_decides():
    assert cut((r"qkv\.kernel$", 1), ("kernel", "whole")) == (1, sharding.WHOLE, sharding.WHOLE)
    assert cut(("kernel", -1), ("qkv", "whole")) == (2, 1, sharding.WHOLE)
    assert cut((r"^head\.", "largest")) == (sharding.WHOLE, 0, sharding.WHOLE)


@pytest.mark.parametrize(
    ("rule", "size", "said"),
    [
        (("kernal$", 1), 2, "'kernal$' matches no parameter; did you mean 'kernel'?"),
        (("qvk", 1), 2, "'qvk' matches no parameter; did you mean 'qkv'?"),
        (("zzz", 1), 2, "there are: backbone, bias"),
        (
            ("head.kernel", 1),
            4,
            "dimension 1 of head.kernel (8, 6) into 4 parts: 6 cannot be cut equally; "
            "4 divides dimension 0",
        ),
        (("qkv", 0), 2, "(4, 8, 24) into 2 parts: that is the depth of stacked blocks"),
        (("head.kernel", 2), 2, "it has 2 dimensions; 2 divides dimension 0 and 1"),
        (("head.kernel", -3), 5, "it has 2 dimensions; use 'whole', or another config.mesh.fsdp"),
    ],
)
def test_a_wrong_rule_is_told_what_would_be_right(rule, size, said):
    with pytest.raises(ConfigError) as error:
        cut(rule, size=size)
    assert "config.mesh.rules" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    "rules", [("kernel", 1), (("kernel(", 1),), (("kernel", 1.5),), (("a", "b"),)]
)
def test_what_is_no_rule_is_refused(rules):
    with pytest.raises(ConfigError, match=r"config\.mesh\.rules .* 'largest', 'whole' or a dim"):
        section(*rules)


def test_devices_that_cannot_share_equally():
    devices = [Device(i // 4, i) for i in reversed(range(8))]
    mesh = arrange(devices, 4)
    assert dict(mesh.shape) == {DATA: 2, FSDP: 4}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    with pytest.raises(ConfigError, match=r"config\.mesh\.fsdp=3 does not divide 8 devices; use 2"):
        arrange(devices, 3)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_base_state_is_cut_but_for_crumbs(size):
    """All four trees alike, at most 1 % of a copy whole, no stage along its depth."""
    config = sonata.get_config("base")
    objective = make_sonata(config)
    shapes = jax.eval_shape(lambda key: init_state(objective, key), jax.random.key(0))
    trees = {name: shapes[name] for name in sharding.TREES}
    found = sharding.cuts(trees, config.mesh, size)
    assert found["student"] == found["teacher"] == found["mu"] == found["nu"]
    pairs = jax.tree.map(lambda x, at: (x, at), shapes["student"], found["student"])
    pairs = jax.tree_util.tree_leaves_with_path(pairs, is_leaf=lambda x: isinstance(x, tuple))
    whole = sum(x.size for _, (x, at) in pairs if at == sharding.WHOLE)
    assert whole < 0.01 * sum(x.size for _, (x, _) in pairs)
    for path, (x, at) in pairs:
        assert at == sharding.WHOLE or x.shape[at] % size == 0
        assert at != 0 or "blocks" not in jax.tree_util.keystr(path)


@pytest.mark.devices(4)
def test_slices_are_joined_and_added_up_exactly():
    mesh = data_mesh(2)
    whole = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.arange(3.0)}
    rule = section(("a", 1))
    cuts = sharding.cuts({"student": whole}, rule, 2)["student"]
    specs = sharding.specs({"student": whole}, rule, mesh)["student"]
    assert (cuts, specs) == ({"a": 1, "b": sharding.WHOLE}, {"a": P(None, FSDP), "b": P()})

    def on_device(slices):
        joined = sharding.gather(slices, cuts, lambda name: jnp.float32)
        number = jax.lax.axis_index((DATA, FSDP)).astype(jnp.float32)
        mine = jax.tree.map(lambda x: x * (1 + number), joined)
        parts, sums = sharding.reduce(mine, cuts, {"n": number}, (DATA, FSDP))
        ones = jax.tree.map(lambda x: jnp.float32(x.size), slices)
        return joined, parts, sums, sharding.total(ones, cuts)

    out = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs,), out_specs=(P(), specs, P(), P()), check_vma=False
    )
    joined, parts, sums, total = jax.jit(out)(whole)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 10 * y), parts, whole)
    assert sums["n"] == 6 and total == 27  # each of its numbers counts once


def test_what_travels_in_bfloat16_is_read_so_everywhere():
    """Features and gradients of a network in bfloat16 do not know whether its kernels were."""
    config = small_config()
    config.network.dtype, config.network.rotary_base = "bfloat16", 0.0
    objective = make_sonata(config)
    params = jax.jit(lambda key: objective.init(key)[0])(jax.random.key(0))

    def rounded(keys, x):
        return x.astype(objective.read_as(".".join(key.key for key in keys))).astype(x.dtype)

    sent = jax.tree_util.tree_map_with_path(rounded, params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, sent)
    named = jax.tree_util.tree_leaves_with_path(changed)
    assert all(moved == (path[-1].key == "kernel") for path, moved in named)

    shape = objective.rows.network.hierarchy((64, 32), 1)
    grid = np.random.default_rng(0).integers(0, 6, (64, 3))
    order, count, _ = sort_row(grid, np.zeros(64, np.int32), np.ones(64, bool), 64)
    hierarchy = build_hierarchy(grid[order], np.zeros(64, np.int32), count, shape)

    views = SimpleNamespace(features=jnp.ones((64, 9)), mask=jnp.zeros(64, bool), coord=None)
    network = objective.student

    def value(params):
        x = network.levels(params["backbone"], views, hierarchy, None, None)
        x = up_cast(x, hierarchy, 1)
        heads = [network.embed(params[head], x, count) for head in HEADS]
        heads += [network.directions(params[head]) for head in HEADS]
        return sum((y**3).sum() for y in (x, *heads))

    found = jax.jit(jax.value_and_grad(value))
    jax.tree.map(np.testing.assert_array_equal, found(params), found(sent))
