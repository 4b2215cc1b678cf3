"""Causal attention for NVIDIA GPUs: cuDNN's fused kernels, behind our interface.

cuDNN takes value heads narrower than the query's (MLA) since 9.10. JAX has the binding, its public
`jax.nn.dot_product_attention` refuses the shapes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels._choose import is_hopper
from pallas_kernels._compat import cudnn_attention, has_cudnn

_WIDEST = 256  # of a head


def refusal(q: jax.Array, v: jax.Array) -> str | None:
    """Why these operands cannot run, or None."""
    if q.dtype != jnp.bfloat16:
        return f"implementation='cudnn' takes bfloat16, not {q.dtype=} (causal_attention)"
    for name, width in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if width % 8 or width > _WIDEST:
            return (
                f"{name}.shape[-1]={width} must be a multiple of 8, at most {_WIDEST}, for "
                "implementation='cudnn' (causal_attention)"
            )
    return None


def is_supported() -> bool:
    """Whether we trace for a Hopper GPU and the process has cuDNN."""
    return is_hopper() and has_cudnn()


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    """See `pallas_kernels.causal_attention`; bfloat16 only.

    Raises:
      ValueError: another dtype, or heads that cuDNN does not take.
      RuntimeError: no cuDNN in this process.
    """
    if why := refusal(q, v):
        raise ValueError(why)
    return _attend(scale, q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return cudnn_attention(q, k, v, scale=scale)


def _attend_forward(scale, q, k, v):
    out, vjp = jax.vjp(functools.partial(cudnn_attention, scale=scale), q, k, v)
    # Its result and softmax statistics can be saved by name; the operands are computed again.
    leaves, tree = jax.tree.flatten(vjp)
    leaves = [
        leaf if any(leaf is x for x in (q, k, v)) else checkpoint_name(leaf, "attention_output")
        for leaf in leaves
    ]
    return out, jax.tree.unflatten(tree, leaves)


def _attend_backward(scale, vjp, dout):
    return vjp(dout)


_attend.defvjp(_attend_forward, _attend_backward)
