"""Reading safetensors folders without trusting them.

safetensors' own NumPy reader cannot read FP8, so the header is parsed here and tensors are memory
maps of the file, with ml_dtypes for what NumPy lacks. Everything the format asks for is checked
before anything is mapped: the header's length, its JSON, dtypes and shapes, and that the tensors
fill the file from end to end without overlapping.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from dsv3_jax.config import ConfigError

# All that NumPy can hold, so that any folder can be described; readers choose what they take.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit, for the index too
_MAX_DIMENSIONS = 64  # NumPy's limit
_MAX_BYTES = 2**63 - 1

INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


class WeightsError(ConfigError):
    """A weights folder that cannot be used; the message names file and tensor."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor as a read-only memory map of its file.

        Raises:
          WeightsError: the file has become unreadable or shorter since its header was read.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise WeightsError(f"cannot be read: {error} ({self.file})") from error


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors of one .safetensors file.

    Raises:
      WeightsError: the file, its header or an entry is malformed; tensors overlap or leave bytes
        of the file to none.
    """
    header, data, size = _header(file)
    entries, spans = {}, []
    for name, raw in header.items():
        entries[name], begin, end = _entry(file, name, raw)
        if data + end > size:
            raise WeightsError(
                f"tensor {name!r} ends at byte {data + end} of a file of {size}: truncated? "
                f"({file})"
            )
        entries[name] = dataclasses.replace(entries[name], offset=data + begin)
        spans.append((begin, end, name))
    reached, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin < reached:
            raise WeightsError(f"tensors {before} and {name!r} overlap ({file})")
        if begin > reached:
            raise WeightsError(
                f"{begin - reached} bytes between {before} and {name!r} belong to no tensor "
                f"({file})"
            )
        reached, before = end, repr(name)
    if data + reached != size:
        raise WeightsError(f"{size - data - reached} bytes after {before} ({file})")
    return entries


def open_folder(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a folder: those of `model.safetensors.index.json`, else of its one file.

    Raises:
      WeightsError: no weights, a shard that is missing or leaves the folder, or a tensor that is
        not where the index says.
    """
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob(f"*{_SUFFIX}"))
        if len(files) != 1:
            raise WeightsError(f"{len(files)} {_SUFFIX} files without {INDEX} must be 1 ({folder})")
        return read_header(files[0])
    weight_map = _weight_map(index)
    by_shard = {}
    for shard in sorted(set(weight_map.values())):
        if not _is_file(folder / shard):
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


def same_bytes(one: TensorEntry, other: TensorEntry, chunk: int = 1 << 24) -> bool:
    """Whether two tensors have the same dtype, shape and bits; holds two chunks at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, chunk):
        count = min(chunk, one.nbytes - start)
        # A map of each chunk, so that the pages of those before it can go.
        mine, theirs = (
            dataclasses.replace(
                entry, dtype=np.dtype(np.uint8), shape=(count,), offset=entry.offset + start
            ).read()
            for entry in (one, other)
        )
        if not np.array_equal(mine, theirs):
            return False
    return True


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: shard} of an index, every shard a file name of the index's own folder."""
    try:
        size = index.stat().st_size
        if size > MAX_HEADER:
            raise WeightsError(f"{size} bytes must be at most {MAX_HEADER} ({index})")
        raw = strict_json(index.read_bytes(), f"{index}")
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror} ({index})") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise WeightsError(f"no readable weight_map ({index})")
    for name, shard in weight_map.items():
        # Links inside the folder are followed (the hub cache is made of them); paths are not.
        plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:")
        if not (plain and shard.endswith(_SUFFIX)):
            raise WeightsError(
                f"shard {shard!r} of tensor {name!r} must be a {_SUFFIX} file name in the folder "
                f"({index})"
            )
    return weight_map


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the first byte of the data and the size of the file."""
    if not _is_file(file):  # before opening: a pipe would never answer
        raise WeightsError(f"not a readable file ({file})")
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise WeightsError(f"header length {length} does not fit the {size} bytes ({file})")
            text = stream.read(length)
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror} ({file})") from error
    if not text.startswith(b"{"):
        raise WeightsError(f"header must be a JSON object ({file})")
    header = strict_json(text, f"header of {file}")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(type(v) is str for v in metadata.values())):
        raise WeightsError(f"__metadata__ must map names to strings ({file})")
    return header, 8 + length, size


def _entry(file: Path, name: str, raw: Any) -> tuple[TensorEntry, int, int]:
    """One tensor's entry, without its offset, and its begin and end from the start of the data."""
    try:
        code, shape, (begin, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
        known = code in _DTYPES
        if type(shape) is not list or type(raw["data_offsets"]) is not list:
            raise TypeError("neither may be anything but a list")
        if not all(type(n) is int and 0 <= n <= _MAX_BYTES for n in (*shape, begin, end)):
            raise ValueError("a size or offset is not a whole number of 63 bits")
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"tensor {name!r} has a malformed entry ({file})") from error
    if not known:
        raise WeightsError(f"tensor {name!r} has unsupported dtype {code!r} ({file})")
    dtype = np.dtype(_DTYPES[code])
    # Empty dimensions count as one: NumPy multiplies the others even then.
    if len(shape) > _MAX_DIMENSIONS or _product(shape) * dtype.itemsize > _MAX_BYTES:
        raise WeightsError(f"tensor {name!r} has too large a shape to be an array ({file})")
    entry = TensorEntry(file, dtype, tuple(shape), begin)
    if end - begin != entry.nbytes:
        raise WeightsError(
            f"tensor {name!r} of shape {shape} and dtype {code} has {entry.nbytes} bytes and does "
            f"not fit bytes {begin}..{end} ({file})"
        )
    return entry, begin, end


def _product(shape: list[int]) -> int:
    return math.prod(max(n, 1) for n in shape)


def strict_json(text: bytes, place: str) -> Any:
    """The value of a JSON text, held to the standard: UTF-8, no name twice, no NaN.

    Raises:
      WeightsError: it is not; the message ends in `place`.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise WeightsError(f"not valid JSON: nested too deep ({place})") from None
    except ValueError as error:  # of UTF-8, of JSON, of a number of thousands of digits
        raise WeightsError(f"not valid JSON: {str(error)[:200]} ({place})") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # an escaped half of a surrogate pair is no text
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _is_file(path: Path) -> bool:
    """Whether it is a regular file, through links; False where the system refuses to say."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
