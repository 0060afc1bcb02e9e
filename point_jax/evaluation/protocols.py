"""Protocols: how labels are used to turn an encoder into a predictor.

Some are fitted to frozen features at once: `ridge`, `knn`, `logistic`. The others train a
segmentation with the trainer of the pretraining: same loop, checkpoints, resume, meshes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from point_jax.data.pipeline import make_batches
from point_jax.data.scenes import Scene
from point_jax.evaluation.candidates import Candidate
from point_jax.evaluation.classes import Classes
from point_jax.evaluation.features import EncoderFeatures, LabelledVoxels, RawFeatures
from point_jax.evaluation.knn import KnnPredictor, collect_neighbours
from point_jax.evaluation.logistic import fit_logistic
from point_jax.evaluation.predict import LinearPredictor, Predictor
from point_jax.evaluation.ridge import fit_ridge
from point_jax.features.encoder import Encoder
from point_jax.features.voxels import Voxels
from point_jax.interop.release import config_of
from point_jax.interop.store import SEGMENTOR, Weights, digest, save_weights
from point_jax.models import statistics
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.segmentation import Segmentation
from point_jax.objectives.settings import PROTOCOLS, make_segmentation
from point_jax.training import checkpoint, mesh
from point_jax.training.config import Config
from point_jax.training.loop import FINISHED, train
from point_jax.training.schedules import optimizer_schedule
from point_jax.training.state import init_state
from point_jax.training.step import make_train_step

FITTED = ("ridge", "knn", "logistic")
TRAINED = tuple(PROTOCOLS)
SCRATCH = "scratch"
FLOORS_OF_TRAINED = "logistic"  # close to the best linear layer, so that no floor is too low
HEADS = ("random", "logistic")  # where a trained protocol's layer starts
FITTED_HEADS = ("linear", "lora")  # protocols whose layer reads the encoder's own features


def check_head(head: str, protocol: str) -> None:
    """Refuses a start of the layer that a protocol cannot have.

    Args:
      head: of the config, one of `HEADS`; fitted protocols do not read it.
      protocol: of the evaluation.

    Raises:
      ValueError: says why not, and what to do.
    """
    if head not in HEADS:
        raise ValueError(f"config.head is {head!r}, expected one of {', '.join(HEADS)}")
    if head == "logistic" and protocol in TRAINED and protocol not in FITTED_HEADS:
        raise ValueError(
            f"config.head=logistic fits the layer to the encoder's features, and in "
            f"protocol={protocol} it reads a decoder that starts at random: leave it random, or "
            f"take one of {', '.join(FITTED_HEADS)}"
        )


def check_lifted(protocol: str, votes: bool, robustness: bool) -> None:
    """Refuses what cannot be done with image features that are lifted to points.

    Args:
      protocol: of the evaluation.
      votes, robustness: whether these are asked for, too.

    Raises:
      ValueError: says why not, and what to do.
    """
    if protocol not in FITTED:
        raise ValueError(
            f"protocol={protocol} trains on points alone, and lifted image features are frozen: "
            f"expected one of {', '.join(FITTED)}; a linear probe of lifted features is logistic"
        )
    if votes:
        raise ValueError(
            "config.test.votes is True, but images do not turn, scale and flip with a scene, so "
            "lifted image features cannot be voted on: leave it False"
        )
    if robustness:
        raise ValueError(
            "config.test.robustness is True, but images of a scene without colours or of a single "
            "frame are still all its images: leave it False for lifted image features"
        )


@dataclass(frozen=True)
class DecoderFeatures:
    """The finest features of a network with a decoder.

    Attributes:
      encoder: the network.
    """

    encoder: Encoder

    @property
    def channels(self) -> int:
        """C, the channels of the decoder's last stage."""
        return self.encoder.spec.decoder[0].channels

    def __call__(self, clouds: Sequence[Voxels]) -> Iterator[np.ndarray]:
        """(V, C) float32 for each cloud, in their order, lazily."""
        for features in self.encoder.encode_voxels(clouds):
            yield features.decoder().at_voxels()


def fitted(
    protocol: str, candidate: Candidate, scenes: Sequence[Scene], classes: int, seed: int
) -> Predictor:
    """A predictor fitted to the frozen features of the training scenes.

    Args:
      protocol: one of `FITTED`.
      candidate: what gives the features.
      scenes: training scenes with labels.
      classes: K.
      seed: of an untrained encoder, and of which voxels are drawn.
    """
    extractor = candidate.extractor(seed)
    data = LabelledVoxels(extractor, scenes, candidate.grid_size)
    if protocol == "ridge":
        return fit_ridge(data, classes).predictor(extractor)
    if protocol == "logistic":
        return fit_logistic(data, classes, seed=seed).predictor(extractor)
    return KnnPredictor(extractor, collect_neighbours(data, classes, seed=seed))


class Stopped(Exception):
    """A training was stopped by a signal and saved.

    Attributes:
      code: the exit code that says so.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped, exit code {code}")
        self.code = code


def trained(
    protocol: str,
    candidate: Candidate,
    config: Config,
    scenes: Sequence[Scene],
    classes: Classes,
    workdir: Path,
    change: Callable[[Scene], Scene],
) -> Predictor:
    """A predictor trained in a folder, where it goes on if it was stopped.

    Args:
      protocol: one of `TRAINED`.
      candidate: the encoder that it starts from; an untrained one for `scratch`.
      config: the whole config; `crops.grid_size` is the candidate's.
      scenes: training scenes with labels, what a fitted start of the layer is fitted to.
      classes: of the labels.
      workdir: of the run; gets `segmentor`, the weights, see `store`.
      change: what is done to every training scene.

    Raises:
      Stopped: by a signal.
      ConfigError: a value that does not fit.
    """
    objective = make_segmentation(config, protocol, len(classes), candidate.network)
    if candidate.network is not None:
        config_of(_network(objective))  # what cannot be kept afterwards is refused now
    head_start = None
    if config.head == "logistic":
        head_start = functools.partial(
            _fitted_head, objective, candidate, scenes, len(classes), config.seed
        )
    code = train(
        config,
        workdir,
        objective=objective,
        make_step=make_train_step,
        make_schedule=optimizer_schedule,
        make_batches=functools.partial(make_batches, change=change),
        load_initial=functools.partial(_initial, candidate.params),
        load_frozen=head_start,
    )
    if code != FINISHED:
        raise Stopped(code)
    student, teacher = _result(objective, workdir)
    head, backbone = student["head"], objective.whole(student, teacher)
    if candidate.network is not None and jax.process_index() == 0:
        _keep(workdir, config, objective, candidate, backbone, head, classes)
    return _predictor(objective, candidate, backbone, head)


def _initial(
    params: Mapping[str, Any] | None, source: Path, template: Mapping[str, Any]
) -> dict[str, Any]:
    """The encoder's weights, to those parts of student and teacher that hold them."""
    given: dict[str, Any] = {}
    for part, tree in template.items():
        wanted = tree.get("backbone", {})
        there = statistics.among(dict(params or {}), wanted)
        own = {name: wanted[name] for name in there}
        checkpoint.compare_trees(source, there, own)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), there, own)
        given[part] = {"backbone": placed} if placed else {}
    return given


def _fitted_head(
    objective: Segmentation,
    candidate: Candidate,
    scenes: Sequence[Scene],
    classes: int,
    seed: int,
    template: Mapping[str, Any],
) -> dict[str, Any]:
    """The student's layer near the optimum for the encoder before any training.

    Short runs then show what training adds to the best layer (arXiv:2202.10054), not how far a
    layer gets in so many steps.
    """
    if candidate.network is not None and candidate.params is None:  # untrained: as the run starts
        start = jax.jit(lambda key: init_state(objective, key))(jax.random.key(np.uint32(seed)))
        candidate = replace(candidate, params=objective.whole(start["student"], start["teacher"]))
    layer = fitted("logistic", candidate, scenes, classes, seed)
    assert isinstance(layer, LinearPredictor)
    head = {"kernel": layer.kernel, "bias": layer.bias}
    own = template["student"]["head"]
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), head, own)
    return {"student": {"head": placed}}


def _result(objective: Segmentation, workdir: Path) -> tuple[Any, Any]:
    """Student and teacher of a finished run, on this process's first device."""
    everywhere = mesh.replicated(mesh.data_mesh())
    state = jax.eval_shape(lambda key: init_state(objective, key), jax.random.key(0))
    template = {
        part: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            state[part],
        )
        for part in ("student", "teacher")
    }
    found = checkpoint.load_weights(workdir, template)
    found = jax.tree.map(lambda leaf: leaf.addressable_data(0), found)
    return found["student"], found["teacher"]


def _keep(
    workdir: Path,
    config: Config,
    objective: Segmentation,
    candidate: Candidate,
    backbone: Any,
    head: Any,
    classes: Classes,
) -> None:
    """What was trained as weights, for `point_jax.load`, `launch.infer` and `launch.convert`."""
    if (workdir / SEGMENTOR).exists():  # of an earlier start of the same finished training
        return
    variant, network = config_of(_network(objective))
    source = {
        "format": "workdir",
        "file": workdir.name,
        "grid_size": candidate.grid_size,
        "classes": list(classes.names),
        "learned": {"sources": config.to_dict()["data"]["sources"], "from": [config.init_from]},
    }
    params = {"backbone": backbone, "seg_head": head}
    weights = Weights("segmentor", variant, network, params, source=source)
    marked = replace(weights, source=source | {"sha256": digest(weights)})
    save_weights(workdir / SEGMENTOR, marked)


def _network(objective: Segmentation) -> PTv3Spec:
    return objective.trunk.spec  # pyright: ignore[reportAttributeAccessIssue]


def _predictor(
    objective: Segmentation, candidate: Candidate, backbone: Any, head: Any
) -> LinearPredictor:
    kernel, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])
    if candidate.network is None:
        return LinearPredictor(RawFeatures(), kernel, bias)
    network = _network(objective)
    encoder = Encoder(network, backbone, candidate.grid_size)
    if network.decoder:
        return LinearPredictor(DecoderFeatures(encoder), kernel, bias)
    return LinearPredictor(EncoderFeatures(encoder), kernel, bias)
