"""FP8 wgrad on Hopper: per-group products over rows, both operands quantised token-wise.

A block's tile is 128 by 128 or 256 of one group's gradient, 64 rows of it to each consumer. Both
scales change along the tile: one for each of its rows and one for each of its columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels._e4m3 import E4M3, TILE
from pallas_kernels.grouped_matmul import hopper_pipeline as pipeline
from pallas_kernels.grouped_matmul.hopper_fp8_sums import Products, promoted_sum
from pallas_kernels.grouped_matmul.hopper_fp8_tiles import OPERAND, GroupTile, group_tile
from pallas_kernels.grouped_matmul.hopper_tiles import ATOM
from pallas_kernels.quantize import TokenTiles


def multiply_groups(
    x: TokenTiles, dy: TokenTiles, *, tile: GroupTile | None = None, interpret: bool = False
) -> jax.Array:
    """Operands [K, P] and [N, P] -> bfloat16 [G, K, N]; K and N are multiples of 128."""
    (k, _), n, groups = x.codes.shape, dy.codes.shape[0], x.first.shape[0]
    tile = tile or group_tile(n)
    if n % tile.columns:
        raise ValueError(f"{n=} must be a multiple of {tile.columns=}")
    kernel = pipeline.launch(
        functools.partial(_body, tile=tile),
        jax.ShapeDtypeStruct((groups, k, n), jnp.bfloat16),
        {
            "x_slots": plgpu.SMEM((tile.stages, TILE, TILE), E4M3, transforms=OPERAND),
            "dy_slots": plgpu.SMEM((tile.stages, tile.columns, TILE), E4M3, transforms=OPERAND),
            "x_scales": plgpu.SMEM((tile.stages, TILE), jnp.float32),
            "dy_scales": plgpu.SMEM((tile.stages, tile.columns), jnp.float32),
            "staged": pipeline.staging(ATOM, tile.store_slots, jnp.bfloat16),
            **pipeline.ring_barriers(4, tile.stages, 1),
        },
        cluster=1,
        name="grouped_matmul_fp8_wgrad",
        interpret=interpret,
    )
    return kernel(x.first, x.count, x.codes, x.scale, dy.codes, dy.scale)


def _body(
    first, count, x, x_scale, dy, dy_scale, out,
    x_slots, dy_slots, x_scales, dy_scales, staged, full, empty, turn, *, tile,
):  # fmt: skip
    ring = pipeline.Ring(full, empty, turn, tile.stages, 0)
    groups, k_tiles, n_tiles = out.shape[0], out.shape[1] // TILE, out.shape[2] // tile.columns

    def fetch(index):
        group = lax.div(index, k_tiles * n_tiles)
        local = index - group * (k_tiles * n_tiles)
        n_tile = lax.div(local, k_tiles)
        return group, local - n_tile * k_tiles, n_tile, first[group], count[group]

    for_each_tile = functools.partial(pipeline.for_each_tile, groups * k_tiles * n_tiles, fetch)

    def produce():
        def visit(record, step):
            _, k_tile, n_tile, start, steps = record

            def copy(i, slot, full):
                tokens = pl.ds((start + i) * TILE, TILE)
                n_first = n_tile * tile.columns
                for codes, scale, channels, slots, scales in (
                    (x, x_scale, pl.ds(k_tile * TILE, TILE), x_slots, x_scales),
                    (dy, dy_scale, pl.ds(n_first, tile.columns), dy_slots, dy_scales),
                ):
                    plgpu.copy_gmem_to_smem(codes.at[channels, tokens], slots.at[slot], full)
                    plgpu.copy_gmem_to_smem(scale.at[start + i, channels], scales.at[slot], full)

            return pipeline.fill(ring, steps, step, copy)

        for_each_tile(visit)

    def consume():
        warpgroup = lax.axis_index(pipeline.WARPGROUP)
        half, shape = pl.ds(warpgroup * ATOM, ATOM), (ATOM, TILE)
        row_layout, column_layout = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))

        def operands(slot, part):
            columns = dy_slots.at[slot, pl.ds(part * TILE, TILE)]
            return x_slots.at[slot, half], _compat.transposed(columns)

        def factor(slot, row_scale, part):
            columns = dy_scales[slot, pl.ds(part * TILE, TILE)]
            column_scale = plgpu.layout_cast(columns, column_layout)
            rows = lax.broadcast_in_dim(row_scale, shape, [0])
            return lax.broadcast_in_dim(column_scale, shape, [1]) * rows

        def row_scales(slot, _):
            return plgpu.layout_cast(x_scales[slot, half], row_layout)

        products = Products(shape, tile.columns // TILE, operands, row_scales, factor)

        def visit(record, step):
            group, k_tile, n_tile, _, steps = record
            counts = lax.div(steps, tile.chain), lax.rem(steps, tile.chain)
            totals, step = promoted_sum(ring, counts, step, products, tile.chain)
            totals = [total.astype(out.dtype) for total in totals]
            down = pl.ds(k_tile * TILE + warpgroup * ATOM, ATOM)

            def chunk(column):
                def write(spot):
                    block, inside = divmod(column, TILE)
                    spot[...] = totals[block][:, inside : inside + ATOM]

                place = out.at[group, down, pl.ds(n_tile * tile.columns + column, ATOM)]
                return ATOM, write, functools.partial(pipeline.store_all, out=place)

            pipeline.send(staged.at[warpgroup], map(chunk, range(0, tile.columns, ATOM)))
            return step

        for_each_tile(visit)

    pipeline.split_roles(ring, produce, consume)
