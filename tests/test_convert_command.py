"""`launch.convert` there and back, on files and on runs of this project."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import foreign, random_state, same, small_config
from small import small_config as small_run

from launch import command, convert
from point_jax.interop.convert import to_pointcept, to_weights
from point_jax.interop.files import read_file, write_pth
from point_jax.interop.release import config_of
from point_jax.interop.store import Weights, digest, load_weights, save_weights
from point_jax.interop.workdir import read_workdir
from point_jax.objectives.settings import make_sonata, network_spec
from point_jax.training.checkpoint import CheckpointError, Checkpoints
from point_jax.training.config import settle_config


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is an extra: .pth files are not tested")


def command_line(capsys, *arguments):
    """Exit code, and lines on stdout and stderr, of `launch.convert`."""
    code = command.run(convert.main, ["convert", *map(str, arguments)], convert.__doc__)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder after steps 3 and 5, with random student and teacher."""
    folder = tmp_path_factory.mktemp("run")
    config = small_run()
    settle_config(config, folder)
    template = jax.eval_shape(make_sonata(config).init, jax.random.key(0))[0]
    checkpoints = Checkpoints(folder, 2)
    for step in (3, 5):
        draw = np.random.default_rng(step).standard_normal
        trees = {
            tree: jax.tree.map(lambda s, draw=draw: jnp.asarray(draw(s.shape, "f4")), template)
            for tree in ("student", "teacher", "mu")
        }
        checkpoints.save(step, {"step": jnp.int32(step)} | trees, {})
    checkpoints.close()
    return folder


def test_a_run_of_this_project_goes_out_and_in(tmp_path, workdir):
    weights = read_workdir(workdir)
    assert weights.kind == "pretraining"
    assert (weights.variant, weights.config) == config_of(network_spec(small_run().network))
    assert weights.source["numbers"] == {"step": 5}
    assert weights.source["file"].endswith("/checkpoints/5")
    content = to_pointcept(weights)
    assert all(k.startswith(("module.student.", "module.teacher.")) for k in content["state_dict"])
    network = tmp_path / "network.json"
    network.write_text(json.dumps(weights.config))
    again = to_weights(foreign(tmp_path, content["state_dict"]), str(network))
    assert digest(dataclasses.replace(again, source={})) == digest(
        dataclasses.replace(weights, source={})
    )


def test_a_run_with_another_config_is_refused(tmp_path, workdir):
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    content["config"]["network"]["depths"] = [1, 2]
    file.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"student/backbone/enc/stage1/blocks/conv/bias is \(1, .*, not \(2, "
    ):
        read_workdir(tmp_path / "run")
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="describes no network"):
        read_workdir(tmp_path / "run")


def test_the_command_there_and_back(tmp_path, torch, capsys):
    state, config = random_state("sonata_small"), small_config("sonata_small")
    write_pth(tmp_path / "in.pth", {"config": config, "state_dict": state})
    steps = (
        ("in.pth", "w", (), "checkpoint"),
        ("w", "hub", ("--to=safetensors",), "safetensors"),
        ("hub", "w2", (), "checkpoint"),
        ("w2", "out.pth", (), "pth"),
        ("in.pth", "hub2", ("--to=safetensors",), "safetensors"),
    )
    for source, target, more, to in steps:
        paths = (f"--input={tmp_path / source}", f"--output={tmp_path / target}")
        code, out, err = command_line(capsys, *paths, *more)
        assert (code, err) == (0, [])
        assert out[0].startswith(f"read {tmp_path / source}: encoder PT-v3m2: 0.61 M parameters")
        assert " under 273 keys, sha256 " in out[0]
        assert out[-1] == f"wrote {tmp_path / target}: {to}"
    assert same(read_file(tmp_path / "out.pth").state, state)
    assert same(read_file(tmp_path / "hub2").state, state)
    assert read_file(tmp_path / "out.pth").config == config
    assert load_weights(tmp_path / "w2").source["format"] == "safetensors"


def test_the_command_on_a_run(tmp_path, torch, capsys, workdir):
    source, teacher = f"--input={workdir}", read_workdir(workdir).params["teacher"]["backbone"]
    code, out, err = command_line(capsys, source, f"--output={tmp_path / 'a.pth'}", "--to=pth")
    assert (code, err) == (0, [])
    assert "took the teacher's encoder" in out[2]
    weights = to_weights(read_file(tmp_path / "a.pth"))
    jax.tree.map(np.testing.assert_array_equal, weights.params["backbone"], teacher)
    code, out, _ = command_line(capsys, source, f"--output={tmp_path / 'b.pth'}", "--tree=student")
    assert code == 0 and "the student's" in out[0]
    code, out, _ = command_line(capsys, source, f"--output={tmp_path / 'w'}")
    assert code == 0 and load_weights(tmp_path / "w").kind == "pretraining"
    code, out, _ = command_line(capsys, source, f"--output={tmp_path / 'c.pth'}", "--to=pointcept")
    assert code == 0 and "left out: the optimizer's state" in out[1]
    assert "does not resume" in out[2]


def test_the_commands_mistakes_are_one_line_each(tmp_path, capsys, workdir):
    save_weights(tmp_path / "w", Weights("linear_head", "", {}, {"seg_head": {"bias": np.ones(2)}}))
    (tmp_path / "taken").write_text("precious")
    w, new = f"--input={tmp_path / 'w'}", f"--output={tmp_path / 'new'}"
    run = f"--input={workdir}"
    for arguments, message in (
        ((), "required: --input, --output"),
        ((w, new, "--frobnicate"), "unrecognized arguments: --frobnicate"),
        ((w, new, "--to=onnx"), "invalid choice: 'onnx'"),
        ((w, f"--output={tmp_path / 'taken'}"), "taken exists already"),
        (("--input=nowhere.pth", new), "nowhere.pth does not exist"),
        ((f"--input={tmp_path}", new), "no folder of weights: expected manifest.json"),
        ((w, new), "is converted already: give --to="),
        ((run, f"--output={tmp_path / 'new.pth'}"), "give --to=pth for its encoder"),
        ((w, new, "--network=sonata"), "--network is for files without a config"),
        ((w, new, "--tree=student"), "--tree is for a pretraining"),
        ((w, new, "--to=pointcept"), "holds a pretraining or a segmentor, not one linear_head"),
    ):
        code, _, err = command_line(capsys, *arguments)
        assert code == 1 and len(err) == 1
        assert err[0].startswith("error: ") and message in err[0]
    assert {p.name for p in tmp_path.iterdir()} == {"w", "taken"}
    code, out, err = command_line(capsys, "--help")
    assert (code, err) == (0, []) and any("--network=NAME" in line for line in out)
