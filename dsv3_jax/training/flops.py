"""Parameter counts, training FLOPs and the chips' peaks, from the configuration alone.

Conventions. A parameter is a trained weight: the router's bias is state and is not counted.
`active` is what one token touches: `topk` of the routed experts, everything else, and one row of
the embedding table. For the released 671B model that is 36.63e9; README_WEIGHTS.md first said
"36.6B (including 0.9B for the output Head)" and now says "36.7B (including 0.9B for Embedding
and 0.9B for the output Head)", although the whole embedding table would make it 37.55e9. An MTP
module's own weights are 11.61e9; the published 11.5B leaves out `eh_proj` (0.10e9). These counts
add up to every element of the released R1 and Kimi K2 files.
"""

import dataclasses

from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained weights.

    `total`: the main model, embedding and output head included, MTP modules not.
    `active`: those of `total` that one token touches (one embedding row, `num_experts_per_tok`
      routed experts).
    `embedding`, `head`: the two vocabulary matrices, both in `total`.
    `mtp`: all MTP modules' own weights; embedding and head are the main model's.
    `mtp_active`: those of `mtp` that one token touches.
    """

    total: int
    active: int
    embedding: int
    head: int
    mtp: int
    mtp_active: int


def _attention_matrices(config: ModelConfig) -> int:
    """Weights in one layer's attention projections (MLA, report section 2.1.1)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    key_value = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    key_value += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + key_value + heads * config.v_head_dim * hidden


def _ffn_matrices(config: ModelConfig, *, moe: bool, routed_experts: int) -> int:
    """Weights in one layer's FFN, counting `routed_experts` of its routed experts."""
    if not moe:
        return 3 * config.hidden_size * config.intermediate_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    gate = config.hidden_size * config.n_routed_experts
    return gate + (routed_experts + config.n_shared_experts) * expert


def _layer_norms(config: ModelConfig) -> int:
    """Norm scales in one layer: before attention, before the FFN, and inside MLA."""
    return 2 * config.hidden_size + (config.q_lora_rank or 0) + config.kv_lora_rank


def _main_matrices(config: ModelConfig, routed_experts: int) -> int:
    """Weights of the main model's matmuls in its layers (no embedding, no head)."""
    attention = config.num_hidden_layers * _attention_matrices(config)
    dense = config.num_dense_layers * _ffn_matrices(config, moe=False, routed_experts=0)
    moe = _ffn_matrices(config, moe=True, routed_experts=routed_experts)
    return attention + dense + config.num_moe_layers * moe


def _mtp_matrices(config: ModelConfig, routed_experts: int) -> int:
    """Weights of one MTP module's own matmuls: `eh_proj` and a MoE layer."""
    moe = _ffn_matrices(config, moe=True, routed_experts=routed_experts)
    return 2 * config.hidden_size**2 + _attention_matrices(config) + moe


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts the weights of the network that `config` describes, exactly."""
    vocabulary = config.vocab_size * config.hidden_size
    norms = config.num_hidden_layers * _layer_norms(config) + config.hidden_size
    mtp_norms = _layer_norms(config) + 3 * config.hidden_size  # enorm, hnorm, shared_head.norm
    depth = config.num_nextn_predict_layers
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    return ParameterCounts(
        total=_main_matrices(config, experts) + norms + 2 * vocabulary,
        active=_main_matrices(config, chosen) + norms + vocabulary + config.hidden_size,
        embedding=vocabulary,
        head=vocabulary,
        mtp=depth * (_mtp_matrices(config, experts) + mtp_norms),
        mtp_active=depth * (_mtp_matrices(config, chosen) + mtp_norms),
    )


def train_flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool) -> int:
    """Floating-point operations of forward and backward for one token of a training sequence.

    Six per weight of every matmul the token passes through (two forward, four backward): the
    layers with their gate, the chosen and shared experts, and the output head. Attention scores
    and their product with the values cost six per multiplied pair over half the sequence, because
    causality masks the other half. The embedding is a lookup and costs nothing; norms, rotary
    positions and the optimizer are left out, and so is everything rematerialisation repeats.

    Args:
      config: the network.
      sequence_length: tokens in a sequence.
      mtp: whether the MTP modules are trained too. Each adds `eh_proj`, one MoE layer with its
        attention, and another use of the output head.

    Returns:
      FLOPs a token; 250.45e9 for the released 671B model at 4096 without MTP.
    """
    head = config.vocab_size * config.hidden_size
    weights = _main_matrices(config, config.num_experts_per_tok) + head
    layers = config.num_hidden_layers
    if mtp:
        depth = config.num_nextn_predict_layers
        weights += depth * (_mtp_matrices(config, config.num_experts_per_tok) + head)
        layers += depth
    pair_width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * weights + 3 * layers * pair_width * sequence_length


# Dense bf16 peaks in FLOP/s of one JAX device, by `device_kind` in lower case (vendors' data
# sheets). Exact names only: a MIG slice or a card of another form factor has another peak.
_PEAK_FLOPS: dict[str, float] = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,  # what a v5p reports
    "tpu v5p": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 2307e12 / 2,  # a chip is two JAX devices
    "nvidia a100-pcie-40gb": 312e12,
    "nvidia a100-sxm4-40gb": 312e12,
    "nvidia a100-sxm4-80gb": 312e12,
    "nvidia a100 80gb pcie": 312e12,
    "nvidia h100 80gb hbm3": 989.4e12,  # SXM
    "nvidia h100 nvl": 835.5e12,
    "nvidia h100 pcie": 756e12,
    "nvidia h200": 989.4e12,  # SXM
    "nvidia h200 nvl": 835.5e12,
    "nvidia b200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one JAX device in FLOP/s, from `jax.Device.device_kind`.

    Returns:
      The peak, or None for CPUs and chips not in the table: utilisation is then unknown.
    """
    return _PEAK_FLOPS.get(device_kind.lower())
