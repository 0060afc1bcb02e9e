"""Foreign files come in bit for bit; what is broken, hostile or no checkpoint is refused."""

import json
import os
import pickle
import re
import resource
import shutil
import sys
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from foreign import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from point_jax.interop.files import (
    NEEDS_TORCH,
    Foreign,
    read_file,
    write_pth,
    write_safetensors,
)
from point_jax.interop.store import Weights, digest, load_weights, save_weights
from point_jax.training.checkpoint import CheckpointError

# A damaged file can end Orbax's event loop while a read is under way; it deplores that later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EVERY_DTYPE = (
    *("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "complex64"),
)
CONFIG = {"in_channels": 9, "order": ["z", "hilbert"], "qk_scale": None, "mlp_ratio": 4.0}


def some_state():
    """All dtypes, random bits (so NaNs with payloads, too), a scalar, and a transposed array."""
    rng = np.random.default_rng(0)
    state = {}
    for number, name in enumerate(EVERY_DTYPE):
        dtype = np.dtype(name)
        size = np.arange(2 + number)
        bits = rng.integers(0, 2 if dtype.kind == "b" else 256, (len(size), 3, dtype.itemsize))
        state[f"a.{dtype.name}"] = bits.astype(np.uint8).view(dtype)[..., 0]
    state["counter"] = np.array(7, np.int64)
    state["turned"] = rng.normal(size=(3, 4)).astype(np.float32).T
    return state


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is an extra: .pth files are not tested")


@pytest.fixture(scope="module")
def files(tmp_path_factory, torch):
    """A .pth, a safetensors folder and a converted folder; do not change them."""
    folder = tmp_path_factory.mktemp("files")
    state = some_state()
    write_pth(folder / "a.pth", {"config": CONFIG, "state_dict": state})
    write_safetensors(folder / "a", CONFIG, state)
    params = {"backbone": {"x": np.arange(600, dtype=np.float32).reshape(20, 30)}}
    save_weights(folder / "w", Weights("encoder", "PT-v3m2", CONFIG, params, state, {"file": "f"}))
    return folder


def test_a_pth_comes_back_bit_for_bit(files):
    foreign = read_file(files / "a.pth")
    assert (foreign.config, foreign.format) == (CONFIG, "pth")
    assert same(foreign.state, some_state())


def test_a_safetensors_folder_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    write_safetensors(tmp_path / "a", CONFIG, some_state())
    for path in (tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        foreign = read_file(path)
        assert (foreign.config, foreign.format) == (CONFIG, "safetensors")
        assert same(foreign.state, some_state())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_pth_without_pytorch_says_what_to_install(files, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    for use in (
        lambda: read_file(files / "a.pth"),
        lambda: write_pth(tmp_path / "b.pth", {"state_dict": {}}),
    ):
        with pytest.raises(CheckpointError, match=re.escape("pip install 'point_jax[torch]'")):
            use()
    assert NEEDS_TORCH.endswith("pip install 'point_jax[torch]'")
    assert not list(tmp_path.iterdir())


def test_a_pytorch_that_a_file_can_break_out_of_is_refused(files, torch, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"2\.9\.1.* run code"):
        read_file(files / "a.pth")


def test_files_of_old_pytorch_and_what_lies_beside_the_weights(tmp_path, torch):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "state_dict": layer.state_dict(),  # ordered, with PyTorch's own attribute
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "best_metric_value": np.float64(0.75),  # a NumPy scalar, as Pointcept keeps it
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        foreign = read_file(tmp_path / "a.pth")
        assert same(foreign.state, {k: v.numpy() for k, v in layer.state_dict().items()})
        assert foreign.numbers == {"epoch": 3, "best_metric_value": 0.75}
        assert foreign.config is None
        (remark,) = foreign.left_out
        assert remark.startswith("optimizer (6 arrays and ")


def test_a_state_dict_alone_and_one_without_checksums(tmp_path, torch):
    tensors = {"enc.a": torch.ones(3)}
    torch.save(tensors, tmp_path / "a.pth")
    assert same(read_file(tmp_path / "a.pth").state, {"enc.a": np.ones(3, np.float32)})
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "b.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_file(tmp_path / "b.pth").state, {"enc.a": np.ones(3, np.float32)})


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["state_dict", "config", "optimizer", "whole"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, torch, place, zipped):
    mark, file = tmp_path / "mark", tmp_path / "a.pth"
    content = {"config": {}, "state_dict": {"a": torch.ones(2)}, "optimizer": {}}
    if place == "whole":
        content = Payload(mark)
    else:
        content[place]["b"] = Payload(mark)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    torch.load(file, weights_only=False)
    assert mark.exists(), "the payload does not work, so the test would show nothing"
    mark.unlink()
    with pytest.raises(CheckpointError, match=r"holds posix\.system.*could run code.*refused"):
        read_file(file)
    assert not mark.exists()


def test_code_in_a_plain_pickle_does_not_run(tmp_path, torch):
    mark, file = tmp_path / "mark", tmp_path / "a.pth"
    for protocol in range(2, 6):
        file.write_bytes(pickle.dumps({"state_dict": Payload(mark)}, protocol))
        with pytest.raises(CheckpointError):
            read_file(file)
        assert not mark.exists()


def test_our_stand_ins_for_numpy_build_nothing_else(tmp_path, torch):
    """Scalars of dtype object are pickles again; `codecs.encode` would import codecs."""
    blob = pickle.dumps(Payload(tmp_path / "mark"))
    for name, arguments in {
        "numpy._core.multiarray scalar": (np.dtype("O"), blob),
        "_codecs encode": ("text", "zlib"),
    }.items():
        module, attribute = name.split()
        target = getattr(__import__(module, fromlist=[attribute]), attribute)

        class Call:
            def __init__(self, target, arguments):
                self.call = target, arguments

            def __reduce__(self):
                return self.call

        torch.save({"state_dict": {"a": Call(target, arguments)}}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError):
            read_file(tmp_path / "a.pth")
    assert not (tmp_path / "mark").exists()


def test_what_is_no_checkpoint(tmp_path, torch):
    def check(name, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_file(tmp_path / name)
        assert name in str(caught.value)

    (tmp_path / "empty.pth").touch()
    check("empty.pth", "not a checkpoint .empty")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    check("text.pth", "not a checkpoint .starts with b'version ")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    check("arrays.npz", "zip archive, but not one that PyTorch wrote")
    check("nowhere.pth", "No such file")
    (tmp_path / "folder").mkdir()
    check("folder", r"no model\.safetensors in it")
    for number, content in enumerate(
        ([1, 2], {}, {"a": 1}, {"state_dict": {}}, {"state_dict": {"a": [1]}}, torch.ones(3))
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        check(f"{number}.pth", "holds no state dict")
    torch.save({"state_dict": {"a": torch.ones(2)}, "config": [1]}, tmp_path / "list.pth")
    check("list.pth", "its config is a list")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pth")
    check("sparse.pth", "a is not a plain dense array")
    torch.save({"state_dict": {"a": torch.ones(2)}, "config": {"x": {1}}}, tmp_path / "set.pth")
    check("set.pth", "JSON|could run code")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{" + b"x" * 40)
    check("folder", "truncated or damaged")


def test_a_config_that_is_no_config(tmp_path):
    write_safetensors(tmp_path / "a", CONFIG, some_state())
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_file(tmp_path / "a")


FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLACES = {"pth": "a.pth", "safetensors": "a/model.safetensors"}


@pytest.mark.parametrize("kind", PLACES)
@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(files, tmp_path, kind, share):
    whole = (files / PLACES[kind]).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError):
        read_file(cut)


FLIPS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3
)


def flip(data, flips):
    damaged = bytearray(data)
    for share, bits in flips:
        damaged[int(share * len(damaged))] ^= bits
    return bytes(damaged)


@pytest.mark.parametrize("kind", PLACES)
@FUZZ
@given(flips=FLIPS)
def test_a_changed_file_is_refused_or_harmless(files, tmp_path, kind, flips):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(flip((files / PLACES[kind]).read_bytes(), flips))
    try:
        foreign = read_file(damaged)
    except CheckpointError:
        return
    if kind == "pth":  # PyTorch ignores its archive's checksums; the reader does not
        assert same(foreign.state, some_state())
    assert isinstance(foreign, Foreign)  # safetensors has no checksums: arrays may have changed


@FUZZ
@given(noise=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
def test_noise_is_refused(tmp_path, noise, head):
    (tmp_path / "noise").write_bytes(head + noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError):
            read_file(tmp_path / "noise")


def test_a_converted_folder_comes_back_bit_for_bit(files):
    weights = load_weights(files / "w")
    assert same(weights.extra, some_state())
    assert (weights.kind, weights.variant, weights.config) == ("encoder", "PT-v3m2", CONFIG)
    manifest = json.loads((files / "w" / "manifest.json").read_text())
    assert manifest["digest"] == digest(weights)
    assert (manifest["parameters"], manifest["version"]) == (600, 1)


@settings(FUZZ, max_examples=25)
@given(number=st.integers(0, 100), flips=FLIPS, cut=st.one_of(st.none(), st.floats(0, 0.99)))
def test_a_damaged_folder_is_refused_or_harmless(files, tmp_path, number, flips, cut):
    folder = tmp_path / "w"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files / "w", folder)
    every = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    file = every[number % len(every)]
    data = file.read_bytes()
    file.write_bytes(flip(data, flips) if cut is None else data[: int(cut * len(data))])
    try:
        weights = load_weights(folder)
    except CheckpointError:
        return
    assert digest(weights) == digest(load_weights(files / "w"))


def test_a_folder_of_a_newer_program_or_of_others(files, tmp_path):
    shutil.copytree(files / "w", tmp_path / "w")
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    for key, value, message in (
        ("version", 2, "has version 2, this program reads 1"),
        ("format", "mine", "not a manifest"),
    ):
        text = json.dumps(manifest | {key: value})
        (tmp_path / "w" / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path / "w")
    with pytest.raises(CheckpointError, match="no converted weights"):
        load_weights(tmp_path)


def test_nothing_is_overwritten(tmp_path, torch):
    weights = Weights("encoder", "PT-v3m2", CONFIG, {"backbone": {"x": np.ones(2, np.float32)}})
    state = {"a": np.ones(2, np.float32)}
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "empty", weights)  # an empty folder is no loss
    for write in (
        lambda path: save_weights(path, weights),
        lambda path: write_safetensors(path, CONFIG, state),
        lambda path: write_pth(path, {"state_dict": state}),
    ):
        for place in ("file", "folder"):
            path = tmp_path / place
            if place == "file":
                path.write_text("precious")
            else:
                path.mkdir(exist_ok=True)
                (path / "precious").touch()
            with pytest.raises(CheckpointError, match="exists already"):
                write(path)
    assert (tmp_path / "file").read_text() == "precious"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["precious"]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    weights = Weights("encoder", "PT-v3m2", {"x": object()}, {"backbone": {"x": np.ones(2)}})
    with pytest.raises(CheckpointError, match="no JSON form"):
        save_weights(tmp_path / "w", weights)
    empty = Weights("encoder", "PT-v3m2", {}, {"backbone": {"x": np.ones((0, 2), np.float32)}})
    with pytest.raises(CheckpointError, match="without elements: params/backbone/x"):
        save_weights(tmp_path / "w", empty)
    with pytest.raises(CheckpointError, match="no JSON form"):
        write_safetensors(tmp_path / "s", {"x": object()}, {})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
    """Files can have no more than 64 KiB for a while."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing(tmp_path, torch, full_disk):
    noise = np.random.default_rng(0).standard_normal(1 << 17, np.float32)
    weights = Weights("encoder", "PT-v3m2", CONFIG, {"backbone": {"x": noise}})
    for write in (
        lambda path: write_pth(path, {"config": CONFIG, "state_dict": {"x": noise}}),
        lambda path: write_safetensors(path, CONFIG, {"x": noise}),
        lambda path: save_weights(path, weights),
    ):
        with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/out: "):
            write(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_zip_whose_records_are_compressed_away(tmp_path, torch):
    """An archive with a pickle that PyTorch did not make: refused, whatever it holds."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"state_dict": {}}))
    with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
        read_file(tmp_path / "a.pth")
