"""The small parts: linear map, RMSNorm, SwiGLU feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.parallel.mesh import constrain

FP8_BLOCK = 128  # rows and columns of a released FP8 weight that share a scale


def scaled(module: nn.Module, name: str, weight: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A parameter's values: itself or, kept as FP8, float32 codes times their blocks' scales.

    The scales of an FP8 parameter are a variable of the same path in the collection `scales`,
    float32, with ceil(n / 128) entries along the `axes` that are in blocks.

    Raises:
      ValueError: an FP8 parameter without its scales.
    """
    if not module.has_variable("scales", name):
        if weight.dtype == jnp.float8_e4m3fn:
            path = "/".join((*module.path, name))
            raise ValueError(f"FP8 parameter {path} must have its scales in variables['scales']")
        return weight
    scale = module.get_variable("scales", name)
    for axis in axes:
        scale = jnp.repeat(scale, FP8_BLOCK, axis)
        scale = jax.lax.slice_in_dim(scale, 0, weight.shape[axis], axis=axis)
    return weight.astype(jnp.float32) * scale


class Linear(nn.Module):
    """y = x · kernel, without a bias. Parameter `kernel` [in, out], float32 when initialised.

    The kernel may be kept as FP8, see `scaled`. Input [..., in], output [..., out] in the
    runtime's compute dtype.
    """

    in_features: int
    out_features: int
    config: ModelConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (self.in_features, self.out_features))
        self.kernel = scaled(self, "kernel", kernel, axes=(0, 1))

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
