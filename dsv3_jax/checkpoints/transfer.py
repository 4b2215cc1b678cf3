"""Runs the tensors of a conversion through a few threads, and shows how far it is."""

import concurrent.futures
import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dsv3_jax.checkpoints.safetensors_io import WeightsError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLAIN_SECONDS = 10.0


class Progress:
    """Bytes written, bytes a second and time left: a bar on a terminal, else a line at times.

    Args:
      verb: what is being done, as "converting".
      total: bytes in all.
      done: bytes of them that were there before.
      file: where to print; standard error by default.
    """

    def __init__(self, verb: str, total: int, done: int = 0, file: TextIO | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self._console = Console(file=file or sys.stderr, highlight=False)
        self._verb, self._total, self._initial, self._done = verb, total, done, done
        self._started = self._printed = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = False
        self._bar: progress.Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(verb, total=total, completed=done)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line()

    def stop(self) -> None:
        """Makes the next `advance` of every thread raise."""
        self._stopped = True

    def advance(self, count: int) -> None:
        """Adds `count` bytes; threads may call it.

        Raises:
          InterruptedError: `stop` was called.
        """
        if self._stopped:
            raise InterruptedError("stopped")
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
                self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        rate = (self._done - self._initial) / max(self._printed - self._started, 1e-3)
        left = (self._total - self._done) / rate if rate else 0.0
        scale, unit = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
        self._console.print(
            f"{self._verb}  {self._done / scale:.2f}/{self._total / scale:.2f} {unit}  "
            f"{rate / 1e6:.0f} MB/s  ETA {int(left // 3600)}:{int(left // 60 % 60):02d}:"
            f"{int(left % 60):02d}",
            markup=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def disk_full_names(what: str, partial: Path) -> Iterator[None]:
    """Turns a full disk into bad input that says at what, and that nothing done is lost.

    Raises:
      WeightsError: the disk, a quota or the largest size of a file was reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise WeightsError(
            f"{error.strerror} at {what}: make room and run the same command again, it continues "
            f"from {partial}"
        ) from error


def run_all(items: Iterable[Any], work: Callable[[Any], None], progress: Progress) -> None:
    """Calls `work` on every item, several at a time; memory is bounded by their number.

    After the first error nothing new is begun, and it is raised once the threads have ended.
    """
    # One more than cores, as some wait for the disk; more than eight only wait for each other.
    threads = min((os.cpu_count() or 1) + 1, 8)
    waiting = iter(items)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        running: set[concurrent.futures.Future[None]] = set()
        try:
            while True:
                for item in waiting:
                    running.add(pool.submit(work, item))
                    if len(running) >= 2 * threads:
                        break
                if not running:
                    return
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
        except BaseException:
            progress.stop()
            for future in running:
                future.cancel()
            raise
