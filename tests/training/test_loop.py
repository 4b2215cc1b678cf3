"""Whole runs: what they leave behind, and that stopping, killing and resuming change nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.inference.generate import generate_text
from dsv3_jax.training.loop import TrainingError, planned_steps, train
from dsv3_jax.training.metrics import METRIC_KEYS, read_jsonl
from dsv3_jax.training.step import init_state

ROOT = Path(__file__).parents[2]
STEPS = 8


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def whole(config, compilation_cache, tmp_path_factory):
    """Directory of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert train(config, out) == 0
    return out


def _losses(out):
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"], row["max_vio"], row["tokens"]) for row in rows]


def _final_state(out):
    """All arrays of the newest checkpoint."""
    import orbax.checkpoint as ocp

    store = CheckpointStore(out / "checkpoints")
    folder = out / "checkpoints" / str(store.latest_step()) / "state"
    return jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder))


def _same_run(one, other):
    assert _losses(one) == _losses(other)
    for a, b in zip(_final_state(one), _final_state(other), strict=True):
        np.testing.assert_array_equal(a, b)


def _start(config_file, out, *options, file_kilobytes="unlimited"):
    limited = ["bash", "-c", f'ulimit -f {file_kilobytes}; exec "$@"', "bash"]
    command = [
        *limited,
        sys.executable,
        "scripts/train.py",
        str(config_file),
        "--out",
        str(out),
        *options,
    ]
    # As the test process computes, so must the child: matmul precision is part of the numbers.
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def _wait_for_step(out, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else b""
        if lines.count(b"\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()[1]}")


def test_a_run_leaves_its_numbers_pictures_and_sample(whole, config):
    rows = read_jsonl(whole / "metrics.jsonl")
    assert len(rows) == STEPS == planned_steps(config)
    assert all(set(row) == set(METRIC_KEYS) for row in rows)
    assert rows[-1]["tokens"] == config.total_tokens
    assert rows[-1]["mfu"] is None  # a CPU's peak is not known
    first = rows[0]
    weights = config.loss
    parts = first["main_loss"] + weights.mtp_weight * first["mtp_loss"]
    parts += weights.balance_weight * first["balance_loss"]
    assert first["loss"] == pytest.approx(parts, rel=1e-6)
    assert first["main_loss"] == pytest.approx(np.log(config.model.vocab_size), rel=0.05)
    for name in ("loss.png", "expert_load.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert (whole / "sample.txt").read_text().startswith("the")
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["held_out_perplexity"] == pytest.approx(np.exp(summary["held_out_loss"]))
    assert 0 <= summary["mtp_second_token_accuracy"] <= 1
    assert summary["bigram_loss"] > 0
    evaluations = read_jsonl(whole / "evaluation.jsonl")
    assert [row["step"] for row in evaluations] == [4, 8]
    assert list((whole / "tensorboard").iterdir())
    # Two newest of 3, 6, 8, and the best measured, which is one of them.
    assert CheckpointStore(whole / "checkpoints").steps() == [6, 8]
    metadata = CheckpointStore(whole / "checkpoints").read_metadata()
    assert metadata["sequences"] == STEPS * config.batch.size
    assert metadata["versions"]["jax"] == jax.__version__


def test_a_run_loads_as_a_model_and_completes_a_prompt(whole, config):
    model, variables = load_pretrained(whole, dtype="float32")
    assert model.config == config.model
    store = CheckpointStore(whole / "checkpoints")
    state, _ = store.restore(None, jax.eval_shape(lambda: init_state(model, config)))
    for a, b in zip(
        jax.tree.leaves(variables),
        jax.tree.leaves({"params": state.params, "router_state": state.router_state}),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    text = generate_text(whole, "the cat", dtype="float32", max_new_tokens=5, temperature=0)
    assert text == generate_text(
        whole / "checkpoints", "the cat", dtype="float32", max_new_tokens=5, temperature=0
    )
    half = load_pretrained(whole)[1]
    gate = half["params"]["moe_layers"]["mlp"]["gate"]["kernel"]
    assert gate.dtype == jnp.float32 and half["params"]["norm"]["weight"].dtype == jnp.bfloat16


@pytest.mark.slow  # The next one resumes, too.
def test_resumed_equals_never_stopped(whole, config, tmp_path):
    assert train(dataclasses.replace(config, steps=5), tmp_path) == 0
    assert len(_losses(tmp_path)) == 5
    assert train(config, tmp_path, resume=True) == 0
    _same_run(tmp_path, whole)


def test_sigterm_saves_and_exits_0_and_the_rest_is_the_same(whole, config, config_file, tmp_path):
    process = _start(config_file, tmp_path)
    _wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    stopped = CheckpointStore(tmp_path / "checkpoints").latest_step()
    assert 1 <= stopped < STEPS and "stopped by SIGTERM" in stderr
    assert train(config, tmp_path, resume=True) == 0
    _same_run(tmp_path, whole)


@pytest.mark.slow
def test_kill_9_falls_back_to_the_last_whole_checkpoint(whole, config_file, tmp_path):
    process = _start(config_file, tmp_path)
    _wait_for_step(tmp_path, 4, process)
    process.kill()
    process.communicate()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) < STEPS
    process = _start(config_file, tmp_path, "--resume")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    _same_run(tmp_path, whole)


def test_a_directory_with_a_run_needs_resume(whole, config):
    with pytest.raises(ConfigError, match="already holds a run at step 8.*--resume"):
        train(config, whole)


def test_resume_refuses_another_network_or_token_stream(whole, config):
    wider = dataclasses.replace(config.model, intermediate_size=44)
    with pytest.raises(ConfigError, match=r"model.intermediate_size=44 must be 40"):
        train(dataclasses.replace(config, model=wider), whole, resume=True)
    reseeded = dataclasses.replace(config.data, seed=5)
    with pytest.raises(ConfigError, match=r"data.seed=5 must be 0"):
        train(dataclasses.replace(config, data=reseeded), whole, resume=True)


def test_a_damaged_checkpoint_is_named_and_never_skipped(whole, config, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    largest = max((out / "checkpoints/8").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="step 8 .*damaged.*delete.*step 6"):
        train(config, out, resume=True)


def test_a_run_of_steps_without_finite_loss_ends_with_an_error(config, tmp_path):
    broken = dataclasses.replace(
        config.optimizer, peak_lr=1e30, clip_norm=1e30, max_skipped_in_a_row=2
    )
    with pytest.raises(TrainingError, match="not finite in 2 steps in a row"):
        train(dataclasses.replace(config, optimizer=broken), tmp_path)
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert None in (last["loss"], last["grad_norm"])  # NaN and infinity are not JSON


def test_bad_data_is_one_line(config, tmp_path):
    def with_data(**changes):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))

    with pytest.raises(ConfigError, match="nowhere"):
        train(with_data(corpus=str(tmp_path / "nowhere")), tmp_path / "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="empty"):
        train(with_data(corpus=str(empty)), tmp_path / "b")
    deepseek = DataConfig(corpus=config.data.corpus, tokenizer="deepseek-v3", sequence_length=16)
    with pytest.raises(ConfigError, match=r"1\d\d\d\d\d.*300|300.*1\d\d\d\d\d"):
        train(dataclasses.replace(config, data=deepseek), tmp_path / "c")


def test_a_failed_checkpoint_write_exits_1_with_one_line(config_file, tmp_path):
    # Metrics fit into 60 kB, a checkpoint's arrays do not.
    process = _start(config_file, tmp_path, file_kilobytes=60)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "checkpoint step 3 was not written" in errors[0]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) >= 3  # nothing before it is lost
