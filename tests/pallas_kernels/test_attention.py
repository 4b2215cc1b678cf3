"""Causal attention against the float32 oracle, across its block boundary."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat as cudnn_binding
from pallas_kernels import causal_attention, reference
from pallas_kernels.attention import cudnn, portable, tpu


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
        causal_attention(q, q, q, scale=1.0, implementation="flash")


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


@pytest.fixture
def traced_with_cudnn(monkeypatch):
    """What JAX asks a process with a Hopper GPU, answered; nothing can run."""
    binding = cudnn_binding.fused_attention_stablehlo
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91002)
    monkeypatch.setattr(binding, "cuda_versions", versions)
    monkeypatch.setattr(binding, "check_compute_capability", lambda capability: True)


_MLA = [jax.ShapeDtypeStruct((2, 200, 3, width), jnp.bfloat16) for width in (192, 192, 128)]


def test_cudnn_lowers_heads_of_mla_for_gpus(traced_with_cudnn):
    """One kernel each way, on the true widths (what they compute: benchmark_attention.py)."""

    def both(q, k, v):
        out, pull = jax.vjp(functools.partial(cudnn.causal_attention, scale=0.1), q, k, v)
        return pull(out)

    lowered = jax.jit(both).trace(*_MLA).lower(lowering_platforms=("cuda",))
    assert [out.shape for out in jax.tree.leaves(lowered.out_info)] == [x.shape for x in _MLA]
    text = lowered.as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    # The gradient of v in cuDNN's order, heads before positions.
    assert "tensor<2x3x200x128xbf16>" in text


def test_cudnn_need_not_run_again(traced_with_cudnn):
    """Its result and softmax statistics can be kept by name: then two kernels run, not three."""

    def loss(q, k, v):
        return cudnn.causal_attention(q, k, v, scale=0.1).astype(jnp.float32).sum()

    def kernels(policy):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        text = str(jax.make_jaxpr(gradient)(*_MLA))
        return [text.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd")]

    policies = jax.checkpoint_policies
    assert kernels(policies.nothing_saveable) == [2, 1]
    assert kernels(policies.save_only_these_names("attention_output")) == [1, 1]


def test_cudnn_is_picked_where_it_can_run(traced_with_cudnn):
    hopper = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("all",), axis_types=kinds, abstract_device=hopper)

    def picks_cudnn(*operands):
        attend = functools.partial(causal_attention, scale=1.0)
        return "dot_product_attention_fwd" in str(jax.make_jaxpr(attend)(*operands))

    assert not picks_cudnn(*_MLA)
    with jax.sharding.use_abstract_mesh(mesh):
        assert picks_cudnn(*_MLA)
        assert not picks_cudnn(*(jnp.zeros(x.shape, jnp.float32) for x in _MLA))


@pytest.mark.parametrize(
    ("width", "dtype", "rule"),
    [
        (192, jnp.float32, r"takes bfloat16, not q.dtype=dtype\('float32'\)"),
        (100, jnp.bfloat16, r"q.shape\[-1\]=100 must be a multiple of 8, at most 256"),
        (264, jnp.bfloat16, r"q.shape\[-1\]=264 must be a multiple of 8, at most 256"),
    ],
)
def test_cudnn_says_what_it_does_not_take(width, dtype, rule):
    q = jnp.zeros((1, 4, 2, width), dtype)
    with pytest.raises(ValueError, match=rule):
        causal_attention(q, q, q, scale=1.0, implementation="cudnn")


def test_cudnn_must_be_there():
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        causal_attention(q, q, q, scale=1.0, implementation="cudnn")
