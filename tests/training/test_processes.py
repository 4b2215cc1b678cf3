"""Real processes: started, stopped, killed, and resumed on another number of them.

Over gloo, with a CPU device each; those marked "gpu" over NCCL too, with a GPU each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.training.loop import train
from dsv3_jax.training.metrics import read_jsonl

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
ON_GPUS = jax.default_backend() == "gpu"

needs_two = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@pytest.fixture(scope="module")
def whole(config, compilation_cache, tmp_path_factory):
    """Directory of a run of one process on one device that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert train(config, out) == 0
    return out


class Processes:
    """The processes of one run, each with one device."""

    def __init__(self, config_file, out, count, *options, only=None, file_kilobytes=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1] - 1  # the next one, JAX's, is free then
        self.out, self.running = out, {}
        for index in range(count) if only is None else only:
            limit = (file_kilobytes or {}).get(index, "unlimited")
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", sys.executable]
            command += ["scripts/train.py", str(config_file), "--out", str(out)]
            command += ["--cluster.address", f"127.0.0.1:{port}", "--cluster.count", str(count)]
            command += ["--cluster.index", str(index), *options]
            flags = os.environ["XLA_FLAGS"].split()
            flags = [flag for flag in flags if "device_count" not in flag]
            env = os.environ | {
                "XLA_FLAGS": " ".join(flags),
                "CUDA_VISIBLE_DEVICES": str(index),
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "PYTHONPATH": str(ROOT),
            }
            self.running[index] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def wait_for_step(self, step):
        path = self.out / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= step:
                return
            for process in self.running.values():
                if process.poll() is not None:
                    raise AssertionError(process.communicate()[1])
            time.sleep(0.01)
        raise AssertionError(f"no step {step}")

    def signal(self, index, number):
        self.running[index].send_signal(number)

    def end(self):
        """{index: (exit code, lines on stderr that report an error)}; and no output but 0's."""
        results = {}
        for index, process in self.running.items():
            try:
                out, err = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            results[index] = (process.returncode, errors)
            if index:
                shown = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
                assert not shown, shown
        return results


def assert_same_run(out, whole):
    """Every step once, with the losses and tokens of the run on one device.

    A GPU multiplies the halves of a batch in other orders than the whole: 1e-5 there.
    """
    got, want = read_jsonl(out / "metrics.jsonl"), read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in got] == [row["step"] for row in want]
    assert [row["tokens"] for row in got] == [row["tokens"] for row in want]
    assert [row["max_vio"] for row in got] == [row["max_vio"] for row in want]
    for name in ("loss", "main_loss", "mtp_loss", "balance_loss"):
        np.testing.assert_allclose(
            [row[name] for row in got],
            [row[name] for row in want],
            rtol=1e-5 if ON_GPUS else 1e-6,
            err_msg=name,
        )


def test_a_missing_process_is_named_with_code_2(config_file, tmp_path):
    waits = ("--cluster.join-timeout-s", "2")
    ends = Processes(config_file, tmp_path / "out", 2, *waits, only=[0]).end()
    assert ends == {
        0: (
            2,
            [
                "error: process 1 of 2 did not come within 2 s (cluster.join_timeout_s); is it "
                "running, and can it reach process 0?"
            ],
        )
    }
    assert not (tmp_path / "out").exists()


@needs_two
@pytest.mark.gpu
def test_two_processes_one_killed_resume_on_one(config, config_file, whole, tmp_path):
    two = Processes(config_file, tmp_path, 2, "--parallel.fsdp", "2", "--total-tokens", "1000000")
    two.wait_for_step(5)
    two.signal(1, signal.SIGKILL)
    killed = time.monotonic()
    ends = two.end()
    assert time.monotonic() - killed < 30
    assert ends[1][0] == -signal.SIGKILL
    gone = f"error: process 1 ({HOST}) is gone: killed, or its host lost"
    code, (error,) = ends[0]
    assert code == 1 and error.startswith(gone)
    assert CheckpointStore(tmp_path / "checkpoints").latest_step() >= 3
    assert train(config, tmp_path, resume=True) == 0
    assert_same_run(tmp_path, whole)


@needs_two
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_step(config_file, whole, tmp_path, index):
    options = ("--parallel.expert", "2", "--total-tokens", "1000000")
    two = Processes(config_file, tmp_path, 2, *options)
    two.wait_for_step(4)
    two.signal(index, signal.SIGTERM)
    assert two.end() == {0: (0, []), 1: (0, [])}
    step = CheckpointStore(tmp_path / "checkpoints").latest_step()
    assert step == len(read_jsonl(tmp_path / "metrics.jsonl")) < 1000
    one = Processes(config_file, tmp_path, 1, "--resume", "--steps", "12", *options[2:])
    assert one.end() == {0: (0, [])} or step > 12


@pytest.mark.slow
def test_process_0_killed_ends_the_other_with_1(config_file, compilation_cache, tmp_path):
    two = Processes(config_file, tmp_path, 2, "--parallel.fsdp", "2", "--total-tokens", "1000000")
    two.wait_for_step(4)
    two.signal(0, signal.SIGKILL)
    killed = time.monotonic()
    code, errors = two.end()[1]
    assert time.monotonic() - killed < 30 and code == 1
    assert any(f"process 0 ({HOST}) is gone" in line for line in errors)


@pytest.mark.slow
def test_four_processes_resume_on_two_and_on_another_mesh(config_file, whole, tmp_path):
    # Along the tensor axis, processes 0 and 1, and 2 and 3, read the same sequences.
    four = Processes(
        config_file, tmp_path, 4, "--parallel.fsdp", "2", "--parallel.tensor", "2", "--steps", "4"
    )
    four.wait_for_step(4)
    four.signal(3, signal.SIGKILL)
    ends = four.end()
    assert ends[3][0] == -signal.SIGKILL
    assert all(ends[index][0] == 1 for index in range(3)), ends
    two = Processes(config_file, tmp_path, 2, "--parallel.expert", "2", "--resume")
    assert two.end() == {0: (0, []), 1: (0, [])}
    assert_same_run(tmp_path, whole)
    assert (tmp_path / "summary.json").exists() and (tmp_path / "sample.txt").exists()


@pytest.mark.slow
def test_the_same_mesh_resumes_bit_for_bit(config_file, compilation_cache, tmp_path):
    fsdp = ("--parallel.fsdp", "2")
    assert Processes(config_file, tmp_path / "a", 2, *fsdp).end()[0][0] == 0
    assert Processes(config_file, tmp_path / "b", 2, *fsdp, "--steps", "4").end()[0][0] == 0
    assert Processes(config_file, tmp_path / "b", 2, *fsdp, "--resume").end()[0][0] == 0
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in "ab"]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k != "tokens_per_s"} == {
            k: v for k, v in b.items() if k != "tokens_per_s"
        }


@pytest.mark.slow
def test_a_failed_write_on_one_host_ends_all_with_1(config_file, compilation_cache, tmp_path):
    two = Processes(config_file, tmp_path, 2, "--parallel.fsdp", "2", file_kilobytes={1: 16})
    ends = two.end()
    assert [code for code, _ in ends.values()] == [1, 1]
    for _, errors in ends.values():
        (error,) = errors
        assert "checkpoint step 3 was not written" in error and "File too large" in error
    assert f"process 1 ({HOST})" in ends[0][1][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel.fsdp", "3"), "must multiply to the 2 devices"),
        ((), "must multiply to the 2 devices"),
        (("--parallel.fsdp", "2", "--model.hidden-size", "32", "--resume"), "hidden_size=32 must"),
        (("--parallel.fsdp", "2"), "already holds a run at step 8"),
    ],
    ids=str,
)
def test_bad_input_ends_all_with_2(config_file, whole, options, message):
    ends = Processes(config_file, whole, 2, *options).end()
    for code, errors in ends.values():
        assert code == 2 and len(errors) == 1 and message in errors[0], ends
