"""The checkpoints of a training run: whole train states, written by Orbax in the background.

A checkpoint is the folder `<directory>/<step>/state`. Orbax writes it aside and renames it when
whole, so a killed run leaves at most a temporary folder, which nothing reads. Orbax does not
notice a flipped byte in an array file; the inventory written here before the rename (size and
CRC-32 of every file) does, and tells a damaged checkpoint from one of another model.

Of several processes each writes, and lists, a folder of its own within that one, and checks its
share of all files when they are read.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoints.inventory import find_damage, one_line
from dsv3_jax.checkpoints.metadata import config_from_dict, config_to_dict, describe_run
from dsv3_jax.checkpoints.state_handler import StateHandler, StateSave, chunks_of
from dsv3_jax.checkpoints.stored_arrays import gigabytes_at_a_time, require_same_arrays
from dsv3_jax.config import ConfigError

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "config_from_dict",
    "config_to_dict",
    "describe_run",
]

PyTree = Any

_ITEM = "state"
_STEP_NAMES = ocp.path.step.standard_name_format()


class CheckpointError(RuntimeError):
    """A checkpoint was not written, or is damaged; the message names step and directory."""


class CheckpointStore:
    """Saves, lists and restores the train states of one run.

    Saving is asynchronous: `save` returns once the arrays are copied to host memory, and a write
    that fails later raises `CheckpointError` from the next `save`, `wait` or `close`. Reading
    changes nothing on disk, so a store may be opened on the folder of a run in progress.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        """Opens `directory`, which the first `save` creates.

        Args:
          directory: holds one folder a step.
          keep: number of newest checkpoints to keep, besides the one of lowest metric.
        """
        if keep < 1:
            raise ConfigError(f"{keep=} must be positive (CheckpointStore)")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None
        self._failure: CheckpointError | None = None
        self._write_error: BaseException | None = None  # set by the writing threads
        self._metrics: dict[int, float | None] = {}
        logging.getLogger("absl").addFilter(_not_from_orbax)

    def save(
        self, step: int, state: PyTree, metadata: dict[str, Any], *, metric: float | None = None
    ) -> None:
        """Starts to write a checkpoint, after waiting for the one before it.

        The caller may change or donate `state` as soon as this returns. Once the new checkpoint
        is whole, all but the `keep` newest and the one of lowest metric are deleted. Saving the
        newest step again does nothing.

        Args:
          step: number of the step, at least that of the newest checkpoint.
          state: pytree of arrays.
          metadata: JSON values kept beside the arrays; see `describe_run`.
          metric: held-out loss of this state (lower is better), None if not measured.

        Raises:
          CheckpointError: this write or the one before it failed.
        """
        self.wait()
        newest = self.latest_step()
        if step == newest:
            return
        if newest is not None and step < newest:
            raise CheckpointError(
                f"{step=} is older than the newest checkpoint, step {newest}, in "
                f"{self.directory}: delete the newer ones or write to another directory"
            )
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        record: Any = {"metadata": metadata, "metric": metric}
        json.dumps(record)  # a value JSON cannot hold must fail here, not in the writing thread
        try:
            manager = self._open_manager()
            self._metrics[step], self._pending = metric, step
            chunks = jax.tree.map(chunks_of, state)
            saved = StateSave(state, save_args=chunks, custom_metadata=record)
            args = ocp.args.Composite(**{_ITEM: saved})
            manager.save(step, args=args, force=True)
        except Exception as error:
            self._failure = self._not_written(step, error)
            raise self._failure from error

    def wait(self) -> None:
        """Returns when no write is under way.

        Raises:
          CheckpointError: the write failed, or an earlier one did.
        """
        if self._failure is not None:
            raise self._failure
        if self._manager is None or self._pending is None:
            return
        try:
            # Where a write has failed, Orbax waits for the other processes, and they for this one.
            while self._write_error is None and self._manager.is_saving_in_progress():
                time.sleep(0.005)
            self.check()
            self._manager.wait_until_finished()
            # The rename is the last act of a write, so the folder is the proof.
            if jax.process_index() == 0 and self._pending not in self.steps():
                raise FileNotFoundError("its folder is not there")
        except CheckpointError:
            raise
        except Exception as error:
            self._failure = self._not_written(self._pending, error)
            raise self._failure from error
        self._pending = None

    def check(self) -> None:
        """Raises what `wait` would, without waiting, where a write has already failed.

        Raises:
          CheckpointError: a write failed.
        """
        if self._failure is None and self._write_error is not None and self._pending is not None:
            self._failure = self._not_written(self._pending, self._write_error)
        if self._failure is not None:
            raise self._failure from self._write_error

    def close(self) -> None:
        """Waits for the last write and ends the writing threads.

        Raises:
          CheckpointError: a write failed.
        """
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None and self._failure is None:
                manager.close()
            # After a failure the other processes are gone, and closing would wait for them.
            elif manager is not None and jax.process_count() == 1:
                with contextlib.suppress(Exception):  # the same failure again
                    manager.close()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        found = _STEP_NAMES.find_all(epath.Path(self.directory))
        return sorted(name.step for name in found)

    def latest_step(self) -> int | None:
        """The newest step that has a whole checkpoint, None without any."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of lowest metric (the newer of equals), None if none has one."""
        return _lowest({step: self._record(step)["metric"] for step in self.steps()})

    def read_metadata(self, step: int | None = None) -> dict[str, Any]:
        """The `metadata` that was saved with a step (None: the newest).

        Raises:
          ConfigError: there is no such checkpoint.
          CheckpointError: it is damaged.
        """
        return self._record(self._resolve(step))["metadata"]

    def restore(
        self,
        step: int | None,
        abstract_state: PyTree,
        *,
        partial: bool = False,
        cast: bool = False,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads a checkpoint, bit for bit, through two GB of memory and room for the largest shard.

        Args:
          step: which one; None is the newest.
          abstract_state: pytree of `jax.ShapeDtypeStruct` (or arrays): the structure, shapes and
            dtypes expected, and the shardings to place the arrays with (without one: the
            default device).
          partial: leave out whatever the checkpoint has and `abstract_state` does not, such as
            optimizer moments. The names must agree: {"params": ...} reads the field `params`.
          cast: round what is stored in another dtype to that of `abstract_state`.

        Returns:
          The state and its metadata.

        Raises:
          ConfigError: no such checkpoint, or one of another model: the message names the first
            parameter that differs, and both shapes.
          CheckpointError: damaged; nothing older is taken instead.
        """
        step = self._resolve(step)
        folder = self.state_folder(step)
        self._verify(step)
        targets = jax.tree.map(_with_sharding, abstract_state)
        handler = ocp.PyTreeCheckpointHandler()
        try:
            stored = handler.metadata(epath.Path(folder))
            record: Any = stored.custom_metadata
            require_same_arrays(stored.tree, targets, partial, cast, place=str(folder.parent))
            handler.close()
            handler = ocp.PyTreeCheckpointHandler(
                restore_concurrent_gb=gigabytes_at_a_time(stored.tree, targets)
            )
            state = handler.restore(
                epath.Path(folder),
                args=ocp.args.PyTreeRestore(
                    item=targets,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
                    partial_restore=partial,
                ),
            )
        except ConfigError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._not_read(step, error) from error
        finally:
            handler.close()
        return state, record["metadata"]

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for step in self.steps():
                try:
                    self._metrics[step] = self._record(step)["metric"]
                except CheckpointError:
                    self._metrics[step] = None  # damaged: it cannot be the best one
            self._manager = ocp.CheckpointManager(
                epath.Path(self.directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepNewestAndBest(self.keep, self._metrics),
                    step_name_format=_STEP_NAMES,
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,
                ),
                item_handlers={_ITEM: StateHandler(self._note_failure)},
            )
        return self._manager

    def _note_failure(self, error: BaseException) -> None:
        self._write_error = self._write_error or error

    def state_folder(self, step: int) -> Path:
        """The folder of a step that holds its arrays."""
        return self.directory / _STEP_NAMES.build_name(step) / _ITEM

    def _resolve(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ConfigError(f"no checkpoint in {self.directory}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise ConfigError(f"no checkpoint of {step=} in {self.directory}: it has {steps}")
        return step

    def _record(self, step: int) -> dict[str, Any]:
        """What `save` stored beside the arrays: {"metadata": ..., "metric": ...}."""
        self._verify(step, only="_METADATA")
        handler = ocp.PyTreeCheckpointHandler()
        try:
            record: Any = handler.metadata(epath.Path(self.state_folder(step))).custom_metadata
            return record
        except Exception as error:
            raise self._not_read(step, error) from error
        finally:
            handler.close()

    def _verify(self, step: int, *, only: str | None = None) -> None:
        """Checks this process's share of a step's files (or one file) against the inventory."""
        share = (jax.process_index(), jax.process_count())
        problem = find_damage(self.state_folder(step), only, share=share)
        if problem:
            raise self._damaged(step, problem)

    def _damaged(self, step: int, problem: str) -> CheckpointError:
        path = self.directory / _STEP_NAMES.build_name(step)
        older = [other for other in self.steps() if other < step]
        then = f"go back to step {older[-1]}" if older else "start again, as no older one is left"
        return CheckpointError(
            f"checkpoint step {step} in {self.directory} is damaged: {problem}; "
            f"delete {path} to {then}"
        )

    def _not_read(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"checkpoint step {step} in {self.directory} was not read, though its files are as "
            f"they were written: {one_line(error)}"
        )

    def _not_written(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"checkpoint step {step} was not written to {self.directory}: {one_line(error)}; "
            f"whole checkpoints there: {self.steps() or 'none'}"
        )


@dataclasses.dataclass(frozen=True)
class _KeepNewestAndBest:
    """Orbax preservation policy: the `keep` newest steps and the one of lowest metric."""

    keep: int
    metrics: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self.keep :])
        kept.add(_lowest({step: self.metrics.get(step) for step in steps}))
        return [step in kept for step in steps]


def _lowest(metrics: dict[int, float | None]) -> int | None:
    measured = {step: metric for step, metric in metrics.items() if metric is not None}
    return min(measured, key=lambda step: (measured[step], -step), default=None)


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Logging filter: Orbax's progress and stack traces; what matters is raised here."""
    return "/orbax/" not in record.pathname.replace("\\", "/")
