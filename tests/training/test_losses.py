"""The chunked cross-entropy against plain logits, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training import losses


@pytest.fixture
def case(monkeypatch):
    """Chunks of 2 x 3 positions over a length of 11: four chunks, the last padded."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 6)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 11, 7))
    kernel = jax.random.normal(keys[1], (7, 13))
    targets = jax.random.randint(keys[2], (2, 11), 0, 13)
    weights = jax.random.uniform(keys[3], (2, 11)).at[1, 4:].set(0)
    return hidden, kernel, targets, weights


def _plain(hidden, kernel, targets, weights):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    return -(jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * weights).sum()


def test_value_and_gradients_equal_plain_cross_entropy(case):
    hidden, kernel, targets, weights = case

    def scaled(f):
        return lambda h, k: 3.0 * f(h, k, targets, weights)  # a cotangent other than one

    value, grads = jax.jit(jax.value_and_grad(scaled(losses.cross_entropy), (0, 1)))(hidden, kernel)
    expected, expected_grads = jax.value_and_grad(scaled(_plain), (0, 1))(hidden, kernel)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for ours, plain in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_without_a_gradient_the_value_is_the_same(case):
    assert float(losses.cross_entropy(*case)) == pytest.approx(float(_plain(*case)), rel=1e-6)


def test_token_scores(case):
    hidden, kernel, targets, _ = case
    nats, best = losses.token_scores(hidden, kernel, targets)
    logits = hidden @ kernel
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, expected, atol=1e-5)
    np.testing.assert_array_equal(best, logits.argmax(-1))


def test_bfloat16_keeps_float32_logits(case):
    hidden, kernel, targets, weights = case
    hidden, kernel = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    value = losses.cross_entropy(hidden, kernel, targets, weights)
    wide = _plain(hidden.astype(jnp.float32), kernel.astype(jnp.float32), targets, weights)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(wide), rel=1e-5)  # only the inputs are rounded
