"""What a training run writes down and shows: metrics.jsonl, TensorBoard, the progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
METRIC_KEYS = (
    "step",
    "tokens",
    "loss",
    "main_loss",
    "mtp_loss",
    "balance_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "max_vio",
)
_COUNTERS = frozenset({"step", "tokens"})


class MetricsError(RuntimeError):
    """A metrics file could not be written or read; the message names it."""


def _json_number(key: str, value: float | None) -> float | int | None:
    """NaN and infinities, which JSON lacks, become null."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if key in _COUNTERS else float(value)


def _to_json_line(values: Mapping[str, float | None]) -> bytes:
    clean = {key: _json_number(key, value) for key, value in values.items()}
    return (json.dumps(clean, allow_nan=False) + "\n").encode()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a metrics file, in order; an unfinished last line is left out.

    Raises:
      MetricsError: the file cannot be read, or a line before the last is not JSON.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break  # the process was killed while it wrote this line
            raise MetricsError(f"line {number} of {path} is not JSON") from error
    return rows


class _JsonLines:
    """An append-only file of JSON lines that starts by forgetting steps past `last_step`.

    Unbuffered, so that a line is with the operating system when `write` returns and survives the
    process being killed, and so that a failed write leaves nothing behind to fail again in close.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        try:
            if last_step > 0 and path.exists():
                self._keep_through(last_step)
                self._file = open(path, "ab", buffering=0)
            else:
                self._file = open(path, "wb", buffering=0)
        except OSError as error:
            raise self._error(error) from error

    def _keep_through(self, last_step: int) -> None:
        rows = [row for row in read_jsonl(self._path) if row["step"] <= last_step]
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_bytes(b"".join(_to_json_line(row) for row in rows))
        os.replace(temporary, self._path)  # whole or not at all

    def write(self, values: Mapping[str, float | None]) -> None:
        line = memoryview(_to_json_line(values))
        try:
            while line:  # a nearly full disk takes part of a line, then refuses the rest
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> MetricsError:
        return MetricsError(f"cannot write {self._path}: {error.strerror}")


class _TensorBoard:
    """Scalars in one TensorBoard event file, written in the caller's thread.

    tensorboardX's own `SummaryWriter` writes from a background thread, where a full disk is lost
    and `close` can wait for ever; its record writer and protocol buffers are used directly.
    """

    def __init__(self, directory: Path, first_step: int, flush_seconds: float) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._directory = directory
        self._flush_seconds = flush_seconds
        self._last_flush = time.monotonic()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # File names carry whole seconds: the suffix keeps two starts within one apart.
            self._writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
            if first_step > 1:  # tells TensorBoard to hide what an earlier run wrote past here
                session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._write(event_pb2.Event(session_log=session), first_step)
        except OSError as error:
            raise self._error(error) from error

    def _write(self, event: Any, step: int) -> None:
        event.step = step
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        values = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        try:
            self._write(self._event(summary=self._summary(value=values)), step)
            if time.monotonic() - self._last_flush >= self._flush_seconds:
                self._writer.flush()
                self._last_flush = time.monotonic()
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> MetricsError:
        return MetricsError(f"cannot write {self._directory}: {error.strerror}")


class MetricsWriter:
    """Writes a run's numbers: `metrics.jsonl` (a line a step), `evaluation.jsonl`, TensorBoard.

    `step` counts completed optimizer steps, from 1. Every line reaches the operating system
    before `write` returns; TensorBoard events are flushed every 30 s and on `close`. Neither is
    synced to the disk itself: a power cut may cost the last lines.

    Args:
      directory: the run's folder, created if absent; TensorBoard goes to its `tensorboard/`.
      resume_step: the step of the checkpoint the run continues from, 0 for a new run. Lines past
        it, and an unfinished last line, are dropped, so each step appears once; TensorBoard is
        told to hide its events past it. A new run starts with empty files.

    Raises:
      MetricsError: from the constructor and every method, when a file cannot be written.
    """

    def __init__(self, directory: Path | str, *, resume_step: int = 0) -> None:
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MetricsError(f"cannot create {directory}: {error.strerror}") from error
        self._metrics = _JsonLines(directory / METRICS_FILE, resume_step)
        self._evaluation = _JsonLines(directory / EVALUATION_FILE, resume_step)
        self._tensorboard = _TensorBoard(directory / "tensorboard", resume_step + 1, 30.0)

    def write(
        self,
        metrics: Mapping[str, float | None],
        extra: Mapping[str, float | None] | None = None,
    ) -> None:
        """Writes one step.

        Args:
          metrics: exactly the keys of `METRIC_KEYS`; None for an unknown value (`mfu` on an
            unknown chip, `mtp_loss` without MTP). NaN and infinities are written as null.
          extra: further scalars for TensorBoard alone, such as MaxVio of each layer.

        Raises:
          ValueError: keys missing or not in the contract.
        """
        if set(metrics) != set(METRIC_KEYS):
            wrong = sorted(set(metrics) ^ set(METRIC_KEYS))
            raise ValueError(f"metrics keys {wrong} must be exactly METRIC_KEYS (MetricsWriter)")
        row = {key: metrics[key] for key in METRIC_KEYS}
        self._metrics.write(row)
        scalars = {f"train/{key}": value for key, value in row.items() if key != "step"}
        self._tensorboard.write(int(row["step"] or 0), {**scalars, **(extra or {})})

    def write_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one held-out evaluation after `step` steps to `evaluation.jsonl`."""
        self._evaluation.write({"step": step, **values})
        self._tensorboard.write(step, {f"held_out/{key}": v for key, v in values.items()})

    def close(self) -> None:
        """Flushes and closes every file; the files stay readable at any time before."""
        try:
            self._metrics.close()
        finally:
            try:
                self._evaluation.close()
            finally:
                self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except MetricsError:
            if error is None:  # otherwise the first failure is the one to report
                raise


def _short(value: float) -> str:
    """At most five characters for a rate: 934, 12.3k, 1.23M."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            digits = 0 if unit == "" or value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.2f}G"


def _duration(seconds: float | None) -> str:
    """`H:MM:SS`, or days and hours from 100 hours on; `-:--:--` when unknown."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds + 0.5)
    if whole >= 360_000:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class ProgressBar:
    """Steps, loss, tokens a second, MFU and time left, for a person who watches a run.

    On a terminal one line is redrawn in place (four times a second, 80 columns suffice);
    elsewhere a plain line is printed after the first step, every `plain_seconds`, and after the
    last step. The time left comes from a moving average of the step time that leaves out the
    first step, which compiles.

    Args:
      total_steps: the step at which the run ends.
      initial_step: steps completed before this run.
      file: where to print; standard error by default, so that standard output stays free.
      plain_seconds: seconds between plain lines.
      quiet: show nothing.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial_step: int = 0,
        file: TextIO | None = None,
        plain_seconds: float = 10.0,
        quiet: bool = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console = Console(file=file or sys.stderr, highlight=False, quiet=quiet)
        self._total, self._initial = total_steps, initial_step
        self._plain_seconds = plain_seconds
        self._last_plain = -math.inf
        self._last_update: tuple[int, float] | None = None
        self._step_seconds: float | None = None
        self._progress: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not quiet:
            # Labels must never wrap: a second line would make the display jump.
            self._progress = Progress(
                TextColumn("{task.fields[steps]}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True)),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._progress.add_task(
                "",
                total=total_steps,
                completed=initial_step,
                steps=f"step {initial_step}/{total_steps}",
                line="compiling the first step",
            )

    def __enter__(self) -> "ProgressBar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, *, loss: float, tokens_per_s: float, mfu: float | None) -> None:
        """Shows the state after `step` completed steps; cheap enough for every step.

        Args:
          step: completed steps.
          loss: the training loss, nats a token.
          tokens_per_s: training speed.
          mfu: model FLOPs utilisation as a fraction, None where the chip's peak is unknown.
        """
        now = time.monotonic()
        self._measure(step, now)
        left = None
        if self._step_seconds is not None:
            left = self._step_seconds * max(self._total - step, 0)
        utilisation = "n/a" if mfu is None else f"{100 * mfu:.1f}%"
        line = (
            f"loss {loss:.4f}  {_short(tokens_per_s)} tok/s  MFU {utilisation}  "
            f"ETA {_duration(left)}"
        )
        steps = f"step {step}/{self._total}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, steps=steps, line=line)
            return
        edge = step == self._initial + 1 or step >= self._total
        if edge or now - self._last_plain >= self._plain_seconds:
            self._last_plain = now
            self.print(f"{steps}  {line}")

    def _measure(self, step: int, now: float) -> None:
        """Moves the average step time by a tenth; the first call only starts the clock."""
        if self._last_update is not None and step > self._last_update[0]:
            seconds = (now - self._last_update[1]) / (step - self._last_update[0])
            average = self._step_seconds
            self._step_seconds = seconds if average is None else 0.9 * average + 0.1 * seconds
        self._last_update = (step, now)

    def print(self, message: str) -> None:
        """Prints a line above the bar without disturbing it."""
        self._console.print(message, markup=False, soft_wrap=True)
