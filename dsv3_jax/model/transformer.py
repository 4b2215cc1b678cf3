"""The whole network: embedding, dense and MoE stacks, output head, MTP modules."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.cache import Cache, LayerCache
from dsv3_jax.model.decoder import layer_stack
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.moe import RoutingStats
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.rope import rotations
from dsv3_jax.parallel.mesh import constrain
from dsv3_jax.parallel.vocabulary import lookup


@flax.struct.dataclass
class Routing:
    """Routing statistics: of the MoE stack (arrays [L, ...]; None without one), then each MTP."""

    moe_layers: RoutingStats | None
    mtp: tuple[RoutingStats, ...]


@flax.struct.dataclass
class HiddenStates:
    """States ready for the output head: main [B, T, D], and one [B, T, D] a prediction depth."""

    main: jax.Array
    mtp: tuple[jax.Array, ...]
    routing: Routing
    cache: Cache | None


@flax.struct.dataclass
class ModelOutput:
    """What `Transformer` returns.

    logits: float32 [B, T, V]; position i scores token i + 1.
    mtp_logits: one array like it a prediction depth; entry k at position i scores token i + k + 2.
      Its last k + 1 positions lack the token they would be fed and mean nothing. Empty unless
      `mtp=True`.
    routing: statistics of every MoE layer. cache: the cache extended, or None.
    """

    logits: jax.Array
    mtp_logits: tuple[jax.Array, ...]
    routing: Routing
    cache: Cache | None


class Embedding(nn.Module):
    """Token embedding; parameter `embedding` [V, D]. int32 [...] -> [..., D]."""

    config: ModelConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(self.config.initializer_range)
        embedding = self.param("embedding", init, shape)
        return lookup(embedding, input_ids, self.runtime.compute_dtype)


class Transformer(nn.Module):
    """DeepSeek-V3. `model.apply(variables, input_ids)` with {"params", "router_state"}."""

    config: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()

    def setup(self) -> None:
        config, runtime = self.config, self.runtime
        self.embed_tokens = Embedding(config, runtime)
        if config.num_dense_layers > 0:
            self.dense_layers = layer_stack(
                config, runtime, moe=False, length=config.num_dense_layers, name="dense_layers"
            )
        if config.num_moe_layers > 0:
            self.moe_layers = layer_stack(
                config, runtime, moe=True, length=config.num_moe_layers, name="moe_layers"
            )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime.compute_dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config, runtime)
        self.mtp = [
            MTPModule(config, runtime, name=f"mtp_{k}")
            for k in range(config.num_nextn_predict_layers)
        ]

    def __call__(
        self, input_ids: jax.Array, *, mtp: bool = False, cache: Cache | None = None
    ) -> ModelOutput:
        """Logits of the next token, and with `mtp` of those after it.

        Args:
          input_ids: int32 [B, T].
          mtp: also run the MTP modules (not with a cache).
          cache: from `init_cache` or the last call: `input_ids` follow what it holds, and their
            number must fit what is left of it (a value, so not checked under jit).
        """
        states = self.hidden_states(input_ids, mtp=mtp or self.is_initializing(), cache=cache)
        return ModelOutput(
            logits=self._logits(states.main),
            mtp_logits=tuple(self._logits(state) for state in states.mtp),
            routing=states.routing,
            cache=states.cache,
        )

    def hidden_states(
        self, input_ids: jax.Array, *, mtp: bool = False, cache: Cache | None = None
    ) -> HiddenStates:
        """As `__call__`, without the output head."""
        if mtp and cache is not None:
            raise ValueError("mtp=True cannot be combined with a cache (Transformer)")
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if cache is not None:
            positions = positions + cache.length
        rotation = rotations(self.config, positions)
        embedded = constrain(self.embed_tokens(input_ids), "batch", "sequence", None)
        x, stats = embedded, None
        length = None if cache is None else cache.length
        new_stacks: dict[str, LayerCache | None] = {"dense_layers": None, "moe_layers": None}
        for name in new_stacks:
            if not hasattr(self, name):
                continue
            stack_cache = None if cache is None else getattr(cache, name)
            x, (stats, new_stacks[name]) = getattr(self, name)(
                x, rotation, None, length, stack_cache
            )
        hidden = self.norm(x)
        mtp_states, mtp_stats = self._predict_ahead(hidden, embedded, rotation) if mtp else ((), ())
        if cache is not None:
            cache = Cache(length=cache.length + input_ids.shape[1], **new_stacks)
        return HiddenStates(hidden, mtp_states, Routing(stats, mtp_stats), cache)

    def _predict_ahead(self, hidden, embedded, rotation):
        """Runs the MTP modules; depth k sees the embeddings shifted by k + 1 positions."""
        states, stats = [], []
        length = hidden.shape[1]
        for depth, module in enumerate(self.mtp):
            shifted = jnp.roll(embedded, -(depth + 1), axis=1)
            # The wrapped positions are computed and kept out of loads and losses.
            valid = jnp.broadcast_to(jnp.arange(length) < length - depth - 1, hidden.shape[:2])
            hidden, depth_stats = module(hidden, shifted, rotation, valid)
            states.append(hidden)
            stats.append(depth_stats)
        return tuple(states), tuple(stats)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        dtype = self.runtime.compute_dtype
        return jnp.dot(
            hidden.astype(dtype),
            self.lm_head.kernel.astype(dtype),
            preferred_element_type=jnp.float32,
        )


def init_variables(model: Transformer, key: jax.Array) -> dict:
    """Random float32 {"params", "router_state"}: normal, std `initializer_range`; norms one."""
    return jax.jit(model.init)(key, jnp.zeros((1, 2), jnp.int32))
