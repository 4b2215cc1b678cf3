"""Schedules at their boundaries; AdamW against NumPy and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import BatchConfig, LossConfig, OptimizerConfig
from dsv3_jax.training.optimizer import (
    batch_size,
    bias_update_speed,
    decay_mask,
    learning_rate,
    make_optimizer,
    mtp_weight,
)

T = 1_000_000_000_000


def rate(config, step, tokens):
    value = jax.jit(lambda step, tokens: learning_rate(config, step, tokens))(
        jnp.int32(step), jnp.float32(tokens)
    )
    assert value.dtype == jnp.float32 and value.shape == ()
    return float(value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1e9, 2.2e-4),
        (10 * T - 10_000_000, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 2.15e12, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (10 * T + 4.3e12 / 3, 2.2e-5 + 0.75 * (2.2e-4 - 2.2e-5)),  # cos(60 degrees) = 1/2
        (14_300_000_000_000, 2.2e-5),
        (14_500_000_000_000, 2.2e-5),
        (14_633_000_000_000 - 10_000_000, 2.2e-5),
        (14_633_000_000_000 + 10_000_000, 7.3e-6),
        (14_800_000_000_000, 7.3e-6),
    ],
)
def test_learning_rate_follows_the_report(tokens, expected):
    # 1e-5: the fraction of the cosine carries float32's 1e6 tokens in 1e13.
    assert rate(OptimizerConfig(), 100_000, tokens) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "fraction"), [(0, 1 / 2000), (999, 0.5), (1999, 1.0), (2000, 1.0)]
)
def test_learning_rate_warms_up_linearly_in_steps(step, fraction):
    assert rate(OptimizerConfig(), step, 0.0) == pytest.approx(2.2e-4 * fraction, rel=1e-6)


def test_learning_rate_without_warmup_or_decay():
    config = OptimizerConfig(warmup_steps=0, constant_tokens=1000, decay_tokens=0, hold_tokens=500)
    assert rate(config, 0, 0.0) == pytest.approx(config.peak_lr)
    assert rate(config, 0, 999.0) == pytest.approx(config.peak_lr)
    assert rate(config, 0, 1000.0) == pytest.approx(config.decay_lr)
    assert rate(config, 0, 1499.0) == pytest.approx(config.decay_lr)
    assert rate(config, 0, 1500.0) == pytest.approx(config.final_lr)


def test_learning_rate_never_rises_after_the_warmup():
    config = OptimizerConfig()
    tokens = jnp.linspace(0.0, 1.48e13, 20_001, dtype=jnp.float32)
    rates = jax.vmap(lambda t: learning_rate(config, jnp.int32(5000), t))(tokens)
    assert np.all(np.diff(np.asarray(rates)) <= 0)


def test_loss_schedules_switch_at_their_tokens():
    config = LossConfig()
    for function, before, after, limit in (
        (mtp_weight, 0.3, 0.1, 10 * T),
        (bias_update_speed, 0.001, 0.0, 14_300_000_000_000),
    ):
        traced = jax.jit(lambda tokens, function=function: function(config, tokens))
        assert float(traced(jnp.float32(0))) == pytest.approx(before)
        # Two float32 spacings (2**20 tokens) below the limit.
        assert float(traced(jnp.float32(limit - 2 * 2**20))) == pytest.approx(before)
        assert float(traced(jnp.float32(limit))) == pytest.approx(after)
        assert float(traced(jnp.float32(1.48e13))) == pytest.approx(after)


def test_batch_size_ramp_of_the_report():
    config = BatchConfig(
        size=15360,
        microbatch_size=3072,
        initial_size=3072,
        ramp_tokens=469_000_000_000,
        ramp_stages=4,
    )
    stage = 469_000_000_000 // 4
    assert [batch_size(config, s * stage) for s in range(5)] == [3072, 6144, 9216, 12288, 15360]
    assert [batch_size(config, (s + 1) * stage - 1) for s in range(4)] == [3072, 6144, 9216, 12288]
    assert batch_size(config, 14_800_000_000_000) == 15360


def test_batch_size_is_whole_microbatches_and_never_shrinks():
    config = BatchConfig(
        size=21, microbatch_size=3, initial_size=6, ramp_tokens=1000, ramp_stages=7
    )
    sizes = [batch_size(config, tokens) for tokens in range(0, 1200)]
    assert all(size % 3 == 0 for size in sizes)
    assert sizes == sorted(sizes)
    assert sizes[0] == 6 and sizes[999] < 21 and sizes[1000] == 21
    assert len(set(sizes)) == 6  # 15 more sequences in steps of 3


def test_batch_size_without_a_ramp():
    assert batch_size(BatchConfig(size=8, microbatch_size=4), 0) == 8
    flat = BatchConfig(size=8, microbatch_size=4, initial_size=4, ramp_tokens=0)
    assert batch_size(flat, 0) == 8


def tree(rng, scale=1.0):
    """A parameter-like tree: stacked norms have two dimensions, like a matrix."""

    def draw(*shape):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "embed_tokens": {"embedding": draw(7, 4)},
        "moe_layers": {
            "input_layernorm": {"weight": draw(3, 4)},
            "self_attn": {"o_proj": {"kernel": draw(3, 5, 4)}},
            "mlp": {
                "gate": {"kernel": draw(3, 4, 6)},
                "experts": {
                    "gate_up_proj": draw(3, 6, 4, 2, 5),
                    "down_proj": draw(3, 6, 5, 4),
                },
                "shared_experts": {"down_proj": {"kernel": draw(3, 5, 4)}},
            },
        },
        "norm": {"weight": draw(4)},
        "mtp_0": {"eh_proj": {"kernel": draw(8, 4)}, "enorm": {"weight": draw(4)}},
    }


def test_decay_mask_covers_matrices_and_spares_every_norm():
    params = tree(np.random.default_rng(0))
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    spared = {jax.tree_util.keystr(path) for path, decays in flat if not decays}
    assert spared == {
        "['moe_layers']['input_layernorm']['weight']",
        "['norm']['weight']",
        "['mtp_0']['enorm']['weight']",
    }
    assert len(flat) == 10


def test_decay_mask_refuses_an_unknown_leaf():
    with pytest.raises(ValueError, match=r"\['gate'\]\['bias'\]"):
        decay_mask({"gate": {"bias": np.zeros(3)}})


def numpy_adamw(params, gradients, config, rates):
    """AdamW written out in float64 over flat leaves, with clipping and a decay flag each."""
    decays = jax.tree.leaves(decay_mask(params))
    values = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    first = [np.zeros_like(p) for p in values]
    second = [np.zeros_like(p) for p in values]
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum(np.sum(g * g) for g in leaves))
        leaves = [g * min(1.0, config.clip_norm / norm) for g in leaves]
        for i, g in enumerate(leaves):
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g * g
            update = first[i] / (1 - config.beta1**t)
            update /= np.sqrt(second[i] / (1 - config.beta2**t)) + config.eps
            values[i] = values[i] - lr * (update + config.weight_decay * decays[i] * values[i])
    return values


def run(params, gradients, config, rates):
    optimizer = make_optimizer(config)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient, lr):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -lr * u, updates)), state

    for gradient, lr in zip(gradients, rates, strict=True):
        params, state = step(params, state, gradient, lr)
    return params, state


RATES = [0.1, 0.03, 0.02, 0.05, 0.01, 0.04]


@pytest.mark.parametrize("scale", [0.02, 3.0], ids=["below the clip norm", "clipped"])
def test_adamw_matches_numpy(scale):
    rng = np.random.default_rng(1)
    params = tree(rng)
    gradients = [tree(rng, scale) for _ in RATES]
    config = OptimizerConfig(moment_dtype="float32")
    norm = float(optax.tree.norm(gradients[0]))
    assert (norm > config.clip_norm) == (scale == 3.0)
    actual, _ = run(params, gradients, config, RATES)
    expected = numpy_adamw(params, gradients, config, RATES)
    for a, e in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-6)  # float32 against float64


def test_adamw_matches_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    params = tree(rng)
    gradients = [tree(rng, 2.0) for _ in RATES]
    config = OptimizerConfig(moment_dtype="float32")
    decays = jax.tree.leaves(decay_mask(params))
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(params)]
    groups = [
        {
            "params": [t for t, d in zip(tensors, decays, strict=True) if d == flag],
            "weight_decay": config.weight_decay * flag,
        }
        for flag in (True, False)
    ]
    peer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    for gradient, lr in zip(gradients, RATES, strict=True):
        for tensor, g in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(tensors, config.clip_norm)
        for group in peer.param_groups:
            group["lr"] = lr
        peer.step()
    actual, _ = run(params, gradients, config, RATES)
    for a, t in zip(jax.tree.leaves(actual), tensors, strict=True):
        # torch divides by norm + 1e-6 when it clips: 1e-8 relative here.
        np.testing.assert_allclose(a, t.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_both_moments_are_stored_in_bfloat16_and_cost_little():
    rng = np.random.default_rng(3)
    params = tree(rng)
    gradients = [tree(rng, 0.3) for _ in RATES]
    narrow, state = run(params, gradients, OptimizerConfig(), RATES)
    wide, _ = run(params, gradients, OptimizerConfig(moment_dtype="float32"), RATES)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    for moment in (adam.mu, adam.nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(moment)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.float32)}
    # A stored moment is off by at most 2**-9 of itself, and the error of each of the earlier
    # steps decays with beta: update errors stay below a few times 2**-9 of an update of about 1.
    moved = sum(RATES) * 4 * 2.0**-9
    for n, w in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        difference = np.abs(np.asarray(n) - np.asarray(w))
        assert difference.max() < moved
    assert any(
        np.any(np.asarray(n) != np.asarray(w))
        for n, w in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True)
    )


def test_clipping_norm_of_bfloat16_gradients_is_computed_in_float32():
    # 2**16 equal entries of 2**-4: the norm is exactly 16. Summed in bfloat16 it would stall.
    gradient = {"kernel": jnp.full((256, 256), 2.0**-4, jnp.bfloat16)}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0, moment_dtype="float32"))
    params = {"kernel": jnp.zeros((256, 256), jnp.float32)}
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["kernel"], 0.1 * 2.0**-4 / 16, rtol=1e-6)
