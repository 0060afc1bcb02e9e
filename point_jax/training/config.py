"""The config: defaults of the training part, command line, checks, and `config.json`."""

import difflib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags
from ml_collections import ConfigDict, config_flags

from point_jax import limits

Config = Any  # a ConfigDict; type checkers cannot know what its attributes hold

CONFIG = "config.json"  # in a run's folder
PACKAGES = ("point_jax", "jax", "jaxlib", "numpy", "flax", "orbax-checkpoint", "grain")

# Keys that may change when a run is resumed: they change what is written, where, how fast, and
# whether the run goes on, not what is computed.
HARMLESS = (
    "about",  # the file's argument: what it decides are the other keys
    *("train.log_every", "train.max_bad_steps", "checkpoint.every", "checkpoint.keep"),
    *("mesh.fsdp", "mesh.rules", "mesh.smallest", "network.remat", "network.remat_levels"),
    *("data.threads", "data.prefetch", "data.cache", "data.skip_bad", "data.patience"),
    *("data.held_out.sources", "data.held_out.scenes"),
    *("test.sources", "test.first_grid", "test.votes", "test.submission"),
    *("test.floors", "test.robustness"),
    *("probe.every", "probe.train_sources", "probe.test_sources", "probe.scenes", "probe.voxels"),
)

# Keys that older programs did not know, and the values that say what these did.
ADDED = {"network.stem": "linear", "network.norm": "layer", "network.pooling": "grid"}
ADDED |= {"data.images.count": 0, "data.images.height": 224, "data.images.width": 224}
ADDED |= {"data.images.features": "", "images.height": 30, "images.width": 40}
ADDED |= {"images.dtype": "float32", "images.layers": [], "head": "random"}
ADDED |= {"network.remat_levels": [], "crops.drop_probability": 1.0}
ADDED |= {"teacher": "online"}
ADDED |= {"mesh.fsdp": 1, "mesh.rules": [["", "largest"]], "mesh.smallest": 65_536}

OPTIONAL = ("schedule",)  # sections that only some objectives read

_POSITIVE, _COUNT = limits.number(above=0), limits.whole(1)
_SHARES = limits.each(limits.PROBABILITY, "first", "last")
_SIZES = limits.each(_POSITIVE, "first", "last")


def _is_rule(value: Any) -> bool:
    try:
        pattern, cut = value
        re.compile(pattern)
    except (TypeError, ValueError, re.error):
        return False
    return cut in ("largest", "whole") or (isinstance(cut, int) and not isinstance(cut, bool))


_RULES = limits.each(
    limits.Limit(
        _is_rule, "a regular expression and 'largest', 'whole' or a dimension, as in ('kernel$', 1)"
    )
)
LIMITS = {
    "seed": limits.whole(0, 2**31 - 1),
    "train.steps": _COUNT,
    "train.batch": _COUNT,
    "train.log_every": _COUNT,
    "train.max_bad_steps": _COUNT,
    "optim.lr": _POSITIVE,
    "optim.lr_decay": limits.number(above=0, most=1),
    "optim.block_lr": _POSITIVE,
    "optim.pct_start": limits.PROBABILITY,
    "optim.div": _POSITIVE,
    "optim.final_div": _POSITIVE,
    "optim.beta1_high": limits.number(0, below=1),
    "optim.beta1_low": limits.number(0, below=1),
    "optim.beta2": limits.number(above=0, below=1),
    "optim.eps": _POSITIVE,
    "optim.wd": limits.number(0),
    "optim.wd_final": limits.number(0),
    "optim.clip": _POSITIVE,
    "schedule.warmup": limits.PROBABILITY,
    "schedule.mask_size": _SIZES,
    "schedule.mask_ratio": _SHARES,
    "schedule.teacher_temp": _SIZES,
    "schedule.momentum": _SHARES,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": _COUNT,
    "mesh.fsdp": _COUNT,
    "mesh.rules": _RULES,
    "mesh.smallest": limits.whole(0),
}


class ConfigError(ValueError):
    """A key or value that the person who started the run has to change."""


def default_config() -> Config:
    """Defaults of everything that this package reads: Sonata's base recipe.

    A config file starts from this and adds `config.objective` and `config.data`. The sections are
    locked: assigning a key that does not exist is an error that names the nearest one.
    """
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a workdir, checkpoint or converted weights that a new run starts from

    config.train = train = ConfigDict()
    train.steps = 200_000
    train.batch = 96  # scenes per step, over all devices
    train.log_every = 10
    train.max_bad_steps = 20  # so many skipped steps in a row end the run

    config.optim = optim = ConfigDict()
    optim.lr = 0.004
    optim.lr_decay = 0.9  # from one block of the encoder to the one before it
    optim.block_lr = 1.0  # factor of the learning rate of all blocks, of encoder and decoder
    optim.pct_start = 0.05
    optim.div = 10.0  # the first step's learning rate is lr / div
    optim.final_div = 1000.0  # the last step's is lr / div / final_div
    optim.beta1_high = 0.95
    optim.beta1_low = 0.85
    optim.beta2 = 0.999
    optim.eps = 1e-8
    optim.wd = 0.04
    optim.wd_final = 0.2
    optim.clip = 3.0

    config.schedule = schedule = ConfigDict()
    schedule.warmup = 0.05  # share of the steps; of mask_size, mask_ratio, teacher_temp
    schedule.mask_size = (0.1, 0.4)  # metres
    schedule.mask_ratio = (0.3, 0.7)
    schedule.teacher_temp = (0.04, 0.07)
    schedule.momentum = (0.994, 1.0)

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 1000
    checkpoint.keep = 2

    # How the state lies on the devices: changes memory and traffic, not what is computed.
    config.mesh = mesh = ConfigDict()
    mesh.fsdp = 1  # so many neighbouring devices share one copy of the state; 1: each has its own
    # Of each (regular expression, dimension) the first that is found in a parameter's path, as in
    # "backbone.enc.stage0.blocks.qkv.kernel", says along which dimension it is cut: a number,
    # "largest" (of those that fsdp divides; whole if there is none) or "whole". Without any: whole.
    mesh.rules = (("", "largest"),)
    mesh.smallest = 65_536  # numbers; smaller parameters, and vectors, stay whole in any case

    for section in (train, optim, schedule, checkpoint, mesh):
        section.lock()
    return config


def parse_command_line(argv: Sequence[str]) -> tuple[Config, str]:
    """Reads `--config=FILE.py[:ARG] --workdir=DIR [--config.some.key=VALUE ...]`.

    Args:
        argv: the command line, the program's name first.

    Returns:
        The locked config with the overrides applied, and the workdir.

    Raises:
        ConfigError: a flag or key that does not exist (with the nearest name), a value of the
            wrong type, a config file that is missing or fails, a flag given twice.
    """
    names = [arg.split("=", 1)[0].lstrip("-") for arg in argv[1:] if arg.startswith("-")]
    for name in names:
        if names.count(name) > 1:  # ml_collections would join two tuples
            raise ConfigError(f"--{name} is given twice")
    overrides = [arg for arg in argv[1:] if re.match(r"--?(no)?config\.", arg)]
    plain = [arg for arg in argv if arg not in overrides]
    config = _parse_flags(plain)[0]
    for override in overrides:
        _check_key(override, config)
    config, workdir = _parse_flags(argv)
    return config, workdir


def _parse_flags(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    argv = list(argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", None, "the config file", flag_values=values, sys_argv=argv
    )
    workdir = flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    try:
        rest = values(argv)[1:]
        config = holder.value
        if config is None:
            raise ConfigError("--config=FILE.py is missing")
        if not isinstance(config, ConfigDict):
            hasattr(config, "seed")  # stands for a file that could not be opened: it says so now
            raise ConfigError(f"get_config() gave a {type(config).__name__}, expected a ConfigDict")
    except (flags.Error, OSError, ImportError, SyntaxError, NameError, AttributeError) as error:
        raise ConfigError(_readable(error)) from error
    if rest:
        raise ConfigError(f"not a flag: {' '.join(rest)} (write --config.key=VALUE)")
    if not workdir.value:
        raise ConfigError("--workdir=DIR is missing: where the run's files go")
    return config, workdir.value


def _readable(error: Exception) -> str:
    """The last line that says what went wrong; ml_collections wraps whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    if "get_config() takes 0 positional" in line:
        return "get_config() of the config file takes no argument: write --config=FILE.py, no ':'"
    return line


def _check_key(override: str, config: ConfigDict) -> None:
    """Raises ConfigError where `--config.a.b=value` names no key of the config."""
    path = re.sub(r"^--?(no)?config\.", "", override.split("=", 1)[0])
    place, node = "config", cast(Any, config)
    for key in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"no key '{key}' in {place}: {place} is a {type(node).__name__}")
        if key not in node:
            near = difflib.get_close_matches(key, list(node), 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(sorted(node))}"
            raise ConfigError(f"no key '{key}' in {place}; {hint}")
        place, node = f"{place}.{key}", node[key]
    if isinstance(node, ConfigDict):
        raise ConfigError(f"{place} is a section, not a value; it has: {', '.join(sorted(node))}")


def check_config(config: ConfigDict) -> None:
    """Checks the sections that this package reads.

    Raises:
        ConfigError: a key is missing, unknown (with the nearest name), or its value is of the
            wrong type or out of range.
    """
    wanted = default_config()
    for section in set(OPTIONAL) - set(config):
        del wanted[section]
    for place, default in _leaves(wanted.to_dict()):
        section, _, key = place.rpartition(".")
        node = cast(Any, config)
        for part in filter(None, section.split(".")):
            node = node.get(part, ConfigDict())
        if key not in node:
            raise ConfigError(f"config.{place} is missing; its default is {default!r}")
        if type(node[key]) is not type(default):
            raise ConfigError(
                f"config.{place} is {node[key]!r}, expected a {type(default).__name__}"
                f" such as {default!r}"
            )
    for name, section in wanted.items():
        if isinstance(section, ConfigDict):
            for key in cast(ConfigDict, config[name]):
                _check_key(f"--config.{name}.{key}", wanted)

    try:
        limits.check(dict(_leaves(config.to_dict())), LIMITS, "config.")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _leaves(tree: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names of the values in which two nested dicts differ, each with "name: old -> new"."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return {
        key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config and the package versions as JSON values.

    Raises:
        ConfigError: a value has no JSON form.
    """
    content = {"config": config.to_dict(), "versions": package_versions()}
    try:
        return json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be written as JSON: {error}") from error


def compare_config(
    config: ConfigDict, workdir: Path, folder: Path | None = None, *, binding: bool = True
) -> list[str]:
    """Compares the config with the one the workdir was started with.

    Args:
        config: the config to go on with.
        workdir: the run's folder.
        folder: may have its `config.json`; None: the same.
        binding: whether there is anything to go on from: a checkpoint, a result. If not, all keys
            may change.

    Returns:
        Remarks for the person who resumes the run: changed package versions, changed keys.

    Raises:
        ConfigError: keys that decide what the run computes differ; all are named.
    """
    file, source = (folder or workdir) / CONFIG, workdir / CONFIG
    if not file.exists():
        return []
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is not a config this program wrote: {error}") from error
    return compare_contents(config, old, workdir, source, binding=binding)


def compare_contents(
    config: ConfigDict, old: Any, workdir: Path, source: Path, *, binding: bool = True
) -> list[str]:
    """As `compare_config`, with what `resolved` gave when the workdir was started.

    Args:
        config: the config to go on with.
        old: the JSON value.
        workdir: the run's folder, for messages.
        source: where `old` was read, for messages.
        binding: as for `compare_config`.
    """
    new = resolved(config)
    try:
        before, after = dict(_leaves(old["config"])), dict(_leaves(new["config"]))
        versions = dict(old.get("versions", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source} is not a config this program wrote: {error}") from error
    changed = differences({k: v for k, v in ADDED.items() if k in after} | before, after)
    grave = [text for key, text in changed.items() if key not in HARMLESS]
    if grave and binding:
        raise ConfigError(
            f"{workdir} was started with another config ({'; '.join(grave)}); go on with the "
            f"same values, or start in a new --workdir with --config.init_from={workdir}"
        )
    remarks = [f"config changed, {text}" for text in changed.values()]
    for name, version in new["versions"].items():
        if binding and (was := versions.get(name)) != version:
            remarks.append(f"{name} was {was}, is {version}: results may differ in last bits")
    return remarks


def settle_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json`, the config that a run is bound to from its first checkpoint on."""
    content = json.dumps(resolved(config), indent=2, sort_keys=True) + "\n"
    write_atomically(workdir / CONFIG, content)


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's content; a kill at any moment leaves all of the old or all of the new."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
