"""Reading safetensors folders without trusting them.

safetensors' own NumPy reader cannot read FP8, so the header is parsed here and tensors are memory
maps of the file, with ml_dtypes for what NumPy lacks. Length, offsets, overlaps, dtypes and shapes
are checked before anything is mapped.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.config import ConfigError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


class WeightsError(ConfigError):
    """A weights folder that cannot be used; the message names file and tensor."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor as a read-only memory map of its file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and the first byte of the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise WeightsError(f"header length {length} does not fit the {size} bytes ({file})")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise WeightsError(f"header is not valid JSON: {error} ({file})") from error
    if not isinstance(header, dict):
        raise WeightsError(f"header must be a JSON object ({file})")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entry(file: Path, name: str, raw: Any, data: int, size: int) -> tuple[TensorEntry, int]:
    """One tensor's entry and its end, in bytes from the start of the data."""
    try:
        code, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError("a size or offset is not a whole number")
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"tensor {name!r} has a malformed entry ({file})") from error
    if code not in _DTYPES:
        raise WeightsError(f"tensor {name!r} has unsupported dtype {code!r} ({file})")
    dtype = np.dtype(_DTYPES[code])
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise WeightsError(
            f"tensor {name!r} of shape {list(shape)} and dtype {code} does not fit bytes "
            f"{begin}..{end} of a file of {size} (truncated?) ({file})"
        )
    return TensorEntry(file, dtype, shape, data + begin), end


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors of one .safetensors file.

    Raises:
      WeightsError: the header or an entry is malformed, truncated or overlapping.
    """
    header, data = _header(file)
    size = file.stat().st_size
    entries = {}
    spans = []
    for name, raw in header.items():
        entries[name], end = _entry(file, name, raw, data, size)
        spans.append((entries[name].offset, data + end, name))
    spans.sort()
    for (_, end, name), (begin, _, following) in itertools.pairwise(spans):
        if begin < end:
            raise WeightsError(f"tensors {name!r} and {following!r} overlap ({file})")
    return entries


def open_folder(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a folder: those of `model.safetensors.index.json`, else of its one file.

    Raises:
      WeightsError: no weights, a shard that is missing or leaves the folder, or a tensor that is
        not where the index says.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise WeightsError(
                f"{len(files)} .safetensors files without model.safetensors.index.json must be 1 "
                f"({folder})"
            )
        return read_header(files[0])
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"no readable weight_map ({index})") from error
    by_shard = {}
    for shard in shards:
        # Links inside the folder are followed (the hub cache is made of them); paths are not.
        if Path(shard).name != shard:
            raise WeightsError(f"shard {shard!r} must be a file name in the folder ({index})")
        if not (folder / shard).is_file():
            raise WeightsError(f"shard {shard!r} is missing ({index})")
        by_shard[shard] = read_header(folder / shard)
    entries = {}
    for name, shard in weight_map.items():
        if name not in by_shard[shard]:
            raise WeightsError(f"tensor {name!r} is not in {shard!r} as the index says ({index})")
        entries[name] = by_shard[shard][name]
    for shard, present in by_shard.items():
        for name in present:
            if weight_map.get(name) != shard:
                raise WeightsError(f"tensor {name!r} of {shard!r} is not in the index ({index})")
    return entries
