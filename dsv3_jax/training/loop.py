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

from dsv3_jax.checkpoints.store import CheckpointStore, config_to_dict, describe_run
from dsv3_jax.config import ConfigError, TrainConfig
from dsv3_jax.data.pipeline import TrainingData, open_data
from dsv3_jax.evaluation.perplexity import evaluate
from dsv3_jax.evaluation.report import write_report
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.placement import batch_sharding, mesh_for, require_fit, state_shardings
from dsv3_jax.training.flops import peak_flops, train_flops_per_token
from dsv3_jax.training.metrics import METRIC_KEYS, MetricsWriter, ProgressBar
from dsv3_jax.training.optimizer import batch_size
from dsv3_jax.training.step import (
    StepMetrics,
    TrainState,
    compiler_options,
    init_state,
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
        state: TrainState,
        say: Any,
    ) -> None:
        microbatch = config.batch.microbatch_size
        self._batch_sharding = None if mesh is None else batch_sharding(mesh, microbatch)
        self._jitted = jit_train_step(model, config, state, mesh)
        self._options = compiler_options(mesh)
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._microbatch = config.batch.microbatch_size
        self._say = say

    def __call__(self, state: TrainState, rows: np.ndarray) -> tuple[TrainState, StepMetrics]:
        tokens = rows.reshape(-1, self._microbatch, rows.shape[1])
        batch = {"tokens": jax.device_put(tokens, self._batch_sharding)}
        if tokens.shape not in self._compiled:
            start = time.monotonic()
            lowered = self._jitted.lower(state, batch)
            self._compiled[tokens.shape] = lowered.compile(compiler_options=self._options)
            count = tokens.shape[0]
            self._say(
                f"compiled the step of {count} x {self._microbatch} sequences in "
                f"{time.monotonic() - start:.1f} s"
            )
        return self._compiled[tokens.shape](state, batch)


def _fit_for_resume(saved: dict[str, Any], config: TrainConfig, data: TrainingData) -> None:
    """Refuses to continue a run whose network or token stream would be another one."""
    wanted = config_to_dict(config)
    for section in ("model", "data"):
        for key, value in wanted[section].items():
            before = saved["config"][section].get(key, value)
            # Where files are cached and how far they are read ahead changes no token.
            if before != value and key not in ("cache_dir", "prefetch"):
                raise ConfigError(
                    f"{section}.{key}={value!r} must be {before!r} as in the checkpoint (--resume)"
                )
    for key, value in data.describe().items():
        if key.endswith("_fingerprint") and saved["data"].get(key, value) != value:
            raise ConfigError(
                f"{key} {str(value)[:12]} must be {str(saved['data'][key])[:12]} as in the "
                "checkpoint: the corpus or tokenizer has changed (--resume)"
            )


def _open_run(out: Path, config: TrainConfig, *, resume: bool) -> CheckpointStore:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} must be a directory (--out)")
    store = CheckpointStore(out / "checkpoints", keep=config.checkpoint.keep)
    if store.latest_step() is not None and not resume:
        raise ConfigError(
            f"{out} already holds a run at step {store.latest_step()}: continue it with --resume "
            "or choose another directory (--out)"
        )
    if store.latest_step() is None and resume:
        _log.info("no checkpoint in %s: starting a new run (--resume)", out)
    out.mkdir(parents=True, exist_ok=True)
    return store


def _start_state(
    store: CheckpointStore,
    model: Transformer,
    config: TrainConfig,
    data: TrainingData,
    mesh: Mesh | None,
) -> TrainState:
    """The newest checkpoint's state, or a fresh one where there is none, on its devices."""
    abstract = jax.eval_shape(lambda: init_state(model, config))
    shardings = None if mesh is None else state_shardings(mesh, abstract)
    if store.latest_step() is None:
        return jax.jit(init_state, static_argnums=(0, 1), out_shardings=shardings)(model, config)
    _fit_for_resume(store.read_metadata(), config, data)
    if shardings is not None:
        abstract = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
    state, _ = store.restore(None, abstract)
    _log.info("resumed from step %d in %s", int(state.step), store.directory)
    return state


class _Run:
    """One run's moving parts; `to` trains up to a step."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        store: CheckpointStore,
        data: TrainingData,
        mesh: Mesh | None,
    ) -> None:
        self.config, self.out, self.store, self.data, self.mesh = config, out, store, data, mesh
        self.model = Transformer(config.model, config.runtime)
        self.state = _start_state(store, self.model, config, data, mesh)
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
        metadata["data"] = self.data.describe()
        self.store.save(self.step, self.state, metadata, metric=metric)

    def evaluate(self, writer: MetricsWriter) -> float:
        result = evaluate(
            self.model,
            self.variables(),
            self.held_out,
            self.data.tokenizer.byte_lengths,
            batch_size=self.config.batch.microbatch_size,
        )
        names = ("loss", "perplexity", "bits_per_byte", "accuracy", "mtp_accuracy")
        writer.write_evaluation(self.step, {name: getattr(result, name) for name in names})
        return result.loss

    def _record(self, writer: MetricsWriter, bar: ProgressBar, metrics: StepMetrics, s: float):
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

    def to(self, last: int, writer: MetricsWriter) -> bool:
        """Trains until step `last`; False when a signal asked to stop before it."""
        config, length = self.config, self.config.data.sequence_length
        first = self.step
        self._tokens_before = int(self.state.sequences) * length
        batches = self.data.batches(
            int(self.state.sequences), lambda start: batch_size(config.batch, start * length)
        )
        with ProgressBar(last, initial_step=first) as bar, _stop_requests() as stop:
            train_step = _Step(self.model, config, self.mesh, self.state, bar.print)
            while self.step < last and not stop:
                rows = next(batches)
                before = time.monotonic()
                self.state, metrics = train_step(self.state, rows)
                jax.block_until_ready(metrics)
                self._record(writer, bar, metrics, time.monotonic() - before)
                evaluated = None
                if self.step % config.evaluation.every_steps == 0 or self.step == last:
                    evaluated = self.evaluate(writer)
                    bar.print(f"step {self.step}: held-out loss {evaluated:.4f}")
                if self.step % config.checkpoint.every_steps == 0 or self.step == last:
                    self.save(evaluated)
            if stop and self.step < last:
                self.save()
                self.store.wait()
                bar.print(
                    f"stopped by {signal.Signals(stop[0]).name} at step {self.step}, saved in "
                    f"{self.store.directory}; continue with --resume"
                )
        batches.close()
        return self.step >= last


def train(config: TrainConfig, out_dir: str | Path, *, resume: bool = False) -> int:
    """Trains, evaluates, saves and reports; returns the exit code 0.

    `out_dir` receives `metrics.jsonl`, `evaluation.jsonl`, `tensorboard/`, `checkpoints/`, the
    tokenizer, and at the end `loss.png`, `expert_load.png`, `sample.txt` and `summary.json`.
    SIGTERM and SIGINT save a checkpoint and end the run with 0. With `resume` it continues from
    the newest checkpoint, or starts where there is none.

    Raises:
      ConfigError: bad input, a directory that holds a run (without `resume`), or a checkpoint of
        another network or token stream.
      CheckpointError, MetricsError: a write failed.
      TrainingError: too many steps in a row were not finite.
    """
    out = Path(out_dir)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = mesh_for(config.parallel)
    if mesh is not None:
        require_fit(mesh, config)
    with contextlib.closing(_open_run(out, config, resume=resume)) as store:
        data = open_data(config)
        data.tokenizer.save(out / "tokenizer.json")
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            run = _Run(config, out, store, data, mesh)
            last = max(planned_steps(config), run.step)
            with MetricsWriter(out, resume_step=run.step) as writer:
                finished = run.to(last, writer)
                store.wait()
            if finished:
                print(write_report(run.model, run.variables(), config, data, out))
    return 0
