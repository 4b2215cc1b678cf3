"""Parameters written and read a tensor at a time, in a layout that Orbax restores.

A parameter is a Zarr v3 array whose shards are its slots: the slot that one tensor of a
Hugging Face folder fills is one file. Inside it lie uncompressed tiles of one or two MB and,
last, their index, so a device that holds a slice of the parameter reads only the tiles it needs.
Tiles are in the order in which a band of the tensor's rows yields them: a tensor of any size is
written and read through memory of a few bands.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.direct_io import DirectReader, DirectWriter, bytes_of
from dsv3_jax.checkpoints.ledger import tensor_shape

_BLOCK = 128  # rows that share FP8 scales: bands are whole numbers of them
_TILE_ROWS = 1024


def band_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor to take at a time: whole FP8 blocks, and little or nothing left over."""
    rows = shape[0]
    if len(shape) == 1 or rows <= 2 * _BLOCK:
        return rows
    sizes = [_BLOCK * blocks for blocks in range(_TILE_ROWS // _BLOCK, 1, -1)]
    best = min(sizes, key=lambda size: -(-rows // size) * size)
    return rows if rows % best and rows <= 2 * _TILE_ROWS else best


def turned(array: np.ndarray) -> np.ndarray:
    """A contiguous transpose; four times as fast as NumPy's, whose order misses the caches."""
    rows, columns = array.shape
    result = np.empty((columns, rows), array.dtype)
    source, target = (a.view(f"u{array.dtype.itemsize}") for a in (array, result))
    for row in range(0, rows, 256):
        for column in range(0, columns, 64):
            at = slice(row, row + 256), slice(column, column + 64)
            target[at[1], at[0]] = source[at].T
    return result


@dataclasses.dataclass(frozen=True)
class Slot:
    """The file of one tensor.

    shape: of the whole parameter. dtype: of its elements.
    """

    row: hf_names.Row
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's shape in a Hugging Face folder."""
        return tensor_shape(self.shape, self.row)

    @property
    def band(self) -> int:
        """Rows of the tensor in a band."""
        return band_rows(self.tensor_shape)

    @property
    def tile(self) -> tuple[int, ...]:
        """Shape of a tile in the parameter's axes, without the indexed ones."""
        if not self.row.transpose:
            return (self.band, *self.tensor_shape[1:])
        columns = self.tensor_shape[1]
        while columns > _TILE_ROWS and columns % 2 == 0:
            columns //= 2
        return columns, self.band

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along the same axes."""
        slot = self.tensor_shape[::-1] if self.row.transpose else self.tensor_shape
        return tuple(-(-n // size) for n, size in zip(slot, self.tile, strict=True))

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return math.prod((*self.tile, *self.tiles)) * self.dtype.itemsize + self.tile_index().nbytes

    @property
    def file(self) -> str:
        """Name of the file, from the folder of the checkpoint."""
        index = (*self.row.index, *[slice(None)] * (len(self.shape) - len(self.row.index)))
        chunk = ["0" if isinstance(i, slice) else str(i) for i in index]
        return f"{array_folder(self.row.path)}/{'.'.join(['c', *chunk])}"

    def bands(self) -> Iterator[slice]:
        """Rows of the tensor, a band at a time."""
        rows = self.tensor_shape[0]
        for start in range(0, rows, max(self.band, 1)):
            yield slice(start, min(start + self.band, rows))

    def tile_index(self) -> np.ndarray:
        """Offset and size in bytes of every tile, uint64 [*tiles, 2]; tiles lie band by band."""
        size = math.prod(self.tile) * self.dtype.itemsize
        numbers = np.arange(math.prod(self.tiles), dtype=np.uint64)
        if self.row.transpose:
            numbers = numbers.reshape(self.tiles[::-1]).T
        offsets = numbers.reshape(self.tiles) * np.uint64(size)
        return np.stack([offsets, np.full_like(offsets, size)], axis=-1)

    def zarr_json(self) -> dict[str, Any]:
        """The metadata file of the whole parameter."""
        raw = {"name": "bytes", "configuration": {"endian": "little"}}
        grid, tile = self._in_all_axes(self.tiles), self._in_all_axes(self.tile)
        sharding = {
            "chunk_shape": tile,
            "codecs": [raw],
            "index_codecs": [raw],
            "index_location": "end",
        }
        shard = [n * size for n, size in zip(grid, tile, strict=True)]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }

    def _in_all_axes(self, sizes: tuple[int, ...]) -> list[int]:
        """`sizes` with a 1 for every indexed axis."""
        left = iter(sizes)
        indexed = [not isinstance(i, slice) for i in self.row.index]
        indexed += [False] * (len(self.shape) - len(indexed))
        return [1 if is_indexed else next(left) for is_indexed in indexed]


def array_folder(path: hf_names.Path) -> str:
    """Name of a parameter's folder, as Orbax builds it."""
    return ".".join(path)


class SlotWriter:
    """Writes the file of a slot, a band at a time; `crc32` is that of the file."""

    def __init__(self, slot: Slot, state: Path) -> None:
        self._slot = slot
        self._file = DirectWriter(state / slot.file, 0, slot.nbytes, truncate=True)
        self.crc32 = 0

    def __enter__(self) -> "SlotWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def write(self, band: np.ndarray) -> None:
        """Adds a band in the parameter's axes: [I, rows] if turned, else as the tensor is."""
        slot = self._slot
        axis = 1 if slot.row.transpose else 0
        if missing := slot.band - band.shape[axis]:
            band = np.pad(band, [(0, missing * (n == axis)) for n in range(band.ndim)])
        self._write(np.ascontiguousarray(band))

    def write_index(self) -> None:
        """Adds the index, after the last band."""
        self._write(self._slot.tile_index())

    def _write(self, array: np.ndarray) -> None:
        self.crc32 = zlib.crc32(bytes_of(array), self.crc32)
        self._file.write(array)


def read_slot(slot: Slot, state: Path, crc32: int | None = None) -> Iterator[np.ndarray]:
    """The bands that `SlotWriter` wrote, in the parameter's axes, each valid until the next.

    Raises:
      ValueError: after the last band, when the file is not that of `crc32`; when it is short.
    """
    shape = (slot.tensor_shape[1], slot.band) if slot.row.transpose else slot.tile
    size = math.prod(shape) * slot.dtype.itemsize
    found = offset = 0
    with DirectReader(state / slot.file, max(size, slot.tile_index().nbytes)) as file:
        for rows in slot.bands():
            raw = file.read(offset, size)
            found, offset = zlib.crc32(raw.data, found), offset + size
            band, count = raw.view(slot.dtype).reshape(shape), rows.stop - rows.start
            yield band[:, :count] if slot.row.transpose else band[:count]
        found = zlib.crc32(file.read(offset, slot.nbytes - offset).data, found)
    if crc32 is not None and found != crc32:
        raise ValueError("it was changed")


def write_arrays(state: Path, slots: Mapping[hf_names.Path, Slot], record: dict[str, Any]) -> None:
    """Makes the folder of every parameter, and the file by which Orbax knows them.

    Args:
      state: the checkpoint's folder.
      slots: any one slot of every parameter.
      record: JSON values kept with the checkpoint.
    """
    tree = {}
    for path, slot in slots.items():
        folder = state / array_folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "zarr.json").write_text(json.dumps(slot.zarr_json()), encoding="utf-8")
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(slot.shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": record,
    }
    (state / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
