"""DeepSeek-V3 as pre-trained: 671B parameters, 37B active, one MTP module (report section 4.2).

    python scripts/train.py configs/v3_671b.py --out DIR --data.corpus PATH

The report's recipe in full: 14.8T tokens at length 4096, the five-part learning rate, the batch
from 3072 to 15360 sequences over the first 469B tokens (the report does not say in which steps:
here four of 3072), MTP weight 0.3 then 0.1, bias updates until 14.3T tokens. Positions are not
scaled in pre-training: the released config.json has YaRN (factor 40) and 163,840 positions
because the weights went through two phases of context extension afterwards; read it with
`ModelConfig.from_hf` to use them. Its initializer_range of 0.02 is not the report's 0.006 either.

Hardware: DeepSeek used 2,048 H800 for about two months (180K GPU-hours per trillion tokens). The
mesh here is for 1,024 TPU v5p: each device has four experts and one sequence at a time.
`python scripts/plan.py configs/v3_671b.py --topology v5p:8x8x16` compiles this step for them
(docs/scaling.md has the result, and other clusters).
Expected: never run.
"""

from dsv3_jax.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """Every number of the report's pre-training, written out although most are defaults."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
            rope_theta=10000.0,
            rope_scaling=None,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            initializer_range=0.006,
        ),
        runtime=RuntimeConfig(compute_dtype="bfloat16", remat_policy="full"),
        parallel=ParallelConfig(fsdp=-1, expert=64),
        data=DataConfig(tokenizer="deepseek-v3", sequence_length=4096, fim_rate=0.1),
        batch=BatchConfig(
            size=15360,
            microbatch_size=1024,
            initial_size=3072,
            ramp_tokens=469_000_000_000,
            ramp_stages=4,
        ),
        optimizer=OptimizerConfig(
            peak_lr=2.2e-4,
            warmup_steps=2000,
            constant_tokens=10_000_000_000_000,
            decay_tokens=4_300_000_000_000,
            decay_lr=2.2e-5,
            hold_tokens=333_000_000_000,
            final_lr=7.3e-6,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            moment_dtype="bfloat16",
        ),
        loss=LossConfig(
            mtp_weight=0.3,
            mtp_weight_final=0.1,
            mtp_switch_tokens=10_000_000_000_000,
            balance_weight=1e-4,
            bias_update_speed=1e-3,
            bias_update_tokens=14_300_000_000_000,
        ),
        total_tokens=14_800_000_000_000,
    )
