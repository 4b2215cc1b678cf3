"""Kimi K2 (arXiv 2507.20534): 1.03T parameters, 32B active, no MTP.

    python scripts/train.py configs/kimi_k2.py --out DIR --data.corpus PATH

The network is that of the released Kimi-K2-Base and -Instruct config.json: V3's with 384 experts in
one group, 64 heads and one dense layer. The report gives 1.04T parameters and 32.6B active; the
released tensors hold 1.026T, of which 31.7B are active without the embedding table. Positions are
not scaled at the pre-training length of 4096; the released files have YaRN (factor 32) from the
context extension: read them with `ModelConfig.from_hf` to use the weights. (K2.5 has rms_norm_eps
1e-5 where K2 has 1e-6.) The recipe is the report's 15.5T tokens, 67M tokens a batch, with AdamW:
Moonshot trained with MuonClip, which this library does not have. The report gives no speed for the
bias update: V3's stands in, as does its balance loss. Moonshot's tokenizer is not distributed as a
`tokenizer.json`; DeepSeek's, whose ids fit the larger vocabulary, stands in unless
`--data.tokenizer` names another.

Hardware: a pod; master weights and moments alone take 8.2 TB (8 bytes a parameter).
Expected: not run: needs a pod and a multi-device mesh, which this version does not have.
"""

from dsv3_jax.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The released network and the report's schedule (its section 2.5)."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=163840,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            first_k_dense_replace=1,
            num_attention_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=384,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            num_nextn_predict_layers=0,
            rope_theta=50000.0,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            initializer_range=0.02,
        ),
        data=DataConfig(tokenizer="deepseek-v3", sequence_length=4096, fim_rate=0.0),
        batch=BatchConfig(size=16384, microbatch_size=4096),
        optimizer=OptimizerConfig(
            peak_lr=2e-4,
            warmup_steps=500,
            constant_tokens=10_000_000_000_000,
            decay_tokens=5_500_000_000_000,
            decay_lr=2e-5,
            hold_tokens=0,
            final_lr=2e-5,
        ),
        loss=LossConfig(bias_update_tokens=15_500_000_000_000),
        total_tokens=15_500_000_000_000,
    )
