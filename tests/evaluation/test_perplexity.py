"""Held-out scores against the logits they come from."""

import math

import jax
import numpy as np
import pytest

from dsv3_jax.evaluation.perplexity import evaluate


def test_scores_equal_those_of_the_logits(checkpoint):
    loaded = checkpoint("base")
    rows = np.random.default_rng(0).integers(0, loaded.config["vocab_size"], (5, 38), np.int32)
    byte_lengths = np.arange(loaded.config["vocab_size"], dtype=np.int32) % 4
    # Two rows at a time: the last batch is half padding.
    result = evaluate(loaded.model, loaded.variables, rows, byte_lengths, batch_size=2)

    padded = np.concatenate([rows, rows[:1]])[:, :-1].reshape(3, 2, -1)
    outputs = [loaded.forward(loaded.variables, batch) for batch in padded]
    logits = np.concatenate([out.logits for out in outputs])[:5]
    ahead = np.concatenate([out.mtp_logits[0] for out in outputs])[:5].argmax(-1)
    targets = rows[:, 1:]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    nats = -np.take_along_axis(log_probs, targets[..., None], -1)
    assert result.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    bits = nats.sum() / math.log(2) / byte_lengths[targets].sum()
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)
    best = logits.argmax(-1)
    assert result.accuracy == pytest.approx((best == targets).mean())
    assert result.mtp_accuracy == pytest.approx((ahead[:, :-1] == targets[:, 1:]).mean())
    assert result.mtp_acceptance == pytest.approx((ahead[:, :-1] == best[:, 1:]).mean())
    assert result.tokens == targets.size
    load = [np.asarray(out.routing.moe_layers.topk_idx) for out in outputs]
    load = np.concatenate(load, axis=1)[:, :5]
    for layer, chosen in enumerate(load):
        counts = np.bincount(chosen.ravel(), minlength=result.load.shape[1])
        np.testing.assert_array_equal(result.load[layer], counts)
