"""Copies of hot experts: loads become even, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig, ParallelConfig, RuntimeConfig
from dsv3_jax.model.transformer import Transformer, init_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.redundancy import choose_copies, place_experts, with_redundant_experts

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=20,
    moe_intermediate_size=10,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=6,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    max_position_embeddings=32,
    initializer_range=0.3,
)
MODEL = Transformer(CONFIG, RuntimeConfig(compute_dtype="float32"))


def skewed(seed, experts=256):
    return np.random.default_rng(seed).zipf(1.5, experts).clip(max=400).astype(float)


def test_a_case_worked_by_hand():
    """Loads 90, 30, 20, 20 in 3 x 2 slots: two more copies for the first, then 30 each."""
    placed = place_experts(np.array([90, 30, 20, 20]), devices=3, slots=2)
    assert [sorted(pair) for pair in placed.expert.reshape(3, 2).tolist()] == [
        [0, 1], [0, 2], [0, 3],
    ]  # fmt: skip
    assert placed.load.tolist() == [60, 50, 50]


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_loads_become_even(seed, nodes):
    """V3's 256 experts and 32 copies on 32 devices of 9 slots, as the report serves prefill."""
    load = skewed(seed)
    placed = place_experts(load, 32, 9, n_group=8, nodes=nodes)
    by_device = placed.expert.reshape(32, 9)
    copies = np.bincount(placed.expert, minlength=256)
    assert (copies >= 1).all() and copies.sum() == 288
    assert all(len(set(row)) == 9 for row in by_device.tolist())  # no copy beside another
    assert np.allclose(placed.load, (load / copies)[by_device].sum(1))
    contiguous = load.reshape(32, 8).sum(1)
    # Copies of whole experts cannot be perfectly even; the floor is that of a node's groups.
    assert placed.load.max() < 0.5 * contiguous.max() + 0.5 * load.sum() / 32
    if nodes > 1:
        for groups in (by_device.reshape(nodes, -1) // 32).tolist():
            assert len(set(groups)) == 2  # whole groups: 8 over 4 nodes


def test_without_spare_slots_experts_are_only_moved():
    placed = place_experts(skewed(0, 16), 4, 4)
    assert sorted(placed.expert.tolist()) == list(range(16))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"devices": 4, "slots": 3}, "slots=3 on devices=4 must hold all 16 experts"),
        ({"devices": 4, "slots": 5, "nodes": 3}, "nodes=3 must divide devices=4"),
        ({"devices": 8, "slots": 5, "nodes": 8, "n_group": 4}, "nodes=8 must divide n_group=4"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        place_experts(np.ones(16), **arguments)


def test_copies_take_positions_in_turn():
    idx = np.zeros((2, 6, 1), np.int32)
    chosen = choose_copies(jnp.asarray(idx), jnp.array([3, 1]), jnp.array([[4, 7, 9], [2, 0, 0]]))
    assert chosen[..., 0].tolist() == [[4, 7, 9, 4, 7, 9], [7, 9, 4, 7, 9, 4]]
    assert np.all(
        choose_copies(jnp.asarray(idx + 1), jnp.array([3, 1]), jnp.zeros((2, 3), int)) == 0
    )


@jax.jit
def run(variables, ids):
    return MODEL.apply(variables, ids, mtp=True)


@functools.cache
def hot():
    """Variables whose gate prefers expert 3, tokens, and the output without copies."""
    variables = init_variables(MODEL, jax.random.key(0))
    gate = variables["router_state"]["moe_layers"]["mlp"]["gate"]
    gate["e_score_correction_bias"] = jnp.zeros((2, 16)).at[:, 3].set(0.3)
    ids = np.random.default_rng(1).integers(0, 40, (8, 9), np.int32)
    return variables, ids, run(variables, ids)


@pytest.mark.parametrize(
    "mesh", [pytest.param(None, marks=pytest.mark.slow), {"expert": 8}], ids=str
)
def test_outputs_and_loads_are_those_without_copies(mesh):
    variables, ids, plain = hot()
    layers, mtp = plain.routing.moe_layers.load, plain.routing.mtp[0].load
    place = functools.partial(place_experts, devices=8, slots=3, n_group=4, nodes=2)
    placements = {"moe_layers": [place(load) for load in np.asarray(layers)], "mtp_0": place(mtp)}
    assert np.bincount(placements["moe_layers"][0].expert)[3] > 1
    devices = None if mesh is None else make_mesh(ParallelConfig(**mesh))
    placed = with_redundant_experts(variables, placements, devices)
    experts = placed["params"]["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    assert experts.shape == (2, 24, 12, 2, 10)
    if devices is None:
        copied = run(placed, ids)
    else:
        assert experts.addressable_shards[0].data.shape[1] == 3
        with jax.set_mesh(devices):
            copied = run(placed, ids)
    assert np.array_equal(copied.routing.moe_layers.load, layers)
    for a, b in ((plain.logits, copied.logits), (plain.mtp_logits[0], copied.mtp_logits[0])):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(a)
