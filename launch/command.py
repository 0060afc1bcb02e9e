"""How every command ends: an exit code, and for errors one line on stderr."""

import contextlib
import errno
import logging
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from point_jax import flags, storage
from point_jax.data.patience import HangingInput
from point_jax.data.scenes import SceneError
from point_jax.training import mesh, peers
from point_jax.training.checkpoint import CheckpointError
from point_jax.training.config import Config, ConfigError, check_config, parse_command_line
from point_jax.training.loop import FAILED, FINISHED, LOST, TrainingStopped
from point_jax.training.metrics import MetricsError

FOR_THE_USER = (
    *(ConfigError, SceneError, CheckpointError, MetricsError, TrainingStopped),
    *(storage.StorageError, FloatingPointError),
)

INTERRUPTED = 128 + signal.SIGINT  # the exit code
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of an OSError: nothing can be written there


class Parser(flags.Parser):
    """Raises a ConfigError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for whatever is wrong with the command line."""
        raise ConfigError(message)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str], usage: str | None) -> int:
    """Runs a command and turns errors into one line on stderr.

    Args:
        main: takes the command line, the program's name first; returns the exit code.
        argv: the command line.
        usage: what `--help` prints.

    Returns:
        What `main` returned; 0 after `--help`; 1 after an error, 130 after Ctrl-C, 200 when an
        object store went away. From an error it does not come back as one of several processes
        (`peers.leave`), nor when input hangs.
    """
    if {"-h", "--help"} & set(argv[1:]):
        print(usage)
        return FINISHED
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates, and raises as well
    code = FAILED
    try:
        return main(argv)
    except FOR_THE_USER as error:
        failure, message = error, str(error)
        if isinstance(error, storage.LostError):
            code = LOST
    except KeyboardInterrupt as error:
        failure, message = error, "interrupted before there was anything to save"
        code = INTERRUPTED
    except Exception as error:
        failure, message = error, f"{type(error).__name__}: {error}"
        if getattr(error, "errno", None) in FULL:
            message = str(error)
        elif storage.of_store(error):
            message = f"object store: {storage.told(error)}"
        else:  # a fault of the program: the way to it helps whoever mends it
            with contextlib.suppress(OSError, ValueError):  # a log on a full disk
                traceback.print_exc()
    message = " ".join(message.split())
    peers.say(message)
    peers.leave(failure, message, code)
    if isinstance(failure, HangingInput):
        peers.end(code)  # the usual end would wait for the thread that hangs
    return code


def split_job(argv: Sequence[str]) -> tuple[list[str], mesh.Job]:
    """Takes --coordinator=HOST:PORT, --processes=N and --process=I out of a command line.

    Returns:
        The rest of it, and what they say; see `mesh.start_processes`.

    Raises:
        ConfigError: a value that cannot be one.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given, rest = parser.parse_known_args(argv[1:])
    return [argv[0], *rest], mesh.Job(given.coordinator, given.processes, given.process)


def config_alone(program: str, config_file: str, rest: Sequence[str]) -> Config:
    """The config of a command that has flags of its own and no workdir.

    Args:
        program: its name.
        config_file: what --config says.
        rest: of the command line, overrides of the config.

    Raises:
        ConfigError: a flag that is no override, or a config that cannot be.
    """
    for word in rest:
        if not word.startswith(("--config.", "--noconfig.")):
            raise ConfigError(f"not a flag: {word}")
    argv = [program, f"--config={config_file}", "--workdir=none", *rest]
    config, _ = parse_command_line(argv)  # nothing is written to the workdir
    check_config(config)
    return config


def keep_compiled() -> None:
    """Keeps compiled programs between commands; JAX_COMPILATION_CACHE_DIR chooses the place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "point_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def make_folder(path: Path, flag: str = "--output") -> None:
    """Makes the folder that a flag names, before any work is done.

    Raises:
        ConfigError: it cannot be made, or written into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag}={path}: cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{flag}={path}: no permission to write there")


def check_file(path: Path, flag: str) -> None:
    """Refuses a file that a flag names and that cannot be written, before any work is done.

    Raises:
        ConfigError: there is no such folder, it may not be written into, or the path is a folder.
    """
    folder, wrong = path.absolute().parent, f"{flag}={path}: not a file that can be written"
    if not folder.is_dir():
        raise ConfigError(f"{flag}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{wrong}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{wrong}: no permission to write there")
