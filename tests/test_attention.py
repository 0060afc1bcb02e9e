"""The kernels of patch attention against its definition, and how one is chosen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from point_jax.measure import cost, hlo
from point_jax.ops import attention_gpu, attention_loop, attention_tpu
from point_jax.ops.attention import SAVED, patch_attention
from point_jax.ops.attention_blocks import blocks_met


class Case(NamedTuple):
    """Patches of K slots, of which some are in use; `sizes` fill each patch one after the other."""

    width: int
    heads: int
    channels: int
    dtype: str = "float32"
    patches: int = 2
    used: int = 2
    sizes: tuple[int, ...] = ()
    narrow: bool | None = None


CASES = {
    "a whole patch in two blocks": Case(256, 3, 16, sizes=(256,)),
    "heads that fill the lanes": Case(128, 8, 16, "bfloat16", sizes=(50, 30)),
    "lanes filled twice": Case(128, 8, 32, sizes=(100, 20), patches=3),
    "short patches, narrow heads": Case(48, 2, 12, sizes=(20, 9, 11)),
    "clouds that meet no neighbour": Case(512, 1, 64, "bfloat16", 1, 1, sizes=(128, 130, 70)),
    "heads that do not fill the lanes evenly": Case(128, 10, 24, sizes=(128,), patches=1, used=1),
    "narrow patches": Case(512, 2, 16, used=5, sizes=(100, 20), narrow=True),
    "patches that could be narrow": Case(256, 2, 16, used=1, sizes=(200, 20), narrow=False),
}


def arrays(case):
    """qkv, segment and gradient; what is in empty slots is not a number."""
    rng = np.random.default_rng(0)
    each = case.width // 4 if case.narrow else case.width
    slots = case.patches * case.width
    segment = np.full((slots // each, each), -1, np.int32)
    for patch in range(case.used):
        start = 0
        for i, size in enumerate(case.sizes):
            segment[patch, start : start + size] = patch * len(case.sizes) + i
            start += size
    segment = segment.reshape(-1)
    empty = segment < 0
    qkv = rng.normal(size=(slots, 3, case.heads, case.channels))
    g = rng.normal(size=(slots, case.heads, case.channels))
    qkv[empty], g[empty] = np.nan, np.nan
    return jnp.asarray(qkv, case.dtype), segment, jnp.asarray(g, case.dtype)


def defined(qkv, segment, g):
    """Output, log-sum-exp and gradient of qkv in float64, segment by segment."""
    qkv, g = np.asarray(qkv, np.float64), np.asarray(g, np.float64)
    slots, _, heads, channels = qkv.shape
    scale = channels**-0.5
    out, lse = np.zeros((slots, heads, channels)), np.zeros((heads, slots))
    grads = np.zeros(qkv.shape)
    for cloud in range(segment.max() + 1):
        at = np.flatnonzero(segment == cloud)
        for h in range(heads):
            q, k, v = qkv[at][:, :, h].swapaxes(0, 1)
            weights = np.exp(scale * q @ k.T)
            lse[h, at] = np.log(weights.sum(1))
            weights /= weights.sum(1, keepdims=True)
            out[at, h], slope = weights @ v, g[at, h]
            change = weights * (slope @ v.T - (slope * out[at, h]).sum(1, keepdims=True))
            grads[at, :, h] = np.stack(
                [scale * change @ k, scale * change.T @ q, weights.T @ slope], axis=1
            )
    return out, lse, grads


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("device", "kernels"), [("tpu", attention_tpu), ("gpu", attention_gpu)])
def test_kernels_are_attention_within_segments(device, kernels, name):
    """Interpreted, but on the device that they are for (`JAX_PLATFORMS=cuda pytest ...`)."""
    interpret = jax.default_backend() != device
    case = CASES[name]
    qkv, segment, g = arrays(case)
    narrow = None if case.narrow is None else jnp.array(case.narrow)
    rest = segment, narrow, jnp.int32(case.used)

    @jax.jit
    def both(qkv, g):
        out, lse = kernels.forward(case.width, qkv, *rest, interpret=interpret)
        return out, lse, kernels.backward(case.width, qkv, *rest, out, lse, g, interpret=interpret)

    out, lse, grads = both(qkv, g)
    assert out.dtype == grads.dtype == qkv.dtype and lse.dtype == jnp.float32
    filled = segment >= 0
    # Empty slots, and all of the patches that are not used: zeros, whatever was in them.
    assert not np.asarray(out[~filled], np.float32).any()
    assert not np.asarray(grads[~filled], np.float32).any()
    want_out, want_lse, want_grads = defined(qkv, segment, g)
    tolerance = 2e-6 if case.dtype == "float32" else 1e-2
    np.testing.assert_allclose(lse[:, filled], want_lse[:, filled], atol=2e-6 * 10)
    for got, want in [(out, want_out), *((grads[:, t], want_grads[:, t]) for t in range(3))]:
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max()
        )


LOOPS = {
    **CASES,
    "no heads that divide": Case(512, 7, 16, sizes=(500,), patches=1, used=1),
    "large scores": Case(256, 2, 16, sizes=(100, 20)),
    "large scores in bfloat16": Case(128, 2, 16, "bfloat16", sizes=(100, 20)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_attention_within_segments(name):
    case = LOOPS[name]
    qkv, segment, g = arrays(case)
    qkv, g = (jnp.where(jnp.isnan(x), 3.0, x) for x in (qkv, g))
    if "large" in name:  # the largest score has to be looked for
        qkv = qkv.at[:, :2].multiply(6)
    narrow = None if case.narrow is None else jnp.array(case.narrow)
    rest = int(segment.max()) + 1, case.width

    @jax.jit
    def both(qkv, g):
        given = segment, narrow, jnp.int32(case.used)
        out, lse = attention_loop.forward(*rest, qkv, *given)
        return out, lse, attention_loop.backward(*rest, qkv, *given, out, lse, g)[0]

    out, lse, grads = both(qkv, g)
    assert out.dtype == grads.dtype == qkv.dtype and lse.dtype == jnp.float32
    filled = segment >= 0
    each = case.width // 4 if case.narrow else case.width
    assert not np.asarray(out[case.used * each :], np.float32).any()
    assert jnp.isfinite(out).all() and jnp.isfinite(grads).all()
    want_out, want_lse, want_grads = defined(qkv, segment, g)
    tolerance = 2e-6 if case.dtype == "float32" else 1e-2
    largest = np.abs(want_lse).max()
    # The sum is of weights that are rounded as they meet the values.
    rounded = 0 if case.dtype == "float32" else 2**-9
    np.testing.assert_allclose(
        lse[:, filled], want_lse[:, filled], atol=2e-6 * largest + rounded, rtol=0
    )
    for got, want in [(out, want_out), *((grads[:, t], want_grads[:, t]) for t in range(3))]:
        np.testing.assert_allclose(
            np.asarray(got, np.float64)[filled],
            want[filled],
            atol=tolerance * max(largest / 10, 1) * np.abs(want).max(),
        )


def test_scores_of_the_loop_stay_inside_of_kernels():
    """On CPUs: K x K is an array only between the backward pass's kernels, once."""
    case = Case(256, 1, 16, sizes=(256,))
    qkv, segment, g = arrays(case)
    given = 2, 256, qkv, segment, None, jnp.int32(2)
    out, lse = jax.eval_shape(lambda: attention_loop.forward(*given))
    for function, arrays_met in (
        (lambda out, lse: attention_loop.forward(*given), 0),
        (lambda out, lse: attention_loop.backward(*given, out, lse, g), 1),
    ):
        kernels = cost.count(hlo.parse(jax.jit(function).lower(out, lse).compile().as_text()))
        assert sum(kernel.size >= 4 * 256**2 for kernel in kernels.kernels) <= 3 * arrays_met


def test_blocks_meet_if_they_share_a_segment():
    rng = np.random.default_rng(1)
    segment = np.full((3, 512), -1, np.int32)
    segment[0] = np.sort(rng.integers(0, 7, 512))  # clouds one after the other
    segment[1, :300] = 7  # one cloud, then nothing
    first, last = (np.asarray(x) for x in blocks_met(jnp.asarray(segment), 128, 64))
    assert first.shape == last.shape == (3, 4)
    for patch in range(3):
        for i in range(4):
            own = set(segment[patch, 128 * i : 128 * (i + 1)]) - {-1}
            meets = [
                j for j in range(8) if own & set(segment[patch, 64 * j : 64 * (j + 1)].tolist())
            ]
            assert list(range(first[patch, i], last[patch, i])) == meets


def step(qkv, segment, used) -> jax.Array:
    return patch_attention(4, 128, qkv, segment, None, used)


def shapes(dtype=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((256, 3, 2, 16), dtype),
        jax.ShapeDtypeStruct((256,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "triton"), ("cpu", None)]
)
def test_a_program_gets_the_kernels_of_the_platform_it_is_lowered_for(platform, call):
    traced = jax.jit(jax.grad(lambda *a: step(*a).sum().astype(jnp.float32))).trace(*shapes())
    assert "pallas" not in str(traced.jaxpr)  # nor are kernels traced for others
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("custom_call" in text) == (call is not None)
    assert call is None or text.count(call) >= 2  # forward and backward


def test_named_results_are_kept_by_rematerialised_blocks():
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)

    def blocks(qkv, segment, used):
        def block(qkv, _):
            return qkv + jnp.expand_dims(step(jnp.sin(qkv), segment, used), 1), None

        return lax.scan(jax.checkpoint(block, policy=policy), qkv, None, length=3)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(blocks))(*shapes(jnp.float32)))
    assert text.count("patch_attention[") == 1 and text.count("patch_attention_gradient[") == 1
