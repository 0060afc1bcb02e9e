"""Times of a program: making it, starting it again, running it; and of the machine."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from point_jax.training import programs

# Edge of the matrices: a product that takes longer than its start.
CALIBRATION, _ON_ACCELERATORS = 2048, 8192
_TRIES = 5
# Of `exchange_time`: float32 numbers that XLA shares out to cores, and how often they turn.
_EXCHANGED, _TURNS = 1 << 20, 64

# A program of another process may be the same but for the names of its scopes.
_CACHE = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_include_metadata_in_key": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Made(NamedTuple):
    """A compiled program and the seconds that it took.

    Attributes:
      compiled: what to call.
      lower: tracing and lowering.
      compile: compiling, or loading what a persistent cache held.
      from_cache: whether it was loaded.
    """

    compiled: Any
    lower: float
    compile: float
    from_cache: bool


def machine_speed(dtype: str, size: int | None = None) -> Callable[[], float]:
    """A function that multiplies two square matrices and returns the FLOP/s, the best of five.

    On CPUs the first product after a training step took 20 to 60 % longer than the next ones.

    Args:
      dtype: of the matrices.
      size: their edge; None for what is long enough here.
    """
    if size is None:
        size = CALIBRATION if jax.default_backend() == "cpu" else _ON_ACCELERATORS
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(product(matrix, matrix))
    return lambda: (
        2 * size**3 / min(seconds(lambda: product(matrix, matrix))[1] for _ in range(_TRIES))
    )


def exchange_time() -> Callable[[], float] | None:
    """A function that says in how many seconds CPU cores pass 4 MB on; None on accelerators.

    A loop turns an array around, in parts of one core each, and copies it, in one core: most of
    what a core reads another one wrote. Where a virtual machine's cores are moved apart a turn
    takes four times as long (80 and 310 us) and short kernels twice, while products of large
    matrices feel nothing.
    """
    if jax.default_backend() != "cpu":
        return None
    array = jnp.ones(_EXCHANGED, jnp.float32)

    def turn(_, x):
        return 0.5 * jnp.flip(x) + 1

    loop = jax.jit(lambda x: jax.lax.fori_loop(0, _TURNS, turn, x)).lower(array).compile()
    jax.block_until_ready(loop(array))
    return lambda: min(seconds(lambda: loop(array))[1] for _ in range(_TRIES)) / _TURNS


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds until that is ready."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def make(function: Any, arguments: tuple[Any, ...], cache: Path) -> Made:
    """Traces, lowers and compiles a jitted function anew, inside `cache_in(cache)`.

    Args:
      function: jitted.
      arguments: of `function.lower`.
      cache: the cache's folder, to tell whether the program came from it.
    """
    jax.clear_caches()
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    before = set(cache.iterdir())
    compiled = lowered.compile()
    end = time.perf_counter()
    return Made(compiled, middle - start, end - middle, not set(cache.iterdir()) - before)


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Keeps every compiled program in a folder for as long as the context lasts."""
    wanted = _CACHE | {"jax_compilation_cache_dir": str(folder)}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        _configure(wanted)
        yield
    finally:
        _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it remembers its folder


def start_kept(function: Any, settings: tuple[Any, ...], arguments: tuple[Any, ...]) -> float:
    """Seconds to start a program that `training.programs` has kept.

    Returns:
      NaN where nothing is kept of it: not on a CPU, several processes, no cache.
    """
    took = math.nan
    for _ in range(2):  # the first time it is made
        jax.clear_caches()
        start = time.perf_counter()
        program = programs.keep(function, *settings)
        if not isinstance(program, programs.Kept) or program.prepare(*arguments) is function:
            return math.nan
        took = time.perf_counter() - start
    return took
