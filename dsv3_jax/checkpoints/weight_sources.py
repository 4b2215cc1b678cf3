"""Weights to be exported, from wherever they lie: each tensor in bands of its rows.

A `Source` hands out every tensor of `hf_names.rows` as a Hugging Face folder holds it, [out, in],
in bands of `band_rows` rows, and says what is known of the folder the weights came from.
"""

import abc
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.array_store import Slot, array_folder, band_rows, read_slot, turned
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.fp8 import DEFAULT_BLOCK
from dsv3_jax.checkpoints.from_hf import LAYOUT, SCALES
from dsv3_jax.checkpoints.inventory import find_damage, one_line, read_inventory
from dsv3_jax.checkpoints.ledger import (
    FP8,
    LEDGER,
    SCALE_SUFFIX,
    assign,
    block_size,
    parameter_shapes,
    read_ledger,
    tensor_shape,
)
from dsv3_jax.checkpoints.metadata import config_from_dict
from dsv3_jax.checkpoints.safetensors_io import (
    DTYPE_CODES,
    TensorEntry,
    WeightsError,
    open_folder,
    read_header,
)
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.checkpoints.tensor_bands import TensorFile, WeightReader, check_tied
from dsv3_jax.config import ModelConfig

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BY_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


class Source(abc.ABC):
    """Weights to be exported.

    Attributes:
      config: the network.
      folder: holds tokenizer files and the like, if any do.
      hf_config: the config.json that the weights came with; {} if none.
      identity: JSON values that change when the weights do.
      tensors: {name: dtype} in the folder the weights came from; {} if they come from none.
      checksums: {name: CRC-32} of those tensors' bytes, as far as known.
    """

    config: ModelConfig
    folder: Path
    hf_config: dict[str, Any]
    identity: dict[str, Any]
    tensors: dict[str, np.dtype]
    checksums: dict[str, int]

    @abc.abstractmethod
    def dtype(self, row: hf_names.Row) -> np.dtype:
        """What `bands` yields."""

    @abc.abstractmethod
    def shape(self, row: hf_names.Row) -> tuple[int, ...]:
        """[out, in] of a tensor."""

    @abc.abstractmethod
    def bands(self, row: hf_names.Row) -> Iterator[np.ndarray]:
        """A tensor, `band_rows` rows at a time, each valid until the next."""

    def scale(self, name: str) -> np.ndarray | None:
        """The scales by which an FP8 tensor was dequantised, if known and of DEFAULT_BLOCK."""
        del name
        return None


def open_source(path: str | Path) -> Source:
    """A Hugging Face folder, a folder that `from_hf` made, or the newest checkpoint of a run.

    Raises:
      ConfigError: none of these, or one that cannot be read.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return _HfFolder(folder)
    run = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if run.name != "checkpoints" or not run.is_dir():
        raise WeightsError(f"neither a config.json nor checkpoints/ of a run ({folder})")
    store = CheckpointStore(run)
    metadata = store.read_metadata()
    state = store.state_folder(store.steps()[-1])
    if metadata.get("converted", {}).get("layout") == LAYOUT:
        return _Converted(run.parent, state, metadata)
    return _Run(run.parent, state, metadata)


class _HfFolder(Source):
    """A Hugging Face folder; FP8 weights are handed out in bfloat16."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ModelConfig.from_hf(folder)
        self.hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entries = open_folder(folder)
        self._block = block_size(folder)
        shapes = parameter_shapes(abstract_variables(self.config))
        plan = assign(folder, self.config, shapes, entries, self._block)
        for item in plan:
            if item.status == "tied":  # written from the one that it repeats
                check_tied(item, entries[item.other])
        self._plan = {item.name: item for item in plan}
        self.tensors = {name: item.entry.dtype for name, item in self._plan.items()}
        self.checksums = {}
        files = {entry.file for entry in entries.values()}
        status = {file.name: file.stat() for file in sorted(files)}
        self.identity = {n: [s.st_size, s.st_mtime_ns] for n, s in status.items()}

    def dtype(self, row: hf_names.Row) -> np.dtype:
        found = self._plan[row.name].entry.dtype
        return _BFLOAT16 if found == FP8 else found

    def shape(self, row: hf_names.Row) -> tuple[int, ...]:
        return self._plan[row.name].entry.shape

    def bands(self, row: hf_names.Row) -> Iterator[np.ndarray]:
        reader = WeightReader(self._plan[row.name], self._block, self.dtype(row))
        return reader.bands(transpose=False)

    def scale(self, name: str) -> np.ndarray | None:
        entry = self._plan[name].scale
        if entry is None or self._block != DEFAULT_BLOCK:
            return None
        return _read_whole(name + SCALE_SUFFIX, entry)


class _Checkpoint(Source):
    """What `_Converted` and `_Run` have in common."""

    def __init__(self, folder: Path, state: Path, metadata: dict[str, Any]) -> None:
        self.folder, self._state = folder, state
        self.config = config_from_dict(metadata["config"]).model
        self._shapes = parameter_shapes(abstract_variables(self.config))
        self.hf_config, self.tensors, self.checksums = {}, {}, {}

    def shape(self, row: hf_names.Row) -> tuple[int, ...]:
        return tensor_shape(self._shapes[row.path], row)


class _Converted(_Checkpoint):
    """A folder that `from_hf` made; every file is checked as it is read."""

    def __init__(self, folder: Path, state: Path, metadata: dict[str, Any]) -> None:
        super().__init__(folder, state, metadata)
        self.hf_config = metadata["converted"]["config.json"]
        self._ledger = read_ledger(folder / LEDGER)["tensors"]
        try:
            self._inventory = read_inventory(state)
        except ValueError as error:
            raise WeightsError(f"{error} ({state})") from error
        self.identity = {"inventory": _crc32(self._inventory)}
        self.tensors = {name: _BY_CODE[line["dtype"]] for name, line in self._ledger.items()}
        self.checksums = {name: line["crc32"] for name, line in self._ledger.items()}
        scales = folder / SCALES
        quantization = self.hf_config.get("quantization_config") or {}
        usable = tuple(quantization.get("weight_block_size", ())) == DEFAULT_BLOCK
        self._scales = read_header(scales) if usable and scales.is_file() else {}

    def dtype(self, row: hf_names.Row) -> np.dtype:
        return np.dtype(self._ledger[row.name]["stored_as"])

    def bands(self, row: hf_names.Row) -> Iterator[np.ndarray]:
        slot = Slot(row, self._shapes[row.path], self.dtype(row))
        size, crc32 = self._inventory.get(slot.file, [0, 0])
        try:
            if size != slot.nbytes:
                raise ValueError(f"it has {slot.nbytes} bytes, not the {size} of the inventory")
            for band in read_slot(slot, self._state, crc32):
                yield turned(band) if row.transpose else band
        except (ValueError, FileNotFoundError) as error:
            place = self._state / slot.file
            raise WeightsError(f"tensor {row.name!r} is damaged: {error} ({place})") from error

    def scale(self, name: str) -> np.ndarray | None:
        entry = self._scales.get(name + SCALE_SUFFIX)
        return None if entry is None else _read_whole(name + SCALE_SUFFIX, entry)


class _Run(_Checkpoint):
    """The newest checkpoint of a training run, in the chunks in which Orbax wrote it."""

    def __init__(self, folder: Path, state: Path, metadata: dict[str, Any]) -> None:
        super().__init__(folder, state, metadata)
        if problem := find_damage(state):
            raise WeightsError(f"the checkpoint is damaged: {problem} ({state})")
        self.identity = {"inventory": _crc32(read_inventory(state))}
        written = json.loads((state / "_METADATA").read_text(encoding="utf-8"))
        self._driver = "zarr3" if written.get("use_zarr3") else "zarr"
        self._is_ocdbt = written.get("use_ocdbt", True)
        plain = ts.Context()
        slots: dict[hf_names.Path, hf_names.Row] = {}
        for row in hf_names.rows(self.config):
            slots.setdefault(row.path, row)
        arrays = {path: self._open(path, plain) for path in slots}
        # A chunk may span many tensors, and a band many chunks: those that the tensors of a stack
        # cross stay in memory, or they would be read again for the next band.
        kept: dict[str, int] = {}
        for path, row in slots.items():
            stack = path[1]
            kept[stack] = kept.get(stack, 0) + _crossed_bytes(arrays[path], row)
        context = ts.Context({"cache_pool": {"total_bytes_limit": max(kept.values())}})
        self._arrays = {path: self._open(path, context) for path in slots}

    def _open(self, path: hf_names.Path, context: ts.Context) -> ts.TensorStore:
        name = array_folder(path)
        base = {"driver": "file", "path": f"{self._state}/"}
        if self._is_ocdbt:
            store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            store = {**base, "path": f"{self._state}/{name}/"}
        spec = {"driver": self._driver, "kvstore": store}
        try:
            array = ts.open(spec, context=context, read=True).result()
        except ValueError as error:
            raise WeightsError(
                f"{name} cannot be read: {one_line(error)} ({self._state})"
            ) from None
        if tuple(array.shape) != self._shapes[path]:
            raise WeightsError(
                f"{name} has shape {list(array.shape)}, the config needs "
                f"{list(self._shapes[path])} ({self._state})"
            )
        return array

    def dtype(self, row: hf_names.Row) -> np.dtype:
        return self._arrays[row.path].dtype.numpy_dtype

    def bands(self, row: hf_names.Row) -> Iterator[np.ndarray]:
        shape = self.shape(row)
        step = band_rows(shape)
        slot = self._arrays[row.path][row.index] if row.index else self._arrays[row.path]
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            if row.transpose:
                yield turned(np.ascontiguousarray(slot[:, rows].read().result()))
            else:
                yield slot[rows].read().result()


def _crossed_bytes(array: ts.TensorStore, row: hf_names.Row) -> int:
    """Bytes of all chunks of a parameter that a band of a tensor crosses, and the band after it.

    The next band may be another tensor's.
    """
    chunk: Any = array.chunk_layout.read_chunk.shape  # known for every array of these drivers
    index = [*row.index, *[slice(None)] * (array.rank - len(row.index))]
    whole = [axis for axis, i in enumerate(index) if isinstance(i, slice)]
    along = whole[-1 if row.transpose else 0]  # the axis of the tensor's rows
    crossed = list(chunk)
    for axis in whole:
        length, size = array.shape[axis], chunk[axis]
        crossed[axis] = -(-length // size) * size
        if axis == along:
            rows = band_rows(tensor_shape(tuple(array.shape), row))
            crossed[axis] = min(crossed[axis], -(-rows // size) * size + size)
    all_chunks = (-(-n // size) * size for n, size in zip(array.shape, chunk, strict=True))
    elements = min(2 * math.prod(crossed), math.prod(all_chunks))
    return elements * array.dtype.numpy_dtype.itemsize


def _read_whole(name: str, entry: TensorEntry) -> np.ndarray:
    with TensorFile(name, entry, entry.shape[0]) as file:
        return file.rows(0, entry.shape[0]).copy()


def _crc32(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
