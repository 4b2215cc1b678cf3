"""Rows of varying number between the devices of one mesh axis: all-to-all, there and back.

Everything here runs inside `shard_map`. Each device learns how many rows every device has for
every expert, so that both ends compute the same offsets.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Route(NamedTuple):
    """One direction, seen from one device; all int32 [devices of the axis].

    send_start, send_size: the rows here that go to each device.
    put_start: the row at which they begin there.
    receive_start, receive_size: where the rows of each device begin here, and how many come.
    """

    send_start: jax.Array
    send_size: jax.Array
    put_start: jax.Array
    receive_start: jax.Array
    receive_size: jax.Array


class Transfer(NamedTuple):
    """What `plan_transfer` finds out.

    there, back: rows to the device of their expert, and home again.
    order, inverse: int32 [rows], sorts the received rows by local expert, and undoes it.
    group_sizes: int32 [E / devices], received rows of each local expert.
    """

    there: Route
    back: Route
    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def _starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Exclusive cumulative sum."""
    return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def _segment(sizes: jax.Array, rows: int) -> jax.Array:
    """The run that each of `rows` rows belongs to, for runs of `sizes`; the last one past them."""
    count = sizes.shape[0]
    return jnp.repeat(jnp.arange(count), sizes, total_repeat_length=rows)


def _transposed_order(sizes: jax.Array, rows: int) -> jax.Array:
    """Rows lie in runs (a, b) with a slow; the permutation that makes b slow; rows past them stay.

    sizes int32 [A, B] -> int32 [rows]: the old row at each new one.
    """
    old_start = _starts(sizes.reshape(-1)).reshape(sizes.shape)
    new_sizes = sizes.T.reshape(-1)
    new_start = _starts(new_sizes)
    run = _segment(new_sizes, rows)
    row = jnp.arange(rows, dtype=jnp.int32)
    moved = old_start.T.reshape(-1)[run] + row - new_start[run]
    return jnp.where(row < new_sizes.sum(), moved, row)


def _window(start: jax.Array, size: jax.Array, first: jax.Array, rows: int) -> tuple:
    """The parts of runs of rows that lie within the `rows` rows from row `first`.

    Returns (rows of each run before its part, the part's size, its start counted from `first`).
    """
    before = jnp.clip(first - start, 0, size)
    kept = jnp.clip(first + rows - start, 0, size) - before
    return before, kept, jnp.clip(start + before - first, 0, rows)


def gather_sizes(group_sizes: jax.Array, axis: str) -> jax.Array:
    """What every device of `axis` holds for each expert: int32 [E] -> [devices, E]."""
    return jax.lax.all_gather(group_sizes, axis)


def received_rows(sizes_SE: jax.Array) -> jax.Array:
    """Rows that each device gets from all, int32 [devices]; device d has the d-th of experts."""
    devices = sizes_SE.shape[0]
    return sizes_SE.reshape(devices, devices, -1).sum((0, 2), dtype=jnp.int32)


def plan_transfer(sizes_SE: jax.Array, axis: str, first: jax.Array | int, rows: int) -> Transfer:
    """Plans the exchange of rows that every device of `axis` holds sorted by expert.

    Args:
      sizes_SE: int32 [devices, E], from `gather_sizes`; device d has the d-th share of experts.
      axis: the mesh axis.
      first, rows: of everything that arrives at a device, in the order of senders, the `rows`
        rows from row `first` travel now, into a buffer of `rows` rows.
    """
    devices, me = sizes_SE.shape[0], jax.lax.axis_index(axis)
    local = sizes_SE.shape[1] // devices
    first = jnp.asarray(first, jnp.int32)
    sizes_SD = sizes_SE.reshape(devices, devices, local).sum(-1, dtype=jnp.int32)
    before_SD, kept_SD, put_SD = _window(_starts(sizes_SD, 0), sizes_SD, first, rows)
    leave_SD = _starts(sizes_SD, 1) + before_SD
    here, to_me = (leave_SD[me], kept_SD[me]), (put_SD[:, me], kept_SD[:, me])
    mine_SE = jax.lax.dynamic_slice_in_dim(sizes_SE, me * local, local, axis=1)
    mine_start_SE = _starts(mine_SE.reshape(-1)).reshape(mine_SE.shape)
    _, mine_SE, _ = _window(mine_start_SE, mine_SE, first, rows)
    return Transfer(
        there=Route(*here, put_SD[me], *to_me),
        back=Route(*to_me, leave_SD[:, me], *here),
        order=_transposed_order(mine_SE, rows),
        inverse=_transposed_order(mine_SE.T, rows),
        group_sizes=mine_SE.sum(0, dtype=jnp.int32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange(x: jax.Array, route: Route, reverse: Route, rows: int, axis: str) -> jax.Array:
    """Sends rows along `route`; `reverse` brings gradients back.

    [R, D] -> [rows, D]; rows that nobody sends are zeros.
    """
    del reverse
    return jax.lax.platform_dependent(
        x,
        route,
        cpu=functools.partial(_send_dense, rows=rows, axis=axis),
        default=functools.partial(_send_ragged, rows=rows, axis=axis),
    )


def _exchange_forward(x, route, reverse, rows, axis):
    return exchange(x, route, reverse, rows, axis), (route, reverse, x.shape[0])


def _exchange_backward(rows, axis, residuals, dy):
    route, reverse, sent = residuals
    return exchange(dy, reverse, route, sent, axis), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _send_ragged(x: jax.Array, route: Route, *, rows: int, axis: str) -> jax.Array:
    return jax.lax.ragged_all_to_all(
        x,
        jnp.zeros((rows, x.shape[1]), x.dtype),
        route.send_start,
        route.send_size,
        route.put_start,
        route.receive_size,
        axis_name=axis,
    )


def _send_dense(x: jax.Array, route: Route, *, rows: int, axis: str) -> jax.Array:
    """The same by an all-to-all of full-size slots: XLA's CPU backend has no ragged one."""
    slot = jnp.arange(x.shape[0], dtype=jnp.int32)
    index_DR = jnp.minimum(route.send_start[:, None] + slot, x.shape[0] - 1)
    slots_DRX = jax.lax.all_to_all(x[index_DR], axis, split_axis=0, concat_axis=0)
    row = jnp.arange(rows, dtype=jnp.int32)
    # Starts ascend: the sender of a row is the last one whose rows begin at or before it.
    sender = jnp.searchsorted(route.receive_start, row, side="right").astype(jnp.int32) - 1
    sender = jnp.maximum(sender, 0)
    place = row - route.receive_start[sender]
    received = slots_DRX[sender, jnp.clip(place, 0, x.shape[0] - 1)]
    arrived = (place >= 0) & (place < route.receive_size[sender])
    return jnp.where(arrived[:, None], received, 0)
