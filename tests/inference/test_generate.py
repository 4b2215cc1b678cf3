"""Sampling, and generation through the cache against recomputing the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.sampling import sample

NEVER = -1  # an end token that no model produces


def test_greedy_generation_equals_recomputing_every_prefix(checkpoint):
    loaded = checkpoint("base")
    prompt = loaded.token_ids[:, :5]
    new = generate(
        loaded.model, loaded.variables, prompt, max_new_tokens=6, eos_id=NEVER, temperature=0
    )
    # Causality: one forward pass over prompt and answer holds the logits of every prefix.
    sequence = np.concatenate([prompt, new], axis=1)
    padded = np.zeros_like(loaded.token_ids)
    padded[:, : sequence.shape[1]] = sequence
    logits = loaded.forward(loaded.variables, padded).logits
    np.testing.assert_array_equal(new, logits[:, 4:10].argmax(-1))


def test_a_row_ends_at_its_end_token(checkpoint):
    loaded = checkpoint("base")
    prompt = loaded.token_ids[:, :5]
    options = {"max_new_tokens": 6, "temperature": 0}
    free = generate(loaded.model, loaded.variables, prompt, eos_id=NEVER, **options)
    end = int(free[0, 2])
    cut = generate(loaded.model, loaded.variables, prompt, eos_id=end, **options)
    for row_free, row_cut in zip(free, cut, strict=True):
        stop = row_free.tolist().index(end) if end in row_free else 6
        np.testing.assert_array_equal(row_cut[:stop], row_free[:stop])
        np.testing.assert_array_equal(row_cut[stop:], end)


def test_errors(checkpoint):
    loaded = checkpoint("base")
    limit = loaded.config["max_position_embeddings"]
    arguments = (loaded.model, loaded.variables)
    with pytest.raises(ConfigError, match=f"max_position_embeddings={limit}"):
        generate(*arguments, np.zeros((1, 3), np.int32), max_new_tokens=limit, eos_id=0)
    with pytest.raises(ConfigError, match="prompt length 0"):
        generate(*arguments, np.zeros((1, 0), np.int32), max_new_tokens=1, eos_id=0)
    with pytest.raises(ConfigError, match="top_p=0"):
        generate(*arguments, np.zeros((1, 3), np.int32), max_new_tokens=1, eos_id=0, top_p=0)


def test_samples_follow_the_distribution():
    probabilities = jnp.asarray([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (20_000, 4))

    def shares(**options):
        drawn = sample(logits, jax.random.key(0), **options)
        return np.bincount(drawn, minlength=4) / len(drawn)

    # Three standard deviations of a share of 0.5 over 20,000 draws are 0.011.
    np.testing.assert_allclose(shares(temperature=1.0), probabilities, atol=0.011)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(shares(temperature=0.5), squared, atol=0.011)
    np.testing.assert_allclose(
        shares(temperature=1.0, top_p=0.75), [5 / 8, 3 / 8, 0, 0], atol=0.011
    )
    np.testing.assert_array_equal(shares(temperature=1.0, top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(temperature=0.0), [1, 0, 0, 0])
