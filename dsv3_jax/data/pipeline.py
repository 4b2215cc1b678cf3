"""The data room's front door: `open_data(config)` gives batches, held-out rows and counts."""

import logging
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.data.packing import PackedSequences, TokenStore, cached_store, held_out_rows
from dsv3_jax.data.sources import DataError, DocumentSet, name_fraction, open_corpus
from dsv3_jax.data.tokenizer import Tokenizer, cache_folder, load_tokenizer

if TYPE_CHECKING:
    import grain

# A tokenizer is trained on about this much text: more changes little and takes hours.
_BPE_TEXT_BYTES = 1 << 28
_READ_THREADS = 4

_log = logging.getLogger(__name__)


class TrainingData:
    """Training batches and held-out sequences of one corpus under one tokenizer.

    Attributes:
      tokenizer: the tokenizer of every id here.
      rows_per_epoch: sequences in one pass over the training documents.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        train: TokenStore,
        held_out: TokenStore,
    ) -> None:
        """Wraps opened token stores; `open_data` is the usual way here.

        Raises:
          DataError: `data.fim_rate` > 0 with a tokenizer that has no Fill-in-Middle tokens.
        """
        data = config.data
        ids = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
        fim_ids = tuple(i for i in ids if i is not None)
        if data.fim_rate > 0 and len(fim_ids) < 3:
            raise DataError(
                f"data.fim_rate={data.fim_rate} must be 0 for data.tokenizer={data.tokenizer!r}: "
                "it has no <｜fim▁begin｜>, <｜fim▁hole｜> and <｜fim▁end｜> tokens"
            )
        self.tokenizer = tokenizer
        self._data = data
        self._train = train
        self._held_out = held_out
        self._packed = PackedSequences(
            train,
            sequence_length=data.sequence_length,
            seed=data.seed,
            fim_rate=data.fim_rate,
            fim_ids=fim_ids if len(fim_ids) == 3 else None,
        )
        self.rows_per_epoch = self._packed.rows_per_epoch

    @property
    def train_tokens(self) -> np.ndarray:
        """[number of tokens] read-only uint16 or uint32: documents, each [BOS] tokens [EOS]."""
        return self._train.tokens

    def examples(self, indices: np.ndarray) -> np.ndarray:
        """Training sequences by global example index: int64 [n] -> int32 [n, T + 1]."""
        return self._packed.examples(indices)

    def batches(
        self,
        start: int,
        sizes: Callable[[int], int] | int,
        *,
        group: int = 1,
        part: np.ndarray | None = None,
    ) -> "grain.DatasetIterator[np.ndarray]":
        """The endless stream of batches from global example `start` on.

        Each step takes the next `size` global examples. Of every `group` of them (a microbatch) a
        process reads those at the positions `part`, so all processes together read one stream,
        however many they are. A run that consumed k examples resumes with `start=k`.
        `data.prefetch` batches are read ahead by threads.

        Args:
          start: global index of the first example.
          sizes: global sequences a step, or a pure function from the index of a step's first
            example to that (called from reading threads).
          group: examples that `part` divides; must divide every size.
          part: int64 [n], positions in [0, group); None for all.

        Returns:
          An iterator of int32 [size / group * n, T + 1]; its `close()` stops reading ahead.

        Raises:
          DataError: an argument is out of range; for a size, when its batch is asked for.
        """
        part = np.arange(group) if part is None else part
        if start < 0 or not len(part) or part.min() < 0 or part.max() >= group:
            raise DataError(
                f"{start=} must not be negative and part={part.tolist()} must be positions in "
                f"[0, {group=}) (TrainingData.batches)"
            )
        import grain  # seconds to import, and only training needs it

        steps = _Steps(self._packed, start, sizes, group, part)
        threads = min(self._data.prefetch, _READ_THREADS)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._data.prefetch)
        return iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def held_out(self, n: int) -> np.ndarray:
        """Up to `n` held-out sequences, evenly spread, never rewritten, the same every time.

        Returns:
          int32 [min(n, available), T + 1].

        Raises:
          DataError: none is available.
        """
        length = self._data.sequence_length
        rows = held_out_rows(self._held_out, length, n)
        if not len(rows):
            raise DataError(
                f"held-out text of {len(self._held_out.tokens)} tokens must give at least one "
                f"sequence of data.sequence_length={length} + 1 tokens: set data.held_out to a "
                "path with more text, or shorten the sequence"
            )
        return rows

    def describe(self) -> dict[str, int | float | str]:
        """Counts and identities, for logs and checkpoints.

        `*_tokens` include BOS and EOS; `*_bytes` are UTF-8 bytes of text; the fingerprints are
        equal wherever the same tokenizer and the same training tokens are.
        """
        counts: dict[str, int | float | str] = {}
        for name, store in (("train", self._train), ("held_out", self._held_out)):
            counts[f"{name}_documents"] = store.documents
            counts[f"{name}_tokens"] = len(store.tokens)
            counts[f"{name}_bytes"] = store.text_bytes
        counts["bytes_per_token"] = self._train.text_bytes / len(self._train.tokens)
        counts["sequence_length"] = self._data.sequence_length
        counts["rows_per_epoch"] = self.rows_per_epoch
        counts["vocab_size"] = self.tokenizer.vocab_size
        counts["tokenizer_fingerprint"] = self.tokenizer.fingerprint
        counts["train_fingerprint"] = self._train.fingerprint
        return counts


class _Steps:
    """Random access to a process's batches by step, which is what Grain's readers ask for."""

    def __init__(
        self,
        packed: PackedSequences,
        start: int,
        sizes: Callable[[int], int] | int,
        group: int,
        part: np.ndarray,
    ) -> None:
        self._packed = packed
        self._size_at = sizes if callable(sizes) else lambda first: sizes
        self._group, self._part = group, part
        self._starts = [start]  # global index of each step's first example, as far as known
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        with self._lock:
            while len(self._starts) < index + 2:
                first = self._starts[-1]
                self._starts.append(first + self._checked_size(first))
            first, end = self._starts[index : index + 2]
        groups = np.arange(first, end, self._group)
        return self._packed.examples((groups[:, None] + self._part).reshape(-1))

    def _checked_size(self, first: int) -> int:
        size = operator.index(self._size_at(first))
        if size <= 0 or size % self._group:
            raise DataError(
                f"batch size {size} at example {first} must be positive and divisible by "
                f"group={self._group} (TrainingData.batches)"
            )
        return size


def open_data(
    config: TrainConfig, check_tokenizer: Callable[[Tokenizer], None] | None = None
) -> TrainingData:
    """Corpus -> tokenizer -> tokens -> sequences, reusing the cache for whatever has not changed.

    Args:
      check_tokenizer: may raise, before anything is turned into tokens.

    Raises:
      DataError: the corpus, the tokenizer, or their fit to `config` is unusable.
      CacheError: the cache cannot be written.
    """
    start = time.perf_counter()
    corpus = open_corpus(config.data)
    tokenizer = load_tokenizer(
        config.data,
        vocab_size=config.model.vocab_size,
        texts=lambda: _texts_to_train_on(corpus.train),
        corpus_fingerprint=corpus.train.fingerprint,
    )
    if check_tokenizer is not None:
        check_tokenizer(tokenizer)
    cache = cache_folder(config.data)
    train, held_out = (
        cached_store(cache, documents, documents.fingerprint, tokenizer)
        for documents in (corpus.train, corpus.held_out)
    )
    data = TrainingData(config, tokenizer, train, held_out)
    _log.info(
        "data ready in %.1f s: %d training and %d held-out tokens, vocabulary %d, %s",
        time.perf_counter() - start,
        len(train.tokens),
        len(held_out.tokens),
        tokenizer.vocab_size,
        corpus.train.description,
    )
    return data


def _texts_to_train_on(documents: DocumentSet) -> Iterator[str]:
    """All texts, or of a larger set a share of about `_BPE_TEXT_BYTES`, chosen by name."""
    share = _BPE_TEXT_BYTES / max(documents.size_bytes, 1)
    for document in documents:
        if share >= 1 or name_fraction(document.name, salt="tokenizer") < share:
            yield document.text
