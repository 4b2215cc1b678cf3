"""Moonlight-16B-A3B (arXiv 2502.16982): 15.96B parameters, 2.2B active without the embeddings.

    python scripts/train.py configs/moonlight_16b.py --out DIR --data.corpus PATH

The network is the released config.json's: V3's with one expert group, uncompressed queries, two
shared experts and no MTP. To use the released weights read their config.json with
`ModelConfig.from_hf`. The recipe is the paper's first two stages (5.2T tokens at length 8192,
batch 2048 until 200B tokens and then 4096) with AdamW: Moonshot trained with Muon, which this
library does not have, and its third stage raises the learning rate again, which this schedule
cannot. The balance loss is V3's. Moonshot's tokenizer is not distributed as a `tokenizer.json`;
DeepSeek's, whose ids fit the larger vocabulary, stands in unless `--data.tokenizer` names another.

Hardware: several accelerators; master weights and moments alone take 128 GB (8 bytes a parameter).
Expected: not run: needs a multi-device mesh, which this version does not have.
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
    """The released network and stages 1 and 2 of its recipe."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=163840,
            hidden_size=2048,
            intermediate_size=11264,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
            num_nextn_predict_layers=0,
            rope_theta=50000.0,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
        ),
        data=DataConfig(tokenizer="deepseek-v3", sequence_length=8192, fim_rate=0.0),
        batch=BatchConfig(
            size=4096,
            microbatch_size=512,
            initial_size=2048,
            ramp_tokens=200_000_000_000,
            ramp_stages=1,
        ),
        optimizer=OptimizerConfig(
            peak_lr=4.2e-4,
            warmup_steps=2000,
            constant_tokens=33_000_000_000,
            decay_tokens=5_167_000_000_000,
            decay_lr=4.2e-5,
            hold_tokens=0,
            final_lr=4.2e-5,
        ),
        loss=LossConfig(bias_update_speed=1e-3, bias_update_tokens=5_200_000_000_000),
        total_tokens=5_200_000_000_000,
    )
