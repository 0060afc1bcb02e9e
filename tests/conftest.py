"""Settings that every test runs under, and processes of their own for multi-device tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IN_CHILD = "POINT_JAX_TEST_DEVICES"

# JAX reads these when it is first imported, which happens after this file; commands that tests
# start inherit them. What is already set in the environment wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs of a module and of the commands it starts compile in two thirds of the time.

    XLA leaves most optimizations out. For modules that run programs for moments; not for those that
    compare with the originals' numbers.
    """
    import jax

    name = "disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"JAX_{name.upper()}", "1")
        jax.config.update(f"jax_{name}", True)
        yield
    jax.config.update(f"jax_{name}", False)


class DeviceTest(pytest.Item):
    """A test marked `devices(count)`: the same test, run by a pytest in a process of its own.

    The number of CPU devices is fixed when JAX starts, so it cannot change within this process.
    """

    count: int

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rs", "--no-header", self.nodeid]
        env = os.environ | {
            IN_CHILD: str(self.count),
            "JAX_NUM_CPU_DEVICES": str(self.count),
            # The CPU client sizes its thread pool by NPROC. With fewer threads than devices, steps
            # in flight can wait for one another's collectives for ever.
            "NPROC": str(max(16, 2 * self.count)),
        }
        try:
            child = subprocess.run(
                command, cwd=self.config.rootpath, env=env, text=True, timeout=600,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"no end after {error.timeout} s:\n{error.output}", pytrace=False)
        if child.returncode != 0:
            pytest.fail(child.stdout, pytrace=False)
        if "1 passed" not in child.stdout:
            pytest.skip(child.stdout.strip().splitlines()[-2])

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.name} [{self.count} devices]"


def _replacements(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    for item in items:
        marker = item.get_closest_marker("devices")
        if marker is None or os.environ.get(IN_CHILD):
            yield item
        else:
            assert item.parent is not None
            stand_in = DeviceTest.from_parent(item.parent, name=item.name)
            stand_in.count = marker.args[0]
            stand_in.own_markers = item.own_markers
            yield stand_in


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts stand-ins in the places of multi-device tests (after -k and -m have chosen)."""
    items[:] = _replacements(items)
