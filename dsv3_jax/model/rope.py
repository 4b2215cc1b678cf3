"""Rotary positions with YaRN scaling (arXiv 2309.00071; report section 4.3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 · mscale · ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angles per position of the R/2 rotated pairs, float32 [R/2], radians.

    With YaRN, pairs that turn more than `beta_fast` times within the original length keep their
    frequency, those that turn less than `beta_slow` times are slowed by `factor`, and a linear
    ramp joins them.
    """
    rope_dim, theta = config.qk_rope_head_dim, config.rope_theta
    exponents = np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim
    frequencies = theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that turns `turns` times within the original length."""
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), rope_dim - 1)
    # A ramp of no width would divide by zero; Hugging Face widens it by the same amount.
    high = high + 0.001 if low == high else high
    slowed = np.clip((np.arange(rope_dim // 2) - low) / (high - low), 0, 1)
    frequencies = frequencies * (1 - slowed) + frequencies / scaling.factor * slowed
    return frequencies.astype(np.float32)


def _rotation_scale(scaling: RopeScaling) -> float:
    """Factor on cos and sin: 1 when `mscale` equals `mscale_all_dim`, as in the release."""
    if scaling.mscale and scaling.mscale_all_dim:
        over = _mscale(scaling.factor, scaling.mscale_all_dim)
        return _mscale(scaling.factor, scaling.mscale) / over
    return _mscale(scaling.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on attention scores: qk_head_dim^-0.5, times YaRN's mscale² when it is on."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotations(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles: int32 [B, T] -> two float32 [B, T, R/2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    scale = 1.0 if config.rope_scaling is None else _rotation_scale(config.rope_scaling)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of the last axis, in float32.

    The result lists all first members, then all second members: queries and keys are permuted
    alike, so their products are those of the interleaved order.

    Args:
      x: [B, T, R] or [B, T, N, R].
      cos, sin: [B, T, R/2] from `rotations`.

    Returns:
      The shape and dtype of `x`.
    """
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
