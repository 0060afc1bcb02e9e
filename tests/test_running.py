"""Running sums equal NumPy's, on the way of CPUs and on that of accelerators."""

import jax
import numpy as np
import pytest

from point_jax.geometry.running import running_sum, running_sum_by_products


@pytest.mark.parametrize("size", [1, 127, 128, 129, 20_000])
@pytest.mark.parametrize("way", [running_sum, running_sum_by_products])
def test_a_running_sum_equals_numpys(way, size):
    values = np.random.default_rng(size).integers(0, 800, size).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(way)(values), np.cumsum(values))
    odd = values % 2 == 1
    np.testing.assert_array_equal(jax.jit(running_sum)(odd), np.cumsum(odd))


def test_a_running_sum_is_exact_up_to_its_limit():
    values = np.full(1 << 12, 1 << 12, np.int32)  # 2^24 in all
    values[0] -= 1
    np.testing.assert_array_equal(jax.jit(running_sum_by_products)(values), np.cumsum(values))
