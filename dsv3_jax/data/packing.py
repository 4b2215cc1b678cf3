"""Tokens on disk, and the endless, shuffled stream of training sequences cut from them.

`TokenStore` keeps one split's documents, each as [BOS] tokens [EOS], in one memory-mapped file.
`PackedSequences` gives random access to training sequence `i` of a stream without end (report
section 4.1: packing without attention masks between documents, Fill-in-Middle in PSM order).
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dsv3_jax.data.sources import CacheError, Document
from dsv3_jax.data.tokenizer import Tokenizer

_FORMAT = 1  # part of the cache key: raise it when the files would change
_ENCODE_BYTES = 1 << 22  # text encoded at a time
_ENCODE_DOCUMENTS = 512
_BLOCK_BYTES = 1 << 20
_CHECKED_BLOCKS = 64

_log = logging.getLogger(__name__)


class TokenStore:
    """Tokens of one split: a flat little-endian file, document offsets, and counts.

    Attributes:
      tokens: [number of tokens] uint16 or uint32 memory map, read-only: documents in corpus
        order, each [BOS] tokens [EOS].
      offsets: int64 [documents + 1]: document d is `tokens[offsets[d]:offsets[d + 1]]`.
      text_bytes: UTF-8 bytes of the documents' text.
      fingerprint: hex digest of the tokens, equal on every machine with the same corpus.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a finished store.

        Raises:
          CacheError: a file is missing, has the wrong length, or fails its checksum. At most 64
            blocks of 1 MiB, evenly spaced, are checked, so that opening stays fast.
        """
        try:
            saved = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            facts = saved["facts"]
            if saved["crc32"] != _crc32_of(facts):
                raise CacheError(f"{folder / 'facts.json'} fails its checksum")
            self.offsets: np.ndarray = np.load(folder / "offsets.npy")
            checksums = np.load(folder / "checksums.npy")
            file = folder / "tokens.bin"
            dtype = np.dtype(facts["dtype"])
            self.text_bytes: int = facts["text_bytes"]
            self.fingerprint: str = facts["fingerprint"]
            if zlib.crc32(self.offsets.data) != facts["offsets_crc32"]:
                raise CacheError(f"{folder / 'offsets.npy'} fails its checksum")
            size = int(facts["tokens"]) * dtype.itemsize
            if file.stat().st_size != size:
                raise CacheError(f"{file} has {file.stat().st_size} bytes and must have {size}")
            _check_blocks(file, checksums)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise CacheError(f"damaged token store {folder}: {error}") from error
        # An empty file cannot be mapped.
        self.tokens: np.ndarray = np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


def cached_store(
    cache: Path, documents: Iterable[Document], fingerprint: str, tokenizer: Tokenizer
) -> TokenStore:
    """The store of `documents`, from the cache or built now.

    A damaged store is built again. A new one is written aside and renamed when whole, so a killed
    or concurrent run leaves no half store.

    Args:
      cache: the cache's root folder.
      documents: streamed once, and only if the store must be built.
      fingerprint: identifies `documents`.
      tokenizer: encodes the texts.

    Raises:
      CacheError: the store cannot be written.
      DataError: a document is unreadable.
    """
    key = f"{_FORMAT} {fingerprint} {tokenizer.fingerprint}"
    folder = cache / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.exists():
        try:
            return TokenStore(folder)
        except CacheError as error:
            _log.warning("tokenizing again: %s", error)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        _build(aside, documents, tokenizer)
        _replace_folder(aside, folder)
    except OSError as error:
        raise CacheError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenStore(folder)


def _replace_folder(aside: Path, folder: Path) -> None:
    """Renames `aside` to `folder`, unless another process has put a whole store there."""
    if folder.exists():
        try:
            TokenStore(folder)
            return
        except CacheError:
            damaged = folder.with_name(f"{aside.name}.damaged")
            os.rename(folder, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(aside, folder)
    except OSError:
        if not folder.exists():  # else another process was faster; its store is the same
            raise


def _build(folder: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    start = time.perf_counter()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    ends = array("q", [0])
    text_bytes = 0
    with (folder / "tokens.bin").open("wb") as stream:
        for texts in _text_batches(documents):
            text_bytes += sum(len(text.encode()) for text in texts)
            for ids in tokenizer.encode_batch(texts):
                stream.write(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype).tobytes())
                ends.append(ends[-1] + len(ids) + 2)
        stream.flush()
        os.fsync(stream.fileno())
    offsets = np.array(ends, np.int64)
    np.save(folder / "offsets.npy", offsets)
    digest = hashlib.sha256(offsets.tobytes())
    checksums = []
    with (folder / "tokens.bin").open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            checksums.append(zlib.crc32(block))
    np.save(folder / "checksums.npy", np.array(checksums, np.uint32))
    facts = {
        "dtype": dtype.str,
        "offsets_crc32": zlib.crc32(offsets.data),
        "tokens": ends[-1],
        "text_bytes": text_bytes,
        "fingerprint": digest.hexdigest(),
    }
    saved = {"facts": facts, "crc32": _crc32_of(facts)}
    (folder / "facts.json").write_text(json.dumps(saved), encoding="utf-8")
    _log.info(
        "tokenized %d documents: %d bytes, %d tokens, %.1f s",
        len(offsets) - 1,
        text_bytes,
        facts["tokens"],
        time.perf_counter() - start,
    )


def _text_batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _ENCODE_BYTES or len(texts) >= _ENCODE_DOCUMENTS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _crc32_of(facts: dict[str, int | str]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _check_blocks(file: Path, checksums: np.ndarray) -> None:
    count = len(checksums)
    if count != -(-file.stat().st_size // _BLOCK_BYTES):
        raise CacheError(f"{file} must have one checksum for every {_BLOCK_BYTES} bytes")
    chosen = {k * (count - 1) // max(_CHECKED_BLOCKS - 1, 1) for k in range(_CHECKED_BLOCKS)}
    with file.open("rb") as stream:
        for block in sorted(chosen) if count > _CHECKED_BLOCKS else range(count):
            if zlib.crc32(_read_block(stream, block)) != checksums[block]:
                raise CacheError(f"{file}: block {block} fails its checksum")


def _read_block(stream: BinaryIO, block: int) -> bytes:
    stream.seek(block * _BLOCK_BYTES)
    return stream.read(_BLOCK_BYTES)


# What a random number is for; part of its key.
_DOCUMENT_ORDER, _ROW_ORDER, _FIM_CHOICE, _FIM_FIRST_CUT, _FIM_SECOND_CUT = range(5)
_FEISTEL_ROUNDS = 8
_FIM_UNIT = 1 << 32  # the rate as an integer over this: exact arithmetic on every machine
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al., 2014) of a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int) -> int:
    """A 64-bit key that depends on every part and their order."""
    state = 0
    for part in parts:
        state = int(_mix(np.array([(state + _GOLDEN * (part + 1)) & _MASK], np.uint64))[0])
    return state


def _hash(index: np.ndarray, key: int | np.uint64) -> np.ndarray:
    """uint64, as good as random: a function of `index` and the 64-bit `key` alone."""
    return _mix(_mix(index.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `index` under a permutation of range(size) that `key` chooses.

    A Feistel network on the smallest square power of two that holds `size`; a value that falls
    outside is sent through again until it is inside. Needs no table, whatever `size` is.

    Args:
      index: int64 [n], in [0, size).
      size: at least 1.
      key: 64 bits.

    Returns:
      int64 [n].
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _hash(np.arange(_FEISTEL_ROUNDS), key)
    out = index.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> bits, out[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_hash(right, round_key) & mask)
        out[outside] = (left << bits) | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


class _Epoch(NamedTuple):
    """One pass over the documents: order[k] is the k-th document, starts[k] its first position."""

    number: int
    order: np.ndarray  # int64 [documents]
    starts: np.ndarray  # int64 [documents + 1]
    is_fim: np.ndarray  # bool [documents], by document


class PackedSequences:
    """Random access to an endless stream of training sequences of T + 1 tokens.

    An *epoch* is one pass over all documents, in an order drawn for it and joined end to end in a
    ring. A share `fim_rate` of them, drawn anew each epoch (exact over epochs, rounded to whole
    documents in each), is rewritten from [BOS] tokens [EOS] to
    [BOS] <fim_begin> prefix <fim_hole> suffix <fim_end> middle [EOS], cut at two random token
    boundaries. Row r of the epoch is positions r*T .. r*T + T of the ring: it shares its last
    token with the next row's first, so that every token is a target. Every epoch has the same
    number of rows, enough for its longest form; the last row runs on into the ring's start (fewer
    than T + 3 tokens are a target twice; none is lost). Rows are read in an order drawn for the
    epoch.

    Sequence i of the stream is row number i % rows_per_epoch of epoch i // rows_per_epoch. Every
    draw is a function of (seed, epoch, document or row) alone, so `examples` needs only i; an
    epoch's document order and prefix sums are computed once, in time proportional to the documents.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        sequence_length: int,
        seed: int,
        fim_rate: float = 0.0,
        fim_ids: tuple[int, int, int] | None = None,
    ) -> None:
        """Builds the stream's constants; reads no tokens.

        Args:
          store: at least one document.
          sequence_length: T.
          seed: any non-negative integer.
          fim_rate: in [0, 1].
          fim_ids: ids of <fim_begin>, <fim_hole>, <fim_end>; needed if `fim_rate` > 0.
        """
        if store.documents == 0:
            raise ValueError("the token store must hold at least one document (PackedSequences)")
        if fim_rate > 0 and fim_ids is None:
            raise ValueError(f"{fim_rate=} needs fim_ids (PackedSequences)")
        self._store = store
        self._tokens = np.asarray(store.tokens)  # slicing a memmap object is several times slower
        self._length = sequence_length
        self._seed = seed
        self._fim_share = round(fim_rate * _FIM_UNIT) * store.documents
        self._fim_ids = fim_ids or ()
        longest = len(store.tokens) + 3 * -(-self._fim_share // _FIM_UNIT)
        self.rows_per_epoch = -(-longest // sequence_length)
        self._epoch = functools.lru_cache(maxsize=3)(self._new_epoch)

    def examples(self, indices: np.ndarray) -> np.ndarray:
        """Sequences of the stream by global index: int64 [n] -> int32 [n, T + 1]."""
        out = np.empty((len(indices), self._length + 1), np.int32)
        epochs, numbers = np.divmod(indices, self.rows_per_epoch)
        for epoch in np.unique(epochs):
            plan = self._epoch(int(epoch))
            chosen = np.flatnonzero(epochs == epoch)
            key = _key(self._seed, int(epoch), _ROW_ORDER)
            rows = permute(numbers[chosen], self.rows_per_epoch, key)
            for place, row in zip(chosen.tolist(), rows.tolist(), strict=True):
                self._read_row(plan, row, out[place])
        return out

    def _new_epoch(self, number: int) -> _Epoch:
        documents = self._store.documents
        index = np.arange(documents)
        share = self._fim_share
        rewritten = share * (number + 1) // _FIM_UNIT - share * number // _FIM_UNIT
        ranks = permute(index, documents, _key(self._seed, number, _FIM_CHOICE))
        is_fim = ranks < rewritten
        order = permute(index, documents, _key(self._seed, number, _DOCUMENT_ORDER))
        lengths = np.diff(self._store.offsets) + 3 * is_fim
        starts = np.concatenate([[0], np.cumsum(lengths[order])])
        return _Epoch(number, order, starts, is_fim)

    def _read_row(self, plan: _Epoch, row: int, out: np.ndarray) -> None:
        """Fills `out` [T + 1] with positions row*T, row*T + 1, ... of the epoch's ring."""
        position = row * self._length % int(plan.starts[-1])
        rank = int(np.searchsorted(plan.starts, position, side="right")) - 1
        skip = position - int(plan.starts[rank])
        filled = 0
        while True:
            for piece in self._pieces(plan, int(plan.order[rank])):
                taken = piece[skip : skip + len(out) - filled]
                out[filled : filled + len(taken)] = taken
                filled += len(taken)
                skip = max(skip - len(piece), 0)
                if filled == len(out):
                    return
            rank = (rank + 1) % len(plan.order)

    def _pieces(self, plan: _Epoch, document: int) -> Iterator[np.ndarray]:
        """The document as it stands in this epoch, in consecutive pieces."""
        first, last = self._store.offsets[document : document + 2]
        tokens = self._tokens[first:last]
        if not plan.is_fim[document]:
            yield tokens
            return
        begin, hole, end = (np.array([i], np.int32) for i in self._fim_ids)
        cuts = [
            _hash(np.array([document]), _key(self._seed, plan.number, purpose))[0]
            % np.uint64(len(tokens) - 1)
            for purpose in (_FIM_FIRST_CUT, _FIM_SECOND_CUT)
        ]
        a, b = sorted(1 + int(cut) for cut in cuts)
        parts = tokens[:1], begin, tokens[1:a], hole, tokens[b:-1], end, tokens[a:b], tokens[-1:]
        yield from parts


def held_out_rows(store: TokenStore, sequence_length: int, count: int) -> np.ndarray:
    """Up to `count` sequences of a store in corpus order, evenly spread over it.

    Row r is tokens r*T .. r*T + T; a last part shorter than that is left out. No Fill-in-Middle.

    Returns:
      int32 [min(count, rows), T + 1].
    """
    rows = max(len(store.tokens) - 1, 0) // sequence_length
    count = min(count, rows)
    chosen = [(2 * k + 1) * rows // (2 * count) for k in range(count)]
    out = np.empty((count, sequence_length + 1), np.int32)
    for place, row in enumerate(chosen):
        start = row * sequence_length
        out[place] = store.tokens[start : start + sequence_length + 1]
    return out
