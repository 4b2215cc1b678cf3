"""What each operation means, in plain float32: the oracles of the kernel tests.

Cost is of no concern here; `grouped_matmul` multiplies every row by every group's matrix.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Rows of group g times `w[g]`; x [M, K], w [G, K, N] -> float32 [M, N], zeros past the sum."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    member = (row[:, None] >= (ends - group_sizes)) & (row[:, None] < ends)
    # Rows past the sum may hold anything, NaN included: replaced, not multiplied by zero.
    x = jnp.where(member.any(1)[:, None], x.astype(jnp.float32), 0)
    every = jnp.einsum("mk,gkn->gmn", x, w.astype(jnp.float32), precision="highest")
    return jnp.where(member.T[:, :, None], every, 0).sum(0)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    """softmax(q kᵀ scale) v over keys up to the query's; [B, T, N, *] -> float32 [B, T, N, H]."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, precision="highest") * scale
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
