"""The decode cache of MLA: per token and layer, C compressed values and one rotary key of R."""

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig


@flax.struct.dataclass
class LayerCache:
    """One layer's cache, or a stack's when the arrays have a leading layer axis.

    kv: normalised compressed keys and values, [B, S, C]. k_pe: rotated shared keys, [B, S, R].
    """

    kv: jax.Array
    k_pe: jax.Array


@flax.struct.dataclass
class Cache:
    """The whole model's cache. `length` (int32 scalar) positions are filled, the same in each row.

    `dense_layers` and `moe_layers` are stacked over layers, [L, B, S, ...]; a stack without layers
    is None.
    """

    length: jax.Array
    dense_layers: LayerCache | None
    moe_layers: LayerCache | None


def init_cache(config: ModelConfig, batch: int, max_length: int, dtype: str = "bfloat16") -> Cache:
    """An empty cache for `batch` sequences of up to `max_length` tokens.

    It takes (kv_lora_rank + qk_rope_head_dim) values a token and layer.
    """

    def stack(layers: int) -> LayerCache | None:
        if layers == 0:
            return None
        shape = (layers, batch, max_length)
        return LayerCache(
            kv=jnp.zeros((*shape, config.kv_lora_rank), dtype),
            k_pe=jnp.zeros((*shape, config.qk_rope_head_dim), dtype),
        )

    return Cache(
        length=jnp.zeros((), jnp.int32),
        dense_layers=stack(config.num_dense_layers),
        moe_layers=stack(config.num_moe_layers),
    )
