"""Image encoders equal the originals and their definitions; images know nothing of each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from foreign import foreign
from golden import load
from image_states import DINOV2, SIGLIP, SWIGLU, dinov2_state, siglip_state

from point_jax.interop.image_encoders import image_spec, to_image_encoder
from point_jax.models.functional import functional
from point_jax.models.image_encoder import CAFFE, HALF, IMAGENET, ImageEncoder, NetworkEncoder
from point_jax.models.vgg import CONVOLUTIONS, VGGSpec
from point_jax.models.vit import dinov2_spec, interpolate

STATES = {"mlp": (DINOV2, dinov2_state), "swiglu": (SWIGLU, dinov2_state)}
STATES |= {"siglip": (SIGLIP, siglip_state)}


features = jax.jit(NetworkEncoder.__call__, static_argnums=0)  # equal encoders compile once


def read(tmp_path, state, config, dtype=jnp.float32):
    """Encoder and parameters of a transformers state dict."""
    weights, _ = to_image_encoder(foreign(tmp_path, state, config))
    spec = image_spec(weights.variant, weights.config, dtype)
    return NetworkEncoder(spec), jax.tree.map(jnp.asarray, weights.params["image_encoder"])


@pytest.fixture(params=STATES)
def small(request, tmp_path):
    config, state = STATES[request.param]
    return read(tmp_path, state(config), config)


def images(batch, height, width, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)
    )


def worst(got, want):
    return float(np.abs(np.asarray(got) - np.asarray(want)).max())


@pytest.mark.parametrize("name", ["h_dinov2_reg_mlp", "h_dinov2_reg_swiglu"])
def test_dinov2_equals_the_original(tmp_path, name):
    arrays, about = load(name)
    state = {key.removeprefix("sd."): a for key, a in arrays.items() if key.startswith("sd.")}
    encoder, params = read(tmp_path, state, about["config"])
    _, apply = functional(encoder.network.build)
    apply = jax.jit(apply, static_argnames=("method", "height", "width"))
    first = dataclasses.replace(encoder.network, depth=1)
    apply_first = jax.jit(functional(first.build)[1], static_argnames="method")
    one_block = params | {"blocks": jax.tree.map(lambda a: a[:1], params["blocks"])}
    for size in ("same", "larger", "rect", "smaller"):
        x = jnp.asarray(arrays[f"{size}_pixel_values"].transpose(0, 2, 3, 1))
        height, width = (edge // 14 for edge in x.shape[1:3])
        want = {part: arrays[f"{size}_{part}"] for part in ("embeddings", "hidden1", "pos_embed")}
        places = apply(params, height=height, width=width, method="positions")
        assert worst(places[None], want["pos_embed"]) < 2e-5
        embedded = apply(params, x, method="embed")
        assert worst(embedded, want["embeddings"]) < 2e-5
        assert worst(apply_first(one_block, embedded, method="trunk"), want["hidden1"]) < 2e-5
        last = arrays[f"{size}_last_hidden_state"]
        assert worst(apply(params, x, method="tokens"), last) < 2e-5
        patches = last[:, -height * width :].reshape(2, height, width, -1)
        assert worst(apply(params, x), patches) < 2e-5


def plain_siglip(state, config, x):
    """SigLIP's image tower by its definition, one image (H, W, 3) of the grid it trained on."""
    heads, edge = config["num_attention_heads"], config["patch_size"]

    def dense(x, key):
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    def norm(x, key):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * state[f"{key}.weight"] + state[f"{key}.bias"]

    tokens = []
    for top in range(0, x.shape[0], edge):
        for left in range(0, x.shape[1], edge):
            patch = x[top : top + edge, left : left + edge].transpose(2, 0, 1)
            kernel = state["embeddings.patch_embedding.weight"]
            tokens.append((kernel * patch[None]).sum((1, 2, 3)))
    x = np.stack(tokens) + state["embeddings.patch_embedding.bias"]
    x = x + state["embeddings.position_embedding.weight"]
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        y = norm(x, f"{at}.layer_norm1")
        q, k, v = (
            np.split(dense(y, f"{at}.self_attn.{name}_proj"), heads, axis=1) for name in "qkv"
        )
        mixed = [
            scipy.special.softmax(a @ b.T / np.sqrt(a.shape[1]), axis=1) @ c
            for a, b, c in zip(q, k, v, strict=True)
        ]
        x = x + dense(np.concatenate(mixed, axis=1), f"{at}.self_attn.out_proj")
        y = dense(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(y, f"{at}.mlp.fc2")
    return norm(x, "post_layernorm")


def test_siglip_equals_its_definition(tmp_path):
    state = siglip_state(SIGLIP)
    encoder, params = read(tmp_path, state, SIGLIP)
    x = images(1, 16, 16)
    exact = {key: array.astype(np.float64) for key, array in state.items()}
    want = plain_siglip(exact, SIGLIP, np.asarray(x[0]) / 127.5 - 1)
    got = features(encoder, params, x)
    assert got.shape == (1, 4, 4, 24)
    assert worst(got.reshape(16, 24), want) < 2e-5


def test_interpolation_without_antialiasing_is_the_cubic_one():
    """Constants stay, and the grid itself; between, the weights are Keys' kernel with a = -0.75."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 2)).astype("f4"))
    for antialias in (True, False):
        assert worst(interpolate(table, 4, 5, antialias), table) < 1e-6
        assert worst(interpolate(jnp.ones((4, 5, 2)), 7, 3, antialias), np.ones((7, 3, 2))) < 1e-6
    # Twice as many cells: the weights of the four nearest at a quarter and three quarters.
    t = np.array([1.25, 0.25, 0.75, 1.75])
    a = -0.75
    weights = np.where(
        t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    )
    line = np.asarray(table[:1, :, 0])
    doubled = interpolate(jnp.asarray(line[..., None]), 1, 10, False)[0, :, 0]
    assert worst(doubled[5], (weights * line[0, 1:5]).sum()) < 1e-6  # between cells 2 and 3
    assert worst(doubled[0], (weights[::-1] * line[0, [0, 0, 0, 1]]).sum()) < 1e-6


def test_any_grid_of_patches(small):
    encoder, params = small
    for height, width in ((8, 20), (16, 16)):
        found = features(encoder, params, images(2, height, width))
        assert found.shape == (2, height // 4, width // 4, encoder.channels)
        assert found.dtype == jnp.float32
        assert worst(found[:, 0], found[:, 1]) > 1e-2  # patches differ


def test_images_of_a_batch_are_independent(small):
    encoder, params = small
    batch = images(2, 8, 20)
    together = features(encoder, params, batch)
    for number in range(2):
        alone = features(encoder, params, batch[number : number + 1])[0]
        assert worst(alone, together[number]) < 5e-6
    other = batch.at[1].set(0)
    np.testing.assert_array_equal(features(encoder, params, other)[0], together[0])


def test_bytes_and_floats_are_the_same_image(small):
    encoder, params = small
    x = images(2, 8, 20)
    floats = x.astype(jnp.float32) / 255
    assert worst(features(encoder, params, x), features(encoder, params, floats)) < 1e-5


def test_bfloat16_is_close(small):
    encoder, params = small
    half = NetworkEncoder(dataclasses.replace(encoder.network, dtype=jnp.bfloat16))
    x = images(2, 16, 16)
    exact, close = features(encoder, params, x), features(half, params, x)
    assert close.dtype == jnp.float32
    error = jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < float(error) < 2e-2  # not equal: the arithmetic is another


def test_masked_patches_are_not_seen(tmp_path):
    encoder, params = read(tmp_path, dinov2_state(DINOV2), DINOV2)
    _, apply = functional(encoder.network.build)
    apply = jax.jit(apply)
    x = IMAGENET(images(2, 8, 12))
    mask = np.zeros((2, 2, 3), bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    changed = x.at[0, 4:, 8:].set(3.0).at[1, :4, :4].set(-1.0)
    seen = apply(params, x, jnp.asarray(mask))
    np.testing.assert_array_equal(apply(params, changed, jnp.asarray(mask)), seen)
    assert worst(apply(params, x), seen) > 1e-3
    plain, params = read(tmp_path, siglip_state(SIGLIP), SIGLIP)
    with pytest.raises(ValueError, match="mask_token=True"):
        functional(plain.network.build)[1](params, x, jnp.asarray(mask))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("small", 22_058_112),
        ("base", 86_583_552),
        ("large", 304_372_736),
        ("giant", 1_136_486_912),
    ],
)
def test_published_sizes(size, parameters):
    """As many parameters as transformers' module of this size."""
    encoder = NetworkEncoder(dinov2_spec(size))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert (encoder.stride, encoder.channels) == (14, encoder.network.channels)


def test_a_vit_starts_random_and_takes_gradients():
    """What a student needs: random start values, and a gradient for every parameter."""
    spec = image_spec("dinov2_with_registers", SWIGLU)
    encoder = NetworkEncoder(spec)
    params = encoder.init(jax.random.key(0))
    x = images(2, 8, 12)
    found = jax.jit(jax.grad(lambda p: (encoder(p, x) ** 3).sum()))(params)
    still = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(found) if not g.any()]
    assert still == ["['mask_token']"]


TINY = (3, 4, 5, 6, 7)


def plain_vgg(params, x):
    """Outputs of the blocks by definition: sums over windows, maxima over pairs; (H, W, 3)."""
    found = []
    for block, count in enumerate(CONVOLUTIONS, 1):
        if block > 1:
            rows, columns = x.shape[0] // 2, x.shape[1] // 2
            x = x[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, -1).max((1, 3))
        for number in range(1, count + 1):
            layer = jax.tree.map(np.asarray, params[f"conv{block}_{number}"])
            kernel = layer["kernel"].astype(np.float64)
            x = np.stack(
                [
                    sum(
                        scipy.signal.correlate2d(x[..., i], kernel[..., i, o], "same")
                        for i in range(kernel.shape[2])
                    )
                    + layer["bias"][o]
                    for o in range(kernel.shape[3])
                ],
                axis=-1,
            )
            x = np.maximum(x, 0)
        found.append(x)
    return found


def test_vgg_equals_its_definition():
    rng = np.random.default_rng(0)
    layers = ("conv4_3", "conv5_3")
    encoder = NetworkEncoder(VGGSpec(layers, TINY))
    params = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32),
        encoder.init(jax.random.key(0)),
    )
    x = images(1, 32, 48)
    blocks = plain_vgg(params, np.asarray(x[0], np.float64)[..., ::-1] - CAFFE.mean[::-1])
    four, five = blocks[3], blocks[4]
    both = np.concatenate([four, five.repeat(2, axis=0).repeat(2, axis=1)], axis=-1)
    for given, want, stride in (
        (layers, both, 8),
        (("conv4_3",), four, 8),
        (("conv5_3",), five, 16),
        (("conv1_2",), blocks[0], 1),
    ):
        encoder = NetworkEncoder(VGGSpec(given, TINY))
        assert (encoder.stride, encoder.channels) == (stride, want.shape[-1])
        got = features(encoder, params, x)[0]
        assert got.shape == want.shape
        assert worst(got, want) < 1e-5 * np.abs(want).max()
    with pytest.raises(ValueError, match="expected some of conv1_2, conv2_2"):
        VGGSpec(("conv4_2",))


def test_constants_of_the_pixels():
    """White, black and red by the three conventions."""
    x = jnp.asarray([[[[255, 255, 255], [0, 0, 0], [255, 0, 0]]]], jnp.uint8)
    np.testing.assert_allclose(HALF(x)[0, 0], [[1, 1, 1], [-1, -1, -1], [1, -1, -1]])
    np.testing.assert_allclose(IMAGENET(x)[0, 0, 2], [2.2489083, -2.0357143, -1.8044444], rtol=1e-5)
    np.testing.assert_allclose(
        CAFFE(x)[0, 0, 2], [-104.00699, -116.66877, 255 - 122.67892], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((1, 10, 8, 3), "uint8", "10 x 8; this encoder needs multiples of 4: .* 8 x 8"),
        ((1, 0, 8, 3), "uint8", "needs multiples of 4"),
        ((8, 8, 3), "uint8", r"shape \(8, 8, 3\), expected \(B, H, W, 3\)"),
        ((1, 3, 8, 8), "float32", r"expected \(B, H, W, 3\)"),
        ((1, 8, 8, 3), "int32", "images are int32, expected uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, dtype, says):
    encoder: ImageEncoder = NetworkEncoder(image_spec("siglip", SIGLIP))
    with pytest.raises(ValueError, match=says):
        encoder({}, jnp.zeros(shape, dtype))
