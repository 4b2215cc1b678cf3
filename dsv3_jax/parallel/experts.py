"""Dispatch of tokens to experts and back: no token is ever dropped (report section 2.1.2).

On one device the choices are sorted by expert. On a mesh with an expert axis every device holds
E / expert of the experts: it sorts its own choices, sends each run of rows to the device of its
experts, and gets the results back. All of it is gathers and exchanges by permutations, and so are
the gradients: a scatter-add would be slow and, on some devices, not deterministic.

Rows arrive in a buffer of a set size. What does not fit travels in further rounds through the same
buffer, in the forward pass and in the backward pass: the result is that of a larger buffer.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.exchange import (
    Way,
    exchange,
    gather_sizes,
    plan_transfer,
    rows_needed,
    way_of_devices,
    whole_slots,
)
from dsv3_jax.parallel.mesh import axis_sizes, mesh_axes

# Names what a program does only after an overflow: a plan leaves it out of what a step sends.
OVERFLOW = "overflow"

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


class Buffer(NamedTuple):
    """The receive buffer of the exchange and how rows come into it, see `RuntimeConfig`."""

    factor: float
    on_overflow: Literal["exact", "stop"]
    way: Way | None = None


class Received(NamedTuple):
    """What the exchange reports of one layer; zeros where no rows travel.

    overflow: int32 [], 1 where a device of the mesh got more rows than its buffer holds.
    need: float32 [], rows of the device that got most, over an equal share: the buffer factor
      that would have sufficed.
    """

    overflow: jax.Array
    need: jax.Array


def nothing_received() -> Received:
    """Where no rows travel."""
    return Received(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def run_experts(
    compute: Compute,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weight: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    buffer: Buffer,
) -> tuple[jax.Array, Received]:
    """Sends tokens to their experts, computes, and returns the weighted sums.

    Args:
      compute: `compute(rows, row_weight, gate_up, down, group_sizes)`, the experts at hand on
        rows sorted by expert, each result times its row's weight. With a tensor axis the result
        may lack the other devices' part of F: parts are summed here.
      x: tokens, [B, T, D].
      topk_idx, topk_weight: int32 and float32 [B, T, K].
      gate_up: [E, D, 2, F]. down: [E, F, D].
      buffer: size of the receive buffer, and what to do with rows that it does not hold.

    Returns:
      float32 [B, T, D], all NaN on the devices of an exchange that overflowed under "stop"; and
      what the exchange reports.

    Raises:
      ConfigError: the mesh's expert or tensor axis does not divide E or F.
    """
    sizes = axis_sizes()
    if max(sizes.values()) == 1:
        out = _on_one_device(compute, x, topk_idx, topk_weight, gate_up, down)
        return out, nothing_received()
    _require_divisible(sizes, gate_up)
    batch, sequence = mesh_axes("batch", x.shape[0]), mesh_axes("sequence", x.shape[1])
    tokens = PartitionSpec(batch or None, sequence or None)
    share = topk_idx.size // math.prod(sizes[axis] for axis in (*batch, *sequence))
    local_experts = gate_up.shape[0] // sizes["expert"]
    counts = (share, topk_idx.shape[-1], local_experts, sizes["expert"])
    rows, everything = (buffer_rows(factor, *counts) for factor in (buffer.factor, math.inf))
    way = buffer.way or way_of_devices()
    if way == "slots":
        rows = whole_slots(rows, sizes["expert"])
    in_rounds = buffer.on_overflow == "exact" and rows < everything
    if sizes["expert"] == 1:
        body = _on_one_device
    elif "expert" in batch:
        body = functools.partial(_by_exchange, rows=rows, way=way, in_rounds=in_rounds)
    else:
        body = _by_selection

    # As the parameters lie. Gathered here, their gradients come back by a reduce-scatter.
    hidden = "fsdp" if sizes["fsdp"] > 1 and gate_up.shape[1] % sizes["fsdp"] == 0 else None

    def on_each_device(x, idx, weight, gate_up, down) -> tuple[jax.Array, jax.Array]:
        if hidden:
            gate_up = jax.lax.all_gather(gate_up, hidden, axis=1, tiled=True)
            down = jax.lax.all_gather(down, hidden, axis=2, tiled=True)
        out = body(compute, x, idx, weight, gate_up, down)
        out, most = out if isinstance(out, tuple) else (out, jnp.zeros((), jnp.int32))
        if sizes["tensor"] > 1:
            out = jax.lax.psum(out, "tensor")
        return out, most[None, None]

    out, most = jax.shard_map(
        on_each_device,
        in_specs=(
            *(tokens,) * 3,
            PartitionSpec("expert", hidden, None, "tensor"),
            PartitionSpec("expert", "tensor", hidden),
        ),
        out_specs=(tokens, tokens),
        check_vma=False,
    )(x, topk_idx, topk_weight, gate_up, down)
    most = most.max()
    return out, Received((most > rows).astype(jnp.int32), most.astype(jnp.float32) / share)


def _require_divisible(sizes: Mapping[str, int], gate_up: jax.Array) -> None:
    for axis, dimension, name in (
        ("expert", 0, "n_routed_experts"),
        ("tensor", 3, "moe_intermediate_size"),
    ):
        if gate_up.shape[dimension] % sizes[axis]:
            raise ConfigError(
                f"parallel.{axis}={sizes[axis]} must divide {name}={gate_up.shape[dimension]}"
            )


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
    rows = _sorted_rows(plan, x_MD, weight_MK)
    return combine(compute(*rows, gate_up, down, plan.group_sizes), plan, x_MD.shape[0])


def _sorted_rows(plan: Dispatch, x_MD, weight_MK) -> tuple[jax.Array, jax.Array]:
    """Rows [M·K, D] and their weights [M·K] in the order of the experts."""
    return dispatch(x_MD, plan), permute(weight_MK.reshape(-1), plan.order, plan.inverse)


def buffer_rows(factor: float, share: int, choices: int, local_experts: int, devices: int) -> int:
    """Rows of the receive buffer: `factor` times an equal share, at most what can ever arrive.

    A token's choices differ, so it sends a device one row for each expert there at most.

    Args:
      share: rows that a device sends, its tokens times `choices`: what each receives in balance.
      local_experts: experts on a device. devices: of the expert axis.
    """
    everything = devices * (share // choices) * min(choices, local_experts)
    return math.ceil(min(factor * share, everything))


class _Sizes(NamedTuple):
    """What every device of the axis knows before rows travel: its own sorting, all sizes
    int32 [devices, E], and the rounds that the fullest buffer or slot needs, int32 []."""

    plan: Dispatch
    sizes_SE: jax.Array
    rounds: jax.Array


class _Way(NamedTuple):
    """Rows of the receive buffer, and how they come into it."""

    buffer: int
    way: Way


def _by_exchange(compute, x, topk_idx, topk_weight, gate_up, down, *, rows, way, in_rounds):
    """Rows travel to the device of their expert and back; with the buffer that takes them at
    once."""
    x_MD, idx_MK, weight_MK = _flatten(x, topk_idx, topk_weight)
    plan = plan_dispatch(idx_MK, gate_up.shape[0] * axis_sizes()["expert"])
    sizes_SE = gather_sizes(plan.group_sizes, "expert")
    # All devices of the axis compute this from the same numbers: they agree on what follows.
    most = rows_needed(sizes_SE, way)
    sizes, how = _Sizes(plan, sizes_SE, (most + rows - 1) // rows), _Way(rows, way)
    if in_rounds:
        out = _in_rounds(compute, how, sizes, x_MD, weight_MK, gate_up, down)
    else:
        sent = _sorted_rows(plan, x_MD, weight_MK)
        out = _one_round(compute, how, sizes, 0, *sent, gate_up, down)
        # Where rows are missing: no number made without them may pass for a result.
        out = jnp.where(most > rows, jnp.nan, combine(out, plan, x_MD.shape[0]))
    return out.reshape(x.shape), most


def _one_round(compute, how: _Way, sizes: _Sizes, number, rows, row_weight, gate_up, down):
    """Results [M·K, D] of the rows that travel in round `number`; zeros for the others."""
    sent = rows.shape[0]
    transfer = plan_transfer(sizes.sizes_SE, "expert", number, how.buffer, sent, how.way)
    there, back = transfer.there, transfer.back

    def to_experts(rows: jax.Array) -> jax.Array:
        rows = exchange(rows, there, back, how.buffer, "expert")
        return permute(rows, transfer.order, transfer.inverse)

    received, weight = to_experts(rows), to_experts(row_weight[:, None])[:, 0]
    out = compute(received, weight, gate_up, down, transfer.group_sizes)
    out = permute(out, transfer.inverse, transfer.order)
    return exchange(out, back, there, sent, "expert")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(compute, how, sizes: _Sizes, x_MD, weight_MK, gate_up, down):
    """As many rounds as it takes, nearly always one; float32 [M, D].

    The backward pass computes each round again, so that memory does not grow with their number. A
    layer that is rematerialised anyway does not compute its experts once more for that.
    """
    run = functools.partial(_one_round, compute, how, sizes)

    def again(number, out):
        # Rows are sorted again rather than kept for a round that hardly ever comes.
        return out + run(number, *_sorted_rows(sizes.plan, x_MD, weight_MK), gate_up, down)

    # Outside the loop, so that its exchange may overlap with other work.
    first = run(0, *_sorted_rows(sizes.plan, x_MD, weight_MK), gate_up, down)
    with jax.named_scope(OVERFLOW):
        out = jax.lax.fori_loop(1, sizes.rounds, again, first)
    return combine(out, sizes.plan, x_MD.shape[0])


def _in_rounds_forward(compute, how, *arguments):
    return _in_rounds(compute, how, *arguments), arguments


def _in_rounds_backward(compute, how, residuals, dout_MD):
    sizes, x_MD, weight_MK, gate_up, down = residuals
    plan = sizes.plan

    def again(number, gradients):
        run = functools.partial(_one_round, compute, how, sizes, number)
        _, vjp = jax.vjp(run, *_sorted_rows(plan, x_MD, weight_MK), gate_up, down)
        dout = dispatch(dout_MD.astype(x_MD.dtype), plan)
        return jax.tree.map(jnp.add, gradients, vjp(dout))

    shapes = jax.eval_shape(functools.partial(_sorted_rows, plan), x_MD, weight_MK)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (*shapes, gate_up, down))
    drows, dweight, *dweights = jax.lax.fori_loop(0, sizes.rounds, again, zeros)
    dx_MD = combine(drows, plan, x_MD.shape[0]).astype(x_MD.dtype)
    return None, dx_MD, dweight[plan.inverse].reshape(weight_MK.shape), *dweights


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _flatten(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, X] -> [M, X] each."""
    return tuple(a.reshape(-1, a.shape[-1]) for a in arrays)
