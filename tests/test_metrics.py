"""`metrics.jsonl` after kills and with values that JSON lacks; the digest of parameters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from point_jax.training.metrics import (
    MetricsError,
    MetricsWriter,
    finished,
    params_digest,
    read_metrics,
)


def write(workdir, steps, restored=0):
    writer = MetricsWriter(workdir, restored)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step, "lr": 0.1})
    return writer


def test_one_object_a_step_readable_while_the_run_goes_on(tmp_path):
    writer = write(tmp_path, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0, "lr": 0.1},
        {"step": 2, "loss": 0.5, "lr": 0.1},
    ]
    writer.close()


def test_resuming_removes_later_steps_and_a_torn_last_line(tmp_path):
    write(tmp_path, range(1, 8)).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    write(tmp_path, [5, 6], restored=4).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    write(tmp_path, [1], restored=0).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_values_that_are_not_finite_stay_valid_json(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": float("nan"), "norm": float("inf"), "low": -float("inf"), "lr": 0.5})
    writer.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is line["norm"] is line["low"] is None
    assert line["lr"] == 0.5
    assert line["nonfinite"] == {"loss": "nan", "norm": "inf", "low": "-inf"}
    (board,) = (tmp_path / "tensorboard").iterdir()  # which would warn at each of them
    assert {v.tag for event in events(board) for v in event.summary.value} == {"lr"}
    assert caplog.text == ""


def test_a_run_has_finished_when_its_last_line_says_so(tmp_path):
    assert finished(tmp_path) is None
    writer = write(tmp_path, [1, 2])
    assert finished(tmp_path) is None
    writer.event("done", 2, params_digest="abc")
    assert finished(tmp_path) == {"event": "done", "step": 2, "params_digest": "abc"}
    writer.close()


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(MetricsError, match=r"metrics.jsonl, line 2: .*; delete the line"):
        MetricsWriter(tmp_path, 1)


def test_tensorboard_gets_the_values_and_forgets_the_steps_after_the_restored_one(tmp_path):
    write(tmp_path, [1, 2, 3]).close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    write(tmp_path, [3], restored=2).close()
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
    values = [v for event in events(first) for v in event.summary.value if v.tag == "loss"]
    np.testing.assert_allclose([v.simple_value for v in values], [1, 1 / 2, 1 / 3])
    assert any(event.HasField("session_log") and event.step == 3 for event in events(second))


def events(file):
    """Records of an event file: length, checksum, content, checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        yield event_pb2.Event.FromString(  # pyright: ignore[reportAttributeAccessIssue]
            data[at + 12 : at + 12 + size]
        )
        at += 16 + size


def test_the_digest_sees_every_bit_name_and_shape():
    tree = {"student": {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.ones(4)}, "teacher": {}}
    digest = params_digest(tree)
    assert digest == params_digest(
        {"teacher": {}, "student": dict(reversed(tree["student"].items()))}
    )
    assert len(digest) == 64
    others = [
        {"student": {"a": {"w": jnp.zeros((3, 2))}, "b": jnp.ones(4)}},
        {"student": {"a": {"v": jnp.zeros((2, 3))}, "b": jnp.ones(4)}},
        {"student": {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.ones(4).at[3].set(1 + 1e-7)}},
        {"student": {"a": {"w": -jnp.zeros((2, 3))}, "b": jnp.ones(4)}},
        {"student": {"a": {"w": jnp.zeros((2, 3), jnp.int32)}, "b": jnp.ones(4)}},
        {"teacher": tree["student"]},
    ]
    assert len({digest, *map(params_digest, others)}) == 7
