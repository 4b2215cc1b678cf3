"""The threads of a conversion and what they show."""

import io
import threading

import pytest
from rich.console import Console

from dsv3_jax.checkpoints import transfer
from dsv3_jax.checkpoints.safetensors_io import WeightsError


def test_plain_lines_say_bytes_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(transfer.time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    with transfer.Progress("converting", 10_000_000_000, 2_000_000_000, file) as progress:
        for _ in range(3):
            clock[0] += 7.0
            progress.advance(1_400_000_000)
        clock[0] += 1.0
        progress.advance(3_800_000_000)
    lines = file.getvalue().splitlines()
    assert lines == [
        "converting  4.80/10.00 GB  200 MB/s  ETA 0:00:26",
        "converting  10.00/10.00 GB  364 MB/s  ETA 0:00:00",
    ]


def test_a_terminal_gets_a_bar_on_one_line(monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with transfer.Progress("converting", 10_000_000) as progress:
        progress.advance(10_000_000)
    text = file.getvalue()
    assert "converting" in text and "10.0/10.0 MB" in text and "ETA" in text
    assert text.count("\n") == 1


def test_the_first_error_ends_all_threads_and_begins_nothing_new():
    begun, waiting = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == 3:
            waiting.set()
            raise WeightsError("tensor 3")
        waiting.wait(30)
        while True:  # a long tensor: stopped at its next band
            progress.advance(1)

    with (
        pytest.raises(WeightsError, match="tensor 3"),
        transfer.Progress("x", 1, file=io.StringIO()) as progress,
    ):
        transfer.run_all([3, *range(10, 1000)], work, progress)
    assert len(begun) < 30


def test_every_item_is_done_once():
    done = []
    with transfer.Progress("x", 1, file=io.StringIO()) as progress:
        transfer.run_all(range(100), done.append, progress)
    assert sorted(done) == list(range(100))


def test_only_a_full_disk_is_bad_input(tmp_path):
    with pytest.raises(WeightsError, match="No space left on device at x: make room"):
        with transfer.disk_full_names("x", tmp_path):
            raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), transfer.disk_full_names("x", tmp_path):
        raise PermissionError(13, "Permission denied")
