"""One decoder layer, and a stack of equal layers scanned over their parameters."""

import flax.linen as nn
import jax

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.cache import LayerCache
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE, RoutingStats
from dsv3_jax.parallel.mesh import constrain

Rotation = tuple[jax.Array, jax.Array]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_output"),
}


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: attention, then a dense FFN or (with `moe`) DeepSeekMoE.

    [B, T, D] -> [B, T, D], with the layer's routing statistics and its extended cache (or None).
    """

    config: ModelConfig
    runtime: RuntimeConfig
    moe: bool

    def setup(self) -> None:
        config, runtime = self.config, self.runtime
        norm = (config.hidden_size, config.rms_norm_eps, runtime.compute_dtype)
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = MLA(config, runtime)
        self.post_attention_layernorm = RMSNorm(*norm)
        if self.moe:
            self.mlp = MoE(config, runtime)
        else:
            self.mlp = SwiGLU(config.intermediate_size, config, runtime)

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        valid: jax.Array | None,
        cache_length: jax.Array | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, tuple[RoutingStats | None, LayerCache | None]]:
        attended, cache = self.self_attn(self.input_layernorm(x), rotation, cache, cache_length)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, valid)
        else:
            out, stats = self.mlp(normed), None
        return constrain(x + out, "batch", "sequence", None), (stats, cache)


def remat_layer(runtime: RuntimeConfig, *, scanned: bool) -> type[DecoderLayer]:
    """DecoderLayer under the runtime's remat policy."""
    if runtime.remat_policy == "none":
        return DecoderLayer
    # Inside a scan the loop already keeps XLA from merging the recomputation with the original.
    policy = _REMAT_POLICIES[runtime.remat_policy]
    return nn.remat(DecoderLayer, policy=policy, prevent_cse=not scanned)


def layer_stack(
    config: ModelConfig, runtime: RuntimeConfig, *, moe: bool, length: int, name: str
) -> nn.Module:
    """`length` layers as one scanned module: parameters, statistics and caches gain an axis L."""
    scanned = nn.scan(
        remat_layer(runtime, scanned=True),
        variable_axes={"params": 0, "router_state": 0, "scales": 0, "placement": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
        length=length,
        unroll=length if runtime.unroll_layers else 1,
    )
    return scanned(config, runtime, moe, name=name)
