"""A smoothed bigram model of the tokens: the baseline a trained network has to beat.

Interpolated Kneser-Ney: absolute discounting of the bigram counts, backing off to how many
different contexts a token follows, itself discounted and backed off to the uniform distribution
so that no token has probability zero.
"""

import numpy as np


def _discount(counts: np.ndarray) -> float:
    """Absolute discount `n1 / (n1 + 2 n2)` from the numbers of counts equal to one and to two.

    One half where no count is one: the formula would give 0 and leave nothing for the unseen.
    """
    ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return float(ones / (ones + 2 * twos)) if ones else 0.5


class BigramModel:
    """Interpolated Kneser-Ney bigram over token ids; build it with `fit`.

    With `c(v, w)` the count of `w` after `v`, `d` its discount, `N(v)` the number of different
    tokens after `v` and `M(w)` the number of different tokens before `w`:

        p(w | v) = max(c(v, w) - d, 0) / c(v) + d N(v) / c(v) q(w)
        q(w)     = max(M(w) - e, 0) / sum(M) + e |M > 0| / sum(M) / V

    A context never seen has `p = q`. Memory grows with the different pairs in the text and with
    the vocabulary, never with its square.
    """

    def __init__(
        self,
        pairs: np.ndarray,
        discounted: np.ndarray,
        context_counts: np.ndarray,
        backoff_mass: np.ndarray,
        backoff: np.ndarray,
    ) -> None:
        self._pairs = pairs  # sorted v * V + w of the pairs seen
        self._discounted = discounted  # max(c(v, w) - d, 0) of each
        self._context_counts = context_counts  # c(v), at least 1
        self._backoff_mass = backoff_mass  # d N(v) / c(v), 1 for a context never seen
        self._backoff = backoff  # q(w)

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> "BigramModel":
        """Counts the pairs of neighbours in a stream of tokens.

        Args:
          tokens: integers in [0, vocab_size), shape [T], T at least 2; document ends are tokens
            like any other.
          vocab_size: size of the vocabulary, V.

        Raises:
          ValueError: a wrong shape, fewer than two tokens, or an id outside the vocabulary.
        """
        stream = _check_ids(tokens, vocab_size)
        if stream.ndim != 1 or stream.size < 2:
            raise ValueError(
                f"tokens of shape {stream.shape} must be one stream of at least two "
                "(BigramModel.fit)"
            )
        pairs, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
        contexts, followers = np.divmod(pairs, vocab_size)
        discount = _discount(counts)

        context_counts = np.bincount(stream[:-1], minlength=vocab_size)
        different_after = np.bincount(contexts, minlength=vocab_size)
        seen = context_counts > 0
        context_counts = np.maximum(context_counts, 1)
        backoff_mass = np.where(seen, discount * different_after / context_counts, 1.0)

        different_before = np.bincount(followers, minlength=vocab_size)
        backoff_discount = _discount(different_before)
        kept = np.maximum(different_before - backoff_discount, 0.0)
        spread = backoff_discount * np.count_nonzero(different_before) / vocab_size
        return cls(
            pairs=pairs,
            discounted=counts - discount,
            context_counts=context_counts,
            backoff_mass=backoff_mass,
            backoff=(kept + spread) / len(pairs),
        )

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return len(self._backoff)

    def token_losses(self, sequences: np.ndarray) -> np.ndarray:
        """Negative log-probability of every token but the first, given the one before it.

        Args:
          sequences: token ids, shape [N, T + 1].

        Returns:
          float64 [N, T], nats.

        Raises:
          ValueError: a wrong shape or an id outside the vocabulary.
        """
        ids = _check_ids(sequences, self.vocab_size)
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise ValueError(
                f"sequences of shape {ids.shape} must be [N, T + 1] with T at least 1 (BigramModel)"
            )
        contexts, targets = ids[:, :-1], ids[:, 1:]
        keys = contexts * self.vocab_size + targets
        places = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        discounted = np.where(self._pairs[places] == keys, self._discounted[places], 0.0)
        probability = discounted / self._context_counts[contexts]
        probability += self._backoff_mass[contexts] * self._backoff[targets]
        return -np.log(probability)

    def loss(self, sequences: np.ndarray) -> float:
        """Mean negative log-probability of a target token in nats; arguments as `token_losses`."""
        return float(self.token_losses(sequences).mean())


def _check_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int64, wide enough for a pair's key of any vocabulary."""
    ids = np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids of type {ids.dtype} must be integers (BigramModel)")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()} must lie in [0, {vocab_size}) (BigramModel)"
        )
    return ids.astype(np.int64)
