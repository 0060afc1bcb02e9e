"""Runs whose folder is in an object store, a stand-in for Google's in this process."""

import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from ml_collections import ConfigDict

from launch import command
from point_jax.features.load import load, read_checkpoint
from point_jax.interop.store import Weights, save_weights
from point_jax.storage import Mirror, StorageError, local, place
from point_jax.training import checkpoint
from point_jax.training.checkpoint import CheckpointError
from point_jax.training.metrics import finished, read_metrics

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no stand-in for a store")

RUN = "gs://bucket/runs/toy"


@pytest.fixture(scope="module")
def store():
    """An empty store; its clients find it by the environment, at their first use."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    patch = pytest.MonkeyPatch()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        patch.setenv(name, f"http://localhost:{port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    # It asks by gRPC, which the stand-in has not.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="the object store's client is not installed")
    from fsspec.config import conf

    conf.update({name: {"token": "anon"} for name in ("gs", "gcs")})
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield
    server.stop()
    patch.undo()


def toy(workdir, *arguments):
    told = ["toy", f"--config={toy_run.__file__}", f"--workdir={workdir}", *arguments]
    return command.run(toy_run.main, told, None)


def test_a_run_in_an_object_store_goes_on_to_the_same_bits(store, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:  # a scene that is damaged, and mended later
        original = toy_run.generate

        def generate(data, *arguments):
            damaged = {**data.to_dict(), "fails": (0, 6)}
            return original(ConfigDict(damaged), *arguments)

        patch.setattr(toy_run, "generate", generate)
        assert toy(RUN) == 1
    assert "scene_7: coord.npy is cut off" in capsys.readouterr().err
    assert [path.name for path in place(RUN).glob("checkpoints/*")] == ["4", "6"]
    assert toy(RUN) == 0
    said = capsys.readouterr().out
    assert "going on after step 6 of 12" in said and f"checkpoint  {RUN}/checkpoints/12" in said
    assert toy(RUN) == 0 and "finished: 12 steps" in capsys.readouterr().out

    there = tmp_path / "there"
    there.mkdir()
    (there / "metrics.jsonl").write_bytes((place(RUN) / "metrics.jsonl").read_bytes())
    assert [line["step"] for line in read_metrics(there)] == [*range(1, 13), 12]
    assert toy(tmp_path / "here") == 0
    assert finished(there) == finished(tmp_path / "here")
    assert not Path("gs:").exists()
    names = {path.name for path in place(RUN).iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}


def test_converted_weights_are_read_from_there(store, tmp_path):
    weights = Weights("linear_head", "", {}, {"seg_head": {"bias": np.arange(2.0)}})
    save_weights(tmp_path, weights)
    remote = "gs://bucket/weights"
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        target = place(remote) / str(file.relative_to(tmp_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    found = read_checkpoint(remote).params["seg_head"]["bias"]
    np.testing.assert_array_equal(found, np.arange(2.0))
    with pytest.raises(CheckpointError, match="holds one linear_head"):
        load(remote)


def test_weights_are_read_from_there(store, tmp_path):
    remote, here = "gs://bucket/runs/weights", tmp_path / "weights"
    assert toy(remote) == toy(here) == 0
    for number, source in enumerate((place(remote), here)):
        assert toy(tmp_path / f"next{number}", f"--config.init_from={source}") == 0
    assert finished(tmp_path / "next0") == finished(tmp_path / "next1")
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, checkpoint.saved_shapes(source))
        for source in (place(remote), here)
    ]
    assert shapes[0] == shapes[1]


def test_a_mirror_tells_the_first_error_and_keeps_what_it_could_not_send(store, capsys):
    files = Mirror(place("gs://no-such-bucket/a"), ())
    (files.folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(KeyError, match="first"):
        fail_in(files)
    assert f"kept in {files.folder}" in capsys.readouterr().err
    assert (files.folder / "metrics.jsonl").exists()
    with Mirror(place("gs://bucket/b"), ()) as files:
        (files.folder / "metrics.jsonl").write_text("{}")
    assert not files.folder.exists()
    assert (place("gs://bucket/b") / "metrics.jsonl").read_text() == "{}"


def fail_in(context):
    with context:
        raise KeyError("first")


def test_a_store_that_is_not_there_is_told_without_a_trace(store, capsys):
    assert toy("gs://no-such-bucket/run") == 1
    error = capsys.readouterr().err
    assert "\nerror: " in f"\n{error}" and "gs://no-such-bucket" in error
    assert "Traceback" not in error


def test_an_error_of_a_store_s_library_is_told_without_a_trace(capsys):
    """Whatever was read there: weights, scenes, an encoder."""
    errors = pytest.importorskip("gcsfs.retry", reason="the object store's client is not installed")

    def main(argv):
        raise errors.HttpError({"code": 403, "message": "no access to bucket"})

    assert command.run(main, ["train"], None) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: object store: HttpError: ") and "no access to bucket" in error
    assert error.count("\n") == 1


def test_what_no_store_can_be():
    with pytest.raises(StorageError, match=r"s3://b/run: of object stores only gs://.* mount"):
        place("s3://b/run")
    with pytest.raises(StorageError, match=r"--workdir=gs://b/run: expected a folder on this"):
        local("gs://b/run", "--workdir")
    with pytest.raises(StorageError, match="gs://: expected gs://bucket/folder, with a bucket"):
        place("gs://")
    with pytest.raises(StorageError, match="with two strokes"):
        place(Path("gs://b/run"))
    assert place("runs/a") == local("runs/a", "--workdir") == Path("runs/a")
