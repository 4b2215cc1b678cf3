"""Multi-head Latent Attention (report section 2.1.1), in its two equal forms.

*Expanded*: keys and values of every head are computed from the compressed ones; for whole
sequences. *Absorbed*: the key half of `kv_b_proj` moves into the query and its value half behind
the weighted sum, so that a decode step reads only the compressed cache.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.cache import LayerCache
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.rope import rotate, softmax_scale
from dsv3_jax.parallel.context import attend_over_context, shares_sequences
from dsv3_jax.parallel.mesh import constrain, per_head
from pallas_kernels import causal_attention

# Hugging Face builds the two inner norms with the default epsilon, whatever rms_norm_eps says.
_INNER_NORM_EPS = 1e-6


class MLA(nn.Module):
    """Multi-head Latent Attention, [B, T, D] -> [B, T, D].

    Without a cache it attends causally within its input (expanded form). With one it appends its
    input at `cache_length` and attends to everything cached so far (absorbed form), and returns
    the cache extended.
    """

    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        config, runtime = self.config, self.runtime
        hidden, heads = config.hidden_size, config.num_attention_heads

        def linear(in_features: int, out_features: int) -> Linear:
            return Linear(in_features, out_features, config, runtime)

        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, _INNER_NORM_EPS, runtime.compute_dtype)

        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = norm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = norm(config.kv_lora_rank)
        self.kv_b_proj = linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = linear(heads * config.v_head_dim, hidden)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        cache_length: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends; `rotation` is cos and sin [B, T, R/2] of the input's positions.

        Raises:
          ValueError: a cache without `cache_length`.
        """
        q_nope_BTNP, q_pe_BTNR = self._queries(x, rotation)
        kv_BTC, k_pe_BTR = self._compressed(x, rotation)
        if cache is None:
            out_BTNH = self._expanded(q_nope_BTNP, q_pe_BTNR, kv_BTC, k_pe_BTR)
        else:
            if cache_length is None:
                raise ValueError("cache_length=None must be given with a cache (MLA)")
            # In the cache's dtype, at the rows that follow what is there.
            cache = LayerCache(
                kv=lax.dynamic_update_slice_in_dim(
                    cache.kv, kv_BTC.astype(cache.kv.dtype), cache_length, axis=1
                ),
                k_pe=lax.dynamic_update_slice_in_dim(
                    cache.k_pe, k_pe_BTR.astype(cache.k_pe.dtype), cache_length, axis=1
                ),
            )
            out_BTNH = self._absorbed(q_nope_BTNP, q_pe_BTNR, cache, cache_length)
        out_BTNH = checkpoint_name(out_BTNH, "attention_output")
        return self.o_proj(out_BTNH.reshape(*x.shape[:2], -1)), cache

    def _queries(self, x, rotation):
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], config.num_attention_heads, config.qk_head_dim)
        q = constrain(q, "batch", "sequence", "heads", None)
        q_nope_BTNP, q_pe_BTNR = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        return q_nope_BTNP, rotate(q_pe_BTNR, *rotation)

    def _compressed(self, x, rotation):
        kv_BTC, k_pe_BTR = jnp.split(
            self.kv_a_proj_with_mqa(x), [self.config.kv_lora_rank], axis=-1
        )
        return self.kv_a_layernorm(kv_BTC), rotate(k_pe_BTR, *rotation)

    def _expanded(self, q_nope_BTNP, q_pe_BTNR, kv_BTC, k_pe_BTR):
        config = self.config
        if shares_sequences(kv_BTC.shape[1]):
            q = jnp.concatenate([q_nope_BTNP, q_pe_BTNR], axis=-1)
            kernel_CNX = self._expanding_kernel()
            scale = softmax_scale(config)
            return attend_over_context(q, kv_BTC, k_pe_BTR, kernel_CNX, scale=scale)
        kv = self.kv_b_proj(kv_BTC).reshape(*q_nope_BTNP.shape[:3], -1)
        kv = constrain(kv, "batch", None, "heads", None)
        k_nope_BTNP, v_BTNH = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
        k_pe_BTNR = jnp.broadcast_to(k_pe_BTR[:, :, None], q_pe_BTNR.shape)
        return per_head(
            functools.partial(causal_attention, scale=softmax_scale(config)),
            jnp.concatenate([q_nope_BTNP, q_pe_BTNR], axis=-1),
            jnp.concatenate([k_nope_BTNP, k_pe_BTNR], axis=-1),
            v_BTNH,
        )

    def _expanding_kernel(self):
        """`kv_b_proj` as [C, N, P + H] in the compute dtype."""
        config = self.config
        kernel = self.kv_b_proj.kernel.astype(self.runtime.compute_dtype)
        return kernel.reshape(config.kv_lora_rank, config.num_attention_heads, -1)

    def _absorbed(self, q_nope_BTNP, q_pe_BTNR, cache, cache_length):
        config = self.config
        kv_b_k_CNP, kv_b_v_CNH = jnp.split(
            self._expanding_kernel(), [config.qk_nope_head_dim], axis=-1
        )
        q_BTNC = jnp.einsum("BTNP,CNP->BTNC", q_nope_BTNP, kv_b_k_CNP)
        kv_BSC, k_pe_BSR = (a.astype(q_BTNC.dtype) for a in (cache.kv, cache.k_pe))
        scores_BNTS = jnp.einsum(
            "BTNC,BSC->BNTS", q_BTNC, kv_BSC, preferred_element_type=jnp.float32
        )
        scores_BNTS += jnp.einsum(
            "BTNR,BSR->BNTS", q_pe_BTNR, k_pe_BSR, preferred_element_type=jnp.float32
        )
        query_T = cache_length + jnp.arange(q_BTNC.shape[1])
        seen_TS = query_T[:, None] >= jnp.arange(kv_BSC.shape[1])
        scores_BNTS = jnp.where(seen_TS, scores_BNTS * softmax_scale(config), -jnp.inf)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNC.dtype)
        context_BTNC = jnp.einsum("BNTS,BSC->BTNC", weights_BNTS, kv_BSC)
        return jnp.einsum("BTNC,CNH->BTNH", context_BTNC, kv_b_v_CNH)
