"""The small parts: linear map, RMSNorm, SwiGLU feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.parallel.mesh import constrain


class Linear(nn.Module):
    """y = x · kernel, without a bias. Parameter `kernel` [in, out], float32 when initialised.

    Input [..., in], output [..., out] in the runtime's compute dtype.
    """

    in_features: int
    out_features: int
    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        self.kernel = self.param("kernel", init, (self.in_features, self.out_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.runtime.compute_dtype
        return x.astype(dtype) @ self.kernel.astype(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; statistics in float32, result in `dtype`.

    Parameter `weight` [features]. [..., features] -> [..., features].
    """

    features: int
    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (self.features,))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * weight.astype(jnp.float32)).astype(self.dtype)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)): the dense FFN and the shared experts.

    [..., D] -> [..., D] through `width` hidden units.
    """

    width: int
    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        hidden = self.config.hidden_size
        self.gate_proj = Linear(hidden, self.width, self.config, self.runtime)
        self.up_proj = Linear(hidden, self.width, self.config, self.runtime)
        self.down_proj = Linear(self.width, hidden, self.config, self.runtime)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(hidden, "batch", "sequence", "ffn"))
