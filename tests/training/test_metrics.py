"""metrics.jsonl through crashes and full disks, TensorBoard events, the progress bar."""

import io
import json
import math
import os
import re

import numpy as np
import pytest

from dsv3_jax.training.metrics import (
    METRIC_KEYS,
    MetricsError,
    MetricsWriter,
    ProgressBar,
    read_jsonl,
)


def row(step, **changes):
    values = dict.fromkeys(METRIC_KEYS, 0.5 * step)
    return {**values, "step": step, "tokens": 4096 * step, "mfu": None, **changes}


def scalars(directory):
    """{tag: {step: value}} of every event file, as TensorBoard would show them."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                for steps in found.values():
                    for step in [s for s in steps if s >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_a_line_a_step_with_the_contracts_keys(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(row(1, loss=np.float32(2.5)))
        first = (tmp_path / "metrics.jsonl").read_text()  # readable before close
        writer.write(row(2, mfu=0.41))
    assert first.count("\n") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [list(METRIC_KEYS)] * 2
    assert json.loads(lines[0])["loss"] == 2.5 and json.loads(lines[0])["mfu"] is None
    assert json.loads(lines[1])["mfu"] == 0.41
    assert '"step": 2, "tokens": 8192,' in lines[1]


def test_nan_and_infinity_are_null_in_json_and_kept_in_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(row(1, loss=math.nan, grad_norm=math.inf))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = json.loads(line, parse_constant=refuse)
    assert parsed["loss"] is None and parsed["grad_norm"] is None
    assert math.isnan(scalars(tmp_path / "tensorboard")["train/loss"][1])


@pytest.mark.parametrize("change", [{"losss": 1.0}, "loss"])
def test_keys_outside_the_contract_are_refused(tmp_path, change):
    bad = row(1)
    if isinstance(change, str):
        del bad[change]
    else:
        bad.update(change)
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="loss"):
        writer.write(bad)


def test_tensorboard_has_every_scalar_and_the_extras(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(row(1), extra={"max_vio/layer_3": 0.25})
        writer.write_evaluation(1, {"main_loss": 3.5})
    found = scalars(tmp_path / "tensorboard")
    expected = {f"train/{key}" for key in METRIC_KEYS if key not in ("step", "mfu")}
    assert set(found) == expected | {"max_vio/layer_3", "held_out/main_loss"}
    assert found["max_vio/layer_3"] == {1: 0.25}
    assert found["held_out/main_loss"] == {1: 3.5}


def test_resume_after_a_kill_leaves_each_step_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 8):
        writer.write(row(step))
    writer.write_evaluation(4, {"main_loss": 4.0})
    writer.write_evaluation(6, {"main_loss": 6.0})
    writer._tensorboard._writer.flush()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "tok')  # killed in the middle of a line; nothing was closed
    with MetricsWriter(tmp_path, resume_step=5) as resumed:
        for step in range(6, 9):
            resumed.write(row(step, loss=100.0))
        resumed.write_evaluation(8, {"main_loss": 8.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert [r["loss"] for r in rows[4:]] == [2.5, 100.0, 100.0, 100.0]
    assert [r["step"] for r in read_jsonl(tmp_path / "evaluation.jsonl")] == [4, 8]
    losses = scalars(tmp_path / "tensorboard")["train/loss"]
    assert losses == {**{s: 0.5 * s for s in range(1, 6)}, 6: 100.0, 7: 100.0, 8: 100.0}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(row(step))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(row(3))
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]


def test_a_new_run_starts_with_empty_files(tmp_path):
    for steps in (3, 2):
        with MetricsWriter(tmp_path) as writer:
            for step in range(1, steps + 1):
                writer.write(row(step))
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: No space left"):
        with MetricsWriter(tmp_path) as writer:
            writer.write(row(1))


def test_a_full_disk_under_tensorboard_is_an_error_too(tmp_path):
    with pytest.raises(MetricsError, match="tensorboard: No space left"):
        with MetricsWriter(tmp_path) as writer:
            writer._tensorboard._writer._py_recordio_writer._writer = open("/dev/full", "wb")
            writer.write(row(1))


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match="cannot create .*file"):
        MetricsWriter(tmp_path / "file" / "run")


def test_damage_before_the_last_line_is_reported_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(MetricsError, match="line 2 of .*metrics.jsonl is not JSON"):
        read_jsonl(path)


def test_plain_progress_lines_are_few_and_complete(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("dsv3_jax.training.metrics.time.monotonic", lambda: clock[0])
    out = io.StringIO()
    with ProgressBar(100, initial_step=20, file=out, plain_seconds=10.0) as bar:
        clock[0] += 60  # compiles
        for step in range(21, 101):
            bar.update(step, loss=3.25, tokens_per_s=12_345.0, mfu=None)
            clock[0] += 0.5
        bar.print("held-out loss [3.1]")
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 21/100  loss 3.2500  12.3k tok/s  MFU n/a  ETA -:--:--"
    assert lines[1] == "step 41/100  loss 3.2500  12.3k tok/s  MFU n/a  ETA 0:00:30"
    assert lines[-2].startswith("step 100/100 ") and lines[-2].endswith("ETA 0:00:00")
    assert lines[-1] == "held-out loss [3.1]"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("steps", "loss", "speed", "mfu"),
    [(40, 3.0, 950.0, None), (1_000_000, 12.3456, 123_456_789.0, 0.4567)],
)
def test_terminal_bar_is_one_line_of_80_columns(monkeypatch, steps, loss, speed, mfu):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with ProgressBar(steps, file=out) as bar:
        bar.update(steps - 1, loss=loss, tokens_per_s=speed, mfu=mfu)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    assert max(len(frame) for frame in frames) <= 80
    last = [frame for frame in frames if "loss" in frame][-1]
    assert f"step {steps - 1}/{steps}" in last and f"loss {loss:.4f}" in last
    assert ("MFU n/a" if mfu is None else "MFU 45.7%") in last and "ETA" in last
    assert "…" not in last
