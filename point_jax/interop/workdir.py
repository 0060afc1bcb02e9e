"""The newest checkpoint of a run of this project as `Weights`."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from point_jax import storage
from point_jax.interop.convert import backbone_template
from point_jax.interop.files import read_json
from point_jax.interop.pointcept import to_state_dict
from point_jax.interop.release import config_of
from point_jax.interop.store import MANIFEST, SEGMENTOR, Weights, digest, leaves
from point_jax.models.functional import functional
from point_jax.models.heads import OnlineCluster, start_prototypes
from point_jax.objectives.settings import ONLINE, default_network, network_spec
from point_jax.objectives.sonata_spec import OFFLINE
from point_jax.training import checkpoint
from point_jax.training.checkpoint import FOLDER, CheckpointError, complete_steps

CONFIG = "config.json"
# Parts of the state that not every pretraining has: Concerto's two, and a teacher of its own.
OTHERS = ("patch_proj", "image", OFFLINE)


def is_workdir(path: Path) -> bool:
    """Whether a folder is one that `launch.train` made, with a checkpoint in it."""
    return (path / CONFIG).is_file() and (path / FOLDER).is_dir()


def find_run(path: Path) -> tuple[Path, int] | None:
    """The run and the step that a path names: a run's folder, or `<run>/checkpoints/<step>`.

    Returns:
      The run's folder and the step, the newest for the folder itself; None for any other path.

    Raises:
      CheckpointError: the run has no checkpoint.
    """
    if path.parent.name == FOLDER and path.name.isdigit() and is_workdir(path.parent.parent):
        return path.parent.parent, int(path.name)
    if not is_workdir(path):
        return None
    steps = complete_steps(path / FOLDER)
    if not steps:
        raise CheckpointError(f"no checkpoint in {path / FOLDER}")
    return path, int(steps[-1].name)


def data_sources(path: Path) -> list[Mapping[str, Any]] | None:
    """What weights have learned from, and those that they started from and that taught them.

    Args:
      path: see `find_run`, or the weights of a segmentation.

    Returns:
      Sources as the configs list them; None where one of these is not known here.
    """
    lists = [sources for sources, _ in _lineage(path)]
    if any(sources is None for sources in lists):
        return None
    return [entry for sources in lists for entry in sources or ()]


def label_sources(path: Path) -> list[Mapping[str, Any]]:
    """Those of `data_sources` whose labels were learned too, as far as they are known here."""
    return [entry for sources, labels in _lineage(path) if labels for entry in sources or ()]


def _lineage(path: Path) -> Iterator[tuple[list[Mapping[str, Any]] | None, bool]]:
    """Sources and whether with their labels: of weights, and of all that they go back to."""
    try:
        found = find_run(path)
    except CheckpointError:  # its checkpoints are gone
        found = None
    if found is not None:
        config = read_json(found[0] / CONFIG).get("config", {})
        sources, labels = config.get("data", {}).get("sources"), "protocol" in config
        before = [config.get("init_from", ""), config.get("teacher", ONLINE)]
    else:
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
        learned = manifest.get("source", {}).get("learned", {})
        sources, labels, before = learned.get("sources"), True, learned.get("from", [])
    yield sources, labels
    for other in before:
        if other not in ("", ONLINE):
            yield from _lineage(storage.place(other))


def read_workdir(workdir: Path | str) -> Weights:
    """Student and teacher of a run's checkpoint, every bit checked.

    Args:
      workdir: see `find_run`.

    Returns:
      A pretraining; `source` has the step under "numbers", and "grid_size" in metres.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, or its network is not the config's.
    """
    found = find_run(storage.place(workdir))
    if found is None:
        raise CheckpointError(f"{workdir} is no run's folder: no {CONFIG} and {FOLDER} in it")
    workdir, step = found
    content = read_json(workdir / CONFIG)
    if "protocol" in content.get("config", {}):
        raise CheckpointError(
            f"{workdir} is the run of a segmentation, not of a pretraining; when its evaluation "
            f"has finished, {workdir / SEGMENTOR} is what it trained"
        )
    try:
        # A run of an older program lacks the newest keys, and had what are now their defaults.
        spec = network_spec(default_network().to_dict() | content["config"]["network"])
        variant, config = config_of(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{workdir / CONFIG} describes no network: {error}") from error
    folder = workdir / FOLDER / str(step)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        saved = handler.metadata(epath.Path(storage.absolute(folder / "state"))).tree
        here = SingleDeviceSharding(jax.local_devices()[0])
        template = {
            tree: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                saved[tree],
            )
            for tree in ("student", "teacher")
        }
    except Exception as error:  # whatever a damaged file makes the library raise
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from error
    wanted = {name: leaf.shape for name, leaf in leaves(backbone_template(spec))}
    faults = []
    for tree, part in template.items():
        found = {name: leaf.shape for name, leaf in leaves(part.get("backbone", {}))}
        for name in sorted(wanted.keys() | found.keys()):
            have, want = found.get(name, "missing"), wanted.get(name, "absent")
            faults += [f"{tree}/backbone/{name} is {have}, not {want}"] if have != want else []
    if faults:
        raise CheckpointError(f"{folder} is not of the network in {CONFIG}: {'; '.join(faults)}")
    state = jax.device_get(checkpoint.load_weights(folder, template))
    points, extra = _without_others(state)
    weights = Weights("pretraining", variant, config, points, extra)
    source = {
        "file": f"{workdir.name}/{FOLDER}/{folder.name}",
        "format": "workdir",
        "sha256": digest(weights),
        "numbers": {"step": step},
        "grid_size": content["config"]["views"]["grid_size"],
    }
    return dataclasses.replace(weights, source=source)


def _without_others(
    state: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Student and teacher of the points, and Concerto's image branch under the original's names.

    An image encoder and an offline teacher are left out: they are as they were in the folders that
    the run had them from.
    """
    points = {
        tree: {name: part for name, part in parts.items() if name not in OTHERS}
        for tree, parts in state.items()
    }
    projection = state["student"].get("patch_proj")
    if projection is None:
        return points, {}
    weight = np.ascontiguousarray(np.asarray(projection["kernel"]).T)
    hidden = points["student"]["mask_head"]["mlp"]["fc1"]["kernel"].shape[1]
    prototypes = len(points["student"]["mask_head"]["prototypes"])
    return points, {
        "patch_proj.weight": weight,
        "patch_proj.bias": np.asarray(projection["bias"]),
        **_image_heads(len(weight), hidden, prototypes),
    }


def _image_heads(channels: int, hidden: int, prototypes: int) -> dict[str, np.ndarray]:
    """Concerto's heads on image features as they start, in the original's names.

    Nothing reads them and nothing trains them (REFERENCE quirk 17), so runs here have none; but
    Pointcept's model has them and its strict loader asks for them.
    """
    init, _ = functional(
        lambda rngs: OnlineCluster(channels, hidden, channels, prototypes, rngs=rngs)
    )
    head = init(jax.random.key(0))
    head["prototypes"] = start_prototypes(jax.random.key(1), head["prototypes"].shape)
    state = to_state_dict(jax.tree.map(np.asarray, head), "enc2d_head_student.")
    ours = {k: x for k, x in state.items() if k.startswith("enc2d_head_student.prototype.")}
    return state | {k.replace("_student.", "_teacher."): x for k, x in ours.items()}
