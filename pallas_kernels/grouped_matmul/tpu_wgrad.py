"""TPU kernel of the weights' gradient: per-group xᵀ dy."""

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


class _Copies:
    """The copies of one kernel call; `move` is "start" or "wait"."""

    def __init__(self, tasks, x, dy, out, buffers, semaphores, tiles):
        self.tasks, self.inputs, self.result, self.tiles = tasks, (x, dy), out, tiles
        self.buffers, self.semaphores = buffers, semaphores
        self.count, self.groups = tasks.counts[0], out.shape[0]
        self.across = out.shape[2] // tiles.n
        self.low, high = core_share(out.shape[1] // tiles.k * self.across)
        self.steps, self.outputs = (high - self.low) * self.count, (high - self.low) * self.groups

    def place(self, index: Any) -> tuple[Any, Any]:
        """Where this core's tile number `index` lies in K and N."""
        down, right = (self.low + index) // self.across, (self.low + index) % self.across
        return lanes(down * self.tiles.k, self.tiles.k), lanes(right * self.tiles.n, self.tiles.n)

    def rows(self, step: Any, move: str) -> None:
        """The rows of a step's task in x and dy; nothing for a group without rows."""
        task, slot, columns = step % self.count, step % 2, self.place(step // self.count)
        start, stop = floor(self.tasks.first[task]), self.tasks.end[task]
        stop = jnp.where(stop > self.tasks.first[task], stop, start)

        def piece(here: Any, there: Any) -> None:
            for source, columns_of, buffer, semaphore in zip(
                self.inputs, columns, self.buffers[:2], self.semaphores[:2], strict=True
            ):
                copy = pltpu.make_async_copy(
                    source.at[here, columns_of], buffer.at[slot, there], semaphore.at[slot]
                )
                getattr(copy, move)()

        each_piece(start, stop, self.inputs[0].shape[0], self.tiles.rows, piece)

    def out(self, output: Any, move: str) -> None:
        """This core's result number `output`, counted over groups and then tiles."""
        slot, (k, n) = output % 2, self.place(output // self.groups)
        target = self.result.at[output % self.groups, k, n]
        copy = pltpu.make_async_copy(self.buffers[2].at[slot], target, self.semaphores[2].at[slot])
        getattr(copy, move)()


def _clean(buffers: Any, slot: Any, first: Any, end: Any, size: int) -> None:
    """Puts zeros into those of a task's first `size` rows that are not its own, in each buffer."""
    start = floor(first)

    def clean_unit(i: Any, _: None) -> None:
        unit = pl.ds(pl.multiple_of(i * ALIGN, ALIGN), ALIGN)
        own = is_own(start + i * ALIGN, ALIGN, first, end)
        for buffer in buffers:
            rows = buffer[slot, unit].astype(jnp.float32)
            buffer[slot, unit] = jnp.where(own, rows, 0).astype(buffer.dtype)

    lax.fori_loop(0, jnp.where(first > start, 1, 0), clean_unit, None)
    lax.fori_loop((end - start) // ALIGN, size // ALIGN, clean_unit, None)


def _kernel(
    tasks: Tasks,
    x: Any,  # [M, K]
    dy: Any,  # [M, N]
    out: Any,  # [G, K, N]
    x_buf: Any,  # [2, rows, k]
    dy_buf: Any,  # [2, rows, n]
    out_buf: Any,  # [2, k, n]
    total: Any,  # float32 [k, n]
    *semaphores: Any,
    tiles: tpu_tiles.WgradTiles,
) -> None:
    """A step is one task for one tile of every group's matrix; the groups of one tile, then on."""
    copies = _Copies(tasks, x, dy, out, (x_buf, dy_buf, out_buf), semaphores, tiles)

    def multiply(slot: Any, out_slot: Any, size: int, begins: Any) -> None:
        wide = tiles.n // tiles.block_n

        def block(i: Any, _: None) -> None:
            k = lanes(i // wide * tiles.block_k, tiles.block_k)
            n = lanes(i % wide * tiles.block_n, tiles.block_n)
            product = dot(x_buf[slot, :size, k], dy_buf[slot, :size, n], 0, 0)
            product += jnp.where(begins, 0, total[k, n])
            total[k, n] = product
            # Of use after a group's last task only, but a branch here would cost more.
            out_buf[out_slot, k, n] = product.astype(out.dtype)

        lax.fori_loop(0, tiles.k // tiles.block_k * wide, block, None)

    def visit(step: Any, _: None) -> None:
        task, slot = step % copies.count, step % 2
        group, first, end = tasks.run[task], tasks.first[task], tasks.end[task]
        rows = jnp.where(end > first, end - floor(first), 0)
        output = step // copies.count * copies.groups + group
        begins, ends = task == tasks.start[group], task + 1 == tasks.start[group + 1]

        @pl.when(step + 1 < copies.steps)
        def _prefetch() -> None:
            copies.rows(step + 1, "start")

        copies.rows(step, "wait")

        @pl.when(begins & (output >= 2))
        def _need_buffer() -> None:
            copies.out(output - 2, "wait")

        @pl.when(rows == 0)
        def _empty_group() -> None:
            out_buf[output % 2] = jnp.zeros(out_buf.shape[1:], out.dtype)

        for fewer, size in task_sizes(tiles.rows):

            @pl.when((rows > fewer) & (rows <= size))
            def _sized(size: int = size) -> None:
                # Both sides: a row that is not ours may hold NaN, and NaN times zero is NaN.
                _clean((x_buf, dy_buf), slot, first, end, size)
                multiply(slot, output % 2, size, begins)

        @pl.when(ends)
        def _write() -> None:
            copies.out(output, "start")

    @pl.when(copies.steps > 0)
    def _walk() -> None:
        copies.rows(0, "start")
        lax.fori_loop(0, copies.steps, visit, None)
        unfinished = (jnp.maximum(copies.outputs - 2, 0), copies.outputs)
        lax.fori_loop(*unfinished, lambda output, _: copies.out(output, "wait"), None)


def wgrad(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, first_row: jax.Array, *, interpret: Any
) -> jax.Array:
    """Per-group xᵀ dy: x [M, K], dy [M, N] -> [G, K, N] in the dtype of x.

    Zeros for groups without rows. Rows before `first_row` and behind the groups are not read.
    """
    k, n, groups = x.shape[1], dy.shape[1], sizes.shape[0]
    x, dy = pad(x, ALIGN, LANES), pad(dy, ALIGN, LANES)
    (limit, tall), wide = x.shape, dy.shape[1]
    chip = tpu_tiles.chip(interpret)
    tiles = tpu_tiles.wgrad_tiles(chip, limit, groups, tall, wide, x.dtype.itemsize)
    out = call(
        functools.partial(_kernel, tiles=tiles),
        make_tasks(sizes, limit, first_row=first_row, tile=tiles.rows, fill=False),
        (x, dy),
        jax.ShapeDtypeStruct((groups, tall, wide), x.dtype),
        [
            pltpu.VMEM((2, tiles.rows, tiles.k), x.dtype),
            pltpu.VMEM((2, tiles.rows, tiles.n), x.dtype),
            pltpu.VMEM((2, tiles.k, tiles.n), x.dtype),
            pltpu.VMEM((tiles.k, tiles.n), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        chip=chip,
        flops=2 * limit * tall * wide,
        bytes_read=(x.size * (wide // tiles.n) + dy.size * (tall // tiles.k)) * x.dtype.itemsize,
        interpret=interpret,
        name="grouped_matmul_wgrad",
    )
    return out[:, :k, :n]
