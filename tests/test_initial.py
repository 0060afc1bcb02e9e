"""What a new run may start from: another run's state, or converted weights."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from small import small_config

from point_jax.interop.initial import initial_weights
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, save_weights
from point_jax.objectives.settings import make_sonata
from point_jax.training.checkpoint import CheckpointError
from point_jax.training.loop import _merge

OBJECTIVE = make_sonata(small_config())
VARIANT, CONFIG = config_of(OBJECTIVE.spec.network)


def filled(start):
    """Numbers in the shapes of the objective's parameters."""
    shapes = jax.eval_shape(OBJECTIVE.init, jax.random.key(0))[0]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [np.full(s.shape, start + i, np.float32) for i, s in enumerate(leaves)]
    )


def template():
    sharding = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(OBJECTIVE.init, jax.random.key(0))[0],
    )
    return {"student": shapes, "teacher": shapes}


def test_a_pretraining_gives_both_networks(tmp_path):
    trees = {"student": filled(0), "teacher": filled(100)}
    save_weights(tmp_path / "w", Weights("pretraining", VARIANT, CONFIG, trees))
    got = initial_weights(tmp_path / "w", template())
    jax.tree.map(np.testing.assert_array_equal, got, trees)


def test_an_encoder_gives_the_backbone_of_both_and_the_heads_start_afresh(tmp_path):
    backbone = {"backbone": filled(0)["backbone"]}
    save_weights(tmp_path / "w", Weights("encoder", VARIANT, CONFIG, backbone))
    state = {"student": filled(100), "teacher": filled(200), "step": np.zeros(())}
    got = _merge(state, initial_weights(tmp_path / "w", template()))
    for part in ("student", "teacher"):
        jax.tree.map(np.testing.assert_array_equal, got[part]["backbone"], backbone["backbone"])
        for head in ("mask_head", "unmask_head"):
            jax.tree.map(np.testing.assert_array_equal, got[part][head], state[part][head])
    assert got["step"] is state["step"]


def test_weights_of_another_network_are_named(tmp_path):
    backbone = filled(0)["backbone"]
    backbone["embedding"]["linear"]["kernel"] = np.zeros((6, 6), np.float32)
    backbone["surplus"] = np.zeros(2, np.float32)
    save_weights(tmp_path / "w", Weights("encoder", VARIANT, CONFIG, {"backbone": backbone}))
    with pytest.raises(CheckpointError) as error:
        initial_weights(tmp_path / "w", template())
    assert "extra student.backbone.surplus" in str(error.value)
    assert "teacher.backbone.embedding.linear.kernel is float32 (6, 6)" in str(error.value)
    head = {"seg_head": {"kernel": np.zeros((6, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    save_weights(tmp_path / "head", Weights("linear_head", "", {}, head))
    with pytest.raises(CheckpointError, match="one linear_head; a run starts from an encoder"):
        initial_weights(tmp_path / "head", template())
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        initial_weights(tmp_path / "nowhere", template())


def test_what_a_source_lacks_starts_afresh_only_where_that_is_allowed(tmp_path):
    """Concerto starts from Sonata; its own projection comes along when it is there."""
    trees = {"student": filled(0), "teacher": filled(100)}
    save_weights(tmp_path / "sonata", Weights("pretraining", VARIANT, CONFIG, trees))
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    carried = {"patch_proj.weight": weight, "patch_proj.bias": bias}
    save_weights(tmp_path / "joint", Weights("pretraining", VARIANT, CONFIG, trees, carried))
    wanted = template()
    here = SingleDeviceSharding(jax.devices()[0])

    def shape(*size):
        return jax.ShapeDtypeStruct(size, np.float32, sharding=here)

    wanted["student"] = wanted["student"] | {
        "patch_proj": {"kernel": shape(3, 2), "bias": shape(2)}
    }
    wanted["teacher"] = wanted["teacher"] | {"image": {"kernel": shape(4)}}
    with pytest.raises(CheckpointError, match="missing student.patch_proj.bias"):
        initial_weights(tmp_path / "sonata", wanted)
    optional = ("patch_proj", "image")
    got = initial_weights(tmp_path / "sonata", wanted, optional)
    jax.tree.map(np.testing.assert_array_equal, got, trees)
    got = initial_weights(tmp_path / "joint", wanted, optional)
    np.testing.assert_array_equal(got["student"].pop("patch_proj")["kernel"], weight.T)
    jax.tree.map(np.testing.assert_array_equal, got, trees)
    # And Sonata starts from Concerto without it.
    got = initial_weights(tmp_path / "joint", template())
    jax.tree.map(np.testing.assert_array_equal, got, trees)
