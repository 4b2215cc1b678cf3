"""Causal attention in plain JAX, a block of queries at a time."""

import jax
import jax.numpy as jnp

BLOCK = 512  # queries whose scores exist at once; keys after the block are never touched


def _block(q: jax.Array, k: jax.Array, v: jax.Array, first: int, scale: float) -> jax.Array:
    """Attention of the queries first, first + 1, ... to the keys from 0 to the last of them."""
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32) * scale
    query = first + jnp.arange(q.shape[1])
    seen = query[:, None] >= jnp.arange(k.shape[1])
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    """See `pallas_kernels.causal_attention`. Memory grows with T · 512, not T · T."""
    length = q.shape[1]
    if length <= BLOCK:
        return _block(q, k, v, 0, scale)
    # Blocks are recomputed in the backward pass: their scores never exist together.
    block = jax.checkpoint(_block, static_argnums=(3, 4))
    outputs = []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        outputs.append(block(q[:, first:last], k[:, :last], v[:, :last], first, scale))
    return jnp.concatenate(outputs, axis=1)
