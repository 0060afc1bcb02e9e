"""Concerto pretraining (arXiv:2510.23607): points learn from one another and from images.

    python -m launch.convert --input=dinov2-with-registers-large --output=weights/dinov2
    python -m launch.train --config=configs/concerto.py:base --workdir=DIR \\
        --config.images.encoder=weights/dinov2 \\
        --config.data.sources="({'kind': 'folder', 'root': 'DIR', 'splits': ('train',)},)"

Sizes:
  large  207.7 M parameters, otherwise as base.
  base   The paper's recipe: 108.5 M parameters, batch 96, bfloat16, images of 37 x 37 patches of
         DINOv2 with registers L/14. The paper: 85 hours on 16 H20, 77.3 mIoU on ScanNet by a linear
         probe; not yet repeated here.
  small  38.7 M parameters, batch 16, 20,000 steps, images of 24 x 32 patches. Not yet run.
  tiny   3.8 M parameters, batch 2, 1,000 steps, 15 x 20 patches of 16 pixels: a laptop's CPU.

Scenes carry images as docs/data.md says; those without train on their points alone. With
--config.images.encoder=untrained, tiny's default, a convolutional network of 16-pixel patches that
has learned nothing looks at the images: to try things out. With --config.data.images.features=NAME
batches have what data_prep.image_features has stored. Start from a Sonata run with
--config.init_from=RUN; let a larger run, that stays as it is, teach with --config.teacher=RUN.
"""

from configs import sonata
from point_jax.objectives.settings import default_images
from point_jax.training.config import Config

DROPS = ((1.0, 0.2), (0.2, 0.5))  # (share of the points, probability), one after the other


def get_config(arg: str = "base") -> Config:
    """The config of a size: tiny, small, base or large."""
    sizes = {"tiny": _tiny, "small": _small, "base": _base, "large": _large}
    if arg not in sizes:
        raise ValueError(f"configs/concerto.py:{arg}: expected one of {', '.join(sizes)}")
    config = sonata.get_config("base" if arg == "large" else arg)
    with config.unlocked():
        config.images = default_images()
    config.objective.weights = (1 / 8, 1 / 8, 2 / 8)
    config.views.drop_color = config.views.drop_normal = DROPS
    sizes[arg](config)
    return config


def _base(config: Config) -> None:
    config.data.images.count = 4
    config.data.images.height = config.data.images.width = 518
    config.images.height = config.images.width = 37
    config.images.dtype = "bfloat16"


def _large(config: Config) -> None:
    _base(config)
    config.network.channels = (64, 128, 256, 512, 768)
    config.network.heads = (4, 8, 16, 32, 48)


def _small(config: Config) -> None:
    _base(config)
    config.data.images.height, config.data.images.width = 336, 448
    config.images.height, config.images.width = 24, 32


def _tiny(config: Config) -> None:
    config.images.encoder = "untrained"
    config.data.images.count = 2
    config.data.images.height, config.data.images.width = 240, 320
    config.images.height, config.images.width = 15, 20
