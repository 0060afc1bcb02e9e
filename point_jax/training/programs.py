"""Compiled programs kept on disk, so that a second start traces, lowers and compiles nothing.

JAX's cache keeps what XLA has made, under a key that can be computed only after tracing and
lowering: for a training step, most of a second start. Here a program is found by what determines
it: the source files, versions, machine, settings, and the shapes and places of its arguments.

Two keys lead to a program: that one, and one with the lowered text in place of the sources, so that
a change of sources that leaves the program as it is compiles nothing. Whatever
is missing, damaged or of another version, machine or program is made again. The files lie in
JAX's cache folder and are trusted like the rest of it: reading them can run any code. Those of
another user are not read.
"""

import contextlib
import hashlib
import inspect
import os
import pickle
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from point_jax.training.fingerprint import digest, digest_sources, surroundings

FOLDER = "programs"
FILES = 40  # a program has two: itself, and where to find it

_PACKAGE = Path(__file__).resolve().parents[1]
# What a lowered program may call besides XLA: others (LAPACK, Python) are registered by lowering.
_HARMLESS_CALLS = re.compile(r"Sharding|SPMDFullToShardShape|SPMDShardToFullShape|xla\.sdy\..*")


def keep(
    function: Any, *settings: Any, sources: Sequence[Path] = (_PACKAGE,)
) -> Callable[..., Any]:
    """A jitted function whose program for the first arguments is kept in JAX's cache folder.

    Only on CPUs under Linux, in one process, with a local cache folder; elsewhere, and where
    JAX is told to look for NaN or not to compile, the function itself is returned.

    Args:
      function: jitted, without static arguments. What it closes over and how it is jitted must be
        told by `settings`, `sources` and its own file; changes in memory alone are not noticed.
      settings: values whose `repr` says all that the program depends on: specs, numbers, text.
      sources: files, and folders of Python files, that the program is made from.

    Raises:
      ValueError: a setting whose `repr` does not say what it is.
    """
    text = repr(settings)
    if unclear := re.search(r"\.\.\.| at 0x|\b[Aa]rray\(", text):
        around = text[max(0, unclear.start() - 80) : unclear.end() + 40]
        raise ValueError(f"settings must say all that they hold: {around!r}")
    config: dict[str, Any] = jax.config.values
    place = config["jax_compilation_cache_dir"]
    wanted = place and "://" not in place and config["jax_enable_compilation_cache"]
    watched = any(config[f"jax_{name}"] for name in ("disable_jit", "debug_nans", "debug_infs"))
    here = sys.platform == "linux" and jax.default_backend() == "cpu" and jax.process_count() == 1
    if not wanted or watched or not here:
        return function
    return Kept(function, text, sources, _Files(Path(place) / FOLDER))


class Kept:
    """What `keep` returns: called as the function, with the same results and donations."""

    def __init__(self, function: Any, settings: str, sources: Sequence[Path], files: "_Files"):
        self._function, self._files = function, files
        original = inspect.unwrap(function)
        self._told = (original.__module__, original.__qualname__, settings)
        self._sources = [*sources, Path(inspect.getfile(original))]
        self._program: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Calls the program; arguments unlike the first ones go to the function itself."""
        if self._program is None:
            self._program = self.prepare(*arguments)
        if self._program is not self._function:
            with contextlib.suppress(TypeError, ValueError):  # raised before anything is donated
                return self._program(*arguments)
        return self._function(*arguments)

    def prepare(self, *arguments: Any) -> Any:
        """The program for arguments, or `jax.ShapeDtypeStruct` like them, loaded or made."""
        devices = _devices(arguments)
        sources = digest_sources(self._sources)
        if devices is None or sources is None:
            return self._function
        around = (*surroundings(arguments), devices)
        key = digest(around, self._told, sources)
        if by_text := self._files.read(key):
            if program := _load(self._files.read(by_text.decode()), devices):
                return program
        elif by_text is not None:  # nothing can be kept of it: JAX's cache serves it
            return self._function

        self._function.clear_cache()  # what JAX has loaded in this process cannot be stored again
        lowered = self._function.lower(*arguments)
        text = lowered.as_text()
        calls = re.findall(r'custom_call\s*@"?([^"(\s]+)', text)
        if not all(map(_HARMLESS_CALLS.fullmatch, calls)):
            self._files.write(key, b"")
            return self._function
        by_text = digest(around, self._told, str(lowered.out_tree), text)
        program = _load(self._files.read(by_text), devices)
        if program is None:
            with _without_cache():
                program = lowered.compile()
            content = _dump(program)
            if not content:
                self._files.write(key, b"")
                return program
            self._files.write(by_text, content)
        self._files.write(key, by_text.encode())
        return program


class _Files:
    """Files by key in a folder, each with a checksum over key and content; the oldest go."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, key: str) -> bytes | None:
        """The content, or None if there is none, or none that can be trusted."""
        path = self._folder / key
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    return None
                data = file.read()
            os.utime(path)  # by use
        except OSError:
            return None
        content = data[32:]
        return content if data[:32] == _checksum(key, content) else None

    def write(self, key: str, content: bytes) -> None:
        """Whole or not at all; a folder that cannot be written is left alone."""
        temporary = self._folder / f"{key}.tmp-{os.getpid()}"
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                temporary.write_bytes(_checksum(key, content) + content)
                temporary.replace(self._folder / key)
            finally:
                temporary.unlink(missing_ok=True)
            self._delete_oldest()

    def _delete_oldest(self) -> None:
        ages = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process has deleted it
                ages.append((path.stat().st_mtime, path))
        for _, path in sorted(ages)[:-FILES]:
            path.unlink(missing_ok=True)


def _devices(arguments: tuple[Any, ...]) -> list[Any] | None:
    """The devices of a program, in order: of the arguments' one mesh, or else the first alone."""
    known = [getattr(x, "sharding", None) for x in jax.tree.leaves(arguments)]
    meshes: set[Any] = {at.mesh for at in known if isinstance(at, NamedSharding)}
    if not meshes:
        first = jax.devices()[:1]
        return first if {d for at in known if at for d in at.device_set} <= {*first} else None
    return list(meshes.pop().devices.flat) if len(meshes) == 1 else None


def _dump(program: Any) -> bytes:
    """A program that was compiled here; nothing if it cannot be stored."""
    try:
        return zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
    except Exception:  # of many kinds: constants, callbacks, a backend that cannot
        return b""


def _load(content: bytes | None, devices: list[Any]) -> Any:
    """A program from its file's content; None if there is none, or it cannot be read."""
    if not content:
        return None
    try:
        parts = pickle.loads(zlib.decompress(content))
        return serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
    except Exception:  # whatever a program of another version makes the libraries raise
        return None


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: a program that comes from JAX's cache lacks its code when stored again."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        _use_cache(False)
        yield
    finally:
        _use_cache(before)


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # it remembers whether it is used


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()
