"""Forward and dgrad on Hopper: each run of rows times its group's matrix, or its transpose.

A block's tile is `columns` columns of the product by the rows of one task. The weights are the M
operand of WGMMA, half of the columns to each consumer, and the rows are its N operand: what
accumulates is the tile transposed, and it is transposed back on its way to memory.
"""

import functools
import itertools
from collections.abc import Iterator

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
    RowTile,
    row_tile,
)


def multiply(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    transposed: bool = False,
    tile: RowTile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [M, K] times w[g] ([G, K, N], or [G, N, K] when `transposed`) -> [M, N].

    M is a multiple of 8, K and N are multiples of 64. Group 0 starts at `first_row`; rows of no
    group come out as zeros.
    """
    rows, contraction = x.shape
    columns = w.shape[1] if transposed else w.shape[2]
    tile = tile or row_tile(rows, w.shape[0], columns)
    first_row = jnp.asarray(first_row, jnp.int32)
    lines, count = tasks.row_tasks(group_sizes, first_row, rows, tile.rows, tile.panel)
    weights = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
    most = tile.rows[-1]
    kernel = pipeline.launch(
        functools.partial(_body, tile=tile, transposed=transposed),
        jax.ShapeDtypeStruct((rows, columns), x.dtype),
        {
            "x_slots": pipeline.slots(tile.stages, (most, tile.depth), x.dtype),
            "w_slots": pipeline.slots(tile.stages, weights, w.dtype),
            "staged": pipeline.staging(min(ATOM, most), tile.store_slots, x.dtype),
            **pipeline.ring_barriers(2, tile.stages, tile.cluster),
        },
        cluster=tile.cluster,
        name="grouped_matmul_dgrad" if transposed else "grouped_matmul",
        interpret=interpret,
    )
    return kernel(lines, count, x, w)


def _body(
    lines, count, x, w, out, x_slots, w_slots, staged, full, empty, turn, *, tile, transposed
):
    ring = pipeline.Ring(full, empty, turn, tile.stages, tile.lead)
    steps = -(-x.shape[1] // tile.depth)
    column_tiles = -(-out.shape[1] // (tile.columns * tile.cluster))
    fetch = functools.partial(_fetch, lines, column_tiles, tile.cluster)
    for_each_tile = functools.partial(pipeline.for_each_tile, count[0] * column_tiles, fetch)

    def produce():
        def visit(record, step):
            column, group, window, _, _, variant, live = record

            def load(rows, step):
                def copy(i, slot, full):
                    inner = pl.ds(i * tile.depth, tile.depth)
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(window * ALIGNED_ROWS, rows), inner],
                        x_slots.at[slot, pl.ds(0, rows)],
                        full,
                        collective_axes=pipeline.CLUSTER if tile.cluster > 1 else None,
                    )
                    outer = pl.ds(column * tile.columns, tile.columns)
                    where = (outer, inner) if transposed else (inner, outer)
                    plgpu.copy_gmem_to_smem(w.at[(group, *where)], w_slots.at[slot], full)

                return pipeline.fill(ring, steps * live, step, copy)

            return lax.switch(variant, [functools.partial(load, n) for n in tile.rows], step)

        for_each_tile(visit)

    def consume():
        warpgroup = lax.axis_index(pipeline.WARPGROUP)
        half = tile.columns // CONSUMERS
        own = pl.ds(warpgroup * half, half)

        def visit(record, step):
            *_, variant, live = record

            def compute(rows, step):
                def operands(_, slot):
                    if transposed:
                        weights = w_slots.at[slot, own]
                    else:
                        weights = _compat.transposed(w_slots.at[slot, :, own])
                    return weights, _compat.transposed(x_slots.at[slot, pl.ds(0, rows)])

                total, step = pipeline.drain(ring, steps * live, step, (half, rows), operands)
                pipeline.send(staged.at[warpgroup], _chunks(total, out, record, rows, tile))
                return step

            return lax.switch(variant, [functools.partial(compute, n) for n in tile.rows], step)

        for_each_tile(visit)

    pipeline.split_roles(ring, produce, consume)


def _fetch(lines, column_tiles: int, cluster: int, index: jax.Array) -> tuple:
    """The `index`-th tile: column tile and the fields of its task.

    The row tasks of a panel are walked together, a column of tiles after the other.
    """
    near = lax.div(index, column_tiles)
    first, length = lines[near, tasks.PANEL_FIRST], lines[near, tasks.PANEL_LENGTH]
    local = index - first * column_tiles
    column = lax.div(local, length)
    task = first + local - column * length
    fields = (tasks.GROUP, tasks.WINDOW, tasks.LOW, tasks.HIGH, tasks.VARIANT, tasks.LIVE)
    column = column * cluster + lax.axis_index(pipeline.CLUSTER)
    return column, *(lines[task, field] for field in fields)


def _chunks(total: jax.Array, out, record: tuple, rows: int, tile: RowTile) -> Iterator[tuple]:
    """The chunks, as `send` takes them, of a consumer's `total` [columns / 2, rows].

    Only the ends of a task can hold rows of a neighbour: its first atom, and what the next
    smaller size would not hold.
    """
    column, _, window, low, high, _, _ = record
    half = total.shape[0]
    total = total.astype(out.dtype)
    sure = max((size for size in tile.rows if size < rows), default=0)
    first = column * tile.columns + lax.axis_index(pipeline.WARPGROUP) * half
    for start, across in itertools.product(range(0, rows, ATOM), range(0, half, ATOM)):
        height = min(ATOM, rows - start)
        part = total[across : across + ATOM, start : start + height]
        place = pl.ds(window * ALIGNED_ROWS + start, height), pl.ds(first + across, ATOM)
        if start > 0 and start + height <= sure:
            copy = functools.partial(pipeline.store_all, out=out.at[place])
        else:
            copy = functools.partial(
                pipeline.store_rows, out=out.at[place], low=low - start, high=high - start
            )
        yield height, functools.partial(_compat.store_transposed, value=part), copy
