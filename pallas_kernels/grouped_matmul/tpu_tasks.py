"""What the TPU kernels share: the list of tasks, copies of rows, and the call itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows are copied, and groups' first rows rounded down, in units of a bfloat16 memory tile.
ALIGN = 16
LANES = 128
# A tile of rows is copied in this many pieces, and only the pieces that hold rows.
_PIECES = 4


class Tasks(NamedTuple):
    """Tasks and runs as int32 arrays in scalar memory.

    A task owns rows first..end of one group. A run is all tasks of one group; the runs are in the
    order of their tasks.
    """

    counts: jax.Array  # [2]: number of tasks, number of runs
    first: jax.Array  # [tasks]
    end: jax.Array  # [tasks]
    run: jax.Array  # [tasks]: its run, or -1 for rows that belong to no group
    group: jax.Array  # [runs]: its group
    start: jax.Array  # [runs + 1]: its first task; behind the last run, its last task's successor


def make_tasks(
    sizes: jax.Array, rows: int, *, first_row: jax.Array, tile: int, fill: bool
) -> Tasks:
    """Cuts consecutive groups, whose rows begin at row `first_row`, into tasks.

    Args:
      sizes: int32 [G], rows of each group; what reaches past `rows` is cut off.
      rows: rows of the array.
      first_row: int32 [], rows before the first group.
      tile: most rows of a task, counted from its first row rounded down to `ALIGN`.
      fill: the rows before and behind the groups get tasks too (run -1) and groups without rows
        get none; otherwise the other way round, and the task of an empty group owns no row.
    """
    groups = sizes.shape[0]
    edges = jnp.minimum(first_row + jnp.append(0, jnp.cumsum(sizes)), rows)
    if fill:
        edges = jnp.concatenate([jnp.zeros(1, edges.dtype), edges, jnp.full(1, rows)])
    firsts, ends = edges[:-1], edges[1:]
    starts = firsts // ALIGN * ALIGN
    tiles = jnp.where(ends > firsts, pl.cdiv(ends - starts, tile), 0 if fill else 1)
    tile_ends = jnp.cumsum(tiles)
    # What rounding down at its front and up to whole tasks can add to each segment with rows.
    segments = firsts.shape[0]
    most = (rows + min(segments, rows) * (ALIGN + tile - 2)) // tile + (0 if fill else groups)
    task = jnp.arange(max(most, 1))
    segment = jnp.searchsorted(tile_ends, task, side="right", method="compare_all")
    segment = jnp.minimum(segment, segments - 1)
    start = starts[segment] + (task - (tile_ends - tiles)[segment]) * tile
    is_run = jnp.full(segments, True)
    if fill:
        is_run = (ends > firsts).at[0].set(False).at[-1].set(False)
    run = jnp.where(is_run, jnp.cumsum(is_run) - 1, -1)
    (of_run,) = jnp.nonzero(is_run, size=groups, fill_value=0)
    runs = is_run.sum()
    last_end = tile_ends[of_run[jnp.maximum(runs - 1, 0)]]
    arrays = (
        jnp.stack([tile_ends[-1], runs]),
        jnp.maximum(start, firsts[segment]),
        jnp.minimum(start + tile, ends[segment]),
        run[segment],
        of_run - 1 if fill else of_run,
        jnp.append((tile_ends - tiles)[of_run], 0).at[runs].set(last_end),
    )
    return Tasks(*(a.astype(jnp.int32) for a in arrays))


def floor(row: Any) -> Any:
    """`row` rounded down to `ALIGN`."""
    return pl.multiple_of(row // ALIGN * ALIGN, ALIGN)


def lanes(start: Any, size: int) -> Any:
    """Columns start..start + size, `start` a multiple of `LANES`."""
    return pl.ds(pl.multiple_of(start, LANES), size)


def each_piece(start: Any, stop: Any, limit: int, tile: int, do: Callable) -> None:
    """Calls `do(rows of the array, rows of the buffer)` for pieces that cover rows start..stop.

    The buffer holds `tile` rows of the array from `start`. A piece may reach past `stop`, but not
    past the array's `limit`.
    """
    piece = tile // _PIECES if tile % (_PIECES * ALIGN) == 0 else ALIGN

    def copy_piece(i: Any, _: None) -> None:
        row = start + i * piece

        @pl.when(row + piece <= limit)
        def _whole() -> None:
            do(pl.ds(pl.multiple_of(row, ALIGN), piece), pl.ds(i * piece, piece))

        @pl.when(row + piece > limit)
        def _at_the_end() -> None:
            def copy_unit(j: Any, _: None) -> None:
                here = pl.multiple_of(row + j * ALIGN, ALIGN)
                there = pl.multiple_of(i * piece + j * ALIGN, ALIGN)
                do(pl.ds(here, ALIGN), pl.ds(there, ALIGN))

            lax.fori_loop(0, (limit - row) // ALIGN, copy_unit, None)

    lax.fori_loop(0, pl.cdiv(stop - start, piece), copy_piece, None)


def task_sizes(tile: int) -> list[tuple[int, int]]:
    """For what numbers of rows (more than, at most) a kernel has a product of its own."""
    steps = _PIECES if tile >= 512 else 2
    return [(tile * i // steps, tile * (i + 1) // steps) for i in range(steps)]


def is_own(start: Any, size: int, first: Any, end: Any) -> jax.Array:
    """Which of `size` rows from `start` lie in first..end, bool [size, 1]."""
    row = start + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (row >= first) & (row < end)


def dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Product over one axis of each, float32; float32 operands are not rounded to bfloat16.

    Whatever jax.default_matmul_precision is: the compiler refuses bfloat16 at a higher one.
    """
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def core_share(total: int) -> tuple[Any, Any]:
    """This core's part of `total` tiles of columns: from, to."""
    core, cores = pl.program_id(0), pl.num_programs(0)
    return core * total // cores, (core + 1) * total // cores


def pad(array: jax.Array, *multiples: int) -> jax.Array:
    """`array` with zeros behind each axis up to a multiple; itself if nothing is missing."""
    missing = [-size % multiple for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, [(0, m) for m in missing]) if any(missing) else array


def call(
    kernel: Callable,
    tasks: Tasks,
    arrays: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    scratch: Sequence[Any],
    *,
    chip: pltpu.TpuInfo,
    flops: int,
    bytes_read: int,
    interpret: Any,
    name: str,
) -> jax.Array:
    """Runs `kernel(tasks, *arrays, out, *scratch)` once on each core; arrays stay in HBM."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *refs: kernel(Tasks(*refs[: len(tasks)]), *refs[len(tasks) :]),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tasks),
            grid=(chip.num_cores,),
            in_specs=[anywhere] * len(arrays),
            out_specs=anywhere,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=chip.vmem_capacity_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=bytes_read + math.prod(out.shape) * out.dtype.itemsize,
        ),
        interpret=interpret,
        name=name,
    )(*tasks, *arrays)
