"""Size and CRC-32 of every file in a folder, to tell later whether they are as written."""

import concurrent.futures
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

INVENTORY = "inventory.json"


def write_inventory(folder: Path, known: Mapping[str, list[int]] | None = None) -> None:
    """Lists every file under `folder` in its `inventory.json`.

    Args:
      known: [bytes, CRC-32] of files that need not be read again, by name.
    """
    known = known or {}
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name != INVENTORY]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prints = pool.map(lambda name: known.get(name) or _fingerprint(folder / name), names)
        files = dict(zip(names, prints, strict=True))
    with (folder / INVENTORY).open("w", encoding="utf-8") as file:
        json.dump({"files": files, "crc32": _crc32_of(files)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())  # as Orbax does for its own files, before the rename


def read_inventory(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} as `write_inventory` found them.

    Raises:
      ValueError: it cannot be read, or was changed.
    """
    try:
        inventory = json.loads((folder / INVENTORY).read_text(encoding="utf-8"))
        files = inventory["files"]
        intact = inventory["crc32"] == _crc32_of(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{INVENTORY} cannot be read ({one_line(error)})") from error
    if not intact:
        raise ValueError(f"{INVENTORY} was changed")
    return files


def find_damage(
    folder: Path, only: str | None = None, *, share: tuple[int, int] = (0, 1)
) -> str | None:
    """The first disagreement between a folder and its inventory, None if there is none.

    Args:
      only: the one file to check; None: all.
      share: (i, n): of all files, the i-th of n parts of about equal size.
    """
    try:
        files = read_inventory(folder)
    except ValueError as error:
        return str(error)
    by_size = sorted(files, key=lambda name: (-files[name][0], name))
    names = [only] if only else by_size[share[0] :: share[1]]

    def check(name: str) -> str | None:
        path = folder / name
        try:
            if path.stat().st_size != files[name][0]:
                return f"{name} has {path.stat().st_size} bytes, not {files[name][0]}"
            return None if _fingerprint(path) == files[name] else f"{name} was changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({one_line(error)})"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(check, names)), None)


def _fingerprint(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size, crc32 = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return [size, crc32]


def _crc32_of(files: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def one_line(error: BaseException) -> str:
    """The cause of an error as one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # as TensorStore reports it
        return os.strerror(int(code[1]))
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
