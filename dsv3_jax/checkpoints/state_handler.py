"""How Orbax writes a train state, with an inventory of the files and word of what fails."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoints.inventory import read_inventory, write_inventory

_CHUNK = 1 << 26  # bytes; smaller ones took more processor time to write
_CRUMB = 1 << 20
_OWN_FOLDER = "ocdbt.process_"  # with the process's index: where Orbax lets it write


class StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's pytree handler, which lists its files before the folder gets its final name.

    Every process lists what it wrote itself; the one that finishes the folder reads only the rest.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """`failed` is called, in a thread that writes, as soon as something cannot be written."""
        super().__init__()
        self._failed = failed

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        writes = await super().async_save(directory, *args, **kwargs) or []
        folder = Path(getattr(directory, "path", directory))
        return [_Writes(writes, folder / f"{_OWN_FOLDER}{jax.process_index()}", self._failed)]

    def finalize(self, directory: epath.Path) -> None:
        """The last step, on one process, when all have written."""
        try:
            super().finalize(directory)
            folder, known = Path(directory), {}
            for own in folder.glob(f"{_OWN_FOLDER}*"):
                files = read_inventory(own)
                known |= {f"{own.name}/{name}": found for name, found in files.items()}
            write_inventory(folder, known)
        except BaseException as error:
            self._failed(error)
            raise


def chunks_of(leaf: Any) -> ocp.SaveArgs:
    """In what chunks an array's shards are written: of no more than `_CHUNK` bytes.

    A chunk is read, and held, as a whole. The leading axes (layers of a stack, then experts) are
    cut first, into single ones, as long as a chunk is too large and its parts are no crumbs; so
    who reads one layer, or one expert, need not hold the others.
    """
    sharding, cut = getattr(leaf, "sharding", None), []
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    size = math.prod(shape) * leaf.dtype.itemsize
    for axis, length in enumerate(shape):
        if size <= _CHUNK or size // length < _CRUMB:
            break
        cut.append(axis)
        size //= length
    return ocp.SaveArgs(shard_axes=tuple(cut), chunk_byte_size=_CHUNK)


class _Writes:
    """All that this process writes, and the list of it: one write to Orbax."""

    def __init__(
        self, writes: Sequence[Any], own: Path, failed: Callable[[BaseException], None]
    ) -> None:
        self._writes, self._own, self._failed = writes, own, failed

    def result(self, timeout: float | None = None) -> None:
        try:
            for write in self._writes:
                write.result(timeout=timeout)
            if self._own.is_dir():  # a process may hold nothing that others do not write
                write_inventory(self._own)
        except BaseException as error:
            self._failed(error)
            raise

    def cancel(self) -> None:
        for write in self._writes:
            write.cancel()


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.PyTreeSave):
    """Save arguments of `StateHandler`; Orbax finds a handler by the type of its arguments."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class _StateRestore(ocp.args.PyTreeRestore):
    """Orbax asks every handler for one; reading goes to the base handler directly."""
