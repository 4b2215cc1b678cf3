"""DeepSeekMoE: group-limited sigmoid gate with bias, routed and shared experts (section 2.1.2)."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.layers import SwiGLU, scaled
from dsv3_jax.parallel import experts
from dsv3_jax.parallel.mesh import per_token
from dsv3_jax.parallel.redundancy import choose_copies
from pallas_kernels import expert_mlp_fp8, grouped_matmul


@flax.struct.dataclass
class RoutingStats:
    """What one MoE layer routed; a stack of layers puts a leading axis L on each array.

    topk_idx: chosen experts, int32 [B, T, K], in no particular order.
    topk_weight: their combine weights, float32 [B, T, K].
    load: tokens each expert received, int32 [E], counted over `valid` positions.
    balance_loss: sequence-wise balance loss without its weight alpha, float32 scalar.
    received: what the exchange of tokens between devices reports.
    """

    topk_idx: jax.Array
    topk_weight: jax.Array
    load: jax.Array
    balance_loss: jax.Array
    received: experts.Received


def select_experts(
    scores: jax.Array, bias: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Chooses K experts a token within its best groups, and their combine weights.

    The biased scores choose: groups by the sum of their two best experts, then the K best experts
    of the kept groups. The weights come from the unbiased scores.

    Args:
      scores: sigmoid affinities, float32 [..., E].
      bias: `e_score_correction_bias`, float32 [E].

    Returns:
      topk_idx int32 [..., K] and topk_weight float32 [..., K].
    """
    biased = scores + bias
    if config.n_group > 1:
        grouped = biased.reshape(*scores.shape[:-1], config.n_group, -1)
        group_score = jax.lax.top_k(grouped, 2)[0].sum(-1)
        kept_K = jax.lax.top_k(group_score, config.topk_group)[1]
        kept_G = (kept_K[..., None] == jnp.arange(config.n_group)).any(-2)
        # -inf and not 0: biased scores may be negative, and 0 would then win over them.
        biased = jnp.where(kept_G[..., None], grouped, -jnp.inf).reshape(scores.shape)
    topk_idx = jax.lax.top_k(biased, config.num_experts_per_tok)[1]
    topk_weight = jnp.take_along_axis(scores, topk_idx, axis=-1)
    if config.norm_topk_prob:
        topk_weight = topk_weight / (topk_weight.sum(-1, keepdims=True) + 1e-20)
    return topk_idx, topk_weight * config.routed_scaling_factor


def _routing_stats(
    scores: jax.Array,
    topk_idx: jax.Array,
    topk_weight: jax.Array,
    valid: jax.Array | None,
) -> RoutingStats:
    """Loads and the balance loss; scores [B, T, E], topk_* [B, T, K], valid bool [B, T] or None."""
    _, length, n_experts = scores.shape
    choices = topk_idx.shape[-1]
    chosen_BTE = (topk_idx[..., None] == jnp.arange(n_experts)).any(2)
    share_BTE = scores / scores.sum(-1, keepdims=True)
    if valid is None:
        tokens_B = jnp.full(scores.shape[:1], length, jnp.float32)
    else:
        tokens_B = valid.sum(1).astype(jnp.float32)
        chosen_BTE &= valid[..., None]
        share_BTE = jnp.where(valid[..., None], share_BTE, 0)
    count_BE = chosen_BTE.sum(1, dtype=jnp.int32)
    fraction_BE = count_BE * n_experts / (choices * tokens_B[:, None])
    share_BE = share_BTE.sum(1) / tokens_B[:, None]
    return RoutingStats(
        topk_idx=topk_idx,
        topk_weight=topk_weight,
        load=count_BE.sum(0),
        balance_loss=(fraction_BE * share_BE).sum(-1).mean(),
        received=experts.nothing_received(),
    )


class Gate(nn.Module):
    """Routes tokens, all in float32: [B, T, D] -> RoutingStats.

    Parameter `kernel` [D, E]; `e_score_correction_bias` [E] in the collection `router_state`,
    which no gradient and no optimizer touches.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None) -> RoutingStats:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        kernel = self.param("kernel", init, (config.hidden_size, config.n_routed_experts))
        bias = self.variable(
            "router_state",
            "e_score_correction_bias",
            lambda: jnp.zeros(config.n_routed_experts, jnp.float32),
        )
        # fp32: near-ties in bf16 change which expert wins.
        logits_BTE = jnp.dot(
            x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        scores_BTE = nn.sigmoid(logits_BTE)
        topk_idx, topk_weight = per_token(
            functools.partial(select_experts, config=config),
            scores_BTE,
            jax.lax.stop_gradient(bias.value),
        )
        return _routing_stats(scores_BTE, topk_idx, topk_weight, valid)


class RoutedExperts(nn.Module):
    """The routed SwiGLU experts, dropless: tokens [B, T, D], topk_* [B, T, K] -> float32 [B, T, D]
    and what the exchange of tokens between devices reports.

    Parameters: `gate_up_proj` [E, D, 2, F] (gate, then up) and `down_proj` [E, F, D]; either may
    be kept as FP8, see `scaled`. With variables from `with_redundant_experts` E counts copies.
    """

    config: ModelConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, topk_idx: jax.Array, topk_weight: jax.Array
    ) -> tuple[jax.Array, experts.Received]:
        config, dtype = self.config, self.runtime.compute_dtype
        n_experts, hidden, width = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        if self.has_variable("placement", "expert"):
            copies, slots, placed = (
                self.get_variable("placement", name) for name in ("copies", "slots", "expert")
            )
            n_experts = placed.shape[0]
            topk_idx = choose_copies(topk_idx, copies, slots)
        init = nn.initializers.normal(config.initializer_range)
        gate_up = self.param("gate_up_proj", init, (n_experts, hidden, 2, width))
        gate_up = scaled(self, "gate_up_proj", gate_up, axes=(1, 3)).astype(dtype)
        down = self.param("down_proj", init, (n_experts, width, hidden))
        down = scaled(self, "down_proj", down, axes=(1, 2)).astype(dtype)
        runtime = self.runtime
        buffer = experts.Buffer(
            runtime.expert_buffer_factor, runtime.on_overflow, runtime.expert_exchange
        )
        return experts.run_experts(
            self._compute, x.astype(dtype), topk_idx, topk_weight, gate_up, down, buffer=buffer
        )

    def _compute(
        self,
        rows: jax.Array,
        row_weight: jax.Array,
        gate_up: jax.Array,
        down: jax.Array,
        group_sizes: jax.Array,
    ) -> jax.Array:
        """Weighted SwiGLU of rows [R, D] sorted by expert -> [R, D].

        The combine weight is applied before `down_proj`, which is the same sum: the activation is
        narrower than the output, and the output is then not needed for the gradient.
        """
        implementation = self.runtime.grouped_matmul
        gate_up = gate_up.reshape(*gate_up.shape[:2], -1)
        if self.runtime.fp8_experts:
            return expert_mlp_fp8(rows, gate_up, down, group_sizes, row_weight, implementation)
        multiply = functools.partial(
            grouped_matmul, group_sizes=group_sizes, implementation=implementation
        )
        both = multiply(rows, gate_up).astype(jnp.float32)
        gate, up = jnp.split(both, 2, axis=-1)
        hidden = nn.silu(gate) * up * row_weight[:, None]
        return multiply(hidden.astype(rows.dtype), down)


class MoE(nn.Module):
    """Routed plus shared experts: [B, T, D] -> [B, T, D] and RoutingStats.

    `valid` (bool [B, T] or None) says which positions count in the statistics; all are computed.
    """

    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        config, runtime = self.config, self.runtime
        self.gate = Gate(config)
        self.experts = RoutedExperts(config, runtime)
        if config.n_shared_experts > 0:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = SwiGLU(width, config, runtime)

    def __call__(
        self, x: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, RoutingStats]:
        stats = self.gate(x, valid)
        out, received = self.experts(x, stats.topk_idx, stats.topk_weight)
        out = out.astype(x.dtype)
        if self.config.n_shared_experts > 0:
            # They depend on nothing that travels: the compiler may compute them meanwhile.
            out = out + self.shared_experts(x)
        return out, dataclasses.replace(stats, received=received)
