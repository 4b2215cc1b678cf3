"""Causal attention against the float32 oracle, across its block boundary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_attention, reference
from pallas_kernels.attention import portable, tpu


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(portable, "BLOCK", 8)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 29])
def test_forward_and_gradients(small_blocks, length):
    keys = jax.random.split(jax.random.key(length), 4)
    q, k = (jax.random.normal(key, (2, length, 3, 12)) for key in keys[:2])
    v, dy = (jax.random.normal(key, (2, length, 3, 10)) for key in keys[2:])

    @functools.partial(jax.jit, static_argnums=0)
    def both(f):
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, scale=0.3), q, k, v)
        return out, *vjp(dy)

    for ours, oracle in zip(both(causal_attention), both(reference.causal_attention), strict=True):
        assert np.linalg.norm(ours - oracle) <= 2e-6 * max(np.linalg.norm(oracle), 1)


def test_a_later_key_is_never_seen(small_blocks):
    q = jax.random.normal(jax.random.key(0), (1, 20, 2, 4))
    out = causal_attention(q, q, q, scale=1.0)
    changed = causal_attention(q, q.at[:, 13:].set(99.0), q.at[:, 13:].set(99.0), scale=1.0)
    np.testing.assert_array_equal(out[:, :13], changed[:, :13])


def test_errors_name_what_does_not_fit():
    q = jnp.zeros((1, 4, 2, 3))
    with pytest.raises(ValueError, match=r"\[B, T, N, D\] twice"):
        causal_attention(q, q[:, :3], q, scale=1.0)
    with pytest.raises(ValueError, match="must be one of: portable"):
        causal_attention(q, q, q, scale=1.0, implementation="cudnn")


@pytest.mark.parametrize("length", [128, 200])
def test_the_tpu_kernel_interpreted(length):
    """Forward and gradients in bfloat16, lengths that are and are not whole tiles."""
    keys = jax.random.split(jax.random.key(length), 4)

    def random(key, width):
        return jax.random.normal(key, (2, length, 2, width)).astype(jnp.bfloat16)

    operands = [random(key, width) for key, width in zip(keys, (24, 24, 16, 16), strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, q, k, v, dy):
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, scale=0.2), q, k, v)
        return out, *vjp(dy)

    ours = both(functools.partial(tpu.causal_attention, interpret=True), *operands)
    oracle = both(reference.causal_attention, *(x.astype(jnp.float32) for x in operands))
    for got, want in zip(ours, oracle, strict=True):
        # Rounding of queries, weights and results to bfloat16: 2^-9 each.
        assert np.linalg.norm(got.astype(jnp.float32) - want) <= 5e-3 * np.linalg.norm(want)


def test_the_tpu_kernel_takes_bfloat16_only():
    q = jnp.zeros((1, 4, 2, 3))
    with pytest.raises(ValueError, match=r"takes bfloat16, not q.dtype=dtype\('float32'\)"):
        causal_attention(q, q, q, scale=1.0, implementation="tpu")


def test_the_tpu_kernel_need_not_run_again():
    """Its result and softmax statistics can be kept by name: then two kernels run, not three."""

    def loss(q):
        return tpu.causal_attention(q, q, q, scale=1.0, interpret=True).sum()

    def kernels(policy):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        return str(jax.make_jaxpr(gradient)(q)).count("pallas_call[")

    q = jnp.ones((1, 128, 2, 16), jnp.bfloat16)
    policies = jax.checkpoint_policies
    assert kernels(policies.nothing_saveable) == 3
    assert kernels(policies.save_only_these_names("attention_output")) == 2
