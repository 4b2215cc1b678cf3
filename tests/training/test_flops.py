"""Parameter and FLOP counts against published numbers, the model itself, and a written-out sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.flops import parameter_counts, peak_flops, train_flops_per_token

AWKWARD = ModelConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=37,
    moe_intermediate_size=11,
    num_hidden_layers=5,
    first_k_dense_replace=2,
    num_attention_heads=3,
    q_lora_rank=14,
    kv_lora_rank=9,
    qk_nope_head_dim=7,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=4,
    n_group=3,
    topk_group=2,
    num_nextn_predict_layers=2,
    max_position_embeddings=64,
)


def test_released_671b():
    counts = parameter_counts(ModelConfig())
    assert counts.total == 671_026_404_352
    assert counts.active == 36_625_610_752
    assert counts.embedding == counts.head == 926_679_040
    assert counts.mtp == 11_610_067_968
    # The published figures, as rounded there.
    assert round(counts.total / 1e9) == 671
    # README_WEIGHTS: 36.6B in its first revision, 36.7B now.
    assert 36.6 <= round(counts.active / 1e9, 1) <= 36.7
    assert round((counts.active + counts.embedding) / 1e9, 1) == 37.6  # "37B activated"
    eh_proj = 2 * 7168**2
    assert round((counts.mtp - eh_proj) / 1e9, 1) == 11.5
    # MTP "2.4B activated, with the shared embedding and head", again without eh_proj.
    shared = counts.embedding + counts.head
    assert round((counts.mtp_active - eh_proj + shared) / 1e9, 1) == 2.4


def test_check_value_of_671b_flops():
    flops = train_flops_per_token(ModelConfig(), 4096, mtp=False)
    assert round(flops / 1e9, 2) == 250.45


def test_mtp_flops_include_eh_proj_its_layer_and_the_head():
    config = ModelConfig()
    with_mtp = train_flops_per_token(config, 4096, mtp=True)
    added = with_mtp - train_flops_per_token(config, 4096, mtp=False)
    eh_proj = 2 * 7168 * 7168
    head = 129280 * 7168
    query = 7168 * 1536 + 1536 * 128 * 192
    key_value = 7168 * 576 + 512 * 128 * 256
    attention = query + key_value + 128 * 128 * 7168
    moe = 7168 * 256 + 9 * 3 * 7168 * 2048
    scores = 128 * (192 + 128) * 4096 // 2
    assert added == 6 * (eh_proj + head + attention + moe + scores)
    without = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert train_flops_per_token(without, 4096, mtp=True) == with_mtp - added


def test_flops_grow_with_length_by_attention_alone():
    short, long = (train_flops_per_token(AWKWARD, n, mtp=False) for n in (8, 24))
    # Six per pair, over half of the 16 further positions, in 5 layers of 3 heads.
    assert long - short == 6 * 5 * 3 * (11 + 6) * 16 // 2


@pytest.mark.parametrize(
    "config",
    [
        AWKWARD,
        dataclasses.replace(AWKWARD, q_lora_rank=None, n_shared_experts=0),
        dataclasses.replace(AWKWARD, first_k_dense_replace=0, num_nextn_predict_layers=1),
        dataclasses.replace(AWKWARD, first_k_dense_replace=5, num_nextn_predict_layers=0),
    ],
    ids=["q_lora, MTP depth 2", "no q_lora, no shared expert", "no dense layer", "no MoE layer"],
)
def test_counts_equal_the_models_own_parameters(config):
    model = Transformer(config, runtime=RuntimeConfig())
    ids = jnp.zeros((1, 8), jnp.int32)
    variables = jax.eval_shape(lambda key: model.init(key, ids, mtp=True), jax.random.key(0))
    sizes = {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(subtree))
        for name, subtree in variables["params"].items()
    }
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp_"))
    counts = parameter_counts(config)
    assert counts.mtp == mtp
    assert counts.total == sum(sizes.values()) - mtp
    assert counts.embedding == sizes["embed_tokens"]
    assert counts.head == sizes["lm_head"]


def test_active_leaves_out_unchosen_experts_and_the_embedding_table():
    counts = parameter_counts(AWKWARD)
    unchosen = 3 * (12 - 4) * 3 * 20 * 11
    assert counts.total - counts.active == unchosen + 61 * 20 - 20
    assert counts.mtp - counts.mtp_active == 2 * (12 - 4) * 3 * 20 * 11


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("TPU v4 lite", None),
    ],
)
def test_peak_flops(device_kind, peak):
    assert peak_flops(device_kind) == peak
