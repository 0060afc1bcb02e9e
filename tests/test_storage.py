"""Runs whose folder is in an object store, stand-ins for Google's and Amazon's in this process."""

import socket
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from ml_collections import ConfigDict

from launch import command
from launch.infer_inputs import Record, parse
from point_jax import orbax_s3
from point_jax.features.load import load, read_checkpoint
from point_jax.interop.store import Weights, save_weights
from point_jax.storage import Mirror, StorageError, local, place
from point_jax.training import checkpoint
from point_jax.training.checkpoint import CheckpointError
from point_jax.training.metrics import finished, read_metrics


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    """The address of an empty bucket; its clients find it by the environment, when first used."""
    with pytest.MonkeyPatch.context() as patch:
        server, bucket = {"gs": googles, "s3": amazons}[request.param](patch)
        server.start()
        try:
            bucket()
            yield f"{request.param}://bucket"
        finally:
            server.stop()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def googles(patch):
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no stand-in for a store")
    objects = emulator.objects
    send = objects.download

    def download(request, response, storage, *arguments, **more):
        """With the header that it leaves out; without it TensorStore cannot write what it read."""
        send(request, response, storage, *arguments, **more)
        if response.status in (200, 206):
            file = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = file["generation"]

    patch.setattr(objects, "download", download)
    for _, methods in emulator.HANDLERS:
        if methods.get("GET") is send:
            patch.setitem(methods, "GET", download)
    port = free_port()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        patch.setenv(name, f"http://localhost:{port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    # It asks by gRPC, which the stand-in has not; read when gcsfs is imported.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="the object store's client is not installed")
    from fsspec.config import conf

    for name in ("gs", "gcs"):
        patch.setitem(conf, name, conf.get(name, {}) | {"token": "anon"})
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    return server, lambda: None


def amazons(patch):
    moto = pytest.importorskip("moto.server", reason="no stand-in for a store")
    pytest.importorskip("s3fs", reason="the object store's client is not installed")
    port = free_port()
    address = f"http://localhost:{port}"
    patch.setenv("AWS_ENDPOINT_URL", address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "any")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer("localhost", port, verbose=False)

    def bucket():
        put = urllib.request.Request(f"{address}/bucket", method="PUT")
        urllib.request.urlopen(put).close()

    return server, bucket


def toy(workdir, *arguments):
    told = ["toy", f"--config={toy_run.__file__}", f"--workdir={workdir}", *arguments]
    return command.run(toy_run.main, told, None)


def fetched(run, tmp_path):
    """A folder with the metrics of a run in the store."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((place(run) / "metrics.jsonl").read_bytes())
    return folder


def begin_save(run, step):
    """Leaves what a kill in a save leaves."""
    part = place(run) / f"checkpoints/{step}/state/part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"part")


def test_a_run_in_an_object_store_goes_on_to_the_same_bits(store, tmp_path, capsys):
    run = f"{store}/runs/toy"
    with pytest.MonkeyPatch.context() as patch:  # a scene that is damaged, and mended later
        original = toy_run.generate

        def generate(data, *arguments):
            damaged = {**data.to_dict(), "fails": (0, 6)}
            return original(ConfigDict(damaged), *arguments)

        patch.setattr(toy_run, "generate", generate)
        assert toy(run) == 1
    assert "scene_7: coord.npy is cut off" in capsys.readouterr().err
    assert [path.name for path in place(run).glob("checkpoints/*")] == ["4", "6"]
    assert toy(run) == 0
    said = capsys.readouterr().out
    assert "going on after step 6 of 12" in said and f"checkpoint  {run}/checkpoints/12" in said
    assert toy(run) == 0 and "finished: 12 steps" in capsys.readouterr().out

    there = fetched(run, tmp_path)
    assert [line["step"] for line in read_metrics(there)] == [*range(1, 13), 12]
    assert toy(tmp_path / "here") == 0
    assert finished(there) == finished(tmp_path / "here")
    assert not Path(store.partition("/")[0]).exists()  # a folder of that name, on this machine
    names = {path.name for path in place(run).iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}


def test_converted_weights_are_read_from_there(store, tmp_path):
    weights = Weights("linear_head", "", {}, {"seg_head": {"bias": np.arange(2.0)}})
    save_weights(tmp_path, weights)
    remote = f"{store}/weights"
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        target = place(remote) / str(file.relative_to(tmp_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    found = read_checkpoint(remote).params["seg_head"]["bias"]
    np.testing.assert_array_equal(found, np.arange(2.0))
    with pytest.raises(CheckpointError, match="holds one linear_head"):
        load(remote)


def test_weights_are_read_from_there(store, tmp_path):
    remote, here = f"{store}/runs/weights", tmp_path / "weights"
    assert toy(remote) == toy(here) == 0
    for number, source in enumerate((place(remote), here)):
        assert toy(tmp_path / f"next{number}", f"--config.init_from={source}") == 0
    assert finished(tmp_path / "next0") == finished(tmp_path / "next1")
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, checkpoint.saved_shapes(source))
        for source in (place(remote), here)
    ]
    assert shapes[0] == shapes[1]


def test_a_checkpoint_damaged_there_is_set_aside(store, capsys):
    run = f"{store}/runs/damaged"
    assert toy(run) == 0
    first = capsys.readouterr().out
    for file in ("metrics.jsonl", "checkpoints/12/state/manifest.ocdbt"):
        (place(run) / file).write_bytes(b"")
    assert toy(run) == 0
    said = capsys.readouterr().out
    assert f"cannot read checkpoint {run}/checkpoints/12" in said and "from step 8" in said
    assert f"moved {run}/checkpoints/12 to {run}/checkpoints/12.unreadable" in said
    assert (place(run) / "checkpoints/12.unreadable/state/manifest.ocdbt").exists()
    digest = [line for line in first.splitlines() if "sha256" in line]
    assert digest[0] in said.splitlines()


def test_a_save_that_a_kill_left_incomplete_is_none(store, tmp_path, capsys):
    """In a store it lies under its own name, without the file that Orbax writes last."""
    source, run = tmp_path / "source", f"{store}/runs/first"
    assert toy(source) == 0
    started = f"--config.init_from={source}"
    assert toy(tmp_path / "here", started) == 0
    begin_save(run, 4)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.saved_shapes(place(run))
    capsys.readouterr()
    assert toy(run, started) == 0
    assert "starting with the weights of" in capsys.readouterr().out
    there = fetched(run, tmp_path)
    assert finished(there) == finished(tmp_path / "here")
    begin_save(run, 13)
    assert checkpoint.saved_shapes(place(run)).keys() == {"student", "teacher", "mu", "nu"} | {
        "bad_steps"
    }


def test_a_store_that_goes_away_is_told_and_may_be_tried_again(store, monkeypatch, capsys):
    written = type(place(store)).write_bytes

    def away(path, content):
        if path.name == "metrics.jsonl":
            raise ConnectionError("no route")
        return written(path, content)

    monkeypatch.setattr(type(place(store)), "write_bytes", away)
    assert toy(f"{store}/runs/away") == 200
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {store}/runs/away cannot be used any more (ConnectionError: no")


def test_another_config_is_told_by_the_name_that_was_given(store, capsys):
    run = f"{store}/runs/other"
    assert toy(run, "--config.train.steps=2") == 0
    capsys.readouterr()
    assert toy(run) == 1
    assert f"error: {run} was started with another config" in capsys.readouterr().err


def test_features_are_made_with_weights_from_there(store, tmp_path):
    flags = ["infer", f"--checkpoint={store}/runs/a", "--input=a.ply"]
    options = parse([*flags, f"--output={tmp_path}"])
    assert Record(options).settings["checkpoint"] == f"{store}/runs/a"
    with pytest.raises(StorageError, match="expected a folder on this machine"):
        parse([*flags, f"--output={store}/a"])


def test_a_mirror_tells_the_first_error_and_keeps_what_it_could_not_send(
    store, monkeypatch, capsys
):
    files = Mirror(place(f"{store}/a"), ())
    (files.folder / "metrics.jsonl").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(type(place(store)), "write_bytes", refuse)
        with pytest.raises(KeyError, match="first"):
            fail_in(files)
    assert f"kept in {files.folder}" in capsys.readouterr().err
    assert (files.folder / "metrics.jsonl").exists()
    with Mirror(place(f"{store}/b"), ()) as files:
        (files.folder / "metrics.jsonl").write_text("{}")
    assert not files.folder.exists()
    assert (place(f"{store}/b") / "metrics.jsonl").read_text() == "{}"


def refuse(path, content):
    raise PermissionError(f"{path}: no")


def fail_in(context):
    with context:
        raise KeyError("first")


def test_a_store_that_is_not_there_is_told_without_a_trace(store, capsys):
    address = store.replace("bucket", "no-such-bucket")
    assert toy(f"{address}/run") == toy(f"{address}/run") == 1
    error = capsys.readouterr().err
    assert "\nerror: " in f"\n{error}" and address in error
    assert "Traceback" not in error


def test_an_error_of_a_store_s_library_is_told_without_a_trace(capsys):
    """Whatever was read there: weights, scenes, an encoder."""
    errors = pytest.importorskip("gcsfs.retry", reason="the object store's client is not installed")

    def main(argv):
        raise errors.HttpError({"code": 403, "message": "no access to bucket"})

    assert command.run(main, ["train"], None) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: object store: HttpError: ") and "no access to bucket" in error
    assert "credentials" in error
    assert error.count("\n") == 1


def test_what_no_store_can_be():
    with pytest.raises(StorageError, match=r"az://b/run: of object stores only gs://.* mount"):
        place("az://b/run")
    for store in ("gs", "s3"):
        form = f"expected {store}://bucket/folder, with"
        with pytest.raises(StorageError, match=rf"--workdir={store}://b/run: expected a folder on"):
            local(f"{store}://b/run", "--workdir")
        for address, wrong in (
            *((f"{store}:{strokes}", "a bucket") for strokes in ("//", "/", "///")),
            *((address, "two strokes") for address in (Path(f"{store}://b/r"), f"{store}:///b/r")),
            *((f"{store}://b/{name}", "none of") for name in ("lr[12]", "a*", "a?", "a/../b")),
        ):
            with pytest.raises(StorageError, match=f"{form} {wrong}"):
                place(address)
    assert place("runs/a") == local("runs/a", "--workdir") == Path("runs/a")


def test_an_orbax_that_decides_elsewhere_is_told(monkeypatch):
    utils = pytest.importorskip("orbax.checkpoint._src.serialization.tensorstore_utils")
    monkeypatch.delattr(utils, "_use_gcs_driver")
    orbax_s3.teach_orbax.cache_clear()
    with pytest.raises(StorageError, match=r"s3://b/run: this version of orbax.*point_jax\[s3\]"):
        place("s3://b/run")


def test_the_driver_of_s3_looks_where_s3fs_does():
    def driver(endpoint, **environment):
        return orbax_s3.s3_driver("s3://bucket/runs/a", environment, endpoint)

    plain = {"driver": "s3", "bucket": "bucket", "path": "runs/a"}
    keys = {"aws_credentials": {"type": "environment"}}
    files = {"aws_credentials": {"type": "default", "profile": "default"}}
    amazons = "https://s3.eu-west-1.amazonaws.com"
    assert driver(amazons, AWS_REGION="x") == plain | files
    assert driver(amazons, AWS_ACCESS_KEY_ID="k", AWS_PROFILE="me") == plain | keys
    assert driver(amazons, AWS_PROFILE="me")["aws_credentials"]["profile"] == "me"
    other = plain | files | {"endpoint": "http://minio:9000"}
    assert driver("http://minio:9000") == other | {"aws_region": "us-east-1"}
    regions = {"AWS_REGION": "x", "AWS_DEFAULT_REGION": "y"}
    assert driver("http://minio:9000", **regions) == other | {"aws_region": "x"}
