"""Dispatch of tokens to experts and back: no token is ever dropped (report section 2.1.2).

Both directions are gathers by a permutation, and so are their gradients: a scatter-add would be
slow and, on some devices, not deterministic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dispatch(NamedTuple):
    """The permutation that sorts all M · K choices by expert.

    order: int32 [M·K], the choice (token · K + k) at each sorted row.
    inverse: int32 [M·K], the sorted row of each choice.
    group_sizes: int32 [E], rows of each expert.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def plan_dispatch(topk_idx: jax.Array, n_experts: int) -> Dispatch:
    """Sorts the choices by expert, stably; topk_idx int32 [M, K]."""
    flat = topk_idx.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(rows, unique_indices=True)
    group_sizes = (flat[:, None] == jnp.arange(n_experts)).sum(0, dtype=jnp.int32)
    return Dispatch(order, inverse, group_sizes)


@jax.custom_vjp
def dispatch(x: jax.Array, plan: Dispatch) -> jax.Array:
    """Copies each token to its K rows among the sorted choices: [M, D] -> [M·K, D]."""
    choices = plan.order.size // x.shape[0]
    return x[plan.order // choices]


def _dispatch_forward(x, plan):
    return dispatch(x, plan), (plan, x.shape[0])


def _dispatch_backward(residuals, dy):
    plan, tokens = residuals
    dx_MKD = dy[plan.inverse].reshape(tokens, -1, dy.shape[-1])
    return dx_MKD.sum(1, dtype=jnp.float32).astype(dy.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _unsort(y: jax.Array, plan: Dispatch) -> jax.Array:
    return y[plan.inverse]


def _unsort_forward(y, plan):
    return _unsort(y, plan), plan


def _unsort_backward(plan, dy):
    return dy[plan.order], None


_unsort.defvjp(_unsort_forward, _unsort_backward)


def combine(y: jax.Array, topk_weight: jax.Array, plan: Dispatch) -> jax.Array:
    """Weighted sum of each token's K expert outputs: [M·K, D], float32 [M, K] -> float32 [M, D]."""
    y_MKD = _unsort(y, plan).reshape(*topk_weight.shape, -1)
    return jnp.einsum("MKD,MK->MD", y_MKD, topk_weight, preferred_element_type=jnp.float32)
