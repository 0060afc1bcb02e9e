"""What is evaluated: an encoder from a checkpoint, an untrained one, raw input, lifted images."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from point_jax import storage
from point_jax.evaluation.features import EncoderFeatures, Extractor, RawFeatures
from point_jax.evaluation.lifting import JoinedFeatures, LiftedFeatures, load_lifted
from point_jax.features.encoder import Encoder
from point_jax.features.load import load
from point_jax.features.voxels import INPUTS
from point_jax.interop.workdir import FOLDER, find_run
from point_jax.models.functional import Params, functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.settings import network_spec

RAW, RANDOM, LIFTED = "raw", "random", "lifted:"
GRID_SIZE = 0.02  # metres, of a network that was never trained


class Named(NamedTuple):
    """The two parts of a candidate's name.

    Attributes:
      points: "raw", "random", or a folder of weights; None for image features alone.
      images: the folder of the image encoder whose features are lifted; None for none.
    """

    points: str | None
    images: str | None


def parse(name: str) -> Named:
    """Takes POINTS, lifted:IMAGES or POINTS+lifted:IMAGES apart.

    A folder whose own name begins with "lifted:" is ./lifted:...

    Raises:
      ValueError: one of the two is empty.
    """
    found = re.fullmatch(rf"(?:(.*?)\+)?{LIFTED}(.*)", name)
    if found is None:
        return Named(name, None)
    points, images = found.groups()
    if points == "" or not images:
        raise ValueError(
            f"--encoder={name}: expected {LIFTED}DIR with the folder of an image encoder, or "
            f"ENCODER+{LIFTED}DIR for both joined"
        )
    return Named(points, images)


@dataclass(frozen=True)
class Candidate:
    """What is evaluated.

    Attributes:
      name: as on the command line; of a run with the step.
      network: the encoder; None for the raw input, or for none.
      grid_size: edge of a voxel, metres.
      params: of the encoder; None where a run's seed decides them.
      checkpoint: the folder of the encoder's weights, of lifted features alone the image encoder's;
        None without one.
      steps: of training that they had; None where not known.
      lifted: image features that are joined to those of the points; None for none.
      points: whether there are features of the points; False for lifted ones alone.
    """

    name: str
    network: PTv3Spec | None
    grid_size: float
    params: Params | None = None
    checkpoint: Path | None = None
    steps: int | None = None
    lifted: LiftedFeatures | None = None
    points: bool = True

    def with_seed(self, seed: int) -> Params:
        """The encoder's parameters; untrained ones are drawn by a seed."""
        if self.params is not None or self.network is None:
            return self.params or {}
        network = self.network
        init, _ = functional(lambda rngs: PTv3(network, rngs=rngs))
        return jax.jit(init)(jax.random.key(seed))

    def extractor(self, seed: int) -> Extractor:
        """The frozen features, all levels joined, and with them the lifted ones."""
        parts: list[Extractor] = []
        if self.points and self.network is None:
            parts.append(RawFeatures())
        elif self.network is not None:
            encoder = Encoder(self.network, self.with_seed(seed), self.grid_size)
            parts.append(EncoderFeatures(encoder))
        if self.lifted is not None:
            parts.append(self.lifted)
        return parts[0] if len(parts) == 1 else JoinedFeatures(tuple(parts))


def find(name: str, config: Any) -> Candidate:
    """The candidate that a command line names.

    Args:
      name: "raw", "random", or a folder: of a run, or of converted weights; "lifted:" and the
        folder of an image encoder; or both with a "+" between them.
      config: read are `network` (of a random one; of others dtype and remat), `crops.grid_size`
        (0 for the encoder's own), `tree`, and for lifted features `images`.

    Raises:
      ValueError: settings that do not fit the network, or a name that is none.
      CheckpointError: no encoder there.
    """
    points, images = parse(name)
    if points is None:
        assert images is not None
        grid_size = float(config.crops.grid_size) or GRID_SIZE
        path, lifted = Path(images), load_lifted(images, config.images)
        whole = f"{LIFTED}{path}"
        return Candidate(whole, None, grid_size, checkpoint=path, lifted=lifted, points=False)
    found = _find_points(points, config)
    if images is None:
        return found
    lifted = load_lifted(images, config.images)
    return replace(found, name=f"{found.name}+{LIFTED}{Path(images)}", lifted=lifted)


def _find_points(name: str, config: Any) -> Candidate:
    grid_size = float(config.crops.grid_size)
    if name == RAW:
        return Candidate(name, None, grid_size or GRID_SIZE)
    if name == RANDOM:
        return Candidate(name, network_spec(config.network), grid_size or GRID_SIZE)
    # A run that goes on has other weights tomorrow: from here on it is one of its checkpoints.
    run = find_run(storage.place(name))
    path = storage.place(name) if run is None else run[0] / FOLDER / str(run[1])
    given = network_spec(config.network)
    encoder = load(path, tree=config.tree, grid_size=grid_size or None, dtype=given.dtype)
    if encoder.inputs != INPUTS:
        raise ValueError(
            f"{name}: reads {encoder.inputs}, expected {', '.join(INPUTS)}: no other encoder can "
            "be evaluated"
        )
    # A segmentor's decoder knows other labels: what is evaluated is the encoder.
    network = replace(encoder.spec, decoder=(), remat=given.remat)
    params = {name: part for name, part in encoder.params.items() if name != "dec"}
    steps = run[1] if run else None
    return Candidate(str(path), network, encoder.grid_size, params, path, steps)


def untrained(candidate: Candidate) -> Candidate:
    """The candidate's network before any training."""
    return Candidate(RANDOM, candidate.network, candidate.grid_size)


def floors(candidate: Candidate, config: Any) -> tuple[Candidate, Candidate]:
    """What a candidate has to beat: raw input, and its own network before any training."""
    network = candidate.network or network_spec(config.network)
    grid_size = candidate.grid_size
    raw = Candidate(RAW, None, grid_size)
    return raw, untrained(replace(candidate, network=network))
