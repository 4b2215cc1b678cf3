"""DeepSeek-V3 written out plainly in torch float64: the oracle of the parity tests.

It works on a released-name state dict `{tensor name: tensor}` and the dictionary of a released
`config.json`, follows the technical report (arXiv 2412.19437) and the conventions of the released
weights, favours loops over tricks, and is differentiable by torch autograd.

Every function takes `mistakes`, a set of names from `MISTAKES`: each brings in one error that
ports of this model have made. A test can then assert both that the library agrees with the right
form and that it would notice the wrong one.

Shapes: B batch, T tokens, D hidden, N heads, E experts, G groups, K choices, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = dict[str, Any]
Weights = dict[str, Tensor]

MISTAKES = frozenset(
    {
        "biased_combine_weights",
        "masked_groups_zero",
        "bf16_bias",
        "bf16_router_logits",
        "bf16_gate_weight",
        "rope_half_split",
        "no_yarn_softmax_mscale",
        "yarn_only_past_original_length",
        "single_mscale",
        "yarn_ramp_unguarded",
        "yarn_bounds_not_rounded",
        "lora_norm_eps_from_config",
        "mtp_hidden_first",
        "mtp_no_shared_head_norm",
        "mtp_main_norm_for_shared_head_norm",
        "mtp_pre_norm_hidden",
        "mtp_handover_before_norm",
    }
)
# DeepSeek's layers between the low-rank projections keep this epsilon whatever the config says.
LORA_NORM_EPS = 1e-6


@dataclasses.dataclass
class Routing:
    """What one MoE layer's gate decided, for M = B * T tokens."""

    scores: Tensor  # [M, E] sigmoid scores, before the bias
    chosen: Tensor  # [M, K] expert indices
    weights: Tensor  # [M, K] combine weights
    margin: Tensor  # [M] smallest gap of a decision: chosen against not chosen, experts or groups
    expert_output: Tensor | None = None  # [M, D] weighted sum of the routed experts

    def load(self) -> Tensor:
        """Tokens sent to each expert, [E]."""
        return torch.bincount(self.chosen.reshape(-1), minlength=self.scores.shape[1])


@dataclasses.dataclass
class Output:
    """The result of a forward pass."""

    logits: Tensor  # [B, T, V]
    mtp_logits: list[Tensor]  # entry k: [B, T-1-k, V]; row i scores token i + k + 2
    hidden: Tensor  # [B, T, D] after the final norm
    routing: dict[int, Routing]  # by layer index; MTP modules continue the count


def forward(
    config: Config,
    weights: Weights,
    input_ids: Tensor,
    *,
    mtp: bool = True,
    mistakes: Collection[str] = (),
) -> Output:
    """The whole network on `input_ids` int [B, T]."""
    unknown = set(mistakes) - MISTAKES
    assert not unknown, f"unknown mistakes {unknown}"
    routing: dict[int, Routing] = {}
    embedding = weights["model.embed_tokens.weight"]
    h = embedding[input_ids]
    for index in range(config["num_hidden_layers"]):
        h = decoder_layer(config, weights, index, h, routing, mistakes)
    pre_norm = h
    hidden = rms_norm(h, weights["model.norm.weight"], config["rms_norm_eps"])
    head = weights["lm_head.weight"]
    logits = hidden @ head.T
    mtp_logits = []
    if mtp:
        previous = pre_norm if "mtp_pre_norm_hidden" in mistakes else hidden
        for k in range(config.get("num_nextn_predict_layers", 0)):
            state, previous = mtp_module(config, weights, k, previous, input_ids, routing, mistakes)
            mtp_logits.append(state @ head.T)
    return Output(logits, mtp_logits, hidden, routing)


def mtp_module(
    config: Config,
    weights: Weights,
    k: int,
    previous: Tensor,
    input_ids: Tensor,
    routing: dict[int, Routing],
    mistakes: Collection[str] = (),
) -> tuple[Tensor, Tensor]:
    """MTP module `k` (from 0): (state before the head, state handed to module k+1).

    `previous` is the state of the module before (the main model's for k = 0), [B, >= T-1-k, D].
    Row i joins it with the embedding of token i+k+1, so T-1-k rows come out.
    """
    index = config["num_hidden_layers"] + k
    prefix = f"model.layers.{index}."
    eps = config["rms_norm_eps"]
    rows = input_ids.shape[1] - 1 - k
    embedded = weights["model.embed_tokens.weight"][input_ids[:, k + 1 :]]
    e = rms_norm(embedded, weights[prefix + "enorm.weight"], eps)
    h = rms_norm(previous[:, :rows], weights[prefix + "hnorm.weight"], eps)
    pair = [h, e] if "mtp_hidden_first" in mistakes else [e, h]
    joined = torch.cat(pair, dim=-1) @ weights[prefix + "eh_proj.weight"].T
    raw = decoder_layer(config, weights, index, joined, routing, mistakes, force_moe=True)
    if "mtp_no_shared_head_norm" in mistakes:
        normed = raw
    elif "mtp_main_norm_for_shared_head_norm" in mistakes:
        normed = rms_norm(raw, weights["model.norm.weight"], eps)
    else:
        normed = rms_norm(raw, weights[prefix + "shared_head.norm.weight"], eps)
    return normed, (raw if "mtp_handover_before_norm" in mistakes else normed)


def decoder_layer(
    config: Config,
    weights: Weights,
    index: int,
    x: Tensor,
    routing: dict[int, Routing],
    mistakes: Collection[str] = (),
    force_moe: bool = False,
) -> Tensor:
    """One pre-norm decoder layer; a MoE layer writes its decisions to `routing[index]`."""
    prefix = f"model.layers.{index}."
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
    x = x + attention(config, weights, prefix + "self_attn.", normed, mistakes)
    normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
    if index < config["first_k_dense_replace"] and not force_moe:
        return x + swiglu(weights, prefix + "mlp.", normed)
    output, routing[index] = moe(config, weights, prefix + "mlp.", normed, mistakes)
    return x + output


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def swiglu(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    gate = x @ weights[prefix + "gate_proj.weight"].T
    up = x @ weights[prefix + "up_proj.weight"].T
    return (F.silu(gate) * up) @ weights[prefix + "down_proj.weight"].T


# ---------------------------------------------------------------- attention (report 2.1.1)


def attention(
    config: Config, weights: Weights, prefix: str, x: Tensor, mistakes: Collection[str] = ()
) -> Tensor:
    """Multi-head latent attention in expanded form, causal; x [B, T, D] -> [B, T, D]."""
    batch, length, _ = x.shape
    heads, v_dim = config["num_attention_heads"], config["v_head_dim"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank = config["kv_lora_rank"]
    lora_eps = LORA_NORM_EPS
    if "lora_norm_eps_from_config" in mistakes:
        lora_eps = config["rms_norm_eps"]

    if config.get("q_lora_rank") is None:
        q = x @ weights[prefix + "q_proj.weight"].T
    else:
        low = x @ weights[prefix + "q_a_proj.weight"].T
        low = rms_norm(low, weights[prefix + "q_a_layernorm.weight"], lora_eps)
        q = low @ weights[prefix + "q_b_proj.weight"].T
    q = q.view(batch, length, heads, nope + rope)
    kv_a = x @ weights[prefix + "kv_a_proj_with_mqa.weight"].T
    compressed, k_pe = kv_a[..., :rank], kv_a[..., rank:]
    compressed = rms_norm(compressed, weights[prefix + "kv_a_layernorm.weight"], lora_eps)
    kv = compressed @ weights[prefix + "kv_b_proj.weight"].T
    kv = kv.view(batch, length, heads, nope + v_dim)
    k_nope, v = kv[..., :nope], kv[..., nope:]

    frequencies, amplitude = rope_frequencies(config, length, mistakes)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies.to(x.dtype)
    q_pe = rotate(q[..., nope:], angles[:, None, :], amplitude, mistakes)
    k_pe = rotate(k_pe, angles, amplitude, mistakes)

    scale = softmax_scale(config, mistakes)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mixed = []
    for n in range(heads):
        scores = q[:, :, n, :nope] @ k_nope[:, :, n].transpose(1, 2)
        scores = scores + q_pe[:, :, n] @ k_pe.transpose(1, 2)
        scores = (scores * scale).masked_fill(~causal, -math.inf)
        mixed.append(scores.softmax(-1) @ v[:, :, n])
    return torch.cat(mixed, dim=-1) @ weights[prefix + "o_proj.weight"].T


def rotate(x: Tensor, angles: Tensor, amplitude: float, mistakes: Collection[str] = ()) -> Tensor:
    """Rotates pair j of the last axis, elements 2j and 2j + 1, by `angles[..., j]`."""
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    if "rope_half_split" in mistakes:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.reshape(x.shape)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_active(config: Config, length: int, mistakes: Collection[str]) -> bool:
    yarn = config.get("rope_scaling")
    if not yarn:
        return False
    if "yarn_only_past_original_length" in mistakes:
        return length > yarn["original_max_position_embeddings"]
    return True


def rope_frequencies(
    config: Config, length: int, mistakes: Collection[str] = ()
) -> tuple[Tensor, float]:
    """(radians a position of each rotary pair [rope/2], factor on cos and sin)."""
    dim, theta = config["qk_rope_head_dim"], config.get("rope_theta", 10000.0)
    plain = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if not _yarn_active(config, length, mistakes):
        return torch.tensor(plain, dtype=torch.float64), 1.0
    yarn = config["rope_scaling"]
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        """The (fractional) pair that makes `times` turns over the original length."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(yarn.get("beta_fast", 32))
    high = pair_turning(yarn.get("beta_slow", 1))
    if "yarn_bounds_not_rounded" not in mistakes:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = float(high - low)
    if width == 0:
        width = math.nan if "yarn_ramp_unguarded" in mistakes else 0.001
    frequencies = []
    for j, extrapolated in enumerate(plain):
        ramp = (j - low) / width
        ramp = ramp if math.isnan(ramp) else min(max(ramp, 0.0), 1.0)
        frequencies.append(extrapolated / factor * ramp + extrapolated * (1 - ramp))
    mscale, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    if "single_mscale" in mistakes:
        amplitude = 1.0
    elif mscale and all_dim:
        amplitude = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    else:
        amplitude = _yarn_mscale(factor, 1.0)
    return torch.tensor(frequencies, dtype=torch.float64), amplitude


def softmax_scale(config: Config, mistakes: Collection[str] = ()) -> float:
    """(nope + rope)^-0.5, times the squared YaRN mscale."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config.get("rope_scaling")
    if not yarn or "no_yarn_softmax_mscale" in mistakes:
        return scale
    mscale = yarn.get("mscale" if "single_mscale" in mistakes else "mscale_all_dim")
    return scale * _yarn_mscale(yarn["factor"], mscale) ** 2 if mscale else scale


# ---------------------------------------------------------------- DeepSeekMoE (report 2.1.2)


def moe(
    config: Config, weights: Weights, prefix: str, x: Tensor, mistakes: Collection[str] = ()
) -> tuple[Tensor, Routing]:
    """Routed plus shared experts; x [B, T, D]."""
    tokens = x.reshape(-1, x.shape[-1])
    routing = gate(
        config,
        weights[prefix + "gate.weight"],
        weights[prefix + "gate.e_score_correction_bias"],
        tokens,
        mistakes,
    )
    routed = torch.zeros_like(tokens)
    for expert in range(config["n_routed_experts"]):
        rows, slots = torch.where(routing.chosen == expert)
        if len(rows):
            out = swiglu(weights, f"{prefix}experts.{expert}.", tokens[rows])
            routed = routed.index_add(0, rows, out * routing.weights[rows, slots, None])
    routing.expert_output = routed
    output = routed
    if config["n_shared_experts"]:
        output = output + swiglu(weights, prefix + "shared_experts.", tokens)
    return output.view(x.shape), routing


def gate(
    config: Config, weight: Tensor, bias: Tensor, x: Tensor, mistakes: Collection[str] = ()
) -> Routing:
    """Group-limited sigmoid gate; x [M, D], weight [E, D], bias [E] (no gradient)."""
    experts, groups = config["n_routed_experts"], config["n_group"]
    bias = bias.detach()
    if "bf16_bias" in mistakes:
        bias = bias.bfloat16().to(x.dtype)
    if "bf16_gate_weight" in mistakes:
        weight = weight.bfloat16().to(x.dtype)
    logits = x @ weight.T
    if "bf16_router_logits" in mistakes:
        logits = logits.bfloat16().to(x.dtype)
    scores = logits.sigmoid()
    biased = (scores + bias).detach()
    if "bf16_bias" in mistakes:
        biased = biased.bfloat16().to(x.dtype)  # a bf16 bias makes the sum bf16 as well
    grouped = biased.view(-1, groups, experts // groups)
    group_scores = grouped.topk(min(2, experts // groups), dim=-1).values.sum(-1)
    margin = _choice_margin(group_scores, config["topk_group"])
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, group_scores.topk(config["topk_group"], dim=-1).indices, True)
    fill = 0.0 if "masked_groups_zero" in mistakes else -math.inf
    masked = grouped.masked_fill(~kept[..., None], fill).reshape(-1, experts)
    top = config["num_experts_per_tok"]
    margin = torch.minimum(margin, _choice_margin(masked, top))
    chosen = masked.topk(top, dim=-1).indices
    source = scores + bias if "biased_combine_weights" in mistakes else scores
    combine = source.gather(1, chosen)
    if config["norm_topk_prob"]:
        combine = combine / (combine.sum(-1, keepdim=True) + 1e-20)
    return Routing(scores, chosen, combine * config["routed_scaling_factor"], margin)


def _choice_margin(values: Tensor, k: int) -> Tensor:
    """Gap between the k-th and the next value of each row; infinite when all are taken."""
    if k >= values.shape[-1]:
        return torch.full_like(values[:, 0], math.inf)
    ordered = values.sort(dim=-1, descending=True).values
    return ordered[:, k - 1] - ordered[:, k]


# ---------------------------------------------------------------- losses and balancing


def cross_entropy(logits: Tensor, input_ids: Tensor, ahead: int) -> Tensor:
    """Mean cross-entropy of row i against token i + `ahead`, over the rows that have one.

    The main model has `ahead` 1; MTP module k (from 0) has k + 2.
    """
    rows = input_ids.shape[1] - ahead
    log_probs = logits[:, :rows].log_softmax(-1)
    return -log_probs.gather(-1, input_ids[:, ahead:, None]).mean()


def balance_loss(config: Config, routing: Routing, sequences: int, alpha: float) -> Tensor:
    """Sequence-wise balance loss of one layer, averaged over its `sequences` sequences."""
    experts, top = config["n_routed_experts"], config["num_experts_per_tok"]
    total = routing.scores.new_zeros(())
    scores_per_sequence = routing.scores.view(sequences, -1, experts)
    chosen_per_sequence = routing.chosen.view(sequences, -1, top)
    for scores, chosen in zip(scores_per_sequence, chosen_per_sequence, strict=True):
        length = scores.shape[0]
        count = torch.bincount(chosen.reshape(-1), minlength=experts).to(scores.dtype)
        f = experts / (top * length) * count
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + alpha * (f * p).sum()
    return total / sequences


def updated_bias(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """The bias after one step: up where the load is below the mean, down where it is above."""
    new = bias.clone()
    mean = load.double().mean()
    for expert in range(len(bias)):
        if load[expert] < mean:
            new[expert] += speed
        elif load[expert] > mean:
            new[expert] -= speed
    return new
