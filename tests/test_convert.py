"""Weights of the originals go in and out bit for bit, and nothing is guessed or lost silently."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from foreign import foreign, head_state, pretraining_state, random_state, same, shapes, small_config
from golden import load

from point_jax.interop.convert import encoder_of, to_pointcept, to_release, to_state, to_weights
from point_jax.interop.files import read_file, write_pth, write_safetensors
from point_jax.interop.published import PUBLISHED
from point_jax.interop.store import count, digest, load_weights, save_weights
from point_jax.training.checkpoint import CheckpointError

# Keys and parameters of the published files. Parameters: the READMEs say 39, 108 and 208 million.
TABLE = {
    "sonata": (453, 108_461_376),
    "sonata_small": (273, 38_648_992),
    "concerto_small": (273, 38_648_992),
    "concerto_base": (453, 108_461_376),
    "concerto_base_siglip": (453, 108_461_376),
    "concerto_large": (453, 207_667_456),
    "concerto_large_outdoor": (453, 207_667_456),
    "utonia": (477, 137_253_744),
}
HEADS = {
    "sonata_linear_prob_head_sc": 1232,
    "concerto_large_linear_prob_head_sc": 1728,
    "utonia_linear_prob_head_sc": 1386,
}
NETWORKS = ["sonata", "sonata_small", "utonia", "utonia_decoder", "ptv3"]  # different keys


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is an extra: .pth files are not tested")


@pytest.fixture
def network(tmp_path):
    """A JSON file with the small network of `pretraining_state`."""
    (tmp_path / "network.json").write_text(json.dumps(small_config("sonata_small")))
    return str(tmp_path / "network.json")


@pytest.mark.parametrize("name", TABLE)
def test_published_networks_have_the_published_sizes(name):
    found, fixed = shapes(name, full=True)
    keys, parameters = TABLE[name]
    assert len(found) + len(fixed) == keys
    assert sum(int(np.prod(shape)) for shape in found.values()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_in_and_out_and_in_again(tmp_path, torch, name):
    config, state = small_config(name), random_state(name)
    write_pth(tmp_path / "in.pth", {"config": config, "state_dict": state})
    weights = to_weights(read_file(tmp_path / "in.pth"))
    assert (weights.kind, weights.variant) == ("encoder", PUBLISHED[name].variant)
    save_weights(tmp_path / "converted", weights)
    back = load_weights(tmp_path / "converted")
    assert digest(back) == digest(weights)
    release = to_release(back)
    assert release["config"] == config
    assert same(release["state_dict"], state)
    write_pth(tmp_path / "out.pth", release)
    write_safetensors(tmp_path / "hub", release["config"], release["state_dict"])
    for path in (tmp_path / "out.pth", tmp_path / "hub"):
        again = to_weights(read_file(path))
        assert same(to_state(again), state)
        assert again.config == config


def module_of(torch, state):
    """A PyTorch module with parameters and buffers of these keys, shapes and dtypes alone."""
    root = torch.nn.Module()
    for key, array in state.items():
        *path, leaf = key.split(".")
        node = root
        for name in path:
            if not hasattr(node, name):
                node.add_module(name, torch.nn.Module())
            node = getattr(node, name)
        value = torch.zeros(array.shape, dtype=getattr(torch, array.dtype.name))
        if value.is_floating_point() and leaf not in ("inv_freq", "running_mean", "running_var"):
            node.register_parameter(leaf, torch.nn.Parameter(value))
        else:
            node.register_buffer(leaf, value)
    return root


@pytest.mark.parametrize("name", ["sonata_small", "utonia", "ptv3"])
def test_a_pytorch_module_loads_our_file_strictly(tmp_path, torch, name):
    state = random_state(name)
    weights = to_weights(foreign(tmp_path, state, small_config(name)))
    write_pth(tmp_path / "out.pth", to_release(weights))
    content = torch.load(tmp_path / "out.pth", map_location="cpu", weights_only=True)
    assert content.keys() == {"config", "state_dict"}
    module = module_of(torch, state)
    module.load_state_dict(content["state_dict"], strict=True)
    assert same({k: v.detach().numpy() for k, v in module.state_dict().items()}, state)


@pytest.mark.parametrize("name", HEADS)
def test_linear_heads(tmp_path, torch, name):
    state, config = random_state(name), PUBLISHED[name].config
    assert config == {"backbone_out_channels": HEADS[name], "num_classes": 20}
    weights = to_weights(foreign(tmp_path, state, config))
    assert (weights.kind, weights.variant, weights.config) == ("linear_head", "", config)
    assert weights.params["seg_head"]["kernel"].shape == (HEADS[name], 20)
    save_weights(tmp_path / "w", weights)
    back = load_weights(tmp_path / "w")
    assert same(to_release(back)["state_dict"], state)
    assert to_weights(foreign(tmp_path, state)).config == config  # its shapes say it all
    with pytest.raises(CheckpointError, match="its config is .* its arrays say"):
        to_weights(foreign(tmp_path, state, config | {"num_classes": 13}))
    with pytest.raises(CheckpointError, match="no encoder"):
        encoder_of(weights)


GOLDEN = [
    "b_ptv3m2_enc_weights",
    "c_ptv3m2_encdec_weights",
    "d_utonia_enc_weights",
    "d_utonia_encdec_weights",
    "e_ptv3m1_weights",
]


@pytest.mark.parametrize("name", GOLDEN)
def test_state_dicts_of_the_originals(tmp_path, name):
    state, about = load(name)
    config = about["config"]
    if name == "d_utonia_encdec_weights":
        config = config | {"dec_rope_enable": False}  # as the file of its features says
    weights = to_weights(foreign(tmp_path, state, config))
    assert same(to_state(weights), state)


@pytest.mark.parametrize("name", ["f2_sonata_weights", "g1_concerto_weights"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_pretrainings_of_the_originals(tmp_path, torch, name, prefix):
    """Both trees and all heads; Concerto's image branch is carried along."""
    state, about = load(name)
    network = tmp_path / "network.json"
    network.write_text(
        json.dumps({k: v for k, v in about["config"]["backbone"].items() if k != "type"})
    )
    state = {prefix + key: array for key, array in state.items()}
    content = {"epoch": 7, "state_dict": state, "best_metric_value": 0.5, "optimizer": {"lr": 1}}
    write_pth(tmp_path / "in.pth", content)
    weights = to_weights(read_file(tmp_path / "in.pth"), str(network))
    assert weights.kind == "pretraining"
    assert weights.params.keys() == {"student", "teacher"}
    for tree in weights.params.values():
        assert tree.keys() == {"backbone", "mask_head", "unmask_head"}
    outside = {k.split(".")[0] for k in weights.extra}
    image = {"patch_proj", "enc2d_head_student", "enc2d_head_teacher"}
    assert outside == (image if "concerto" in name else set())
    save_weights(tmp_path / "w", weights)
    write_pth(tmp_path / "out.pth", to_pointcept(load_weights(tmp_path / "w")))
    out = torch.load(tmp_path / "out.pth", weights_only=True)
    wanted = {"epoch", "state_dict", "optimizer", "scheduler", "scaler", "best_metric_value"}
    assert out.keys() == wanted
    assert (out["epoch"], out["best_metric_value"], out["optimizer"]) == (7, 0.5, None)
    assert same({k: v.numpy() for k, v in out["state_dict"].items()}, state)


def test_an_encoder_out_of_a_pretraining(tmp_path, network):
    state = pretraining_state()
    source = foreign(tmp_path, state, numbers={"epoch": 3})
    whole = to_weights(source, network)
    for seed, tree in enumerate(("student", "teacher")):
        want = random_state("sonata_small", seed)
        later, at_once = encoder_of(whole, tree), to_weights(source, network, tree)
        for weights in (later, at_once):
            assert same(to_release(weights)["state_dict"], want)
            assert weights.source["tree"] == tree
    with pytest.raises(CheckpointError, match="a release holds an encoder"):
        to_release(whole)
    with pytest.raises(CheckpointError, match="holds a pretraining or a segmentor"):
        to_pointcept(encoder_of(whole))


def test_student_and_teacher_of_different_networks(tmp_path, network):
    """Distillation: one network cannot stand for both, but each can be had."""
    state = random_state("sonata_small", prefix="student.backbone.")
    state |= random_state("sonata", prefix="teacher.backbone.")
    source = foreign(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"teacher.backbone.: enc_depths .* --tree"):
        to_weights(source, network)
    weights = to_weights(source, network, "student")
    assert same(to_state(weights), random_state("sonata_small"))


@pytest.mark.parametrize("name", ["sonata_small", "utonia_decoder", "ptv3"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_segmentors(tmp_path, name, prefix):
    """The mask token and the decoder are there or not: keys decide, whatever the network says."""
    inner = random_state(name)
    inner.pop("embedding.mask_token", None)
    rng = np.random.default_rng(5)
    inner = {f"backbone.{key}": array for key, array in inner.items()}
    inner["seg_head.weight"] = rng.standard_normal((20, 30), np.float32)
    inner["seg_head.bias"] = rng.standard_normal(20, np.float32)
    state = {prefix + key: array for key, array in inner.items()}
    file = tmp_path / "network.json"
    file.write_text(json.dumps(small_config(name)))
    weights = to_weights(foreign(tmp_path, state), str(file))
    assert weights.kind == "segmentor"
    assert weights.params["seg_head"]["kernel"].shape == (30, 20)
    assert same(to_pointcept(weights)["state_dict"], state)
    alone = to_release(encoder_of(weights))["state_dict"]
    want = {k.removeprefix("backbone."): v for k, v in inner.items() if k.startswith("backbone.")}
    assert same(alone, want)


def test_every_key_that_does_not_fit_is_listed(tmp_path, network):
    state = pretraining_state()
    gone = [
        "module.student.backbone.embedding.stem.norm.bias",
        "module.teacher.backbone.enc.enc3.block4.attn.qkv.weight",
        "module.teacher.mask_head.mlp.2.bias",
    ]
    for key in gone:
        del state[key]
    bent = [
        "module.student.backbone.enc.enc4.down.proj.bias",
        "module.student.mask_head.mlp.0.bias",
    ]
    for key in bent:
        state[key] = np.zeros(7, np.float32)
    surplus = ["module.student.backbone.enc.more", "module.criterion.weight", "module.teacher.x"]
    for key in surplus:
        state[key] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointError) as caught:
        to_weights(foreign(tmp_path, state), network)
    text = str(caught.value)
    for keys, word in (
        (gone, "missing {}"),
        (bent, "{} has shape (7,), expected"),
        (surplus, "extra {}"),
    ):
        for key in keys:
            assert word.format(key.removeprefix("module.")) in text
    assert text.count("; ") == len(gone + bent + surplus) - 1


def test_a_whole_block_that_is_missing_is_listed_key_by_key(tmp_path):
    state = random_state("sonata_small")
    gone = [key for key in state if key.startswith("enc.enc3.block5.")]
    with pytest.raises(CheckpointError) as caught:
        to_weights(
            foreign(
                tmp_path,
                {k: v for k, v in state.items() if k not in gone},
                small_config("sonata_small"),
            )
        )
    assert len(gone) == 18
    assert all(f"missing {key}" in str(caught.value) for key in gone)


def test_a_file_without_config_asks_for_the_network(tmp_path):
    state = {"module." + k: v for k, v in random_state("utonia", prefix="backbone.").items()}
    with pytest.raises(CheckpointError) as caught:
        to_weights(foreign(tmp_path, state))
    text = str(caught.value)
    # Rotary frequencies show the heads; nothing shows the rest.
    assert "PT-v3m3, in_channels=9, enc_depths=[3, 3, 3, 12, 3]" in text
    assert "enc_num_head=[3, 6, 12, 24, 32]" in text
    assert "do not say enc_patch_size, order, stride, rope_base. Give --network=" in text
    full = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes("sonata", True)[0].items()}
    with pytest.raises(CheckpointError) as caught:
        to_weights(foreign(tmp_path, full))
    for text in (
        "of the published, sonata, concerto_base, concerto_base_siglip would fit",
        "do not say enc_num_head, enc_patch_size, order, stride.",
    ):
        assert text in str(caught.value)


def test_a_network_that_is_not_the_files_is_refused(tmp_path):
    state = random_state("sonata_small")
    source = foreign(tmp_path, state)
    with pytest.raises(CheckpointError) as caught:
        to_weights(source, "sonata")
    for text in (
        "enc_depths is [2, 2, 2, 6, 2] in the arrays, [3, 3, 3, 12, 3] in the network sonata",
        "enc_channels is [4, 8, 16, 32, 64] in the arrays",
    ):
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no network 'sonnata': expected sonata, .*JSON"):
        to_weights(source, "sonnata")
    with pytest.raises(CheckpointError, match="a config of its own, which is not sonata's"):
        to_weights(foreign(tmp_path, state, small_config("sonata_small")), "sonata")
    decoder = random_state("utonia_decoder")
    with pytest.raises(CheckpointError, match="does not say its dec_num_head and dec_patch_size"):
        to_weights(foreign(tmp_path, decoder), "utonia")
    for change, message in (
        ({"order": ["z", "peano"]}, "no curve 'peano'"),
        ({"heads": 3}, "heads: PT-v3m2 has no such argument"),
        ({"enc_num_head": ["a"] * 5}, "source.pth"),
        ({"enc_depths": 3}, "source.pth"),
        ({"enc_channels": [4.5, 8, 16, 32, 64]}, "source.pth"),
    ):
        with pytest.raises(CheckpointError, match=message):
            to_weights(foreign(tmp_path, state, small_config("sonata_small") | change))


def test_what_is_of_another_family(tmp_path):
    for state in ({"conv1.weight": np.ones(2)}, {"backbone.x": np.ones(2)}, {"enc.x": np.ones(2)}):
        with pytest.raises(CheckpointError):
            to_weights(foreign(tmp_path, state), "sonata")
    with pytest.raises(CheckpointError, match=r"its keys start with conv1$"):
        to_weights(foreign(tmp_path, {"conv1.weight": np.ones(2)}))
    half = random_state("sonata_small", prefix="student.backbone.")
    with pytest.raises(CheckpointError, match="without teacher.backbone"):
        to_weights(foreign(tmp_path, half), "sonata_small")
    with pytest.raises(CheckpointError, match="has no teacher"):
        to_weights(foreign(tmp_path, half), "sonata_small", "teacher")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_comes_back_as_it_was(tmp_path, dtype):
    """Parameters are float32 here, which holds them exactly; the way back knows what they were."""
    state = {k: v.astype(dtype) for k, v in random_state("sonata_small").items()}
    state["embedding.mask_token"] = state["embedding.mask_token"].astype(np.float32)
    weights = to_weights(foreign(tmp_path, state, small_config("sonata_small")))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.params)} == {np.dtype(np.float32)}
    save_weights(tmp_path / "w", weights)
    assert same(to_state(load_weights(tmp_path / "w")), state)


def test_what_float32_cannot_hold_is_refused(tmp_path):
    state = random_state("sonata_small")
    state["embedding.mask_token"] = np.full((1, 4), 1 / 3)
    config = small_config("sonata_small")
    with pytest.raises(CheckpointError, match=r"exactly: embedding.mask_token .float64."):
        to_weights(foreign(tmp_path, state, config))
    state["embedding.mask_token"] = np.full((1, 4), 0.25)
    assert same(to_state(to_weights(foreign(tmp_path, state, config))), state)


def test_arrays_that_are_computed_here_keep_their_bits(tmp_path, network):
    """Lengths of prototypes, rotary frequencies and counters of batch norms."""
    state = pretraining_state()
    lengths = [key for key in state if key.endswith("original0")]
    assert len(lengths) == 4
    state[lengths[0]] = np.nextafter(state[lengths[0]], np.float32(2))
    weights = to_weights(foreign(tmp_path, state), network)
    assert same(to_pointcept(weights)["state_dict"], state)
    state[lengths[1]] = 2 * state[lengths[1]]
    with pytest.raises(CheckpointError, match="original0 is not 1"):
        to_weights(foreign(tmp_path, state), network)

    state, config = random_state("utonia"), small_config("utonia")
    key = "enc.enc1.block0.attn.rope.inv_freq"
    state[key] = np.nextafter(state[key], np.float32(2))
    assert same(to_state(to_weights(foreign(tmp_path, state, config))), state)
    state[key] = state[key] / 10
    with pytest.raises(CheckpointError, match=key):
        to_weights(foreign(tmp_path, state, config))

    state = random_state("ptv3")
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert len(counters) == 13
    state |= {key: np.array(number, np.int64) for number, key in enumerate(counters)}
    weights = to_weights(foreign(tmp_path, state, small_config("ptv3")))
    save_weights(tmp_path / "w", weights)
    assert same(to_state(load_weights(tmp_path / "w")), state)


def test_sizes_are_counted_without_what_is_carried_along(tmp_path, network):
    state = pretraining_state()
    weights = to_weights(foreign(tmp_path, state), network)
    lengths = sum(v.size for k, v in state.items() if k.endswith("original0"))
    assert count(weights.params) == sum(v.size for v in state.values()) - lengths
    assert head_state("")["mlp.0.weight"].shape == (12, 20)
