"""Causal attention for TPU: JAX's own Pallas kernel (splash attention), behind our interface.

It computes blocks of scores in VMEM, skips the blocks that causality masks, and has backward
kernels of its own: nothing of T x T ever lies in memory, and a compiler has one small loop to
translate where the portable form writes every block out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

_LANES = 128
_BLOCK = 512  # queries and keys whose scores exist at once
# The backward kernel writes a part of dq for each block of keys: few large blocks keep them small.
_BACKWARD_KEYS = 2048


def refusal(q: jax.Array) -> str | None:
    """Why these operands cannot run, or None."""
    if q.dtype != jnp.bfloat16:
        return f"implementation='tpu' takes bfloat16, not {q.dtype=} (causal_attention)"
    return None


def is_supported() -> bool:
    """Whether the current mesh's, or the default, device is a TPU."""
    return pltpu.is_tpu_device()


def _largest(limit: int, length: int) -> int:
    """The largest power-of-two multiple of 128 up to `limit` that divides `length`."""
    size = _LANES
    while size * 2 <= limit and length % (size * 2) == 0:
        size *= 2
    return size


def _kernel(heads: int, length: int, interpret: bool) -> Any:
    """Attention of [N, T, D] operands; its result and softmax statistics can be saved by name."""
    block = _largest(_BLOCK, length)
    return kernels.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=_largest(_BACKWARD_KEYS, length),
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attention_output",
        interpret=interpret,
    )


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, interpret: bool = False
) -> jax.Array:
    """See `pallas_kernels.causal_attention`; bfloat16 only.

    A length that is not a multiple of 128 is padded: causality keeps the padding out of every
    result. The scale is applied to the queries and rounds them once more.

    Raises:
      ValueError: another dtype.
    """
    if why := refusal(q):
        raise ValueError(why)
    length = q.shape[1]

    def heads_first(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -length % _LANES), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)

    q = (q * jnp.float32(scale)).astype(q.dtype)
    out = _attend(interpret, *map(heads_first, (q, k, v)))
    return out.swapaxes(1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend_forward(interpret, q, k, v)[0]


# Both kernels take the precision of products from the surroundings, and compile for no other than
# this one with bfloat16 operands.
def _attend_forward(interpret, q, k, v):
    _, heads, length, _ = q.shape
    with jax.default_matmul_precision("default"):
        return jax.vjp(jax.vmap(_kernel(heads, length, interpret)), q, k, v)


def _attend_backward(interpret, vjp, dout):
    with jax.default_matmul_precision("default"):
        return vjp(dout)


_attend.defvjp(_attend_forward, _attend_backward)
