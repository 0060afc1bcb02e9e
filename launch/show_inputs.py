"""What launch.show is given: the command line, and clouds with their features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import point_jax
from launch import command
from point_jax import storage
from point_jax.data.arrays import ReadOptions
from point_jax.data.checks import UNITS
from point_jax.data.readers import Scan, find_clouds, read_cloud
from point_jax.data.scenes import UP, SceneError, read_dataset_json
from point_jax.training.config import ConfigError
from point_jax.visual.clouds import FeatureCloud, feature_cloud
from point_jax.visual.page import LIMIT
from point_jax.visual.retrieval import Item

UP_CAST = 2  # the Sonata release's demos


@dataclass(frozen=True)
class Options:
    """The command line, its values checked as far as they can be without the clouds."""

    command: str
    input: tuple[Path, ...]
    output: Path
    checkpoint: Path | None
    up_cast: int
    read: ReadOptions
    limit: int
    brightness: float
    saturate: float
    at: tuple[str, ...]
    truth: str
    within: float | None
    lines: int
    query: str
    objects: bool
    count: int
    classes: tuple[str, ...] | None = None

    def file(
        self, suffix: str, name: str = "", clouds: Sequence[FeatureCloud] = (), more: str = ""
    ) -> Path:
        """A file to write: named after the command, and the cloud where there are several."""
        parts = [self.command, name if len(clouds) > 1 else "", more]
        stem = "_".join(part.replace("/", "_") for part in parts if part)
        return self.output / f"{stem}.{suffix}"

    def points(self, cloud: FeatureCloud) -> list[tuple[int | None, list[float] | None]]:
        """Index or place of every --at."""
        points = []
        for text in self.at:
            try:
                values = [float(value) for value in text.split(",")]
                index = int(text) if len(values) == 1 else None
            except ValueError:
                values, index = [], None
            if index is None and len(values) != 3:
                raise ConfigError(
                    f"--at={text}: expected the number of a point of {cloud.name}, or a place X,Y,Z"
                )
            points.append((index, None if index is not None else values))
        return points

    def transform(self, one: FeatureCloud, two: FeatureCloud) -> np.ndarray:
        """(4, 4) from the coordinates in memory of the first cloud to those of the second."""
        matrix = np.eye(4)
        if self.truth != "same":
            try:
                matrix = np.loadtxt(self.truth)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"--truth={self.truth}: neither 'same' nor a text file of numbers: {error}"
                ) from error
            if matrix.shape != (4, 4):
                raise ConfigError(
                    f"--truth={self.truth}: expected 4 lines of 4 numbers, got {matrix.shape}"
                )
        out, back = np.eye(4), np.eye(4)
        out[:3, 3], back[:3, 3] = one.origin, -two.origin
        return back @ matrix @ out

    def query_among(self, items: Sequence[Item], clouds: Sequence[FeatureCloud]) -> int:
        """Place of the --query among items."""
        name, _, instance = self.query.rpartition(":") if self.objects else (self.query, "", "")
        names = [cloud.name for cloud in clouds]
        same = [path.absolute() == Path(name).absolute() for path in self.paths]
        wanted = same.index(True) if any(same) else -1
        wanted = names.index(name) if wanted < 0 and name in names else wanted
        if wanted < 0 or (self.objects and not instance.lstrip("-").isdigit()):
            form = "PATH:INSTANCE, as table:12" if self.objects else "PATH"
            raise ConfigError(
                f"--query={self.query}: expected {form}, one of the clouds {', '.join(names[:20])}"
            )
        for place, item in enumerate(items):
            if item.cloud == wanted and (not self.objects or item.instance == int(instance)):
                return place
        there = [str(item.instance) for item in items if item.cloud == wanted]
        raise ConfigError(
            f"--query={self.query}: {names[wanted]} has no object {instance} that is large enough; "
            f"it has {', '.join(there[:40]) or 'none at all'}"
        )

    @property
    def paths(self) -> list[Path]:
        """All clouds' paths: inputs that are folders of clouds hold many."""
        found = [path for given in self.input for path in find_clouds(given)]
        query = self.query.rpartition(":")[0] if self.objects else self.query
        if query and Path(query).exists() and len(find_clouds(query)) == 1:
            found += find_clouds(query)
        return list({path.absolute(): path for path in found}.values())


@contextmanager
def for_the_user() -> Iterator[None]:
    """Errors of values that came from the command line or files, told as such."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parse(argv: Sequence[str], commands: Sequence[str]) -> Options:
    """The command line.

    Raises:
        ConfigError: a flag that does not exist or does not belong to the command, a missing one,
            or a value that cannot be.
    """
    parser = command.Parser("launch.show", add_help=False)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--input", action="append", required=True, type=Path)
    parser.add_argument("--output", required=True, type=partial(storage.local, what="--output"))
    parser.add_argument("--checkpoint", type=storage.place)
    parser.add_argument("--up_cast", type=int, default=UP_CAST)
    parser.add_argument("--units", choices=tuple(UNITS), default="")
    parser.add_argument("--up", choices=tuple(UP), default="")
    parser.add_argument("--wo_color", action="store_true")
    parser.add_argument("--wo_normal", action="store_true")
    parser.add_argument("--classes", type=Path)
    parser.add_argument("--limit", type=int, default=LIMIT)
    only = {
        "pca": {"brightness": 1.2, "saturate": 0.0},
        "similarity": {"at": []},
        "match": {"truth": "", "within": None, "lines": 60},
        "retrieve": {"query": "", "objects": False, "count": 5},
    }
    parser.add_argument("--brightness", type=float)
    parser.add_argument("--saturate", type=float)
    parser.add_argument("--at", action="append")
    parser.add_argument("--truth")
    parser.add_argument("--within", type=float)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--query")
    parser.add_argument("--objects", action="store_true", default=None)
    parser.add_argument("--count", type=int)
    given = parser.parse_args(argv[1:])
    for owner, flags in only.items():
        for flag, default in flags.items():
            if getattr(given, flag) is not None and owner != given.command:
                raise ConfigError(f"--{flag} belongs to {owner}, not to {given.command}")
            if getattr(given, flag) is None:
                setattr(given, flag, default)
    for flag, low in (("lines", 0), ("count", 1), ("limit", 1), ("up_cast", 0)):
        if getattr(given, flag) < low:
            raise ConfigError(f"--{flag} is {getattr(given, flag)}; expected {low} or more")
    if given.command == "retrieve" and not given.query:
        raise ConfigError("retrieve needs --query, the scene or object to find others like")
    if not 0 <= given.saturate < 0.5 or not given.brightness > 0:
        raise ConfigError("expected --saturate in [0, 0.5) and --brightness above 0")
    if given.within is not None and not given.within > 0:
        raise ConfigError(f"--within is {given.within}; expected metres above 0")
    read = ReadOptions(
        units=given.units, up=given.up, color=not given.wo_color, normal=not given.wo_normal
    )
    rest = {
        k: v for k, v in vars(given).items() if k not in ("units", "up", "wo_color", "wo_normal")
    }
    rest |= {"input": tuple(given.input), "at": tuple(given.at)}
    rest["classes"] = None if given.classes is None else _named(given.classes)
    return Options(**rest, read=read)


def load_clouds(options: Options) -> tuple[list[FeatureCloud], tuple[str, ...] | None]:
    """All clouds of the command line with their features, and the names of their classes.

    Raises:
        SceneError: a cloud cannot be read, or has no features and there is no checkpoint.
    """
    paths = options.paths
    names = _names(paths)
    scans = [read_cloud(path, options.read) for path in paths]
    for name, scan in zip(names, scans, strict=True):
        for note in scan.notes:
            print(f"{name}: {note}")
    classes = {_classes(path) for path in paths}
    if options.checkpoint is not None:
        features = _encoded(options.checkpoint, options.up_cast, scans)
    else:
        features = [(_stored(path), None) for path in paths]
    clouds = []
    for name, scan, (rows, inverse) in zip(names, scans, features, strict=True):
        with for_the_user():
            clouds.append(
                feature_cloud(
                    name,
                    scan.coord,
                    rows,
                    inverse=inverse,
                    color=scan.color,
                    normal=scan.normal,
                    segment=scan.segment,
                    instance=scan.instance,
                    origin=scan.frame.offset @ UP[scan.frame.up].T * UNITS[scan.frame.units],
                )
            )
    return clouds, classes.pop() if len(classes) == 1 else None


def place_of(cloud: FeatureCloud) -> np.ndarray:
    """(n, 3) coordinates for a file: metres, z up, double precision where they are large."""
    return cloud.coord + cloud.origin if cloud.origin.any() else cloud.coord


def _encoded(
    checkpoint: Path, up_cast: int, scans: Sequence[Scan]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each cloud the features (m, E) of the level reached, and the row (n,) of each point."""
    command.keep_compiled()
    encoder = point_jax.load(checkpoint)
    out = []
    for points in encoder.stream(scans):
        level = points.up_cast(min(up_cast, points.depth - 1))
        out.append((level.features, level.ancestor[level.inverse]))
    return out


def _stored(path: Path) -> np.ndarray:
    """Features (n, E) of an NPZ file that launch.infer wrote."""
    if path.suffix.lower() != ".npz":
        raise SceneError(
            f"{path}: has no features; give --checkpoint=DIR to compute them, or an NPZ file with "
            f"coord and features that launch.infer wrote"
        )
    with np.load(path, allow_pickle=False) as arrays:
        if "features" not in arrays:
            raise SceneError(
                f"{path}: has no array features, only {', '.join(arrays.files)}; give "
                f"--checkpoint=DIR to compute them"
            )
        return arrays["features"]


def _named(file: Path) -> tuple[str, ...]:
    """Names of classes in a file."""
    if file.name == "dataset.json":
        names = read_dataset_json(file.parent).get("classes")
    else:
        try:
            names = tuple(line for line in file.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--classes={file}: not readable as text: {error}") from error
    if not names:
        raise ConfigError(f"--classes={file}: there are no names of classes in it")
    return names


def _classes(path: Path) -> tuple[str, ...] | None:
    """Names of the classes of a scene folder's data set, if it states them."""
    if not path.is_dir():
        return None
    return read_dataset_json(path.absolute().parents[1]).get("classes")


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part without suffix, and as much more as tells them apart."""
    names = [
        path.absolute().with_suffix("") if path.is_file() else path.absolute() for path in paths
    ]
    for parts in range(1, 12):
        short = ["/".join(name.parts[-parts:]) for name in names]
        if len(set(short)) == len(short):
            return short
    return [str(path) for path in paths]
