"""What is evaluated: an encoder from a checkpoint, an untrained one, or the raw input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from point_jax.evaluation.features import EncoderFeatures, Extractor, RawFeatures
from point_jax.features.encoder import Encoder
from point_jax.features.load import load
from point_jax.features.voxels import INPUTS
from point_jax.interop.workdir import find_run
from point_jax.models.functional import Params, functional
from point_jax.models.ptv3 import PTv3
from point_jax.models.spec import PTv3Spec
from point_jax.objectives.settings import network_spec

RAW, RANDOM = "raw", "random"
GRID_SIZE = 0.02  # metres, of a network that was never trained


@dataclass(frozen=True)
class Candidate:
    """What is evaluated.

    Attributes:
      name: "raw", "random", or the checkpoint's folder as given.
      network: the encoder; None for the raw input.
      grid_size: edge of a voxel, metres.
      params: of the encoder; None where a run's seed decides them.
      checkpoint: the folder of the weights; None without one.
      steps: of training that they had; None where not known.
    """

    name: str
    network: PTv3Spec | None
    grid_size: float
    params: Params | None = None
    checkpoint: Path | None = None
    steps: int | None = None

    def with_seed(self, seed: int) -> Params:
        """The encoder's parameters; untrained ones are drawn by a seed."""
        if self.params is not None or self.network is None:
            return self.params or {}
        network = self.network
        init, _ = functional(lambda rngs: PTv3(network, rngs=rngs))
        return jax.jit(init)(jax.random.key(seed))

    def extractor(self, seed: int) -> Extractor:
        """The frozen features, all levels joined."""
        if self.network is None:
            return RawFeatures()
        return EncoderFeatures(Encoder(self.network, self.with_seed(seed), self.grid_size))


def find(name: str, config: Any) -> Candidate:
    """The candidate that a command line names.

    Args:
      name: "raw", "random", or a folder: of a run, or of converted weights.
      config: read are `network` (of a random one), `crops.grid_size` (0 for the encoder's own) and
        `tree`.

    Raises:
      ValueError: settings that do not fit the network.
      CheckpointError: no encoder there.
    """
    grid_size = float(config.crops.grid_size)
    if name == RAW:
        return Candidate(name, None, grid_size or GRID_SIZE)
    if name == RANDOM:
        return Candidate(name, network_spec(config.network), grid_size or GRID_SIZE)
    encoder = load(name, tree=config.tree, grid_size=grid_size or None)
    if encoder.inputs != INPUTS:
        raise ValueError(
            f"{name}: reads {encoder.inputs}, expected {', '.join(INPUTS)}: no other encoder can "
            "be evaluated"
        )
    run = find_run(Path(name))
    steps = run[1] if run else None
    return Candidate(name, encoder.spec, encoder.grid_size, encoder.params, Path(name), steps)


def floors(candidate: Candidate, config: Any) -> tuple[Candidate, Candidate]:
    """What a candidate has to beat: raw input, and its own network before any training."""
    network = candidate.network or network_spec(config.network)
    grid_size = candidate.grid_size
    return Candidate(RAW, None, grid_size), Candidate(RANDOM, network, grid_size)
