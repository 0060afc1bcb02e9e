"""Sonata or Concerto, whole but small, on procedural rooms: no download.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/quickstart.py:concerto --workdir=runs/concerto

For: 2 CPU cores, under 5 minutes with compilation; Concerto under 8. Its images are views of the
rooms, its image encoder is an untrained convolutional network: it shows that all parts work
together, and what a step costs, not what images teach.
Expect: the loss falls from 6.0 to 5.4 (chance is log 256 = 5.55); in pictures/pca.png the
trained teacher gives surfaces that face the same way one colour, in rooms that it has never seen.
36 steps teach little more than that; configs/sonata.py trains for longer.
"""

from configs import concerto, sonata
from point_jax.training.config import Config


def get_config(arg: str = "sonata") -> Config:
    """The config of the quickstart: sonata or concerto."""
    if arg not in ("sonata", "concerto"):
        raise ValueError(f"configs/quickstart.py:{arg}: expected sonata or concerto")
    config = (sonata if arg == "sonata" else concerto).get_config("tiny")
    config.train.steps = 36
    config.train.batch = 2
    config.train.log_every = 1
    config.checkpoint.every = 4
    config.optim.lr = 0.002
    config.schedule.mask_size = (0.2, 0.6)
    config.schedule.momentum = (0.96, 1.0)  # a short run needs a teacher that moves

    config.network.depths = (1, 1, 2, 1)
    config.network.channels = (24, 48, 96, 160)
    config.network.heads = (2, 4, 6, 10)
    config.network.patch_size = 256
    config.network.drop_path = 0.1
    config.views.grid_size = 0.04
    config.views.max_size = 4096
    config.objective.shares = (1.0, 0.6, 0.3, 0.1)
    config.objective.hidden = 256
    config.objective.embed = 64
    config.objective.prototypes = 256

    small = {"frames": 16, "width": 112, "height": 84, "voxel": 0.04, "max_points": 30_000}
    config.data.scene_points = 30_000
    config.data.sources = ({"kind": "rooms", "seeds": (100, 1000), "spec": small},)
    config.data.held_out.sources = ({"kind": "rooms", "seeds": (0, 3), "spec": small},)
    config.data.held_out.scenes = 3
    if arg == "concerto":
        config.data.images.height, config.data.images.width = 84, 112
        config.images.height, config.images.width = 5, 7
        config.images.up_cast = 2
    return config
