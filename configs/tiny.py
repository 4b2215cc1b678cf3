"""A small, complete DeepSeek-V3 that learns from the running Python's own standard library.

    python scripts/train.py configs/tiny.py --out runs/tiny

Hardware: two CPU cores, about five minutes. Small batches, because a CPU gains little from large
ones and more steps learn more.
Expected: held-out loss near 3.8 nats a token (2.16 bits a byte), below the 4.29 (2.45) of a
smoothed bigram model of all training tokens.
"""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    TrainConfig,
)

_SEQUENCE, _BATCH, _STEPS = 128, 4, 2400
_TOKENS = _SEQUENCE * _BATCH * _STEPS


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            moe_intermediate_size=64,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=1,
            max_position_embeddings=2048,
            initializer_range=0.02,
        ),
        runtime=RuntimeConfig(compute_dtype="float32", remat_policy="none", unroll_layers=True),
        data=DataConfig(sequence_length=_SEQUENCE),
        batch=BatchConfig(size=_BATCH, microbatch_size=_BATCH),
        optimizer=OptimizerConfig(
            peak_lr=3e-3,
            warmup_steps=100,
            constant_tokens=_TOKENS // 5,
            decay_tokens=_TOKENS - _TOKENS // 5,
            decay_lr=3e-5,
            hold_tokens=0,
            final_lr=3e-5,
        ),
        loss=LossConfig(mtp_switch_tokens=_TOKENS * 2 // 3, bias_update_tokens=_TOKENS * 9 // 10),
        checkpoint=CheckpointConfig(every_steps=600, keep=2),
        evaluation=EvaluationConfig(every_steps=200, sequences=64, final_sequences=256),
        total_tokens=_TOKENS,
    )
