"""Wgrad on Hopper: per-group xᵀ dy, contracted over the rows of the group.

A block's tile is `k` by `n` of one group's gradient, half of `k` to each consumer; both operands
are read as they are stored. A tile is many outputs after few products, so a consumer keeps it in
registers, rounded, and stores it in chunks under the products of the next one. A group without rows
takes no step and stores its zeros.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.grouped_matmul import hopper_pipeline as pipeline
from pallas_kernels.grouped_matmul import hopper_tasks as tasks
from pallas_kernels.grouped_matmul.hopper_tiles import (
    ALIGNED_ROWS,
    ATOM,
    CONSUMERS,
    GroupTile,
    group_tile,
)


def multiply_groups(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    tile: GroupTile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Per-group xᵀ dy: x [M, K], dy [M, N] -> [G, K, N]; zeros for groups without rows.

    M is a multiple of 8, K and N are multiples of 64. Group 0 starts at `first_row`.
    """
    (_, k), n, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    tile = tile or group_tile(x.shape[0], groups, k, n)
    first_row = jnp.asarray(first_row, jnp.int32)
    lines, edges = tasks.group_steps(group_sizes, first_row, tile.depth)
    x_edges, dy_edges = (
        jnp.where(edges[..., None] >= 0, operand[jnp.maximum(edges, 0)], 0) for operand in (x, dy)
    )
    atom = min(tile.depth, ATOM)
    kernel = pipeline.launch(
        # The simulator has no semaphores, and the pace changes no result.
        functools.partial(_body, tile=tile, pace=0 if interpret else tile.pace),
        jax.ShapeDtypeStruct((groups, k, n), x.dtype),
        {
            "x_slots": pipeline.slots(tile.stages, (tile.depth, tile.k), x.dtype, atom),
            "dy_slots": pipeline.slots(tile.stages, (tile.depth, tile.n), x.dtype, atom),
            "staged": pipeline.staging(ATOM, tile.store_slots, x.dtype),
            "rest": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            **pipeline.ring_barriers(2, tile.stages, tile.cluster),
        },
        cluster=tile.cluster,
        name="grouped_matmul_wgrad",
        interpret=interpret,
    )
    return kernel(lines, x, dy, x_edges, dy_edges)


def _body(
    lines, x, dy, x_edges, dy_edges, out,
    x_slots, dy_slots, staged, rest, full, empty, turn, *, tile, pace,
):  # fmt: skip
    ring = pipeline.Ring(full, empty, turn, tile.stages, 0)
    pacemaker = pipeline.pacemaker(pace) if pace else None
    groups, k, n = out.shape
    k_tiles, n_tiles = -(-k // (tile.k * tile.cluster)), -(-n // tile.n)

    def fetch(index):
        group = lax.div(index, k_tiles * n_tiles)
        local = lax.rem(index, k_tiles * n_tiles)
        inner = n_tiles if tile.across else k_tiles
        outer_tile, inner_tile = lax.div(local, inner), lax.rem(local, inner)
        down, across = (outer_tile, inner_tile) if tile.across else (inner_tile, outer_tile)
        k_tile = down * tile.cluster + lax.axis_index(pipeline.CLUSTER)
        fields = (tasks.FIRST_ATOM, tasks.FULL_STEPS, tasks.MORE_ATOMS, tasks.STEPS)
        return group, k_tile, across, *(lines[group, f] for f in fields)

    for_each_tile = functools.partial(pipeline.for_each_tile, groups * k_tiles * n_tiles, fetch)

    def produce():
        def visit(record, step):
            group, k_tile, n_tile, *_, steps = record
            # Operand, its gathered rows, slots, columns, shared by multicast.
            sides = (
                (x, x_edges.at[group], x_slots, pl.ds(k_tile * tile.k, tile.k), False),
                (dy, dy_edges.at[group], dy_slots, pl.ds(n_tile * tile.n, tile.n), True),
            )
            copy = functools.partial(_copy, sides=sides, record=record, rest=rest, tile=tile)
            return pipeline.fill(ring, steps, step, copy)

        for_each_tile(visit, pace=pacemaker)

    def consume():
        warpgroup = lax.axis_index(pipeline.WARPGROUP)
        half = tile.k // CONSUMERS

        def visit(record, state):
            (group, k_tile, n_tile, _, full_steps, _, steps), (step, former) = record, state

            def operands(i, slot):
                pl.when(i >= full_steps)(lambda: plgpu.barrier_wait(rest.at[slot]))
                own = x_slots.at[slot, :, pl.ds(warpgroup * half, half)]
                return _compat.transposed(own), dy_slots.at[slot]

            send = functools.partial(_send, former, out, staged.at[warpgroup])
            total, step = pipeline.drain(ring, steps, step, (half, tile.n), operands, send)
            lax.fori_loop(steps, _count(total), lambda i, _: send(i), None)
            down = k_tile * CONSUMERS + warpgroup
            return step, _Finished(total.astype(out.dtype), group, down, n_tile)

        none = jnp.zeros((half, tile.n), out.dtype)
        _, last = for_each_tile(visit, (0, _Finished(none, -1, 0, 0)))
        send = functools.partial(_send, last, out, staged.at[warpgroup])
        lax.fori_loop(0, _count(none), lambda i, _: send(i), None)

    pipeline.split_roles(ring, produce, consume)


def _copy(i: jax.Array, slot: jax.Array, full, *, sides, record, rest, tile) -> None:
    """Fills a slot with the rows of step `i`.

    A step after the full ones is filled by two copies a side, which count on two barriers.
    """
    _, _, _, first_atom, full_steps, more_atoms, _ = record
    atoms = tile.depth // ALIGNED_ROWS
    start = (first_atom + i * atoms) * ALIGNED_ROWS
    after = i - full_steps

    def whole():
        for operand, _, slots, columns, shared in sides:
            plgpu.copy_gmem_to_smem(
                operand.at[pl.ds(start, tile.depth), columns],
                slots.at[slot],
                full,
                collective_axes=pipeline.CLUSTER if shared and tile.cluster > 1 else None,
            )

    def edge(count: int):
        """`count` rows as they are, then gathered ones, then zeros.

        The zeros are what a copy finds beyond the end of an array. The gathered rows spill over
        into one more step at most, and only after a step whose rows but eight were whole atoms.
        """
        left = tile.depth - count
        for operand, gathered, slots, columns, _ in sides:
            if count:
                plgpu.copy_gmem_to_smem(
                    operand.at[pl.ds(start, count), columns], slots.at[slot, pl.ds(0, count)], full
                )
            else:
                plgpu.barrier_arrive(full)
            plgpu.copy_gmem_to_smem(
                gathered.at[pl.ds(after * ALIGNED_ROWS, left), columns],
                slots.at[slot, pl.ds(count, left)],
                rest.at[slot],
            )

    edges = [functools.partial(edge, n * ALIGNED_ROWS) for n in range(atoms)]
    kind = jnp.where(after == 0, more_atoms, 0)
    lax.switch(jnp.where(after < 0, 0, 1 + kind), [whole, *edges])


class _Finished(NamedTuple):
    """A tile that is multiplied but not stored.

    Attributes:
      values: a consumer's outputs.
      group: whose gradient, or -1: nothing is to be stored.
      down, across: how many such values lie above and to the left of them.
    """

    values: jax.Array
    group: jax.Array | int
    down: jax.Array | int
    across: jax.Array | int


def _count(values: jax.Array) -> int:
    return math.prod(values.shape) // ATOM**2


def _send(tile: _Finished, out, staged, i: jax.Array) -> None:
    """Sends the `i`-th chunk of 64 by 64 values to `out` [G, K, N], if there is one."""
    count, (rows, columns) = _count(tile.values), tile.values.shape

    def send(index: int) -> None:
        down, across = (ATOM * at for at in divmod(index, columns // ATOM))

        def write(spot):
            spot[...] = tile.values[down : down + ATOM, across : across + ATOM]

        rows_out = pl.ds(tile.down * rows + down, ATOM)
        columns_out = pl.ds(tile.across * columns + across, ATOM)
        copy = functools.partial(pipeline.store_all, out=out.at[tile.group, rows_out, columns_out])
        pipeline.send_chunk(staged, index, (ATOM, write, copy))

    branches = [functools.partial(send, index) for index in range(count)]
    lax.switch(jnp.where(tile.group < 0, count, jnp.minimum(i, count)), [*branches, lambda: None])
