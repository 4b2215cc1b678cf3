"""Text documents: where they come from, and which of them are held out for evaluation.

A corpus is "stdlib" (the running Python's own standard library) or a path to a file or folder.
Documents are streamed in a fixed order (by name), so a corpus may be larger than memory.
"""

import dataclasses
import hashlib
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError, DataConfig

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SOURCE_SUFFIXES = tuple(
    """
    .bash .c .cc .cfg .cpp .cs .css .cu .go .h .hpp .hs .html .java .jl .js .kt .lua .m .ml .php
    .pl .py .pyi .r .rb .rs .scala .sh .sql .swift .tex .toml .ts .xml .yaml .yml .zig
    """.split()
)
RECORD_SUFFIXES = (".jsonl", ".parquet")

STDLIB_HELD_OUT = ("http", "json", "tomllib", "pydoc_data")
_STDLIB_SKIPPED = frozenset({"encodings", "test"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# A text file is read in documents of at most about this many bytes, cut after a line end.
_DOCUMENT_BYTES = 1 << 22
_PARQUET_ROWS = 256

_log = logging.getLogger(__name__)


class DataError(ConfigError):
    """The corpus, the tokenizer or their fit is unusable; one line: value, rule, place."""


class CacheError(RuntimeError):
    """A cached tokenizer or token file cannot be written, or is damaged."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and its name, which is unique in its corpus and decides its split."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class DocumentSet:
    """A re-iterable stream of the documents with text, in a fixed order.

    `fingerprint`: hex digest of the files' names, sizes and modification times (not their
    contents, which may be terabytes): it changes when the set does.
    `size_bytes`: bytes of the files the stream reads; the text of the set is about as long or
    shorter.
    """

    description: str
    fingerprint: str
    size_bytes: int
    stream: Callable[[], Iterator[Document]]
    may_be_empty: bool = False

    def __iter__(self) -> Iterator[Document]:
        """Yields documents whose text is not blank.

        Raises:
          DataError: an unreadable document, or none with text (unless `may_be_empty`).
        """
        found = self.may_be_empty
        for document in self.stream():
            if document.text and not document.text.isspace():
                found = True
                yield document
        if not found:
            raise DataError(f"no document with text in {self.description}: at least one is needed")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no document is in both."""

    train: DocumentSet
    held_out: DocumentSet


def open_corpus(data: DataConfig) -> Corpus:
    """Lists the files of `data.corpus` and splits their documents; reads no text yet.

    With `data.held_out` null, "stdlib" holds out whole packages (see `_stdlib_files`), and a path
    holds out the documents whose name hashes below `data.held_out_fraction`, except the first
    document, so that a corpus of one document can be trained on. With `data.held_out` set, all
    of `data.corpus` is for training and all of `data.held_out` is held out.

    Raises:
      DataError: a path is missing or holds no file of a known kind.
    """
    if data.held_out is not None:
        return Corpus(
            _whole_set(data.corpus, "data.corpus", data),
            _whole_set(data.held_out, "data.held_out", data),
        )
    if data.corpus == "stdlib":
        root, files = _stdlib_files()
        held_out = [file for file in files if _package(file) in STDLIB_HELD_OUT]
        train = [file for file in files if _package(file) not in STDLIB_HELD_OUT]
        return Corpus(_stdlib_set(root, train), _stdlib_set(root, held_out))
    return _hash_split(_whole_set(data.corpus, "data.corpus", data), data.held_out_fraction)


def name_fraction(name: str, *, salt: str = "") -> float:
    """A number in [0, 1) that depends on `name` and `salt` only, uniform over names."""
    digest = hashlib.sha256(f"{salt}\n{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _hash_split(whole: DocumentSet, fraction: float) -> Corpus:
    def stream(held_out: bool) -> Iterator[Document]:
        for number, document in enumerate(whole):
            if (number > 0 and name_fraction(document.name) < fraction) == held_out:
                yield document

    def half(label: str, held_out: bool) -> DocumentSet:
        key = f"{whole.fingerprint} {fraction!r} {held_out}"
        return DocumentSet(
            f"the {label} part of {whole.description}",
            hashlib.sha256(key.encode()).hexdigest(),
            whole.size_bytes,
            lambda: stream(held_out),
            may_be_empty=held_out,
        )

    return Corpus(half("training", False), half("held-out", True))


def _whole_set(corpus: str, place: str, data: DataConfig) -> DocumentSet:
    if corpus == "stdlib":
        return _stdlib_set(*_stdlib_files())
    root = Path(corpus).expanduser()
    if not root.exists():
        raise DataError(f"{place}={corpus!r} must be 'stdlib' or an existing file or folder")
    files = _text_files(root) if root.is_dir() else [root.name]
    base = root if root.is_dir() else root.parent
    known = (*TEXT_SUFFIXES, *SOURCE_SUFFIXES, *RECORD_SUFFIXES)
    files = [file for file in files if Path(file).suffix.lower() in known]
    if not files:
        raise DataError(
            f"{place}={corpus!r} must hold at least one file of text ({' '.join(TEXT_SUFFIXES)}), "
            f"source code (.py .c .rs ...) or records ({' '.join(RECORD_SUFFIXES)})"
        )

    def stream() -> Iterator[Document]:
        for file in files:
            yield from _read_file(base, file, data.text_field)

    fingerprint, size = _listing(base, files, data.text_field)
    return DocumentSet(f"{place}={corpus!r}", fingerprint, size, stream)


def _text_files(root: Path) -> list[str]:
    """Relative POSIX paths below `root`, sorted; hidden files and folders are left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _listing(base: Path, files: Iterable[str], salt: str) -> tuple[str, int]:
    """Digest of (folder, names, sizes, modification times), and the sum of the sizes."""
    digest = hashlib.sha256(f"{base.resolve()}\n{salt}\n".encode("utf-8", "surrogateescape"))
    total = 0
    for file in files:
        status = (base / file).stat()
        total += status.st_size
        line = f"{file}\t{status.st_size}\t{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), total


def _read_file(base: Path, file: str, text_field: str) -> Iterator[Document]:
    path = base / file
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(path, file, text_field)
            case ".parquet":
                yield from _read_parquet(path, file, text_field)
            case _:
                yield from _read_text(path, file)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise DataError(
            f"byte 0x{byte:02x} at offset {error.start} must be part of UTF-8 text ({place})"
        ) from error


def _read_text(path: Path, name: str) -> Iterator[Document]:
    """The whole file as one document; only a very long file is cut, after line ends."""
    with path.open("rb") as stream:
        part = 0
        while lines := stream.readlines(_DOCUMENT_BYTES):
            place = f"{path}, part {part}" if part else str(path)
            yield Document(f"{name}#{part}" if part else name, _decode(b"".join(lines), place))
            part += 1


def _checked_text(value: Any, text_field: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"field {text_field!r} is {type(value).__name__} and must be a string ({place})"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"field {text_field!r} holds half a surrogate pair ({place})") from error
    return value


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.isspace():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(_decode(raw, place))
            except json.JSONDecodeError as error:
                raise DataError(f"not valid JSON: {error.msg} ({place})") from error
            if not isinstance(row, dict) or text_field not in row:
                raise DataError(f"data.text_field={text_field!r} must be in every row ({place})")
            yield Document(f"{name}:{number}", _checked_text(row[text_field], text_field, place))


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'dsv3-jax[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise DataError(
                    f"data.text_field={text_field!r} must be one of the columns "
                    f"{', '.join(columns)} ({path})"
                )
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    text = _checked_text(value, text_field, f"{path}, row {number}")
                    yield Document(f"{name}:{number}", text)
                    number += 1
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file: {reason} ({path})") from error


def _package(file: str) -> str:
    return file.split("/", 1)[0].removesuffix(".py")


def _stdlib_files() -> tuple[Path, list[str]]:
    """The standard library's folder and the relative paths of the source files in the corpus.

    Only names in `sys.stdlib_module_names` count, so installed packages and a distribution's
    additions change nothing. Left out as poor text: tests (17 MB of repetition, not installed
    everywhere) and `encodings` (nine tenths generated character tables). About 10 MB remain.
    Held out are the packages in `STDLIB_HELD_OUT` (about 7 % of the bytes); `pydoc_data` stands
    for the texts of its language-reference topics.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = frozenset(sys.stdlib_module_names) - _STDLIB_SKIPPED
    files = [
        file
        for file in _walk_packages(root, packages)
        if not _TEST_FOLDERS.intersection(file.split("/"))
        and (_package(file) != "pydoc_data" or file == "pydoc_data/topics.py")
    ]
    if not files:
        raise DataError(f"data.corpus='stdlib' needs the standard library's .py files in {root}")
    if "pydoc_data/topics.py" not in files:
        _log.warning("this Python has no pydoc_data.topics: the held-out set goes without it")
    return root, files


def _walk_packages(root: Path, packages: frozenset[str]) -> list[str]:
    found = []
    for entry in root.iterdir():
        if entry.name.removesuffix(".py") not in packages:
            continue
        if entry.is_dir():
            found += [f"{entry.name}/{file}" for file in _text_files(entry)]
        else:
            found.append(entry.name)
    return sorted(file for file in found if file.endswith(".py"))


def _stdlib_set(root: Path, files: list[str]) -> DocumentSet:
    def stream() -> Iterator[Document]:
        for file in files:
            if _package(file) == "pydoc_data":
                from pydoc_data import topics

                for topic in sorted(topics.topics):
                    yield Document(f"pydoc_data/topics/{topic}", topics.topics[topic])
            else:
                yield from _read_file(root, file, text_field="")

    fingerprint, size = _listing(root, files, f"stdlib {sys.version}")
    return DocumentSet(f"the standard library in {root}", fingerprint, size, stream)
