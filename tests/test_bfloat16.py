"""bfloat16 on CPUs: the same numbers, and no slice that costs a whole array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point_jax.measure import cost, hlo
from point_jax.ops.attention_loop import backward, forward
from point_jax.ops.bfloat16 import dot_general
from point_jax.ops.rowwise import by_rows


def normal(seed, *shape):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.bfloat16)


def assert_rounded(values, exact):
    """As `exact` rounded to bfloat16, but for what sums in float32 can add."""
    assert values.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(values), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("rows", [(300,), (4, 75)])
def test_a_dense_layer_rounds_its_sums_once(rows):
    x, kernel, slope = normal(0, *rows, 96), normal(1, 96, 40), normal(2, *rows, 40)

    def layer(x, kernel):
        return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    y, backward = jax.vjp(jax.jit(layer), x, kernel)
    of_x, of_kernel = backward(slope)
    exact_x, exact_kernel, exact_slope = (np.float64(a) for a in (x, kernel, slope))
    assert_rounded(y, exact_x @ exact_kernel)
    assert_rounded(of_x, exact_slope @ exact_kernel.T)
    flat_x, flat_slope = exact_x.reshape(-1, 96), exact_slope.reshape(-1, 40)
    assert_rounded(of_kernel, flat_x.T @ flat_slope)


DENSE = (((1,), (0,)), ((), ()))


def test_on_cpus_the_product_is_one_of_bfloat16_into_float32():
    """The only one that is fast there."""
    x, kernel = normal(0, 64, 64), normal(1, 64, 64)
    text = jax.jit(lambda x, kernel: dot_general(x, kernel, DENSE)).lower(x, kernel).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    (product,) = products
    assert product.endswith("(tensor<64x64xbf16>, tensor<64x64xbf16>) -> tensor<64x64xf32>")


def test_everything_else_is_a_plain_product():
    x, kernel = normal(0, 4, 6), normal(1, 6, 5)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, kernel))
    for arguments, how in (
        (wide, {}),
        ((x, wide[1]), {}),
        ((x, kernel), {"preferred_element_type": jnp.float32}),
        ((x, kernel), {"precision": jax.lax.Precision.HIGHEST}),
    ):
        ours = jax.make_jaxpr(lambda x, kernel, how=how: dot_general(x, kernel, DENSE, **how))
        plain = jax.make_jaxpr(
            lambda x, kernel, how=how: jax.lax.dot_general(x, kernel, DENSE, **how)
        )
        assert str(ours(*arguments)) == str(plain(*arguments))
    assert dot_general(x[:0], kernel, DENSE).shape == (0, 5)
    with pytest.raises(ValueError, match="contracts x's last dimension"):
        dot_general(x, kernel, (((0,), (1,)), ((), ())))


def largest_in_loops(function, *args):
    """Bytes of the kernel that moves most, of those that run more than once."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return max(kernel.size for kernel in cost.count(hlo.parse(text)).kernels if kernel.times > 1)


def rows(x):
    return by_rows(lambda weight, x: x @ weight, normal(1, 32, 32), x, jnp.int32(9_000))


QKV, SLOTS = normal(0, 4096, 3, 8, 16), jnp.zeros(4096, jnp.int32)


def attend(qkv):
    return forward(1, 128, qkv, SLOTS, None, jnp.int32(32))[0]


def attend_back(qkv):
    lse, slope = jnp.zeros((8, 4096)), qkv[:, 0]
    return backward(1, 128, qkv, SLOTS, None, jnp.int32(32), slope, lse, slope)[0]


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (rows, normal(0, 16_384, 32)),
        (jax.grad(lambda x: rows(x).astype(jnp.float32).sum()), normal(0, 16_384, 32)),
        (attend, QKV),
        (attend_back, QKV),
    ],
    ids=["rows", "rows back", "attention", "attention back"],
)
def test_a_loop_never_passes_over_all_that_it_writes(function, x):
    whole = jax.eval_shape(function, x)
    assert largest_in_loops(function, x) < whole.size * whole.dtype.itemsize / 2
