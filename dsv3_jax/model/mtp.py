"""Multi-Token Prediction (report section 2.2), in the conventions of the released weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.decoder import Rotation, remat_layer
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.moe import RoutingStats


class MTPModule(nn.Module):
    """One prediction depth: state of the depth before + embedding of the next token -> new state.

    `hidden` [B, T, D] is the main model's state after its final norm, or the depth before's after
    its `shared_head_norm`; `embedded` [B, T, D] holds the embedding of the token that far ahead.
    The result, [B, T, D], is normed and ready for the output head.
    """

    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        config, runtime = self.config, self.runtime
        norm = (config.hidden_size, config.rms_norm_eps, runtime.compute_dtype)
        self.enorm = RMSNorm(*norm)
        self.hnorm = RMSNorm(*norm)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, config, runtime)
        self.layer = remat_layer(runtime, scanned=False)(config, runtime, moe=True)
        self.shared_head_norm = RMSNorm(*norm)

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, rotation: Rotation, valid: jax.Array
    ) -> tuple[jax.Array, RoutingStats]:
        # Embedding first: the order of the released eh_proj, not of the report's equation 21.
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        x, (stats, _) = self.layer(self.eh_proj(both), rotation, valid, None, None)
        assert stats is not None  # the layer was made with moe=True
        return self.shared_head_norm(x), stats
