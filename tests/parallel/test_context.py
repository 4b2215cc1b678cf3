"""Latent attention with positions shared out: the same outputs and gradients, little travelling."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.rope import rotations
from dsv3_jax.parallel import context
from dsv3_jax.parallel.mesh import AXES, make_mesh

CONFIG = ModelConfig(
    hidden_size=20,
    num_attention_heads=4,
    q_lora_rank=14,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=12,
    max_position_embeddings=64,
    initializer_range=0.3,
)
LAYER = MLA(CONFIG, RuntimeConfig(compute_dtype="float32"))


def make(mesh):
    return make_mesh(types.SimpleNamespace(**{**dict.fromkeys(AXES, 1), **mesh}))


def case(batch, length):
    x = np.random.default_rng(0).normal(size=(batch, length, 20)).astype(np.float32)
    rotation = rotations(CONFIG, jnp.broadcast_to(jnp.arange(length), (batch, length)))
    return LAYER.init(jax.random.key(1), x, rotation), x, rotation


def outputs_and_gradients(variables, x, rotation):
    def loss(variables, x):
        out = LAYER.apply(variables, x, rotation)[0]
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
    return out, grads


def check(mesh, batch, length):
    arguments = case(batch, length)
    one = jax.jit(outputs_and_gradients)(*arguments)
    with jax.set_mesh(make(mesh)):
        many = jax.jit(outputs_and_gradients)(*arguments)
    for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(a)


# Two blocks a half; an odd share, which is not mirrored; a length that the axis does not divide.
@pytest.mark.parametrize(
    ("mesh", "batch", "length"),
    [
        ({"context": 4, "tensor": 2}, 2, 32),
        ({"context": 2, "fsdp": 4}, 4, 10),
        ({"context": 8}, 1, 12),
    ],
)
def test_equals_one_device(monkeypatch, mesh, batch, length):
    monkeypatch.setattr(context, "_BLOCK", 2)
    check(mesh, batch, length)


def test_heads_in_turns_equal_all_at_once(monkeypatch):
    monkeypatch.setattr(context, "_EXPANDED", 2 * 16 * 26)  # one head of two sequences of 16
    check({"context": 8}, 2, 16)


def test_every_device_has_equal_work(monkeypatch):
    """Of 2 x devices halves of the sequence each device has one from the front, one mirrored."""
    seen = []
    for device in range(4):
        monkeypatch.setattr(jax.lax, "axis_index", lambda axis, device=device: device)
        monkeypatch.setattr(context, "axis_sizes", lambda: {"context": 4})
        seen.append(context._starts(6))
    assert sorted(sum(seen, ())) == list(range(0, 24, 3))  # every half once
    assert {first + second for first, second in seen} == {21}


def test_compressed_keys_travel_and_queries_change_places():
    """Forward: one gather, of C + R numbers a position, and the exchange there and back."""
    variables, x, rotation = case(2, 32)
    mesh = make({"context": 8})
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "context")))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: LAYER.apply(variables, x, rotation)[0])
        text = run.lower(placed).compile().as_text()
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (all-gather|collective-permute)\(", text)
    assert sorted(found) == [
        ("2,2,4,12", "collective-permute"),
        ("2,2,4,14", "collective-permute"),
        ("2,32,16", "all-gather"),
    ]
