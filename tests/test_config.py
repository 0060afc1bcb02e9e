"""The command line's mistakes are answered at once, and a resumed run keeps its config."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from point_jax.data.pipeline import default_data
from point_jax.training.config import (
    LIMITS,
    ConfigError,
    check_config,
    compare_config,
    default_config,
    parse_command_line,
    settle_config,
)

FILE = """
from point_jax.training.config import default_config

def get_config(size="base"):
    if size not in ("base", "small"):
        raise ValueError(f"no size {size!r}: base or small")
    config = default_config()
    config.train.steps = 100 if size == "base" else 10
    config.data = dict(sources=(dict(kind="rooms"),), skip_bad=False)
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(FILE)
    return path


def parse(file, *arguments):
    return parse_command_line(["train", f"--config={file}", "--workdir=w", *arguments])


def test_defaults_arguments_and_overrides(file):
    config, workdir = parse(file)
    assert (config.train.steps, config.optim.clip, workdir) == (100, 3.0, "w")
    assert parse(f"{file}:small")[0].train.steps == 10
    changed = ("--config.optim.lr=1e-3", "--config.seed=7", "--config.data.skip_bad")
    config, _ = parse(f"{file}:small", *changed, "--config.schedule.mask_size=(0.2,0.3)")
    assert (config.optim.lr, config.seed, config.data.skip_bad) == (1e-3, 7, True)
    assert config.schedule.mask_size == (0.2, 0.3)
    assert parse(file, "--config.optim.lr=1")[0].optim.lr == 1.0
    assert parse(file)[0].seed == 0  # nothing is remembered from one call to the next


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.lrr=1", "no key 'lrr' in config.optim; did you mean 'lr'?"),
        ("--config.trian.steps=1", "no key 'trian' in config; did you mean 'train'?"),
        ("--config.train.zzz=1", "no key 'zzz' in config.train; it has: batch, log_every"),
        ("--config.optim.lr.x=1", "no key 'x' in config.optim.lr: config.optim.lr is a float"),
        ("--config.optim=1", "config.optim is a section, not a value"),
        ("--config.train.steps=1e3", "config.train.steps=1e3"),
        ("--config.train.steps=1e3", "invalid literal for int()"),
        ("--config.optim.lr=fast", "could not convert string to float: 'fast'"),
        ("--config.data.skip_bad=perhaps", "perhaps"),
        ("--wrokdir=x", "Unknown command line flag 'wrokdir'"),
        ("stray", "not a flag: stray"),
    ],
)
def test_a_wrong_argument_is_named(file, argument, message):
    with pytest.raises(ConfigError) as caught:
        parse(file, argument)
    assert message in str(caught.value)


def test_a_missing_or_failing_file_is_named(tmp_path, file):
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        parse(tmp_path / "nowhere.py")
    with pytest.raises(ConfigError, match="no size 'huge': base or small"):
        parse(f"{file}:huge")
    with pytest.raises(ConfigError, match="--config=FILE.py is missing"):
        parse_command_line(["train", "--workdir=w"])
    with pytest.raises(ConfigError, match="--workdir=DIR is missing"):
        parse_command_line(["train", f"--config={file}"])
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="expected a ConfigDict"):
        parse(file)
    file.write_text("def get_config(:\n")
    with pytest.raises(ConfigError, match="invalid syntax"):
        parse(file)


@pytest.mark.parametrize("flag", ["--config.schedule.mask_size=(0.2,0.3)", "--workdir=w"])
def test_a_flag_given_twice_is_named(file, flag):
    """ml_collections would join two tuples to one of four."""
    name = flag.split("=")[0]
    with pytest.raises(ConfigError, match=f"^{name} is given twice"):
        parse_command_line(["train", f"--config={file}", flag, flag])


def test_an_argument_for_a_file_that_takes_none(file):
    file.write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError, match="takes no argument: write --config=FILE.py, no ':'"):
        parse(f"{file}:small")


def test_a_config_file_cannot_invent_keys_of_the_trainer():
    config = default_config()
    with pytest.raises(AttributeError, match='Did you mean "log_every"'):
        config.train.log_evry = 5
    with pytest.raises(TypeError):
        config.train.steps = "many"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "config.seed is -1, expected a whole number from 0 to 2147483647"),
        ("train.steps", 0, "config.train.steps is 0, expected a whole number at least 1"),
        ("optim.lr", float("nan"), "config.optim.lr is nan, expected a number above 0"),
        ("optim.lr", float("inf"), "config.optim.lr is inf, expected a number above 0"),
        ("optim.lr_decay", 5.0, "is 5.0, expected a number above 0 and at most 1"),
        ("optim.wd", -1.0, "config.optim.wd is -1.0, expected a number at least 0"),
        ("optim.wd_final", float("nan"), "config.optim.wd_final is nan, expected"),
        ("optim.beta2", 1.0, "config.optim.beta2 is 1.0, expected a number above 0 and below 1"),
        ("optim.pct_start", 5.0, "config.optim.pct_start is 5.0, expected a number from 0 to 1"),
        ("schedule.mask_size", (0.1,), "config.schedule.mask_size is (0.1,), expected (first, l"),
        ("schedule.mask_size", (-1, 0.4), "expected (first, last), each a number above 0"),
        ("schedule.mask_ratio", (0.3, 1.7), "(first, last), each a number from 0 to 1"),
        ("schedule.teacher_temp", (0, 0), "config.schedule.teacher_temp is (0, 0), expected"),
        ("schedule.momentum", (1.5, 2.0), "(first, last), each a number from 0 to 1"),
        ("schedule.momentum", ("a", "b"), "config.schedule.momentum is ('a', 'b'), expected"),
    ],
)
def test_values_out_of_range(key, value, message):
    config = default_config()
    check_config(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    assert message in str(caught.value)


def test_sections_that_a_file_wrote_itself_are_checked():
    config = ConfigDict(default_config().to_dict())
    config.optim.lrr = 1.0
    with pytest.raises(ConfigError, match=r"no key 'lrr' in config.optim; did you mean 'lr'"):
        check_config(config)
    del config.optim.lrr, config.optim.wd
    with pytest.raises(ConfigError, match=r"config.optim.wd is missing; its default is 0.04"):
        check_config(config)
    config.optim.wd = 1
    with pytest.raises(ConfigError, match=r"config.optim.wd is 1, expected a float such as 0.04"):
        check_config(config)


def test_every_number_of_the_config_has_limits():
    """A key without an entry in the table would take any value."""
    keys = {key for key, value in leaves(default_config().to_dict()) if key != "init_from"}
    assert keys == set(LIMITS)


def leaves(tree, place=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def test_every_packages_version_is_kept(tmp_path, file):
    config, _ = parse(file)
    assert compare_config(config, tmp_path) == []
    settle_config(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["config"]["data"]["sources"] == [{"kind": "rooms"}]
    assert content["versions"]["jax"].count(".") == 2
    assert compare_config(config, tmp_path) == []


def test_resuming_with_another_config_names_the_keys(tmp_path, file):
    settle_config(parse(file)[0], tmp_path)
    config, _ = parse(file, "--config.optim.lr=0.5", "--config.train.steps=7", "--config.seed=0")
    with pytest.raises(ConfigError) as caught:
        compare_config(config, tmp_path)
    assert "optim.lr: 0.004 -> 0.5; train.steps: 100 -> 7" in str(caught.value)
    assert "init_from" in str(caught.value)
    assert compare_config(config, tmp_path, binding=False) == [
        "config changed, optim.lr: 0.004 -> 0.5",
        "config changed, train.steps: 100 -> 7",
    ]


def test_a_run_from_before_a_key_goes_on_with_what_stands_for_it(tmp_path, file):
    settle_config(parse(file)[0], tmp_path)  # has no images
    config, _ = parse(file)
    with config.data.unlocked():
        config.data.images = default_data().images
    assert compare_config(config, tmp_path) == []
    config.data.images.count = 2
    with pytest.raises(ConfigError, match="data.images.count: 0 -> 2"):
        compare_config(config, tmp_path)


def test_resuming_may_change_what_is_written_and_whether_it_goes_on(tmp_path, file):
    settle_config(parse(file)[0], tmp_path)
    config, _ = parse(file, "--config.train.log_every=3", "--config.data.skip_bad=True")
    remarks = compare_config(config, tmp_path)
    assert remarks == [
        "config changed, data.skip_bad: False -> True",
        "config changed, train.log_every: 10 -> 3",
    ]
    settle_config(config, tmp_path)
    assert compare_config(config, tmp_path) == []


def test_a_run_of_a_program_that_did_not_know_a_key_goes_on(tmp_path, file):
    config, _ = parse(file)
    settle_config(config, tmp_path)
    with config.unlocked():
        config.network = ConfigDict({"stem": "linear", "norm": "layer", "pooling": "grid"})
    assert compare_config(config, tmp_path) == []
    config.network.norm = "batch"
    with pytest.raises(ConfigError, match=r"\(network.norm: layer -> batch\)"):
        compare_config(config, tmp_path)


def test_resuming_with_other_packages_is_remarked(tmp_path, file):
    config, _ = parse(file)
    settle_config(config, tmp_path)
    path = Path(tmp_path / "config.json")
    content = json.loads(path.read_text())
    content["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(content))
    (remark,) = compare_config(config, tmp_path)
    assert remark.startswith("jax was 0.0.1, is ")


def test_a_config_that_json_cannot_hold(tmp_path):
    config = default_config()
    config.data = ConfigDict({"sources": {1, 2}})
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        settle_config(config, tmp_path)
