"""Dispatch of tokens to experts and back: no token is ever dropped (report section 2.1.2).

On one device the choices are sorted by expert. On a mesh with an expert axis every device holds
E / expert of the experts: it sorts its own choices, sends each run of rows to the device of its
experts, and gets the results back. All of it is gathers and exchanges by permutations, and so are
the gradients: a scatter-add would be slow and, on some devices, not deterministic.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.exchange import exchange, plan_transfer
from dsv3_jax.parallel.mesh import axis_sizes, mesh_axes

# (rows [R, D] sorted by expert, their weights float32 [R], gate_up, down, group_sizes int32 [E])
# -> weighted results [R, D]
Compute = Callable[..., jax.Array]


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
    """Sorts the choices by expert, stably; topk_idx int32 [M, K].

    Choices outside 0..`n_experts` - 1 come last and count for no expert.
    """
    flat = topk_idx.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_sizes = (flat[:, None] == jnp.arange(n_experts)).sum(0, dtype=jnp.int32)
    return Dispatch(order, _inverse(order), group_sizes)


def _inverse(permutation: jax.Array) -> jax.Array:
    rows = jnp.arange(permutation.size, dtype=jnp.int32)
    return jnp.zeros_like(permutation).at[permutation].set(rows, unique_indices=True)


@jax.custom_vjp
def dispatch(x: jax.Array, plan: Dispatch) -> jax.Array:
    """Copies each token to its K rows among the sorted choices: [M, D] -> [M·K, D]."""
    choices = plan.order.size // x.shape[0]
    return x[plan.order // choices]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: jax.Array, plan: Dispatch, tokens: int) -> jax.Array:
    """Sums each token's K rows, the transpose of `dispatch`: [M·K, D] -> float32 [M, D]."""
    return y[plan.inverse].reshape(tokens, -1, y.shape[-1]).sum(1, dtype=jnp.float32)


def _dispatch_forward(x, plan):
    return dispatch(x, plan), (plan, x.shape[0])


def _dispatch_backward(residuals, dy):
    return combine(dy, *residuals).astype(dy.dtype), None


def _combine_forward(y, plan, tokens):
    return combine(y, plan, tokens), (plan, jnp.zeros((0,), y.dtype))


def _combine_backward(tokens, residuals, dout):
    plan, like = residuals
    return dispatch(dout.astype(like.dtype), plan), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], for a permutation `order` of the rows and its inverse."""
    return x[order]


def _permute_forward(x, order, inverse):
    return x[order], (order, inverse)


def _permute_backward(residuals, dy):
    return dy[residuals[1]], None, None


permute.defvjp(_permute_forward, _permute_backward)


def run_experts(
    compute: Compute,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weight: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """Sends tokens to their experts, computes, and returns the weighted sums.

    Args:
      compute: `compute(rows, row_weight, gate_up, down, group_sizes)`, the experts at hand on
        rows sorted by expert, each result times its row's weight. With a tensor axis the result
        may lack the other devices' part of F: parts are summed here.
      x: tokens, [B, T, D].
      topk_idx, topk_weight: int32 and float32 [B, T, K].
      gate_up: [E, D, 2, F]. down: [E, F, D].

    Returns:
      float32 [B, T, D].

    Raises:
      ConfigError: the mesh's expert or tensor axis does not divide E or F.
    """
    sizes = axis_sizes()
    if max(sizes.values()) == 1:
        return _on_one_device(compute, x, topk_idx, topk_weight, gate_up, down)
    for axis, dimension, name in (
        ("expert", 0, "n_routed_experts"),
        ("tensor", 3, "moe_intermediate_size"),
    ):
        if gate_up.shape[dimension] % sizes[axis]:
            raise ConfigError(
                f"parallel.{axis}={sizes[axis]} must divide {name}={gate_up.shape[dimension]}"
            )
    batch, sequence = mesh_axes("batch", x.shape[0]), mesh_axes("sequence", x.shape[1])
    tokens = PartitionSpec(batch or None, sequence or None)
    if sizes["expert"] == 1:
        body = _on_one_device
    elif "expert" in batch:
        body = _by_exchange
    else:
        body = _by_selection

    def on_each_device(*arrays: jax.Array) -> jax.Array:
        out = body(compute, *arrays)
        return jax.lax.psum(out, "tensor") if sizes["tensor"] > 1 else out

    return jax.shard_map(
        on_each_device,
        in_specs=(
            *(tokens,) * 3,
            PartitionSpec("expert", None, None, "tensor"),
            PartitionSpec("expert", "tensor"),
        ),
        out_specs=tokens,
        check_vma=False,
    )(x, topk_idx, topk_weight, gate_up, down)


def _on_one_device(compute, x, topk_idx, topk_weight, gate_up, down):
    """All experts are here."""
    x_MD, idx_MK, weight_MK = _flatten(x, topk_idx, topk_weight)
    plan = plan_dispatch(idx_MK, gate_up.shape[0])
    return _compute_here(compute, x_MD, weight_MK, gate_up, down, plan).reshape(x.shape)


def _by_selection(compute, x, topk_idx, topk_weight, gate_up, down):
    """Every device of the expert axis holds the same tokens: each adds what its experts give."""
    x_MD, idx_MK, weight_MK = _flatten(x, topk_idx, topk_weight)
    local = gate_up.shape[0]
    idx_MK = idx_MK - jax.lax.axis_index("expert") * local
    # Rows of other devices' experts lie past the sum of the group sizes and come out as zeros.
    plan = plan_dispatch(jnp.where((idx_MK >= 0) & (idx_MK < local), idx_MK, local), local)
    out = _compute_here(compute, x_MD, weight_MK, gate_up, down, plan)
    return jax.lax.psum(out.reshape(x.shape), "expert")


def _compute_here(compute, x_MD, weight_MK, gate_up, down, plan: Dispatch) -> jax.Array:
    row_weight = permute(weight_MK.reshape(-1), plan.order, plan.inverse)
    out = compute(dispatch(x_MD, plan), row_weight, gate_up, down, plan.group_sizes)
    return combine(out, plan, x_MD.shape[0])


def _by_exchange(compute, x, topk_idx, topk_weight, gate_up, down):
    """Rows travel to the device of their expert and back."""
    x_MD, idx_MK, weight_MK = _flatten(x, topk_idx, topk_weight)
    devices, sent = axis_sizes()["expert"], idx_MK.size
    plan = plan_dispatch(idx_MK, gate_up.shape[0] * devices)
    buffer = sent * devices  # holds every row of every device: none can be too many
    transfer = plan_transfer(plan.group_sizes, "expert", buffer)
    there, back = transfer.there, transfer.back

    def to_experts(rows: jax.Array) -> jax.Array:
        rows = exchange(rows, there, back, buffer, "expert")
        return permute(rows, transfer.order, transfer.inverse)

    weight_rows = permute(weight_MK.reshape(-1, 1), plan.order, plan.inverse)
    rows, row_weight = to_experts(dispatch(x_MD, plan)), to_experts(weight_rows)[:, 0]
    out = compute(rows, row_weight, gate_up, down, transfer.group_sizes)
    out = permute(out, transfer.inverse, transfer.order)
    out = exchange(out, back, there, sent, "expert")
    return combine(out, plan, x_MD.shape[0]).reshape(x.shape)


def _flatten(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, X] -> [M, X] each."""
    return tuple(a.reshape(-1, a.shape[-1]) for a in arrays)
