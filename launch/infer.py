"""Features of point clouds: reads files of many formats, encodes them, writes one result each.

    python -m launch.infer --checkpoint=DIR --input=scan.ply --output=DIR
    python -m launch.infer --checkpoint=DIR --input=scans --output=DIR --format=npz,ply,png,html

--input is a file (PLY, PCD, LAS, LAZ, NPZ, text as XYZ or CSV, OBJ, GLB, glTF, STL), a scene folder
with coord.npy, or a folder that is searched for them. Results that are there already stay.

  --checkpoint=DIR     a run's folder, or what launch.convert wrote; of a segmentation (the
                       --workdir of launch.evaluate) the NPZ has the points' classes, too
  --output=DIR         gets NAME.npz: coord and features, input point i is row i
  --format=npz         some of npz, ply (PCA colours), png (picture), html (page that turns)
  --up_cast=K          carry the coarsest features K levels up and join them; default: all levels
  --levels             also level{i}_grid, level{i}_coord and level{i}_features in the NPZ
  --overwrite          make results again that are there
  --skip_bad           go on after a cloud that cannot be used, and count them
  --pattern='*.ply'    of a searched folder only files of such names

What a file does not say:
  --units=m --up=z     m, cm or mm; z, y, -y, ... (defaults: dataset.json's; glTF: y)
  --color_range=255    value of full colour, 1, 255 or 65535, where the dtype does not tell
  --columns='x y z r g b'   of text without a header; other names skip a column
  --any_size           accept an extent that no scene has
  --drop_invalid       leave out points that are NaN; `rows` in the NPZ tells which are left

Input of the network:
  --wo_color, --wo_normal   leave out, as zeros
  --estimate_normals   where a cloud has none: from --neighbours=24 within --radius=METRES, turned
                       --normals_towards=up, middle (of the cloud) or X,Y,Z (the file's frame)
  --grid_size=0.02     edge of a voxel in metres; default: the checkpoint's
  --scale=1            factor on the coordinates
  --mesh=sample        --density=10000 points a square metre or --count=N, --seed=0; or vertices

The network: --tree=teacher|student, --dtype=float32|bfloat16, --inputs=coord,color,normal,
--max_voxels=N (larger clouds are encoded in overlapping chunks), --batch=16 (clouds in memory).

An NPZ with grid_coord and feat (and offset, mask, depth, coord) is encoded as it is.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch import command
from launch.infer_inputs import Job, Options, Record, parse, plan
from launch.infer_outputs import Result, write
from point_jax.data.normals import estimate_normals
from point_jax.data.prepared import Prepared, is_prepared, read_prepared
from point_jax.data.readers import Scan, read_cloud
from point_jax.data.scenes import SceneError
from point_jax.features.encoder import Encoder
from point_jax.features.head import SegmentationHead
from point_jax.features.load import load, load_head, read_checkpoint
from point_jax.interop.store import Weights
from point_jax.training.config import ConfigError
from point_jax.training.metrics import params_digest

POINTS = 4_000_000  # points of the clouds that are encoded together, at most


def read(job: Job, options: Options) -> Scan | Prepared:
    """One cloud, with normals if it has none and they are to be estimated."""
    if is_prepared(job.path):
        return read_prepared(job.path)
    scan = read_cloud(job.path, options.read)
    if scan.normal is not None or not options.given.estimate_normals:
        return scan
    if options.towards == "up":
        towards = None
    elif options.towards == "middle":
        towards = (scan.coord.min(axis=0) + scan.coord.max(axis=0)) / 2
    else:
        towards = scan.frame.to_scene(np.array([options.towards]))[0]
    given = options.given
    normal = estimate_normals(scan.coord, given.neighbours, given.radius, towards)
    return replace(scan, normal=normal)


def batches(
    jobs: Sequence[Job], options: Options, failed: dict[Path, str]
) -> Iterator[list[tuple[Job, Scan | Prepared]]]:
    """Clouds in groups to be encoded together; what cannot be read goes to `failed`."""
    batch, points = [], 0
    for job in jobs:
        try:
            cloud = read(job, options)
        except SceneError as error:
            note(failed, job, error, options)
            continue
        size = len(cloud.grid if isinstance(cloud, Prepared) else cloud.coord)
        if batch and points + size > POINTS:
            yield batch
            batch, points = [], 0
        batch.append((job, cloud))
        points += size
        if len(batch) == options.given.batch:
            yield batch
            batch, points = [], 0
    if batch:
        yield batch


def note(failed: dict[Path, str], job: Job, error: SceneError, options: Options) -> None:
    """Remembers a bad cloud, or raises an error that names its file."""
    text = str(error)
    told = text if str(job.path) in text else f"{job.path}: {text}"
    if not options.given.skip_bad:
        raise SceneError(f"{told} (--skip_bad leaves such clouds out)") from error
    failed[job.path] = told


def encode(
    encoder: Encoder,
    head: SegmentationHead | None,
    batch: Sequence[tuple[Job, Scan | Prepared]],
    options: Options,
    failed: dict[Path, str],
) -> Iterator[tuple[Job, Result]]:
    """Results of a batch, one by one."""
    scans = [(job, cloud) for job, cloud in batch if isinstance(cloud, Scan)]
    if scans and encoder.inputs is None:
        raise ConfigError(
            f"the network reads {encoder.spec.inputs} channels a point, and its checkpoint does "
            "not say which: give them in their order, for instance --inputs=color,normal"
        )
    try:
        stream = zip(scans, encoder.stream([scan for _, scan in scans]), strict=True)
        for (job, scan), features in stream:
            yield job, Result(job.name, [features], scan, encoder.grid_size, head)
    except SceneError:  # raised before the first is encoded: find out which one it is
        for job, scan in scans:
            try:
                yield job, Result(job.name, encoder([scan]), scan, encoder.grid_size, head)
            except SceneError as error:
                note(failed, job, error, options)
    for job, cloud in batch:
        if isinstance(cloud, Scan):
            continue
        try:
            features = encoder.encode_prepared(
                cloud.grid, cloud.features, cloud.offset, cloud.mask, cloud.depth, cloud.coord
            )
        except SceneError as error:
            note(failed, job, error, options)
            continue
        yield job, Result(job.name, features, cloud, encoder.grid_size, head)


def load_encoder(weights: Weights, options: Options) -> Encoder:
    """The network of a checkpoint with the settings of the command line.

    Raises:
        ConfigError: settings that do not fit the network.
    """
    given = options.given
    more = {} if given.max_voxels is None else {"max_voxels": given.max_voxels}
    try:
        encoder = load(
            given.checkpoint,
            weights=weights,
            tree=given.tree,
            grid_size=given.grid_size,
            inputs=options.inputs,  # pyright: ignore[reportArgumentType]
            dtype=jnp.dtype(given.dtype),
            scale=given.scale,
            **more,
        )
    except ValueError as error:
        raise ConfigError(f"{given.checkpoint}: {error} (--inputs, --grid_size)") from error
    levels = len(encoder.spec.encoder)
    if given.up_cast is not None and given.up_cast >= levels:
        raise ConfigError(
            f"--up_cast is {given.up_cast}; the network has {levels} levels: expected 0 to "
            f"{levels - 1}"
        )
    return encoder


def main(argv: Sequence[str]) -> int:
    """Encodes what the command line says; returns the exit code."""
    options = parse(argv)
    if "ply" in options.formats and importlib.util.find_spec("plyfile") is None:
        raise ConfigError("--format=ply needs the package plyfile: pip install 'point_jax[io]'")
    logging.getLogger("laspy").setLevel(logging.CRITICAL)  # it tells errors twice
    command.keep_compiled()
    record = Record(options)
    jobs, done = plan(options, record)
    if done:
        print(f"{done} of {done + len(jobs)} have their results already (--overwrite: make again)")
    if not jobs:
        return 0
    command.make_folder(options.given.output)
    weights = read_checkpoint(options.given.checkpoint)
    encoder = load_encoder(weights, options)
    head = load_head(options.given.checkpoint, weights=weights)
    del weights  # a pretraining has a second network and its heads
    layer = {} if head is None else {"kernel": head.kernel, "bias": head.bias}
    record.bind(params_digest(encoder.params | layer))
    failed: dict[Path, str] = {}
    made = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("encoding", total=len(jobs))
        for batch in batches(jobs, options, failed):
            for job, result in encode(encoder, head, batch, options, failed):
                for remark in result.notes:
                    progress.print(f"{job.path}: {remark}", markup=False, soft_wrap=True)
                write(result, job.files, options.given.up_cast, options.given.levels)
                record.add(job.name, job.path)
                made += 1
                progress.update(task, completed=made + len(failed))
    for reason in failed.values():
        print(f"skipped: {reason}")
    bad = f", {len(failed)} skipped" if failed else ""
    print(f"{made} encoded{bad}: {options.given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
