"""The train step's laws: accumulation, remat, skipped steps, and the update of the biases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.step import init_state, make_train_step, update_bias


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, 300, (4, 17), np.int32)


def _run(config, tokens, accumulation, **runtime):
    """One step from the same state, with the batch in `accumulation` microbatches."""
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **runtime))
    model = Transformer(config.model, config.runtime)
    state = jax.jit(init_state, static_argnums=(0, 1))(model, config)
    batch = {"tokens": tokens.reshape(accumulation, -1, tokens.shape[1])}
    return state, *jax.jit(make_train_step(model, config))(state, batch)


@pytest.fixture(scope="module")
def plain(config, tokens):
    return _run(config, tokens, 1)


def _close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("accumulation", "runtime"),
    [
        (4, {}),
        pytest.param(1, {"remat_policy": "full"}, marks=pytest.mark.slow),
        pytest.param(1, {"remat_policy": "dots"}, marks=pytest.mark.slow),
        (2, {"remat_policy": "attention", "unroll_layers": True}),
    ],
)
def test_accumulation_remat_and_unrolling_change_nothing(
    config, tokens, plain, accumulation, runtime
):
    _, expected_state, expected = plain
    _, state, metrics = _run(config, tokens, accumulation, **runtime)
    # Loads are integers and biases move by their signs: equal to the last bit.
    np.testing.assert_array_equal(metrics.load, expected.load)
    for a, b in zip(
        jax.tree.leaves(state.router_state),
        jax.tree.leaves(expected_state.router_state),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    assert int(state.sequences) == 4 and int(state.step) == 1
    # Adam's first step is lr · sign(g): gradients of rounding size may flip it, so moments, which
    # are linear in the gradient, are compared (bf16 storage: one part in 256 of the largest).
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1].opt_state))
    _close(state.opt_state, expected_state.opt_state, largest / 256)


def test_every_moe_layer_s_load_counts_each_token_once(plain, config):
    load = np.asarray(plain[2].load)
    choices = config.model.num_experts_per_tok
    assert load.shape == (2, config.model.n_routed_experts)
    assert load[0].sum() == 4 * 16 * choices
    assert load[1].sum() == 4 * 15 * choices  # the MTP module's last position has no next token


def test_biases_move_towards_balance_by_gamma(plain, config):
    before, after, metrics = plain
    speed = config.loss.bias_update_speed
    biases = [
        after.router_state["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"][0],
        after.router_state["mtp_0"]["layer"]["mlp"]["gate"]["e_score_correction_bias"],
    ]
    for bias, load in zip(biases, np.asarray(metrics.load), strict=True):
        np.testing.assert_allclose(bias, speed * np.sign(load.mean() - load), rtol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(before.router_state))


def test_update_bias_compares_exactly_where_float32_could_not():
    # The mean is 2**25 + 0.25: float32 would round it onto the smaller loads.
    load = jnp.asarray([2**25, 2**25, 2**25, 2**25 + 1], jnp.int32)
    moved = update_bias(jnp.zeros(4), load, jnp.float32(1.0))
    np.testing.assert_array_equal(moved, [1, 1, 1, -1])
    even = update_bias(jnp.ones(3), jnp.full(3, 7, jnp.int32), jnp.float32(1.0))
    np.testing.assert_array_equal(even, 1)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(config, tokens):
    model = Transformer(config.model, config.runtime)
    state = jax.jit(init_state, static_argnums=(0, 1))(model, config)
    norm = state.params["norm"]["weight"]
    poisoned = state.replace(params={**state.params, "norm": {"weight": norm.at[0].set(jnp.inf)}})
    step = jax.jit(make_train_step(model, config))
    batch = {"tokens": tokens[None]}
    after, metrics = step(poisoned, batch)
    again, _ = step(after, batch)
    assert int(metrics.skipped) == 1 and int(again.skipped) == int(again.skipped_in_row) == 2
    assert int(again.step) == 2 and int(again.sequences) == 8
    for name in ("params", "router_state", "opt_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(again, name)),
            jax.tree.leaves(getattr(poisoned, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    healed, _ = step(again.replace(params=state.params), batch)
    assert int(healed.skipped) == 2 and int(healed.skipped_in_row) == 0
