"""Packing laws: nothing lost, Fill-in-Middle undoes itself, position i needs only i."""

import collections
import errno
import itertools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import packing
from dsv3_jax.data.packing import PackedSequences, TokenStore, cached_store, held_out_rows, permute
from dsv3_jax.data.sources import CacheError, DataError, Document

BOS, EOS = 1, 2
FIM = BEGIN, HOLE, END = 3, 4, 5
FIRST_FREE = 10


class NumberTokenizer:
    """Stands in for a tokenizer: a text is its token ids, separated by blanks."""

    bos_id, eos_id = BOS, EOS

    def __init__(self, vocab_size=1 << 20, fingerprint="numbers"):
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def _documents(lengths):
    """Documents of the given lengths whose tokens are all different."""
    numbers = itertools.count(FIRST_FREE)
    return [[next(numbers) for _ in range(length)] for length in lengths]


def _memory_store(lengths):
    streams = [[BOS, *tokens, EOS] for tokens in _documents(lengths)]
    offsets = np.cumsum([0] + [len(stream) for stream in streams])
    tokens = np.array(sum(streams, []), np.uint32)
    return types.SimpleNamespace(tokens=tokens, offsets=offsets, documents=len(lengths))


def _stream(lengths, sequence_length, *, seed=0, fim_rate=0.0):
    return PackedSequences(
        _memory_store(lengths),
        sequence_length=sequence_length,
        seed=seed,
        fim_rate=fim_rate,
        fim_ids=FIM,
    )


def _epoch(stream, number):
    rows = stream.rows_per_epoch
    return stream.examples(np.arange(number * rows, (number + 1) * rows))


def _ring(lengths, number, **fields):
    """An epoch's ring, read through one row long enough to hold it."""
    longest = sum(lengths) + 5 * len(lengths)
    stream = _stream(lengths, longest, **fields)
    assert stream.rows_per_epoch == 1
    row = stream.examples(np.array([number]))[0].tolist()
    ends = [position for position, token in enumerate(row) if token == EOS]
    return row[: ends[len(lengths) - 1] + 1]


def _split(ring):
    """The ring's documents, each without BOS and EOS."""
    documents, current = [], []
    for token in ring:
        if token == BOS:
            current = []
        elif token == EOS:
            documents.append(current)
        else:
            current.append(token)
    return documents


def _undo_fim(document):
    if not document or document[0] != BEGIN:
        return document
    hole, end = document.index(HOLE), document.index(END)
    return document[1:hole] + document[end + 1 :] + document[hole + 1 : end]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    sequence_length=st.integers(2, 40),
    fim_rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 3),
)
def test_every_epoch_holds_every_document_and_every_token_is_a_target(
    lengths, sequence_length, fim_rate, seed, epoch
):
    ring = _ring(lengths, epoch, seed=seed, fim_rate=fim_rate)
    restored = [_undo_fim(document) for document in _split(ring)]
    assert sorted(restored) == sorted(_documents(lengths))

    stream = _stream(lengths, sequence_length, seed=seed, fim_rate=fim_rate)
    rows = _epoch(stream, epoch)
    assert rows.shape == (stream.rows_per_epoch, sequence_length + 1)
    assert rows.dtype == np.int32
    windows = [
        tuple(ring[(row * sequence_length + k) % len(ring)] for k in range(sequence_length + 1))
        for row in range(stream.rows_per_epoch)
    ]
    assert collections.Counter(map(tuple, rows.tolist())) == collections.Counter(windows)

    targets = collections.Counter(rows[:, 1:].ravel().tolist())
    targets.subtract(collections.Counter(ring))
    assert min(targets.values()) >= 0
    assert sum(targets.values()) < sequence_length + 3


def test_any_order_of_asking_gives_the_same_sequences():
    lengths = [5, 0, 17, 3, 1, 30, 8]
    stream = _stream(lengths, 7, fim_rate=0.3)
    wanted = np.arange(5 * stream.rows_per_epoch)
    whole = stream.examples(wanted)
    shuffled = np.random.default_rng(0).permutation(wanted)
    np.testing.assert_array_equal(stream.examples(shuffled), whole[shuffled])
    for index in (0, 40, 11):
        alone = _stream(lengths, 7, fim_rate=0.3).examples(np.array([index]))
        np.testing.assert_array_equal(alone[0], whole[index])
    assert stream.examples(np.arange(0)).shape == (0, 8)


def test_epochs_and_seeds_differ_in_documents_and_rows():
    lengths = [4] * 40
    orders = [_ring(lengths, epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    rows = _epoch(_stream(lengths, 7), 0)
    follows = (rows[:-1, -1] == rows[1:, 0]).mean()
    assert follows < 0.3  # read in a drawn order: neighbours in the stream rarely join up


def test_fim_rewrites_the_asked_share_in_psm_order_at_drawn_cuts():
    lengths = [9] * 50
    stream_epochs = [_split(_ring(lengths, epoch, fim_rate=0.25)) for epoch in range(8)]
    rewritten = [[d for d in documents if d[0] == BEGIN] for documents in stream_epochs]
    assert {len(documents) for documents in rewritten} == {12, 13}
    assert sum(len(documents) for documents in rewritten) == 100
    chosen = [frozenset(min(_undo_fim(d)) for d in documents) for documents in rewritten]
    assert len(set(chosen)) == 8
    cuts = set()
    for document in itertools.chain(*rewritten):
        kinds = [token for token in document if token in FIM]
        assert kinds == [BEGIN, HOLE, END]
        prefix = document.index(HOLE) - 1
        middle = len(document) - document.index(END) - 1
        assert _undo_fim(document) in _documents(lengths)
        cuts.add((prefix, prefix + middle))
    assert {a for a, _ in cuts} >= set(range(7))
    assert {b for _, b in cuts} >= set(range(3, 10))


def test_rate_zero_never_rewrites_and_rate_one_always_does():
    for epoch in range(3):
        assert not set(FIM) & set(_ring([3, 8], epoch, fim_rate=0.0))
        assert [d[0] for d in _split(_ring([3, 8], epoch, fim_rate=1.0))] == [BEGIN, BEGIN]


def test_rare_rewrites_of_a_single_document_come_every_tenth_epoch():
    first = [_split(_ring([20], epoch, fim_rate=0.1))[0][0] for epoch in range(20)]
    assert first.count(BEGIN) == 2


def test_stream_is_pinned():
    """Literal values: a change here would make every saved position mean another sequence."""
    permutation = permute(np.arange(10), 10, 7)
    assert permutation.tolist() == [7, 6, 0, 8, 9, 3, 5, 2, 4, 1]
    rows = _stream([3, 0, 4], 6, seed=5, fim_rate=0.5).examples(np.array([0, 1, 100]))
    assert rows.tolist() == [
        [1, 3, 4, 11, 12, 5, 10],
        [10, 2, 1, 13, 14, 15, 16],
        [1, 13, 14, 15, 16, 2, 1],
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 255, 1000])
def test_permute_is_a_permutation(size):
    for key in range(5):
        images = permute(np.arange(size), size, key)
        assert sorted(images.tolist()) == list(range(size))
    assert permute(np.array([size - 1]), size, 3)[0] == permute(np.arange(size), size, 3)[-1]


def test_permute_is_near_uniform():
    orders = collections.Counter(tuple(permute(np.arange(4), 4, key)) for key in range(2400))
    # 24 orders, 100 expected each; five standard deviations are 49.
    assert len(orders) == 24
    assert all(51 < count < 149 for count in orders.values())


def test_permute_reaches_any_size_without_a_table():
    size = 3_600_000_000_000
    images = permute(np.arange(10_000), size, 1)
    assert len(set(images.tolist())) == 10_000
    assert 0 <= images.min() and images.max() < size
    assert abs(images.mean() / size - 0.5) < 0.02  # seven standard errors


def test_held_out_rows_are_plain_windows_evenly_spread():
    store = _memory_store([500, 300])
    rows = held_out_rows(store, 8, 10)
    assert rows.dtype == np.int32
    starts = [store.tokens.tolist().index(row[0]) for row in rows.tolist()]
    for row, start in zip(rows, starts, strict=True):
        assert start % 8 == 0
        np.testing.assert_array_equal(row, store.tokens[start : start + 9])
    assert set(np.diff(starts)) == {80}  # 100 rows, every tenth
    assert starts[0] == 40
    assert len(held_out_rows(store, 8, 10**6)) == (804 - 1) // 8
    assert held_out_rows(_memory_store([5]), 8, 4).shape == (0, 9)
    assert held_out_rows(_memory_store([]), 8, 4).shape == (0, 9)


def _store(cache, texts=("11 12 13", "", "14"), tokenizer=None):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return cached_store(cache, documents, "corpus", tokenizer or NumberTokenizer())


def _exploding():
    raise AssertionError("the documents were read again")
    yield


def test_store_holds_documents_between_bos_and_eos_and_is_reused(tmp_path):
    store = _store(tmp_path)
    assert store.tokens.tolist() == [BOS, 11, 12, 13, EOS, BOS, EOS, BOS, 14, EOS]
    assert store.offsets.tolist() == [0, 5, 7, 10]
    assert store.tokens.dtype == np.dtype("<u4")
    assert (store.documents, store.text_bytes) == (3, 10)
    again = cached_store(tmp_path, _exploding(), "corpus", NumberTokenizer())
    assert again.tokens.tolist() == store.tokens.tolist()
    assert again.fingerprint == store.fingerprint
    same, other = NumberTokenizer(), NumberTokenizer(fingerprint="other")
    for fingerprint, tokenizer in (("other", same), ("corpus", other)):
        with pytest.raises(AssertionError, match="read again"):
            cached_store(tmp_path, _exploding(), fingerprint, tokenizer)


def test_store_uses_two_bytes_a_token_where_they_suffice(tmp_path):
    store = _store(tmp_path, ["65535"], NumberTokenizer(1 << 16))
    assert store.tokens.dtype == np.dtype("<u2")
    assert store.tokens.tolist() == [BOS, 65535, EOS]
    assert not store.tokens.flags.writeable


def test_store_fingerprint_follows_tokens_and_document_ends(tmp_path):
    texts = [["11 12", "13"], ["11", "12 13"], ["11 12", "14"]]
    stores = [_store(tmp_path / str(number), text) for number, text in enumerate(texts)]
    assert len({store.fingerprint for store in stores}) == 3
    assert _store(tmp_path / "again", texts[0]).fingerprint == stores[0].fingerprint


def test_store_without_documents_opens(tmp_path):
    store = _store(tmp_path, [])
    assert (store.documents, len(store.tokens)) == (0, 0)
    with pytest.raises(ValueError, match="at least one document"):
        PackedSequences(store, sequence_length=4, seed=0)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-4])


def _flip(file):
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "checksums.npy", "facts.json"])
def test_damaged_store_is_seen_and_built_again(tmp_path, caplog, name, damage):
    good = _store(tmp_path)
    tokens = good.tokens.tolist()  # read before the mapped file is damaged
    (folder,) = (tmp_path / "tokens").iterdir()
    damage(folder / name)
    with pytest.raises(CacheError, match=folder.name):
        TokenStore(folder)
    rebuilt = _store(tmp_path)
    assert "tokenizing again" in caplog.text
    assert rebuilt.tokens.tolist() == tokens
    assert rebuilt.fingerprint == good.fingerprint
    assert list((tmp_path / "tokens").iterdir()) == [folder]


def test_only_some_blocks_of_a_large_store_are_checked_but_first_and_last_always(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 8)
    monkeypatch.setattr(packing, "_CHECKED_BLOCKS", 3)
    _store(tmp_path, [" ".join(map(str, range(10, 110)))])
    (folder,) = (tmp_path / "tokens").iterdir()
    raw = (folder / "tokens.bin").read_bytes()
    for position, seen in ((0, True), (len(raw) // 2, True), (len(raw) - 1, True), (100, False)):
        broken = bytearray(raw)
        broken[position] ^= 1
        (folder / "tokens.bin").write_bytes(broken)
        if seen:
            with pytest.raises(CacheError, match="fails its checksum"):
                TokenStore(folder)
        else:
            TokenStore(folder)


def test_failed_build_leaves_nothing_and_full_disk_is_named(tmp_path, monkeypatch):
    def broken():
        yield Document("a", "11")
        raise DataError("bad line (a:2)")

    with pytest.raises(DataError, match="a:2"):
        cached_store(tmp_path, broken(), "corpus", NumberTokenizer())
    assert list((tmp_path / "tokens").iterdir()) == []

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(CacheError, match="cannot write .*: No space left on device"):
        _store(tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_store_built_meanwhile_by_another_process_is_kept(tmp_path):
    class Racing(NumberTokenizer):
        def encode_batch(self, texts):
            _store(tmp_path)
            return super().encode_batch(texts)

    assert _store(tmp_path, tokenizer=Racing()).tokens.tolist() == _store(tmp_path).tokens.tolist()
    assert len(list((tmp_path / "tokens").iterdir())) == 1
