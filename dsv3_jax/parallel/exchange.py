"""Rows of varying number between the devices of one mesh axis: all-to-all, there and back.

Everything here runs inside `shard_map`. Each device learns how many rows every device has for
every expert, so that both ends compute the same offsets. Rows travel in one of two ways:

- "ragged": each run of rows as long as it is, one behind the other, by `ragged_all_to_all`.
- "slots": an equal slot for every pair of devices, filled or not, by a plain all-to-all. It sends
  the whole buffer, but GPUs of several processes and hosts can do it.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Way = Literal["ragged", "slots"]


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


class Pick(NamedTuple):
    """Rows of an array, some of them zeros: index int32 [n], and whether it counts, bool [n]."""

    index: jax.Array
    counts: jax.Array


class SlotRoute(NamedTuple):
    """One direction by slots: what to fill them from, or what to take from them."""

    before: Pick | None
    after: Pick | None


class Transfer(NamedTuple):
    """What `plan_transfer` finds out.

    there, back: rows to the device of their expert, and home again; Routes or SlotRoutes.
    order, inverse: int32 [rows], sorts the received rows by local expert, and undoes it.
    group_sizes: int32 [E / devices], received rows of each local expert.
    """

    there: Route | SlotRoute
    back: Route | SlotRoute
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


def way_of_devices() -> Way:
    """How rows travel on the devices traced for.

    XLA runs `ragged_all_to_all` on GPUs within one process alone, and there a thread block copies
    all that a device has for another.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return "slots" if described is not None and described.platform == "gpu" else "ragged"


def rows_needed(sizes_SE: jax.Array, way: Way) -> jax.Array:
    """Rows of a buffer that takes at once what any device of the axis gets, int32 []."""
    devices = sizes_SE.shape[0]
    sizes_SD = sizes_SE.reshape(devices, devices, -1).sum(-1, dtype=jnp.int32)
    # Slots are equal: the fullest pair counts for all.
    return sizes_SD.max() * devices if way == "slots" else sizes_SD.sum(0, jnp.int32).max()


def whole_slots(rows: int, devices: int) -> int:
    """So many rows or a few more, in equal slots."""
    return math.ceil(rows / devices) * devices


def plan_transfer(
    sizes_SE: jax.Array, axis: str, number: jax.Array | int, rows: int, sent: int, way: Way
) -> Transfer:
    """Plans the exchange of rows that every device of `axis` holds sorted by expert.

    Args:
      sizes_SE: int32 [devices, E], from `gather_sizes`; device d has the d-th share of experts.
      axis: the mesh axis.
      number: of the round. "ragged": of everything that arrives at a device, in the order of
        senders, the `rows` rows from row `number * rows` travel now. "slots": of what each device
        has for each, as many rows as a slot holds.
      rows: of the buffer they come into. sent: of the array they come from.
    """
    number = jnp.asarray(number, jnp.int32)
    if way == "slots":
        return _plan_slots(sizes_SE, axis, number, rows // sizes_SE.shape[0], sent)
    return _plan_ragged(sizes_SE, axis, number * rows, rows)


def _plan_slots(
    sizes_SE: jax.Array, axis: str, number: jax.Array, slot: int, sent: int
) -> Transfer:
    devices, me = sizes_SE.shape[0], jax.lax.axis_index(axis)
    sizes_SDL = sizes_SE.reshape(devices, devices, -1)
    sizes_SD = sizes_SDL.sum(-1, dtype=jnp.int32)
    leave_D, size_D = _starts(sizes_SD[me]), sizes_SD[me]
    place = number * slot + jnp.arange(slot, dtype=jnp.int32)
    filled_DC = place < size_D[:, None]
    source_DC = jnp.minimum(leave_D[:, None] + place, sent - 1)
    row = jnp.arange(sent, dtype=jnp.int32)
    device = _segment(size_D, sent)
    in_slot = row - leave_D[device] - number * slot
    travels = (in_slot >= 0) & (in_slot < slot)
    to_slots = Pick(source_DC.reshape(-1), filled_DC.reshape(-1))
    from_slots = Pick(device * slot + jnp.clip(in_slot, 0, slot - 1), travels)
    # Of what each device sends here: the rows of each expert in the slot, and the empty rest.
    mine_SL = sizes_SDL[:, me]
    _, mine_SL, _ = _window(_starts(mine_SL, 1), mine_SL, number * slot, slot)
    rest_S1 = slot - mine_SL.sum(1, keepdims=True, dtype=jnp.int32)
    runs = jnp.concatenate([mine_SL, rest_S1], axis=1)
    return Transfer(
        there=SlotRoute(to_slots, None),
        back=SlotRoute(None, from_slots),
        order=_transposed_order(runs, devices * slot),
        inverse=_transposed_order(runs.T, devices * slot),
        group_sizes=mine_SL.sum(0, dtype=jnp.int32),
    )


def _plan_ragged(sizes_SE: jax.Array, axis: str, first: jax.Array, rows: int) -> Transfer:
    devices, me = sizes_SE.shape[0], jax.lax.axis_index(axis)
    local = sizes_SE.shape[1] // devices
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
def exchange(
    x: jax.Array,
    route: Route | SlotRoute,
    reverse: Route | SlotRoute,
    rows: int,
    axis: str,
) -> jax.Array:
    """Sends rows along `route`; `reverse` brings gradients back.

    [R, D] -> [rows, D]; rows that nobody sends are zeros.
    """
    del reverse
    if isinstance(route, SlotRoute):
        return _send_slots(x, route, axis)
    return jax.lax.platform_dependent(
        x,
        route,
        cpu=functools.partial(_send_dense, rows=rows, axis=axis),
        cuda=functools.partial(_send_ragged, rows=rows, axis=axis, parts=_GPU_PARTS),
        default=functools.partial(_send_ragged, rows=rows, axis=axis, parts=1),
    )


def _exchange_forward(x, route, reverse, rows, axis):
    return exchange(x, route, reverse, rows, axis), (route, reverse, x.shape[0])


def _exchange_backward(rows, axis, residuals, dy):
    route, reverse, sent = residuals
    return exchange(dy, reverse, route, sent, axis), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _send_slots(x: jax.Array, route: SlotRoute, axis: str) -> jax.Array:
    slots = _pick(x, route.before)
    devices = jax.lax.axis_size(axis)
    slots = slots.reshape(devices, -1, x.shape[1])
    received = jax.lax.all_to_all(slots, axis, split_axis=0, concat_axis=0)
    return _pick(received.reshape(-1, x.shape[1]), route.after)


def _pick(x: jax.Array, pick: Pick | None) -> jax.Array:
    return x if pick is None else jnp.where(pick.counts[:, None], x[pick.index], 0)


# XLA's kernel for GPUs gives each update a thread block: so many for each pair of devices.
_GPU_PARTS = 128


def _send_ragged(x: jax.Array, route: Route, *, rows: int, axis: str, parts: int) -> jax.Array:
    sent = _in_parts(route.send_start, route.send_size, parts)
    put_start, _ = _in_parts(route.put_start, route.send_size, parts)
    _, receive_size = _in_parts(route.receive_start, route.receive_size, parts)
    out = jnp.zeros((rows, x.shape[1]), x.dtype)
    return jax.lax.ragged_all_to_all(x, out, *sent, put_start, receive_size, axis_name=axis)


def _in_parts(start: jax.Array, size: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Runs int32 [D] cut into `parts` each, nearly equal: starts and sizes [D * parts]."""
    long = (size[:, None] + parts - 1) // parts
    before = jnp.minimum(jnp.arange(parts, dtype=jnp.int32) * long, size[:, None])
    sizes = jnp.minimum(long, size[:, None] - before)
    return (start[:, None] + before).reshape(-1), sizes.reshape(-1)


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
