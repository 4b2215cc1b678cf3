"""Causal attention whose value heads may be narrower than its query and key heads (MLA)."""

import jax

from pallas_kernels._choose import choose
from pallas_kernels.attention import cudnn, portable, tpu

_IMPLEMENTATIONS = {
    "portable": portable.causal_attention,
    "cudnn": cudnn.causal_attention,
    "tpu": tpu.causal_attention,
}


def _pick(q: jax.Array, v: jax.Array) -> str:
    """The implementation for the chip that is traced for."""
    if tpu.is_supported() and tpu.refusal(q) is None:
        return "tpu"
    return "cudnn" if cudnn.is_supported() and cudnn.refusal(q, v) is None else "portable"


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q kᵀ · scale) v, where query t sees keys 0..t; softmax in float32.

    Args:
      q: queries, [B, T, N, D].
      k: keys, [B, T, N, D].
      v: values, [B, T, N, H]; H may differ from D (MLA: 128 beside 192).
      scale: factor on the scores.
      implementation: "portable" (plain JAX, blocks of queries), "cudnn" (Hopper GPUs, bfloat16),
        "tpu" (bfloat16), or None to pick for the chip of the mesh set with `jax.set_mesh`, or else
        the default device.

    Returns:
      [B, T, N, H] in the dtype of `q`.

    Raises:
      ValueError: shapes that do not fit, or an implementation that is unknown or does not take
        them.
    """
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{q.shape=}, {k.shape=}, {v.shape=} must be [B, T, N, D] twice and [B, T, N, H] "
            "(causal_attention)"
        )
    name = implementation or _pick(q, v)
    return choose("causal_attention", _IMPLEMENTATIONS, name)(q, k, v, scale=scale)
