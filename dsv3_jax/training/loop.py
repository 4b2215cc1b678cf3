"""The training loop: the one place that holds state, time and files.

Everything a run's future depends on is in `TrainState`; the data position is its count of
consumed sequences. So a run that was stopped, killed or moved continues bit for bit.
"""

import contextlib
import ctypes
import dataclasses
import logging
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.checkpoints.store import CheckpointStore, describe_run
from dsv3_jax.config import TrainConfig
from dsv3_jax.data.pipeline import TrainingData
from dsv3_jax.evaluation.perplexity import evaluate
from dsv3_jax.evaluation.report import write_report
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.cluster import Cluster
from dsv3_jax.parallel.feeding import BatchFeed
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.placement import mesh_for, require_fit
from dsv3_jax.training.flops import peak_flops, train_flops_per_token
from dsv3_jax.training.init_from import Start
from dsv3_jax.training.metrics import METRIC_KEYS, MetricsWriter, ProgressBar
from dsv3_jax.training.opening import open_data_together, open_run, recorded_start, start_state
from dsv3_jax.training.optimizer import batch_size
from dsv3_jax.training.step import (
    StepMetrics,
    TrainState,
    compiler_options,
    jit_train_step,
)

_log = logging.getLogger(__name__)


# malloc.h's numbers of the settings below.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, where glibc is the allocator.

    XLA's CPU client asks for fresh memory in every step; handed back and asked for again, most of
    it costs a page fault, together as much as the step's arithmetic.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**28)


class TrainingError(RuntimeError):
    """A run that cannot go on."""


def planned_steps(config: TrainConfig) -> int:
    """Optimizer steps of the whole run: to `total_tokens` through the batch ramp, or `steps`."""
    limit = config.steps if config.steps is not None else float("inf")
    sequences = step = 0
    while step < limit and sequences * config.data.sequence_length < config.total_tokens:
        sequences += batch_size(config.batch, sequences * config.data.sequence_length)
        step += 1
    return step


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT while a run is under way; a second one acts as usual."""
    received: list[int] = []
    previous = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Step:
    """The jitted train step, compiled once for each number of microbatches."""

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        mesh: Mesh | None,
        feed: BatchFeed,
        state: TrainState,
        cluster: Cluster,
        say: Any,
    ) -> None:
        self._jitted = jit_train_step(model, config, state, mesh)
        self._options = compiler_options(mesh)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._feed, self._cluster, self._say = feed, cluster, say

    def __call__(self, state: TrainState, rows: np.ndarray) -> tuple[TrainState, StepMetrics]:
        tokens = self._feed.place(rows)
        batch = {"tokens": tokens}
        if tokens.shape not in self._compiled:
            start = time.monotonic()
            lowered = self._jitted.lower(state, batch)
            self._compiled[tokens.shape] = lowered.compile(compiler_options=self._options)
            # Collectives of CPUs wait only 30 s for a process that still compiles.
            self._cluster.gather("the step is compiled", None)
            count, sequences, _ = tokens.shape
            self._say(
                f"compiled the step of {count} x {sequences} sequences in "
                f"{time.monotonic() - start:.1f} s"
            )
        return self._compiled[tokens.shape](state, batch)


class _Run:
    """One run's moving parts; `to` trains up to a step."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        store: CheckpointStore,
        data: TrainingData,
        mesh: Mesh | None,
        cluster: Cluster,
        start: Start | None,
    ) -> None:
        self.config, self.out, self.store, self.data, self.mesh = config, out, store, data, mesh
        self.cluster = cluster
        self.feed = BatchFeed(mesh, config.batch.microbatch_size)
        self.model = Transformer(config.model, config.runtime)
        self.state = start_state(store, self.model, config, data, mesh, start)
        self._init_from = recorded_start(store, start)
        self.held_out = data.held_out(config.evaluation.sequences)
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        self._peak = None if peak is None else peak * (1 if mesh is None else mesh.size)
        self._told_of_overflow = False
        has_mtp = config.model.num_nextn_predict_layers > 0
        self._flops = train_flops_per_token(config.model, config.data.sequence_length, mtp=has_mtp)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def variables(self) -> dict:
        return {"params": self.state.params, "router_state": self.state.router_state}

    def save(self, metric: float | None = None) -> None:
        metadata = describe_run(self.config, sequences=int(self.state.sequences))
        metadata |= {"data": self.data.describe(), "init_from": self._init_from}
        self.store.save(self.step, self.state, metadata, metric=metric)

    def evaluate(self, writer: MetricsWriter | None) -> float:
        result = evaluate(
            self.model,
            self.variables(),
            self.held_out,
            self.data.tokenizer.byte_lengths,
            batch_size=self.config.batch.microbatch_size,
        )
        if writer is not None:
            names = ("loss", "perplexity", "bits_per_byte", "accuracy", "mtp_accuracy")
            writer.write_evaluation(self.step, {name: getattr(result, name) for name in names})
        return result.loss

    def _record(
        self, writer: MetricsWriter | None, bar: ProgressBar, metrics: StepMetrics, s: float
    ) -> None:
        """Writes the numbers of a step that took `s` seconds."""
        values = jax.device_get(metrics)
        tokens = int(self.state.sequences) * self.config.data.sequence_length
        rate = (tokens - self._tokens_before) / s
        self._tokens_before = tokens
        mfu = None if self._peak is None else rate * self._flops / self._peak
        scalar: dict[str, float | None] = {
            field.name: float(getattr(values, field.name))
            for field in dataclasses.fields(values)
            if field.name in METRIC_KEYS
        }
        if self.config.model.num_nextn_predict_layers == 0:
            scalar["mtp_loss"] = None
        row = {"step": self.step, "tokens": tokens, **scalar, "tokens_per_s": rate, "mfu": mfu}
        mean = np.maximum(values.load.mean(-1), 1e-9)
        vio = values.load.max(-1, initial=0) / mean - 1
        extra = {f"max_vio/layer_{layer}": float(v) for layer, v in enumerate(vio)}
        for name in ("buffer_overflows", "buffer_need"):
            extra[f"train/{name}"] = float(getattr(values, name))
        if writer is not None:
            writer.write(row, {**extra, "train/skipped_steps": float(self.state.skipped)})
        bar.update(self.step, loss=float(values.loss), tokens_per_s=rate, mfu=mfu)
        self._check_buffer(values, bar)
        if values.skipped:
            bar.print(f"step {self.step}: loss or gradient not finite, step skipped")
        limit = self.config.optimizer.max_skipped_in_a_row
        if values.skipped_in_row >= limit:
            raise TrainingError(
                f"loss or gradient not finite in {limit} steps in a row, the last at step "
                f"{self.step} (optimizer.max_skipped_in_a_row={limit})"
            )

    def _check_buffer(self, values: StepMetrics, bar: ProgressBar) -> None:
        """Tells of rows that found no room in a receive buffer: once, for the metrics go on."""
        runtime, overflows = self.config.runtime, int(values.buffer_overflows)
        if not overflows:
            return
        told = (
            f"step {self.step}: a device's buffer overflowed in {overflows} MoE layers "
            f"(buffer_need {values.buffer_need:.2f}, runtime.expert_buffer_factor="
            f"{runtime.expert_buffer_factor}"
        )
        if runtime.on_overflow == "stop":
            raise TrainingError(f"{told}, runtime.on_overflow='stop'): the step changed nothing")
        if not self._told_of_overflow:
            bar.print(f"{told}): such steps are slower, their result is the same")
        self._told_of_overflow = True

    def to(self, last: int, writer: MetricsWriter | None) -> bool:
        """Trains until step `last`; False when a signal to any process asked to stop before it."""
        config, length = self.config, self.config.data.sequence_length
        self._tokens_before = int(self.state.sequences) * length
        batches = self.data.batches(
            int(self.state.sequences),
            lambda start: batch_size(config.batch, start * length),
            group=config.batch.microbatch_size,
            part=self.feed.part,
        )
        bar = ProgressBar(last, initial_step=self.step, quiet=writer is None)
        with bar, _stop_requests() as received:
            train_step = _Step(
                self.model, config, self.mesh, self.feed, self.state, self.cluster, bar.print
            )
            stop = 0  # the signal, once all processes know of it
            while self.step < last and not stop:
                rows = next(batches)
                before = time.monotonic()
                self.state, metrics = train_step(self.state, rows)
                jax.block_until_ready(metrics)
                self._record(writer, bar, metrics, time.monotonic() - before)
                self._after_step(last, writer, bar)
                stop = self.cluster.largest(received[0] if received else 0)
            if stop and self.step < last:
                self.save()
                self.store.wait()
                bar.print(
                    f"stopped by {signal.Signals(stop).name} at step {self.step}, saved in "
                    f"{self.store.directory}; continue with --resume"
                )
        batches.close()
        return self.step >= last

    def _after_step(self, last: int, writer: MetricsWriter | None, bar: ProgressBar) -> None:
        """Evaluates and saves where it is due."""
        evaluated = None
        if self.step % self.config.evaluation.every_steps == 0 or self.step == last:
            evaluated = self.evaluate(writer)
            bar.print(f"step {self.step}: held-out loss {evaluated:.4f}")
        if self.step % self.config.checkpoint.every_steps == 0 or self.step == last:
            self.save(evaluated)
        self.store.check()


def train(
    config: TrainConfig,
    out_dir: str | Path,
    *,
    resume: bool = False,
    cluster: Cluster | None = None,
) -> int:
    """Trains, evaluates, saves and reports; returns the exit code 0.

    `out_dir` receives `metrics.jsonl`, `evaluation.jsonl`, `tensorboard/`, `checkpoints/`, the
    tokenizer, and at the end `loss.png`, `expert_load.png`, `sample.txt` and `summary.json`.
    SIGTERM and SIGINT save a checkpoint and end the run with 0. With `resume` it continues from
    the newest checkpoint, or starts where there is none: from `config.init_from`, if that is set.

    Every process of `cluster` must call it alike; they share `out_dir`, where all write
    checkpoints and one writes the rest. A signal to any of them stops all after the same step.

    Raises:
      ConfigError: bad input, a directory that holds a run (without `resume`), a checkpoint of
        another network or token stream, or weights of another network or tokenizer.
      CheckpointError, MetricsError: a write failed.
      TrainingError: too many steps in a row were not finite.
      PeerError: another process failed.
    """
    out, cluster = Path(out_dir), cluster or Cluster()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    # Several processes always make a mesh: of all their devices.
    mesh = mesh_for(config.parallel) if cluster.count == 1 else make_mesh(config.parallel)
    if mesh is not None:
        require_fit(mesh, config)
    store, start = open_run(out, config, cluster, resume=resume)
    with contextlib.closing(store):
        data = open_data_together(config, cluster, start)
        if cluster.is_main:
            data.tokenizer.save(out / "tokenizer.json")
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            run = _Run(config, out, store, data, mesh, cluster, start)
            last = max(planned_steps(config), run.step)
            writer = MetricsWriter(out, resume_step=run.step) if cluster.is_main else None
            with writer or contextlib.nullcontext():
                finished = run.to(last, writer)
                store.wait()
            if finished:
                place = out if cluster.is_main else None
                report = write_report(run.model, run.variables(), config, data, place)
                if cluster.is_main:
                    print(report)
    return 0
