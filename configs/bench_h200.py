"""The comparison model of one H200: 3.98B parameters, 0.74B active, 4 x 4096 tokens a step.

    python scripts/train.py configs/bench_h200.py --out DIR --steps 30

Hardware: one GPU of 80 GB or more. The float32 master weights and gradients, two bfloat16 moments
and the bfloat16 copy that computes add up to 56 GB if all exist at once; activations come on top.
Expected: a step is 83.3 TFLOP forward and backward. One H100 (80 GB, 700 W, 2026-11-25, JAX
0.11.2, remat "full", random tokens): 283 ms a step, 57,800 tokens/s, peak 50.1 GiB; of the
kernels' 276 ms the grouped matmuls take 78, attention 32. That was a bare loop over the train step;
this command takes the same steps and has not run on a GPU to its end:

    python scripts/benchmark_meshes.py configs/bench_h200.py --mesh one --sequences 4

Not run on an H200, nor beside a peer. There transformers 5.17 compiled reaches 56,200 tokens/s and
torchtitan (2026-08, compiled) 77,500 on the same shape, both with bfloat16 weights.
"""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """A short run at a constant rate: what is measured is speed, not loss."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=32768,
            hidden_size=2048,
            intermediate_size=8192,
            moe_intermediate_size=1024,
            num_hidden_layers=10,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            max_position_embeddings=4096,
        ),
        data=DataConfig(tokenizer="corpus-bpe", sequence_length=4096),
        batch=BatchConfig(size=4, microbatch_size=4),
        optimizer=OptimizerConfig(peak_lr=1e-4, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=1000, sequences=8, final_sequences=8),
        total_tokens=100 * 4 * 4096,
    )
