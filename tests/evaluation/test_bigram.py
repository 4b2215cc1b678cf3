"""The bigram baseline against a brute-force Kneser-Ney, as a distribution, and at size."""

import collections
import math
import time
import tracemalloc

import numpy as np
import pytest

from dsv3_jax.evaluation.bigram import BigramModel


def zipf_stream(rng, length, vocab_size):
    """A first-order chain with skewed counts: some pairs are common, most are never seen."""
    popularity = 1.0 / np.arange(1, vocab_size + 1)
    draws = rng.choice(vocab_size, size=length, p=popularity / popularity.sum())
    follow = rng.permutation(vocab_size)
    repeat = rng.random(length) < 0.4
    for i in range(1, length):
        if repeat[i]:
            draws[i] = follow[draws[i - 1]]
    return draws


def brute_force(tokens, vocab_size):
    """p(w | v) for every pair from dictionaries and loops, in the textbook's words."""
    bigrams = collections.Counter(zip(tokens[:-1], tokens[1:], strict=True))
    contexts = collections.Counter(tokens[:-1])
    after = collections.defaultdict(set)
    before = collections.defaultdict(set)
    for v, w in bigrams:
        after[v].add(w)
        before[w].add(v)

    def discount(counts):
        n1 = sum(1 for c in counts if c == 1)
        n2 = sum(1 for c in counts if c == 2)
        return n1 / (n1 + 2 * n2) if n1 else 0.5

    d = discount(bigrams.values())
    e = discount([len(s) for s in before.values()])
    different = len(bigrams)

    def back_off(w):
        kept = max(len(before[w]) - e, 0) / different if w in before else 0.0
        return kept + e * len(before) / different / vocab_size

    table = np.zeros((vocab_size, vocab_size))
    backed = [back_off(w) for w in range(vocab_size)]
    for v in range(vocab_size):
        for w in range(vocab_size):
            if contexts[v] == 0:
                table[v, w] = backed[w]
            else:
                kept = max(bigrams[(v, w)] - d, 0.0) / contexts[v]
                table[v, w] = kept + d * len(after[v]) / contexts[v] * backed[w]
    return table


def table_of(model):
    size = model.vocab_size
    v, w = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    pairs = np.stack([v.ravel(), w.ravel()], axis=1)
    return np.exp(-model.token_losses(pairs)).reshape(size, size)


STREAMS = {
    "skewed": (zipf_stream(np.random.default_rng(0), 400, 30).tolist(), 33),
    "no pair twice": ([0, 1, 2, 3, 4, 0, 2, 4], 6),
    "no pair once": ([0, 1, 2] * 5 + [0], 5),
    "one pair": ([2, 2], 4),
    "full vocabulary": (zipf_stream(np.random.default_rng(1), 3000, 8).tolist(), 8),
}


@pytest.mark.parametrize("name", STREAMS)
def test_equals_brute_force(name):
    tokens, vocab_size = STREAMS[name]
    model = BigramModel.fit(np.array(tokens), vocab_size)
    np.testing.assert_allclose(table_of(model), brute_force(tokens, vocab_size), rtol=1e-12)


@pytest.mark.parametrize("name", STREAMS)
def test_every_context_has_a_distribution_without_zeros(name):
    tokens, vocab_size = STREAMS[name]
    table = table_of(BigramModel.fit(np.array(tokens), vocab_size))
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)
    assert table.min() > 0


def test_a_case_by_hand():
    model = BigramModel.fit(np.array([0, 1, 0, 1, 0, 2]), 3)
    # Pairs 01 twice, 10 twice, 02 once: d = 1 / (1 + 2 * 2) = 0.2.
    # Every token has one kind of predecessor: e = 1 and q is uniform.
    # p(1 | 0) = (2 - 0.2) / 3 + 0.2 * 2 / 3 * 1 / 3.
    loss = model.token_losses(np.array([[0, 1]]))
    assert loss.shape == (1, 1)
    assert math.exp(-loss[0, 0]) == pytest.approx(1.8 / 3 + 0.4 / 9)
    # Token 2 was never a context: the back-off itself.
    assert math.exp(-model.token_losses(np.array([[2, 1]]))[0, 0]) == pytest.approx(1 / 3)


def test_loss_is_the_mean_over_targets():
    stream = zipf_stream(np.random.default_rng(2), 2000, 40)
    model = BigramModel.fit(stream, 40)
    sequences = zipf_stream(np.random.default_rng(3), 70, 40).reshape(7, 10)
    losses = model.token_losses(sequences)
    assert losses.shape == (7, 9)
    assert model.loss(sequences) == pytest.approx(losses.mean())


def test_beats_unigram_and_uniform_where_neighbours_matter():
    rng = np.random.default_rng(4)
    vocab_size = 50
    follow = rng.permutation(vocab_size)
    stream = rng.integers(0, vocab_size, 20_000)
    for i in range(1, len(stream)):
        if rng.random() < 0.5:
            stream[i] = follow[stream[i - 1]]
    train, held_out = stream[:15_000], stream[15_000:]
    model = BigramModel.fit(train, vocab_size)
    # The entropy of the source: the favourite with 0.5 + 0.01, the others 0.01 each.
    entropy = -(0.51 * math.log(0.51) + 49 * 0.01 * math.log(0.01))
    loss = model.loss(held_out[None, :])
    assert entropy - 0.05 < loss < entropy + 0.15  # 2500 parameters from 15,000 tokens
    assert loss < math.log(vocab_size) - 1


@pytest.mark.parametrize("vocab_size", [8192, 129_280])
def test_five_million_tokens_take_seconds_and_no_square_table(vocab_size):
    rng = np.random.default_rng(5)
    popularity = 1.0 / np.arange(1, vocab_size + 1)
    cumulative = np.cumsum(popularity / popularity.sum())
    stream = np.searchsorted(cumulative, rng.random(5_000_000)).clip(max=vocab_size - 1)
    stream = stream.astype(np.int32)  # as the token files have it: the key must be wider
    tracemalloc.start()
    start = time.process_time()
    model = BigramModel.fit(stream, vocab_size)
    held_out = stream[-200_000:].reshape(200, 1000)
    loss = model.loss(held_out)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 600e6  # the square of 129,280 would be 134 GB in float64
    assert 0 < loss < math.log(vocab_size)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 2, 5]), "from 1 to 5"),
        (np.array([-1, 2]), "from -1 to 2"),
        (np.array([1]), "at least two"),
        (np.array([[1, 2], [2, 1]]), "one stream"),
        (np.array([1.0, 2.0]), "must be integers"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        BigramModel.fit(tokens, 5)


def test_bad_sequences_are_refused():
    model = BigramModel.fit(np.array([0, 1, 2]), 3)
    with pytest.raises(ValueError, match=r"must be \[N, T \+ 1\]"):
        model.loss(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="from 0 to 3"):
        model.loss(np.array([[0, 3]]))
