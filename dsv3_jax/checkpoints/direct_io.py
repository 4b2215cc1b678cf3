"""Large files past the page cache.

What a conversion reads and writes is used once and larger than memory. Copying it through the
page cache costs more processor time than the conversion itself (measured: 0.5 GB/s and a whole
core for buffered writes, 1.4 GB/s and a fifth of one for these) and evicts what others use. Where
a file system refuses, or in short pieces, reads and writes are the ordinary ones.
"""

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

# Of memory, offsets and sizes: the largest block of a disk in use, and never less than a page, so
# that no page of the cache holds bytes that are written past it.
_ALIGNMENT = max(4096, mmap.PAGESIZE)
_DIRECT = getattr(os, "O_DIRECT", 0)
_PIECE = 1 << 22  # bytes written at a time
_WORTH_IT = 1 << 20  # shorter files go through the page cache

_free: list[mmap.mmap] = []
_lock = threading.Lock()


@contextlib.contextmanager
def aligned_buffer(size: int) -> Iterator[np.ndarray]:
    """At least `size` bytes of page-aligned memory, used again by the next that asks.

    New memory would be filled with zeros by the system every time.
    """
    with _lock:
        fitting = [buffer for buffer in _free if len(buffer) >= size]
        # Too small ones are given back, so there are never more than were in use at a time.
        memory = min(fitting, key=len) if fitting else _free[0] if _free else None
        if memory is not None:
            _free.remove(memory)
    if memory is None or len(memory) < size:
        memory = mmap.mmap(-1, max(-(-size // _ALIGNMENT) * _ALIGNMENT, _ALIGNMENT))
    try:
        yield np.frombuffer(memory, np.uint8)
    finally:
        with _lock:
            _free.append(memory)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


class DirectReader:
    """Reads any range of a file; a context manager.

    Args:
      largest: bytes of the longest range that will be read.
    """

    def __init__(self, path: Path, largest: int) -> None:
        self._stack = contextlib.ExitStack()
        self._file = self._direct = os.open(path, os.O_RDONLY)
        self._stack.callback(os.close, self._file)
        if _DIRECT and largest >= _WORTH_IT:
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_RDONLY | _DIRECT)
                self._stack.callback(os.close, self._direct)
        room = largest + 2 * _ALIGNMENT
        self._buffer = self._stack.enter_context(aligned_buffer(room))

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, offset: int, size: int) -> np.ndarray:
        """`size` bytes at `offset`, valid until the next call.

        Raises:
          ValueError: the file ends before.
        """
        before = offset % _ALIGNMENT
        wanted = before + size
        room = self._buffer.data[: -(-wanted // _ALIGNMENT) * _ALIGNMENT]
        done = 0
        while done < wanted:
            count = self._read_at(offset - before + done, room[done:])
            if count == 0:
                raise ValueError("it ends early")
            done += count
        return self._buffer[before:wanted]

    def _read_at(self, offset: int, room: memoryview) -> int:
        try:
            return os.preadv(self._direct, [room], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or self._direct == self._file:
                raise
            self._direct = self._file  # it does not take this size after all
            return os.preadv(self._file, [room], offset)


class DirectWriter:
    """Writes a range of a file from its start to its end; a context manager.

    Blocks that the range shares with what lies before and after it are left as they are, so
    several threads can write neighbouring ranges.

    Args:
      offset: where the range starts.
      size: its bytes; fewer than a MB go through the page cache.
      truncate: begin with an empty file.
    """

    def __init__(self, path: Path, offset: int, size: int, *, truncate: bool = False) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if truncate else 0)
        self._stack = contextlib.ExitStack()
        self._file = self._direct = os.open(path, flags, 0o644)
        self._stack.callback(os.close, self._file)
        if _DIRECT and size >= _WORTH_IT:
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | _DIRECT)
                self._stack.callback(os.close, self._direct)
        self._buffer = self._stack.enter_context(aligned_buffer(_PIECE))
        # Byte i of the buffer belongs at start + i; both are aligned.
        self._start = offset - offset % _ALIGNMENT
        self._begin = self._end = offset % _ALIGNMENT

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._stack.close()

    def write(self, array: np.ndarray) -> None:
        """Adds the bytes of a contiguous array."""
        raw = array.reshape(-1).view(np.uint8)
        while raw.size:
            count = min(raw.size, _PIECE - self._end)
            self._buffer[self._end : self._end + count] = raw[:count]
            self._end += count
            raw = raw[count:]
            if self._end == _PIECE:
                self._flush()

    def _flush(self) -> None:
        """Writes the buffer: whole blocks past the page cache, the others through it."""
        first = -(-self._begin // _ALIGNMENT) * _ALIGNMENT
        last = max(self._end // _ALIGNMENT * _ALIGNMENT, first)
        first, last = min(first, self._end), min(last, self._end)
        for descriptor, begin, end in (
            (self._file, self._begin, first),
            (self._direct, first, last),
            (self._file, last, self._end),
        ):
            self._write_at(descriptor, begin, end)
        self._start += self._end
        self._begin = self._end = 0

    def _write_at(self, descriptor: int, begin: int, end: int) -> None:
        room = self._buffer.data
        while begin < end:
            try:
                begin += os.pwrite(descriptor, room[begin:end], self._start + begin)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor == self._file:
                    raise
                descriptor = self._direct = self._file  # it does not take this size after all
