"""Image encoders come in as published, or are refused with every reason."""

import hashlib
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from image_states import DINOV2, SIGLIP, SWIGLU, dinov2_state, names_of_4, siglip_state

import point_jax
from launch import command, convert
from point_jax.interop.files import read_file, write_safetensors
from point_jax.interop.image_encoders import load_image_encoder, to_image_encoder
from point_jax.interop.store import Weights, load_weights, save_weights
from point_jax.models.vgg import CONVOLUTIONS
from point_jax.training.checkpoint import CheckpointError

PREFIX = "dinov2_with_registers."
LAYER = "encoder.layer.0"


def run(capsys, *arguments):
    """Exit code, and lines on stdout and stderr, of `launch.convert`."""
    code = command.run(convert.main, ["convert", *map(str, arguments)], convert.__doc__)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def converted(folder, config, state):
    """Weights of a transformers folder with this content, and what was left out."""
    if not folder.exists():
        write_safetensors(folder, config, state)
    return to_image_encoder(read_file(folder))


def refused(folder, config, state):
    with pytest.raises(CheckpointError) as error:
        converted(folder, config, state)
    return str(error.value)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_there_and_open(tmp_path, capsys):
    """What went into the file is what the opened encoder holds, each array in its place."""
    state = dinov2_state(DINOV2)
    write_safetensors(tmp_path / "hub", DINOV2, state)
    code, out, err = run(capsys, f"--input={tmp_path / 'hub'}", f"--output={tmp_path / 'w'}")
    assert (code, err) == (0, [])
    assert "image_encoder dinov2_with_registers: 0.01 M parameters under 44 keys" in out[0]
    encoder, params = point_jax.load_image_encoder(tmp_path / "w", dtype="bfloat16")
    assert (encoder.stride, encoder.channels) == (4, 24)
    assert encoder.network.dtype == "bfloat16"
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(a.size for a in state.values())
    params = jax.tree.map(np.asarray, params)
    for block in range(2):
        at, ours = f"encoder.layer.{block}", jax.tree.map(lambda a, b=block: a[b], params["blocks"])
        for part, name in enumerate("qkv"):
            third = slice(24 * part, 24 * (part + 1))
            weight = state[f"{at}.attention.{name}_proj.weight"]
            np.testing.assert_array_equal(ours["qkv"]["kernel"][:, third], weight.T)
            bias = state[f"{at}.attention.{name}_proj.bias"]
            np.testing.assert_array_equal(ours["qkv"]["bias"][third], bias)
        np.testing.assert_array_equal(ours["norm2"]["scale"], state[f"{at}.norm2.weight"])
        np.testing.assert_array_equal(ours["scale1"], state[f"{at}.layer_scale1.lambda1"])
    kernel = params["patch"]["kernel"].reshape(4, 4, 3, 24)
    weight = state["embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(kernel[1, 2, 0], weight[:, 0, 1, 2])


@pytest.mark.parametrize("config", [DINOV2, SWIGLU], ids=["mlp", "swiglu"])
def test_both_layouts_and_the_prefix(tmp_path, config):
    new = dinov2_state(config)
    want, left_out = converted(tmp_path / "new", config, new)
    assert left_out == []
    old = names_of_4(new)
    assert not old.keys() >= new.keys()
    names = {"attention.attention.query", "attention.output.dense"}
    names |= {"mlp.weights_in"} if config is SWIGLU else set()
    assert all(f"{LAYER}.{name}.weight" in old for name in names)
    equal(converted(tmp_path / "old", config, old)[0].params, want.params)
    named = {PREFIX + key: array for key, array in old.items()}
    named["classifier.weight"] = np.ones((5, 48), np.float32)
    again, left_out = converted(tmp_path / "prefix", config, named)
    equal(again.params, want.params)
    assert left_out == ["the classifier (1 arrays)"]


def test_several_files_with_an_index(tmp_path):
    state = dinov2_state(DINOV2)
    want = converted(tmp_path / "one", DINOV2, state)[0].params
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DINOV2))
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        part = {k: state[k] for k, place in places.items() if place == name}
        safetensors.numpy.save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"

    def write(places):
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    write(places)
    weights, _ = converted(folder, None, None)
    equal(weights.params, want)
    files = [index, *(folder / name for name in names)]
    content = b"".join(file.read_bytes() for file in files)
    assert weights.source["sha256"] == hashlib.sha256(content).hexdigest()
    moved = min(places)
    write(places | {moved: names[1]})
    said = refused(folder, None, None)
    assert f"{names[0]} is not what" in said and f"extra {moved}" in said
    write(places | {"more": names[1]})
    assert "missing more" in refused(folder, None, None)
    for bad in ("../one/model.safetensors", "gone.safetensors", 7):
        write(places | {moved: bad})
        assert "which is no file beside it" in refused(folder, None, None)
    write({})
    assert "no weight_map" in refused(folder, None, None)


def test_siglip_alone_and_with_its_text_side(tmp_path):
    alone, left_out = converted(tmp_path / "new", SIGLIP, siglip_state(SIGLIP))
    assert left_out == ["the pooling head (4 arrays)"]
    whole = siglip_state(SIGLIP, "vision_model.")
    assert converted(tmp_path / "old", SIGLIP, whole)[1] == left_out
    whole |= {
        "text_model.embeddings.token_embedding.weight": np.ones((9, 24), np.float32),
        "logit_scale": np.ones(1, np.float32),
        "logit_bias": np.ones(1, np.float32),
    }
    config = {"model_type": "siglip", "text_config": {}, "vision_config": SIGLIP}
    weights, left_out = converted(tmp_path / "full", config, whole)
    equal(weights.params, alone.params)
    assert (weights.variant, weights.config) == ("siglip", SIGLIP)
    assert left_out == ["the text side (3 arrays)", "the pooling head (4 arrays)"]
    assert weights.source["left_out"] == left_out


@pytest.mark.parametrize(("config", "state"), [(DINOV2, dinov2_state), (SIGLIP, siglip_state)])
def test_every_misfit_is_named(tmp_path, config, state):
    state = state(config)
    lost, turned = [key for key in sorted(state) if key.endswith(("fc1.weight", "fc2.weight"))][:2]
    del state[lost]
    state[turned] = np.zeros((3, 24), np.float32)
    state["encoder.surprise"] = np.zeros(2, np.float32)
    said = refused(tmp_path / "a", config, state)
    assert f"missing {lost} (" in said
    assert f"{turned} has shape (3, 24), expected (24, " in said
    assert "extra encoder.surprise (2,)" in said
    assert said.count(";") == 2


def test_misfits_carry_the_names_of_their_file(tmp_path):
    old = {PREFIX + key: array for key, array in names_of_4(dinov2_state(SWIGLU)).items()}
    del old[f"{PREFIX}{LAYER}.attention.attention.key.bias"]
    old[f"{PREFIX}{LAYER}.mlp.weights_in.bias"] = np.zeros(3, np.float32)
    said = refused(tmp_path / "a", SWIGLU, old)
    assert f"missing {PREFIX}{LAYER}.attention.attention.key.bias (24,)" in said
    assert f"{PREFIX}{LAYER}.mlp.weights_in.bias has shape (3,), expected (64,)" in said


def test_a_classifier_without_the_prefix_is_extra(tmp_path):
    state = dinov2_state(DINOV2) | {"classifier.weight": np.ones((5, 48), np.float32)}
    assert "extra classifier.weight" in refused(tmp_path / "a", DINOV2, state)


def test_other_numbers_than_float32(tmp_path):
    state = dinov2_state(DINOV2)
    half = {key: array.astype(ml_dtypes.bfloat16) for key, array in state.items()}
    params = converted(tmp_path / "half", DINOV2, half)[0].params
    exact = {key: array.astype(np.float32) for key, array in half.items()}
    equal(params, converted(tmp_path / "exact", DINOV2, exact)[0].params)
    state["layernorm.bias"] = state["layernorm.bias"].astype(np.float64)
    said = refused(tmp_path / "double", DINOV2, state)
    assert "float32 cannot hold exactly: layernorm.bias (float64)" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2'; read are 'dinov2_with_registers'"),
        ({"model_type": "siglip2"}, "model_type is 'siglip2'"),
        ({"hidden_act": "relu"}, "hidden_act='relu': not built here, only 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias=False: not built here"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: expected"),
        ({"patch_size": [4, 4]}, r"patch_size=\[4, 4\]: expected a whole number"),
        ({"image_size": 3}, "side is 0, expected a whole number"),
        (
            {"image_size": 20},
            r"position_embeddings has shape \(1, 17, .*, expected \(1, 26,",
        ),
        ({"num_attention_heads": 5}, "channels=24 is not a multiple of heads=5"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf: expected a number"),
        ({"mlp_ratio": 0.01}, "hidden is 0, expected"),
        ({"use_swiglu_ffn": "yes"}, "use_swiglu_ffn='yes': expected true or false"),
        ({"num_hidden_layers": 3}, r"missing encoder.layer.2.attention.k_proj.bias \(24,\)"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, change, says):
    write_safetensors(tmp_path / "a", DINOV2, dinov2_state(DINOV2))
    (tmp_path / "a" / "config.json").write_text(json.dumps(DINOV2 | change))
    with pytest.raises(CheckpointError, match=says):
        to_image_encoder(read_file(tmp_path / "a"))


def test_the_rest_of_the_folder(tmp_path, capsys):
    folder = tmp_path / "a"
    write_safetensors(folder, SIGLIP, siglip_state(SIGLIP))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    to_image_encoder(read_file(folder))
    for bad in ([0.485, 0.456, 0.406], [0.5], None, ["a"] * 3):
        file.write_text(json.dumps({"image_mean": bad}))
        assert "image_mean is" in refused(folder, None, None)
    file.unlink()
    (folder / "config.json").write_text('{"model_type": "siglip", "vision_config": 3}')
    assert "its vision_config is 3" in refused(folder, None, None)
    (folder / "config.json").unlink()
    code, _, err = run(capsys, f"--input={folder}", f"--output={tmp_path / 'w'}")
    assert code == 1 and "no config.json beside it says which" in err[0]


def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, a file is refused by name. So is a flipped bit, if it means anything."""
    want = converted(tmp_path / "a", DINOV2, dinov2_state(DINOV2))[0].params
    file = tmp_path / "a" / "model.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 5, 9, 200, *rng.integers(10, len(whole), 20)):
        file.write_bytes(whole[:cut])
        assert str(file) in refused(tmp_path / "a", None, None)
    fine = 0
    for place in rng.integers(8, 2000, 60):  # the header: names, shapes, offsets
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(7)
        file.write_bytes(flipped)
        try:
            params = to_image_encoder(read_file(tmp_path / "a"))[0].params
        except CheckpointError as error:
            fine += str(file) in str(error)
        else:  # a bit without meaning, such as one of the remarks beside the arrays
            equal(params, want)
            fine += 1
    assert fine == 60


def test_mistakes_on_the_command_line(tmp_path, capsys):
    write_safetensors(tmp_path / "hub", DINOV2, dinov2_state(DINOV2))
    head = Weights("linear_head", "", {}, {"seg_head": {"bias": np.ones(2)}})
    save_weights(tmp_path / "head", head)
    save_weights(tmp_path / "w", to_image_encoder(read_file(tmp_path / "hub"))[0])
    hub, new = f"--input={tmp_path / 'hub'}", f"--output={tmp_path / 'new'}"
    w = f"--input={tmp_path / 'w'}"
    for arguments, message in (
        ((hub, new, "--network=sonata"), "no --network or --tree with it"),
        ((hub, new, "--tree=student"), "no --network or --tree with it"),
        ((hub, f"--output={tmp_path / 'new.pth'}"), "which becomes a checkpoint: a folder"),
        ((w, new, "--to=pth"), "holds an encoder or a linear head, not one image_encoder"),
        ((w, new, "--to=pointcept"), "not one image_encoder"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1 and len(err) == 1 and message in err[0], err
    assert not (tmp_path / "new").exists()
    for folder, message in (
        ("nowhere", "no such folder; expected what launch.convert wrote"),
        ("hub", "no converted weights; expected what launch.convert wrote"),
        ("head", "holds one linear_head, not an image encoder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_image_encoder(tmp_path / folder)
    with pytest.raises(ValueError, match="layers is for vgg16"):
        load_image_encoder(tmp_path / "w", layers=("conv4_3",))
    with pytest.raises(CheckpointError, match="holds one image_encoder, not an encoder of points"):
        point_jax.load(tmp_path / "w")


WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def h5py():
    return pytest.importorskip("h5py", reason="h5py is an extra: .h5 files are not tested")


@pytest.fixture(scope="module")
def hed(h5py, tmp_path_factory):
    """A file as Keras stores HED, random; and its arrays. Not to be changed."""
    rng, arrays, inputs = np.random.default_rng(0), {}, 3
    for block, (count, width) in enumerate(zip(CONVOLUTIONS, WIDTHS, strict=True), 1):
        for number in range(count):
            at = f"block{block}/layers/conv2d{'' if number == 0 else f'_{number}'}/vars"
            arrays[f"{at}/0"] = rng.standard_normal((3, 3, inputs, width), np.float32)
            arrays[f"{at}/1"] = rng.standard_normal(width, np.float32)
            inputs = width
        arrays[f"dsn{block}/vars/0"] = np.ones((1, 1, width, 1), np.float32)
    arrays["fuse/vars/0"] = np.ones((1, 1, 5, 1), np.float32)
    path = tmp_path_factory.mktemp("hed") / "hed.weights.h5"
    write_h5(h5py, path, arrays)
    return path, arrays


def write_h5(h5py, path, arrays, **options):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, **options)


def test_vgg_of_keras(tmp_path, hed, capsys):
    path, arrays = hed
    code, out, err = run(capsys, f"--input={path}", f"--output={tmp_path / 'w'}")
    assert (code, err) == (0, [])
    assert "image_encoder vgg16: 14.71 M parameters under 26 keys" in out[0]
    assert out[1] == "left out: the edge heads (6 arrays)"
    assert load_weights(tmp_path / "w").source["format"] == "hdf5"
    encoder, params = load_image_encoder(tmp_path / "w")
    assert (encoder.stride, encoder.channels) == (8, 512)
    for ours, theirs in (
        ("conv1_1", "block1/layers/conv2d"),
        ("conv5_3", "block5/layers/conv2d_2"),
    ):
        np.testing.assert_array_equal(params[ours]["kernel"], arrays[f"{theirs}/vars/0"])
        np.testing.assert_array_equal(params[ours]["bias"], arrays[f"{theirs}/vars/1"])
    both, _ = load_image_encoder(tmp_path / "w", layers=("conv4_3", "conv5_3"))
    assert (both.stride, both.channels) == (8, 1024)
    coarse, _ = load_image_encoder(tmp_path / "w", layers=("conv5_3",))
    assert (coarse.stride, coarse.channels) == (16, 512)
    with pytest.raises(ValueError, match="expected some of"):
        load_image_encoder(tmp_path / "w", layers=("conv9_9",))


def test_vgg_files_that_do_not_fit_are_refused(tmp_path, hed, h5py, monkeypatch):
    path, _ = hed
    first = "block1/layers/conv2d/vars"
    small = {f"{first}/0": np.ones((3, 3, 3, 8), np.float32), "more": np.ones(2, np.float32)}
    write_h5(h5py, tmp_path / "a.h5", small)
    with pytest.raises(CheckpointError, match="does not fit") as error:
        to_image_encoder(read_file(tmp_path / "a.h5"))
    said = str(error.value)
    assert f"{first}/0 has shape (3, 3, 3, 8), expected (3, 3, 3, 64)" in said
    assert "extra more (2,)" in said and said.count("missing") == 25
    write_h5(h5py, tmp_path / "b.h5", {"x": np.zeros((99, 99))}, compression="gzip")
    with pytest.raises(CheckpointError, match="x is compressed, incomplete or in another file"):
        read_file(tmp_path / "b.h5")
    write_h5(h5py, tmp_path / "c.h5", {"x": np.array([b"text"])})
    with pytest.raises(CheckpointError, match="x is no array of numbers"):
        read_file(tmp_path / "c.h5")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["elsewhere"] = h5py.ExternalLink(str(path), "/fuse")
    with pytest.raises(CheckpointError, match="holds no arrays"):
        read_file(tmp_path / "d.h5")
    (tmp_path / "e.h5").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_file(tmp_path / "e.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"pip install 'point_jax\[hdf5\]'"):
        read_file(path)
