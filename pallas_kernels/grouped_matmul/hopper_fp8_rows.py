"""FP8 forward and dgrad on Hopper: each run of rows times the transpose of its group's matrix.

A task is up to 128 rows of one group, a block's tile such a task by one or two blocks of 128
columns. A whole task gives each consumer 64 of its rows as WGMMA's M operand. Fewer rows would
waste it, so they become the N operand, which may have any multiple of eight, and each consumer
takes half of the columns, 64 at a time.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels._e4m3 import E4M3, TILE
from pallas_kernels.grouped_matmul import hopper_pipeline as pipeline
from pallas_kernels.grouped_matmul import hopper_tasks as tasks
from pallas_kernels.grouped_matmul.hopper_fp8_sums import Products, promoted_sum
from pallas_kernels.grouped_matmul.hopper_fp8_tiles import OPERAND, SCALES, RowTile, row_tile
from pallas_kernels.grouped_matmul.hopper_tiles import ALIGNED_ROWS, ATOM


def multiply(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    tile: RowTile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [M, C] times the transposes of w [G, O, C] -> bfloat16 [M, O].

    M is a multiple of 8, C and O are multiples of 128; rows of no group come out as zeros.
    """
    rows, columns = x.shape[0], w.shape[1]
    tile = tile or row_tile(rows, w.shape[0], columns)
    blocks = tile.columns // TILE
    if columns % (tile.columns * tile.cluster):
        raise ValueError(f"{columns=} must be a multiple of {tile.columns=} times {tile.cluster=}")
    lines, count = tasks.row_tasks(group_sizes, jnp.int32(0), rows, (TILE,), tile.panel)
    kernel = pipeline.launch(
        functools.partial(_body, tile=tile),
        jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        {
            "x_slots": plgpu.SMEM((tile.stages, TILE, TILE), E4M3, transforms=OPERAND),
            "w_slots": plgpu.SMEM((tile.stages, tile.columns, TILE), E4M3, transforms=OPERAND),
            "x_scales": plgpu.SMEM((tile.stages, TILE), jnp.float32),
            "w_scales": plgpu.SMEM((tile.stages, blocks, SCALES), jnp.float32),
            "staged": pipeline.staging(ATOM, tile.store_slots, jnp.bfloat16),
            **pipeline.ring_barriers(4, tile.stages, tile.cluster),
        },
        cluster=tile.cluster,
        name="grouped_matmul_fp8",
        interpret=interpret,
    )
    w_scale = jnp.pad(w_scale, [(0, 0), (0, 0), (0, -w_scale.shape[2] % SCALES)])
    return kernel(lines, count, x, x_scale, w, w_scale)


def _body(
    lines, count, x, x_scale, w, w_scale, out,
    x_slots, w_slots, x_scales, w_scales, staged, full, empty, turn, *, tile,
):  # fmt: skip
    ring = pipeline.Ring(full, empty, turn, tile.stages, 0)
    steps = x.shape[1] // TILE
    column_tiles = out.shape[1] // (tile.columns * tile.cluster)
    blocks = tile.columns // TILE
    fetch = functools.partial(_fetch, lines, column_tiles, tile.cluster)
    # Registers are full: for alternating turns ptxas spills the loop, at less than half the speed.
    for_each_tile = functools.partial(
        pipeline.for_each_tile, count[0] * column_tiles, fetch, alternate=False
    )

    def by_rows(high: jax.Array, run: Callable[[int, jax.Array], jax.Array], step: jax.Array):
        """`run(rows, step)` compiled for the smallest of the tile's row counts that fits."""
        variant = sum(((high > n).astype(jnp.int32) for n in tile.rows[:-1]), jnp.int32(0))
        return lax.switch(variant, [functools.partial(run, n) for n in tile.rows], step)

    def produce():
        def visit(record, step):
            column, group, window, _, high, live = record

            def load(rows, step):
                def copy(i, slot, full):
                    inner = pl.ds(i * TILE, TILE)
                    outer, own = pl.ds(window * ALIGNED_ROWS, rows), pl.ds(0, rows)
                    shared = pipeline.CLUSTER if tile.cluster > 1 else None
                    plgpu.copy_gmem_to_smem(
                        x.at[outer, inner], x_slots.at[slot, own], full, collective_axes=shared
                    )
                    across = pl.ds(column * tile.columns, tile.columns)
                    plgpu.copy_gmem_to_smem(w.at[group, across, inner], w_slots.at[slot], full)
                    plgpu.copy_gmem_to_smem(x_scale.at[i, outer], x_scales.at[slot, own], full)
                    near = pl.ds(lax.div(i, SCALES) * SCALES, SCALES)
                    own_blocks = pl.ds(column * blocks, blocks)
                    plgpu.copy_gmem_to_smem(
                        w_scale.at[group, own_blocks, near], w_scales.at[slot], full
                    )

                return pipeline.fill(ring, steps * live, step, copy)

            return by_rows(high, load, step)

        for_each_tile(visit)

    def consume():
        warpgroup = lax.axis_index(pipeline.WARPGROUP)

        def visit(record, step):
            _, _, _, _, high, live = record

            def compute(rows, step):
                products = _products(rows, blocks, warpgroup, x_slots, w_slots, x_scales, w_scales)
                chains, rest = divmod(steps, tile.chain)
                counts = chains * live, rest * live if rest else None
                totals, step = promoted_sum(ring, counts, step, products, tile.chain)
                place = functools.partial(_place, out, record, tile)
                chunks = _row_chunks if rows == TILE else _column_chunks
                pipeline.send(staged.at[warpgroup], chunks(totals, place))
                return step

            return by_rows(high, compute, step)

        for_each_tile(visit)

    pipeline.split_roles(ring, produce, consume)


def _products(rows, blocks, warpgroup, x_slots, w_slots, x_scales, w_scales) -> Products:
    """What a consumer multiplies for a task of at most `rows` rows."""
    whole = rows == TILE
    mine = pl.ds(warpgroup * ATOM, ATOM) if whole else pl.ds(0, rows)
    layout = plgpu.Layout.WGMMA.reduce(1 if whole else 0)
    shape = (ATOM, TILE if whole else rows)

    def operands(slot, part):
        if whole:
            columns = w_slots.at[slot, pl.ds(part * TILE, TILE)]
            return x_slots.at[slot, mine], _compat.transposed(columns)
        columns = w_slots.at[slot, pl.ds(part * TILE + warpgroup * ATOM, ATOM)]
        return columns, _compat.transposed(x_slots.at[slot, mine])

    def scales(slot, index):
        near = lax.rem(index, SCALES)
        of_rows = plgpu.layout_cast(x_scales[slot, mine], layout)
        return [of_rows * w_scales[slot, block, near] for block in range(blocks)]

    def factor(_, scales, part):
        return lax.broadcast_in_dim(scales[part], shape, [0 if whole else 1])

    return Products(shape, blocks, operands, scales, factor)


def _fetch(lines, column_tiles: int, cluster: int, index: jax.Array) -> tuple:
    """The `index`-th tile: column tile and the fields of its task.

    The row tasks of a panel are walked together, a column of tiles after the other.
    """
    near = lax.div(index, column_tiles)
    first, length = lines[near, tasks.PANEL_FIRST], lines[near, tasks.PANEL_LENGTH]
    local = index - first * column_tiles
    column = lax.div(local, length)
    task = first + local - column * length
    fields = (tasks.GROUP, tasks.WINDOW, tasks.LOW, tasks.HIGH, tasks.LIVE)
    column = column * cluster + lax.axis_index(pipeline.CLUSTER)
    return column, *(lines[task, field] for field in fields)


def _place(out, record: tuple, tile: RowTile, row, column, rows: int) -> dict:
    """Where `rows` rows by 64 columns go that lie at `row`, `column` of the tile, for a store."""
    tile_column, _, window, low, high, _ = record
    down = pl.ds(window * ALIGNED_ROWS + row, rows)
    return {
        "out": out.at[down, pl.ds(tile_column * tile.columns + column, ATOM)],
        "low": low - row,
        "high": high - row,
    }


def _row_chunks(totals: tuple, place: Callable) -> Iterator[tuple]:
    """The chunks, as `send` takes them, of 64 rows by all columns."""
    row = lax.axis_index(pipeline.WARPGROUP) * ATOM
    for block, total in enumerate(totals):
        total = total.astype(jnp.bfloat16)
        for column in range(0, TILE, ATOM):

            def write(spot, part=total[:, column : column + ATOM]):
                spot[...] = part

            where = place(row, block * TILE + column, ATOM)
            yield ATOM, write, functools.partial(pipeline.store_rows, **where)


def _column_chunks(totals: tuple, place: Callable) -> Iterator[tuple]:
    """The chunks, as `send` takes them, of all rows by 64 columns; `totals` are transposed."""
    column = lax.axis_index(pipeline.WARPGROUP) * ATOM
    for block, total in enumerate(totals):
        total = total.astype(jnp.bfloat16)
        for row in range(0, total.shape[1], ATOM):
            height = min(ATOM, total.shape[1] - row)
            write = functools.partial(_compat.store_transposed, value=total[:, row : row + height])
            where = place(row, block * TILE + column, height)
            yield height, write, functools.partial(pipeline.store_rows, **where)
