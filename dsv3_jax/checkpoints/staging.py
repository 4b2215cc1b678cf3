"""A destination folder that appears whole or not at all, and continues where it was interrupted.

All is written to `DST.partial/result`, beside a journal of the tensors that are finished. A line
of the journal reaches the disk after the bytes it vouches for, so after a crash at any moment it
never promises too much. The last act is to rename the result to DST.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError

_JOURNAL = "journal.jsonl"
_BYTES_A_COMMIT = 256_000_000  # at most this much work is repeated after a crash


class Staging:
    """The unfinished destination of one conversion.

    Attributes:
      result: the folder to write to.
      done: {tensor: record} of what an earlier, interrupted conversion has finished.
      is_finished: it had finished all but tidying up; there is nothing left to write.
    """

    def __init__(self, destination: Path, job: dict[str, Any]) -> None:
        """Starts or continues the conversion `job` (JSON values that say what is done to what).

        Raises:
          ConfigError: `destination` is there already, or an unfinished conversion of another
            source or with other options is, or one that is still running.
        """
        self.destination = destination
        self.partial = destination.with_name(destination.name + ".partial")
        self.result = self.partial / "result"
        self.done: dict[str, dict[str, Any]] = {}
        self._job = json.loads(json.dumps(job))
        self._pending: list[tuple[str, dict[str, Any], list[Path]]] = []
        self._pending_bytes = 0
        self._lock = threading.Lock()
        occupied = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
        journal = self.partial / _JOURNAL
        # The journal goes just before its folder: an empty one is all that is left to tidy up.
        emptied = self.partial.is_dir() and not any(self.partial.iterdir())
        if occupied and not journal.exists() and not emptied:
            raise ConfigError(f"{destination} exists and is not empty")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._read_journal()
            self.is_finished = occupied and not self.result.exists()
            if occupied and not self.is_finished:
                raise ConfigError(f"{destination} exists and is not empty")
        except BaseException:
            os.close(self._journal)
            raise
        if not self.is_finished:
            self.result.mkdir(exist_ok=True)

    def _read_journal(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing to {self.partial}") from None
        with open(os.dup(self._journal), "rb") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # cut off by a crash
            os.ftruncate(self._journal, sum(map(len, lines[:-1])))
            lines = lines[:-1]
        if not lines:
            self._append([self._job])
            return
        try:
            job, *records = map(json.loads, lines)
            self.done = {record.pop("name"): record for record in records}
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"the journal cannot be read: delete {self.partial}") from error
        if job != self._job:
            changed = [key for key in self._job if job.get(key) != self._job[key]]
            raise ConfigError(
                f"{self.partial} holds an unfinished conversion with another "
                f"{' and '.join(changed) or 'job'}: delete it to start again"
            )

    def require_space(self, needed: int) -> None:
        """Checks that the disk has room for `needed` more bytes.

        Raises:
          ConfigError: it has not; the message says how much is needed and available.
        """
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise ConfigError(
                f"{_size(needed)} needed and {_size(free)} available on the disk of "
                f"{self.destination}"
            )

    def finished(self, name: str, record: dict[str, Any], files: Iterable[Path], size: int) -> None:
        """Notes that tensor `name` is written, `size` bytes in `files`; threads may call it."""
        with self._lock:
            self._pending.append((name, record, list(files)))
            self._pending_bytes += size
            if self._pending_bytes < _BYTES_A_COMMIT:
                return
            pending, self._pending, self._pending_bytes = self._pending, [], 0
        self._commit(pending)

    def flush(self) -> None:
        """Brings everything that is finished, and the journal, to the disk."""
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
        self._commit(pending)

    def _commit(self, pending: list[tuple[str, dict[str, Any], list[Path]]]) -> None:
        if not pending:
            return
        files = {file for _, _, files in pending for file in files}
        for path in [*sorted(files), *sorted({file.parent for file in files})]:
            _sync(path)
        with self._lock:
            self._append([{"name": name, **record} for name, record, _ in pending])
            self.done |= {name: record for name, record, _ in pending}

    def _append(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        while lines:
            lines = lines[os.write(self._journal, lines) :]
        os.fsync(self._journal)

    def publish(self) -> None:
        """Gives the result its name and removes everything else."""
        if not self.is_finished:
            self.flush()
            for folder, _, files in os.walk(self.result):
                for path in [*files, "."]:
                    _sync(Path(folder, path))
            os.rename(self.result, self.destination)
            _sync(self.destination.parent)
        shutil.rmtree(self.partial)

    def close(self) -> None:
        """Lets go of the journal; an unfinished conversion can be continued."""
        with contextlib.suppress(OSError):  # the disk may be full; then a little is done again
            self.flush()
        os.close(self._journal)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
