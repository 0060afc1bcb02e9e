"""The smallest real run: every part of the objective at sizes that compile in seconds."""

import jax
import numpy as np

from configs import sonata
from point_jax.objectives.settings import make_sonata
from point_jax.training.mesh import put_batch, replicated
from point_jax.training.sharding import shardings
from point_jax.training.state import init_state
from point_jax.training.step import make_train_step


def small_config(experiment=sonata):
    """A config of two levels on tiny scenes."""
    config = experiment.get_config("tiny")
    config.train.batch = 8
    config.network.depths = (1, 1)
    config.network.channels = (6, 12)
    config.network.heads = (1, 2)
    config.network.patch_size = 32
    config.network.rotary_base = 10.0
    config.network.rotary_shift = 0.1
    config.network.rotary_jitter = 1.1
    config.network.rotary_rescale = 1.2
    config.views.grid_size = 0.1
    config.views.max_size = 128
    config.views.geometry.elastic = ()
    config.objective.shares = (1.0, 0.5)
    config.objective.up_cast = 1
    config.objective.hidden = 16
    config.objective.embed = 8
    config.objective.prototypes = 16
    config.data.scene_points = 256
    return config


def get_config():
    """For `python -m launch.train --config=tests/small.py`: four steps on tiny rooms."""
    config = small_config()
    config.train.steps, config.train.log_every = 4, 1
    config.checkpoint.every = 2
    spec = {"frames": 2, "width": 24, "height": 18, "voxel": 0.1}
    config.data.sources = ({"kind": "rooms", "seeds": (0, 4), "spec": spec},)
    config.data.held_out.sources = ({"kind": "rooms", "seeds": (9, 10), "spec": spec},)
    config.data.held_out.scenes = 1
    return config


SCHEDULE = {
    "lr": 1e-3,
    "beta1": 0.9,
    "wd": 0.04,
    "mask_size": 0.4,
    "mask_ratio": 0.5,
    "teacher_temp": 0.07,
    "momentum": 0.9,
}


def small_batch(scenes=8, points=256, seed=0, size=1.2):
    """Walls and floors of little boxes of some size in metres, as the host ships them."""
    rng = np.random.default_rng(seed)
    coord = rng.uniform(0, [size, size, size / 2], (scenes, points, 3))
    coord[:, ::2, 2] = 0
    coord[:, 1::4, 0] = 0
    return {
        "coord": coord.astype(np.float32),
        "color": rng.integers(0, 256, (scenes, points, 3), np.uint8),
        "normal": np.broadcast_to(np.float32([0, 0, 1]), (scenes, points, 3)).copy(),
        "count": np.full(scenes, points, np.int32),
        "cut": np.zeros(scenes, np.float32),
        "scene": np.arange(scenes, dtype=np.int32),
    }


def schedule(**changes):
    """Scheduled values as the loop passes them."""
    return {name: np.float32(value) for name, value in (SCHEDULE | changes).items()}


class Step:
    """One compiled step of a config's objective on a mesh, always from the config's seed.

    The objective is Sonata's, unless another is given.
    """

    def __init__(self, config, mesh, objective=None):
        self.objective, self.mesh = objective or make_sonata(config), mesh
        make_key = jax.jit(jax.random.key, out_shardings=replicated(mesh))
        self.key = make_key(np.uint32(config.seed))
        init = lambda key: init_state(self.objective, key)  # noqa: E731
        lie = shardings(jax.eval_shape(init, self.key), config.mesh, mesh)
        make = jax.jit(init, out_shardings=lie)
        self.make = lambda: make(self.key)
        self.step = make_train_step(self.objective, config, mesh)

    def __call__(self, batch, **changes):
        """State and metrics after a step on a batch."""
        placed = put_batch(self.mesh, batch, len(batch["count"]))
        state, metrics = self.step(self.make(), placed, schedule(**changes), self.key)
        return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}
