"""The tensors of a Hugging Face folder, read a band of rows at a time."""

import math
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from dsv3_jax.checkpoints.array_store import band_rows, turned
from dsv3_jax.checkpoints.direct_io import DirectReader, bytes_of
from dsv3_jax.checkpoints.fp8 import dequantize_blocks
from dsv3_jax.checkpoints.ledger import FP8, SCALE_SUFFIX, Assignment
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError


class TensorFile:
    """One tensor's bytes, read without mapping them: mapped pages would count as memory in use.

    `crc32` is that of the rows read so far.

    Args:
      extra_rows: how many more rows than `band_rows` may be read at a time.
    """

    def __init__(self, name: str, entry: TensorEntry, extra_rows: int = 0) -> None:
        self.name, self.entry = name, entry
        self.crc32 = 0
        rows = min(band_rows(entry.shape) + extra_rows, entry.shape[0]) if entry.shape else 1
        self._row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        self._file = DirectReader(entry.file, rows * self._row_bytes)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, valid until the next call.

        Raises:
          WeightsError: the file has become shorter.
        """
        entry = self.entry
        offset = entry.offset + start * self._row_bytes
        try:
            raw = self._file.read(offset, (stop - start) * self._row_bytes)
        except ValueError as error:
            raise WeightsError(f"tensor {self.name!r}: {error} ({entry.file})") from None
        if raw.ctypes.data % entry.dtype.alignment:
            raw = raw.copy()
        return raw.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def add(self, band: np.ndarray) -> np.ndarray:
        """Adds a band to the checksum and returns it."""
        self.crc32 = zlib.crc32(bytes_of(band), self.crc32)
        return band

    def bands(self) -> Iterator[np.ndarray]:
        """All rows in order, of the file's dtype."""
        length = self.entry.shape[0] if self.entry.shape else 0
        step = band_rows(self.entry.shape) if length else 1
        for start in range(0, length, step):
            yield self.add(self.rows(start, min(start + step, length)))


def checksum(name: str, entry: TensorEntry) -> int:
    """CRC-32 of a tensor's bytes."""
    with TensorFile(name, entry) as file:
        for _ in file.bands():
            pass
        return file.crc32


def check_tied(
    item: Assignment, original: TensorEntry, advance: Callable[[int], None] | None = None
) -> int:
    """CRC-32 of a tied tensor, which must be bit for bit the one it repeats.

    Args:
      advance: called after every band; may raise.

    Raises:
      WeightsError: it is not; the message names both tensors and files.
    """
    with TensorFile(item.name, item.entry) as copy, TensorFile(item.other, original) as other:
        for one, two in zip(copy.bands(), other.bands(), strict=True):
            if advance is not None:
                advance(0)
            if not np.array_equal(one.view(np.uint8), two.view(np.uint8)):
                raise WeightsError(
                    f"tensor {item.name!r} ({item.entry.file}) must equal {item.other!r} "
                    f"({original.file})"
                )
        return copy.crc32


class WeightReader:
    """A mapped tensor as numbers of `dtype`: an FP8 weight times its scales, others rounded.

    `checksums` has the CRC-32 of the weight, and of its scales, once all bands are read.
    """

    def __init__(
        self, assignment: Assignment, block: tuple[int, int] | None, dtype: np.dtype
    ) -> None:
        self._assignment, self._block, self._dtype = assignment, block, dtype
        self.checksums: dict[str, int] = {}
        self.scale: np.ndarray | None = None
        if assignment.scale is not None:
            name = assignment.name + SCALE_SUFFIX
            with TensorFile(name, assignment.scale, assignment.scale.shape[0]) as file:
                self.scale = file.add(file.rows(0, assignment.scale.shape[0])).copy()
                self.checksums[name] = file.crc32

    def bands(self, *, transpose: bool) -> Iterator[np.ndarray]:
        """Bands of `band_rows` rows, each valid until the next; transposed ones are [I, rows]."""
        name, entry = self._assignment.name, self._assignment.entry
        extra = 0 if self._block is None else 2 * self._block[0]
        with TensorFile(name, entry, extra) as file:
            if entry.dtype == FP8:
                yield from self._dequantized(file, transpose)
            else:
                for raw in file.bands():
                    # Rounded first: there is less to turn, and float64 cannot be turned by bits.
                    band = raw.astype(self._dtype, copy=False)
                    yield turned(band) if transpose else band
            self.checksums[name] = file.crc32

    def _dequantized(self, file: TensorFile, transpose: bool) -> Iterator[np.ndarray]:
        assert self._block is not None and self.scale is not None
        length, step, rows = file.entry.shape[0], band_rows(file.entry.shape), self._block[0]
        for start in range(0, length, step):
            stop = min(start + step, length)
            # Whole blocks: a band of 128 rows need not be whole blocks of another size.
            first, last = start // rows, -(-stop // rows)
            raw = file.rows(first * rows, min(last * rows, length))
            wanted = slice(start - first * rows, stop - first * rows)
            file.add(raw[wanted])
            band = dequantize_blocks(
                raw, self.scale[first:last], self._dtype, self._block, transpose=transpose
            )
            yield band[:, wanted] if transpose else band[wanted]


def has_nonfinite(band: np.ndarray) -> bool:
    """Whether a floating-point array has a NaN or an infinity.

    Their bits, as an integer, are the largest there are: two passes of `max` are cheaper than
    looking at every number.
    """
    if band.size == 0:
        return False
    bits = 8 * band.dtype.itemsize
    infinity = int(np.array(np.inf, band.dtype).view(f"u{bits // 8}"))
    negative = infinity + (1 << (bits - 1))
    positive_max = int(band.view(f"i{bits // 8}").max())
    return positive_max >= infinity or int(band.view(f"u{bits // 8}").max()) >= negative
