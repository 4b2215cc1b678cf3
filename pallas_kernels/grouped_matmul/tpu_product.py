"""TPU kernel of the forward product and of dgrad: rows times their own group's weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu_tiles
from pallas_kernels.grouped_matmul.tpu_tasks import (
    ALIGN,
    LANES,
    Tasks,
    call,
    core_share,
    dot,
    each_piece,
    floor,
    is_own,
    lanes,
    make_tasks,
    pad,
    task_sizes,
)

# A matrix of weights arrives in this many copies, spread over the tasks before it is needed.
_CHUNKS = 8


class _Copies:
    """The copies of one kernel call; `move` is "start" or "wait"."""

    def __init__(self, tasks, x, w, out, buffers, semaphores, tiles, transposed):
        self.tasks, self.arrays, self.tiles, self.transposed = tasks, (x, w, out), tiles, transposed
        self.buffers, self.semaphores = buffers, semaphores
        self.count, self.runs = tasks.counts[0], tasks.counts[1]
        self.low, high = core_share(out.shape[1] // tiles.columns)
        self.steps = (high - self.low) * self.count
        self.all_runs = (high - self.low) * self.runs

    def x(self, task: Any, slot: Any, move: str) -> None:
        """The rows of a task; nothing for rows that belong to no group."""
        x, buffer, semaphore = self.arrays[0], self.buffers[0], self.semaphores[0]
        start = floor(self.tasks.first[task])
        stop = jnp.where(self.tasks.run[task] >= 0, self.tasks.end[task], start)

        def piece(here: Any, there: Any) -> None:
            copy = pltpu.make_async_copy(x.at[here], buffer.at[slot, there], semaphore.at[slot])
            getattr(copy, move)()

        each_piece(start, stop, x.shape[0], self.tiles.rows, piece)

    def w(self, index: Any, chunks: tuple[Any, Any], move: str) -> None:
        """Parts of the weights of this core's run `index`, counted over the tiles of columns."""
        w, buffer, semaphore = self.arrays[1], self.buffers[1], self.semaphores[1]
        slot, group = index % self.tiles.slots, self.tasks.group[index % self.runs]
        columns = lanes((self.low + index // self.runs) * self.tiles.columns, self.tiles.columns)
        size = buffer.shape[1] // _CHUNKS

        def chunk(i: Any, _: None) -> None:
            there = pl.ds(pl.multiple_of(i * size, ALIGN), size)
            if self.transposed:
                here = pl.ds(pl.multiple_of(columns.start + i * size, ALIGN), size)
                source = w.at[group, here]
            else:
                source = w.at[group, there, columns]
            copy = pltpu.make_async_copy(source, buffer.at[slot, there], semaphore.at[slot])
            getattr(copy, move)()

        lax.fori_loop(*chunks, chunk, None)

    def out(self, step: Any, move: str) -> None:
        """The result of a step."""
        out, buffer, semaphore = self.arrays[2], self.buffers[2], self.semaphores[2]
        task, slot = step % self.count, step % 2
        columns = lanes((self.low + step // self.count) * self.tiles.columns, self.tiles.columns)

        def piece(here: Any, there: Any) -> None:
            copy = pltpu.make_async_copy(
                buffer.at[slot, there], out.at[here, columns], semaphore.at[slot]
            )
            getattr(copy, move)()

        start, end = floor(self.tasks.first[task]), self.tasks.end[task]
        each_piece(start, end, out.shape[0], self.tiles.rows, piece)


def _kernel(
    tasks: Tasks,
    x: Any,  # [M, C]
    w: Any,  # [G, C, N], or [G, N, C] when transposed
    out: Any,  # [M, N]
    x_buf: Any,  # [2, rows, C]
    w_buf: Any,  # [slots, C, columns], or [slots, columns, C]
    out_buf: Any,  # [2, rows, columns]
    *semaphores: Any,
    tiles: tpu_tiles.ProductTiles,
    transposed: bool,
) -> None:
    """A step is one task for one tile of columns; the tasks of all groups for one tile, then on."""
    buffers = (x_buf, w_buf, out_buf)
    copies = _Copies(tasks, x, w, out, buffers, semaphores, tiles, transposed)

    def multiply(slot: Any, w_slot: Any, size: int) -> None:
        def block(i: Any, _: None) -> None:
            columns = lanes(i * tiles.block, tiles.block)
            right = w_buf[w_slot, columns] if transposed else w_buf[w_slot, :, columns]
            # Each row's product is its own. What comes of the rows that are not the task's, which
            # may hold anything, is written over: behind them by the next task, before them below.
            product = dot(x_buf[slot, :size], right, 1, 1 if transposed else 0)
            out_buf[slot, :size, columns] = product.astype(out.dtype)

        lax.fori_loop(0, tiles.columns // tiles.block, block, None)

    def visit(step: Any, _: None) -> None:
        task, slot = step % copies.count, step % 2
        first, end, run = tasks.first[task], tasks.end[task], tasks.run[task]
        start = floor(first)

        @pl.when(step + 1 < copies.steps)
        def _prefetch() -> None:
            copies.x((step + 1) % copies.count, 1 - slot, "start")

        @pl.when(run < 0)
        def _of_no_group() -> None:
            out_buf[slot] = jnp.zeros(out_buf.shape[1:], out.dtype)

        @pl.when(run >= 0)
        def _of_a_group() -> None:
            index = step // copies.count * copies.runs + run
            number, tasks_of_run = task - tasks.start[run], tasks.start[run + 1] - tasks.start[run]

            @pl.when(number == 0)
            def _need_weights() -> None:
                copies.w(index, (0, _CHUNKS), "wait")

            ahead = index + tiles.slots - 1

            @pl.when(ahead < copies.all_runs)
            def _fetch_ahead() -> None:
                part = [n * _CHUNKS // tasks_of_run for n in (number, number + 1)]
                copies.w(ahead, (part[0], part[1]), "start")

            copies.x(task, slot, "wait")
            for fewer, size in task_sizes(tiles.rows):

                @pl.when((end - start > fewer) & (end - start <= size))
                def _multiply(size: int = size) -> None:
                    multiply(slot, index % tiles.slots, size)

        @pl.when(first > start)
        def _join() -> None:
            # The first unit also holds rows of the task before, which are still in its buffer.
            back = pl.multiple_of(start - floor(tasks.first[task - 1]), ALIGN)
            theirs = out_buf[1 - slot, pl.ds(back, ALIGN)].astype(jnp.float32)
            ours = out_buf[slot, :ALIGN].astype(jnp.float32)
            joined = jnp.where(is_own(start, ALIGN, first, end), ours, theirs)
            out_buf[slot, :ALIGN] = joined.astype(out.dtype)

        # In order: the last piece of a task may reach over rows that the next one writes.
        @pl.when(step > 0)
        def _one_at_a_time() -> None:
            copies.out(step - 1, "wait")

        copies.out(step, "start")

    @pl.when(copies.steps > 0)
    def _walk() -> None:
        copies.x(0, 0, "start")
        for index in range(tiles.slots - 1):

            @pl.when(index < copies.all_runs)
            def _fetch(index: int = index) -> None:
                copies.w(index, (0, _CHUNKS), "start")

        lax.fori_loop(0, copies.steps, visit, None)
        copies.out(copies.steps - 1, "wait")


def product(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    first_row: jax.Array,
    *,
    transposed: bool,
    interpret: Any,
) -> jax.Array:
    """x [M, C] times w[g] ([G, C, N], or [G, N, C] when `transposed`) -> [M, N].

    Rows before `first_row` and behind the groups are not read and come out as zeros.
    """
    rows, columns = x.shape[0], w.shape[1 if transposed else 2]
    x, w = pad(x, ALIGN, LANES), pad(w, 1, LANES, LANES)
    (limit, contracted), wide = x.shape, w.shape[1 if transposed else 2]
    chip = tpu_tiles.chip(interpret)
    tiles = tpu_tiles.product_tiles(chip, limit, w.shape[0], contracted, wide, x.dtype.itemsize)
    weights = (tiles.columns, contracted) if transposed else (contracted, tiles.columns)
    out = call(
        functools.partial(_kernel, tiles=tiles, transposed=transposed),
        make_tasks(sizes, limit, first_row=first_row, tile=tiles.rows, fill=True),
        (x, w),
        jax.ShapeDtypeStruct((limit, wide), x.dtype),
        [
            pltpu.VMEM((2, tiles.rows, contracted), x.dtype),
            pltpu.VMEM((tiles.slots, *weights), x.dtype),
            pltpu.VMEM((2, tiles.rows, tiles.columns), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((tiles.slots,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        chip=chip,
        flops=2 * limit * contracted * wide,
        bytes_read=(x.size * (wide // tiles.columns) + w.size) * x.dtype.itemsize,
        interpret=interpret,
        name="grouped_matmul_dgrad" if transposed else "grouped_matmul",
    )
    return out[:rows, :columns]
