"""A 16B model with every feature of V3: 15.8B parameters, 2.4B active, one MTP module of 0.6B.

    python scripts/train.py configs/v3_16b.py --out DIR --data.corpus PATH

The report's smaller ablation model (section 4.5, 15.7B parameters, 1.33T tokens) is not
described further. This one takes DeepSeek-V2-Lite's sizes (27 layers, hidden 2048, 64 routed
and 2 shared experts of 1408, 6 chosen) and gives them what V3 adds: compressed queries
(q_lora_rank 768), the sigmoid gate with 8 groups of which 4 are kept, balancing without an
auxiliary loss, MTP, V3's vocabulary. Peak rate and batch are V2-Lite's (4.2e-4, 4608 sequences);
the schedule has V3's five parts, each the same share of the 1.33T tokens as in V3.

Hardware: several accelerators; master weights and moments alone take 131 GB (8 bytes a parameter).
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

_TOTAL_TOKENS = 1_330_000_000_000


def _share(tokens_of_v3: int) -> int:
    """Scales a boundary of V3's run of 14.8T tokens to this one."""
    return tokens_of_v3 * _TOTAL_TOKENS // 14_800_000_000_000


def get_config() -> TrainConfig:
    """The model and a recipe scaled from V3's."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=129280,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
            max_position_embeddings=4096,
        ),
        data=DataConfig(tokenizer="deepseek-v3", sequence_length=4096, fim_rate=0.1),
        batch=BatchConfig(size=4608, microbatch_size=512),
        optimizer=OptimizerConfig(
            peak_lr=4.2e-4,
            warmup_steps=2000,
            constant_tokens=_share(10_000_000_000_000),
            decay_tokens=_share(4_300_000_000_000),
            decay_lr=4.2e-5,
            hold_tokens=_share(333_000_000_000),
            final_lr=1.4e-5,
        ),
        loss=LossConfig(
            mtp_switch_tokens=_share(10_000_000_000_000),
            bias_update_tokens=_share(14_300_000_000_000),
        ),
        total_tokens=_TOTAL_TOKENS,
    )
