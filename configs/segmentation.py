"""What an encoder's features are worth in semantic segmentation.

    python -m launch.evaluate --encoder=runs/quickstart --workdir=runs/linear \\
        --config=configs/segmentation.py:data=rooms,protocol=linear,encoder=tiny

The argument is a list of name=value:
  data      rooms (procedural, no download), scannet, scannet200, s3dis (tested on area 5) or
            s3dis-1 to s3dis-6, or a folder of scenes with a dataset.json that names the classes
  protocol  linear, decoder, lora, full, scratch, or fitted at once: ridge, knn, logistic
  encoder   tiny, small, base or v3m1: the network of --encoder=random and of scratch, and how long
            and on how large crops is trained

At base, ScanNet, the settings are those of Sonata's authors: 800 passes over 1,201 scenes, crops of
102,400 points, one cycle of AdamW at 0.002, cross-entropy + Lovász, Mix3D; but for the batch, 32
instead of 24, so that 8 accelerators of 80 GB share it in rows of two scenes. Expect 72.5 mIoU for
Sonata's linear probe: the paper's, not yet repeated here. At tiny, rooms: a CPU, 10 minutes.

With protocol=scratch,encoder=v3m1 and --encoder=random it is PTv3's own supervised recipe,
Pointcept's semseg-pt-v3m1-0-base: one cycle of AdamW at 0.006, 0.0006 for blocks, no clipping, 800
passes; but for the batch, 16 instead of 12, for 8 accelerators as above. Expect 77.6 mIoU on
ScanNet: the paper's, not yet repeated here. docs/evaluate.md says where it deviates.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import sonata
from point_jax.data.pipeline import default_data
from point_jax.evaluation.classes import S3DIS_AREAS
from point_jax.evaluation.lifting import default_lifting
from point_jax.evaluation.protocols import FITTED, FITTED_HEADS, TRAINED
from point_jax.objectives.settings import default_crops, default_decoder, default_segmentation
from point_jax.training.config import Config, default_config

PROTOCOLS = (*TRAINED, *FITTED)


def get_config(arg: str = "") -> Config:
    """The config of a list such as "data=rooms,protocol=linear,encoder=tiny"."""
    chosen = {"data": "rooms", "protocol": "linear", "encoder": "base"}
    for part in filter(None, arg.split(",")):
        name, equals, value = part.partition("=")
        if name not in chosen or not equals:
            raise ValueError(
                f"configs/segmentation.py:{arg}: {part!r} is none of {', '.join(chosen)} = VALUE"
            )
        chosen[name] = value.rstrip("/") or value if name == "data" else value
    if chosen["protocol"] not in PROTOCOLS:
        raise ValueError(f"protocol={chosen['protocol']}: expected one of {', '.join(PROTOCOLS)}")
    if chosen["encoder"] not in SIZES:
        raise ValueError(f"encoder={chosen['encoder']}: expected one of {', '.join(SIZES)}")

    config = default_config()
    del config.schedule
    config.protocol = chosen["protocol"]
    config.about = ",".join(f"{name}={value}" for name, value in chosen.items())
    config.dataset = chosen["data"]
    config.encoder = ""  # what --encoder names, settled when the command starts
    config.tree = "teacher"  # of a pretraining: teacher or student
    base = "base" if chosen["encoder"] == "v3m1" else chosen["encoder"]
    config.head = "random"  # where the layer starts; logistic: fitted first (linear, lora)
    config.network = sonata.get_config(base).network
    config.decoder = default_decoder()
    config.crops = default_crops()
    config.objective = default_segmentation()
    config.images = default_lifting()  # of lifted image features
    config.data = default_data()
    with config.data.unlocked():
        del config.data.held_out
    config.test = ConfigDict()
    config.test.sources = ()
    config.test.first_grid = 0.0  # metres: points are thinned to this before votes; 0: not at all
    config.test.votes = False  # predict every point, over rotations, scales and flips
    config.test.submission = False  # write predictions in the benchmark's format
    config.test.floors = True  # also height, normal and colour alone, and the untrained encoder
    config.test.robustness = False  # without colour, few labels, single frames, ...
    config.labels = ConfigDict()
    config.labels.classes = ""  # scannet, scannet200, s3dis or rooms; "": dataset.json's
    config.labels.share = 1.0  # of a training scene's labels that are kept
    for section in (config.test, config.labels):
        section.lock()

    config.optim.lr = 0.002
    config.optim.block_lr = 0.1
    config.optim.lr_decay = 0.9 if chosen["protocol"] == "full" else 1.0
    config.optim.wd = config.optim.wd_final = 0.02
    config.train.log_every = 10
    SIZES[chosen["encoder"]](config)
    _data(config, chosen["data"], whole=chosen["encoder"] in ("base", "v3m1"))
    return config.lock()


def _base(config: Config) -> None:
    config.train.batch, config.train.steps = 32, 800 * 1201 // 32
    config.decoder.channels = (64, 96, 192, 384)
    config.decoder.heads = (4, 6, 12, 24)


def _small(config: Config) -> None:
    config.train.batch, config.train.steps = 16, 5_000
    config.crops.max_size = 65_536


def _tiny(config: Config) -> None:
    config.train.batch, config.train.steps = 4, 300
    config.checkpoint.every = 100
    if config.protocol in FITTED_HEADS:  # so few steps would leave a random layer half trained
        config.head = "logistic"
    else:
        config.optim.lr = 0.02
    config.crops.max_size = 16_384
    config.data.scene_points = 120_000


def _v3m1(config: Config) -> None:
    config.train.batch, config.train.steps = 16, 800 * 1201 // 16
    config.network.depths = (2, 2, 2, 6, 2)
    config.network.channels = (32, 64, 128, 256, 512)
    config.network.heads = (2, 4, 8, 16, 32)
    config.network.stem, config.network.norm = "conv", "batch"
    config.network.pooling = "serialized"
    config.decoder.channels = (64, 64, 128, 256)
    config.decoder.heads = (4, 4, 8, 16)
    config.optim.lr = 0.006
    config.optim.wd = config.optim.wd_final = 0.05
    config.optim.clip = 1e9  # never
    config.crops.drop_probability = 0.2


SIZES = {"tiny": _tiny, "small": _small, "base": _base, "v3m1": _v3m1}


def _data(config: Config, name: str, whole: bool) -> None:
    """Names the scenes; `whole` asks for the data set's own length of training and crops."""
    if name == "rooms":
        config.data.sources = ({"kind": "rooms", "seeds": (100, 132)},)
        config.test.sources = ({"kind": "rooms", "seeds": (0, 8)},)
        config.labels.classes = "rooms"
    elif name in ("scannet", "scannet200"):
        label = "segment20" if name == "scannet" else "segment200"
        folder = {"kind": "folder", "root": "data/scannet", "units": "m", "up": "z"}
        config.data.sources = (folder | {"splits": ("train",), "segment": label},)
        config.test.sources = (folder | {"splits": ("val",), "segment": label},)
        config.labels.classes = name
        config.data.scene_points = max(config.data.scene_points, 400_000)
    elif name.partition("-")[0] == "s3dis":
        number = name.partition("-")[2] or "5"
        if f"Area_{number}" not in S3DIS_AREAS:
            raise ValueError(f"data={name}: expected s3dis-1 to s3dis-6")
        folder = {"kind": "folder", "root": "data/s3dis", "units": "m", "up": "z"}
        rest = tuple(area for area in S3DIS_AREAS if area != f"Area_{number}")
        config.data.sources = (folder | {"splits": rest},)
        config.test.sources = (folder | {"splits": (f"Area_{number}",)},)
        config.test.first_grid = 0.01
        config.data.scene_points = 1_200_000
        config.crops.max_share = 0.6
        if whole:
            config.crops.max_size = 204_800
            config.train.steps = 3000 * 204 // config.train.batch
        config.labels.classes = "s3dis"
        if config.network.norm == "batch":
            config.crops.geometry.elastic = ()
    elif (root := Path(name)).is_dir():
        split = "test" if (root / "test").is_dir() else "val"
        config.data.sources = ({"kind": "folder", "root": name, "splits": ("train",)},)
        config.test.sources = ({"kind": "folder", "root": name, "splits": (split,)},)
    else:
        raise ValueError(
            f"data={name}: no such folder; or rooms, scannet, scannet200, s3dis, s3dis-1 to s3dis-6"
        )
