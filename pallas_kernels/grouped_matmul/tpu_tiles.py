"""Tile sizes of the TPU kernels, in one place: a row a generation, and one rule for every shape.

A row holds what the compiler's schedules say of a generation (docs/kernels_tpu.md has the figures).
The rule takes the tiles with the least modelled time: the longer of arithmetic and memory traffic.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_FEWEST_ROWS = 32
# The compiler keeps spilled registers and its own buffers in what the tiles leave free.
_VMEM_SHARE = 0.85
# Most rows of the result in one unrolled product of wgrad: more of them keep tpu7x waiting.
_TALLEST = 1536
# Part of the shorter of arithmetic and traffic that is taken not to hide behind the longer.
_NOT_HIDDEN = 0.25


class ProductTiles(NamedTuple):
    """Of the forward product and of dgrad."""

    rows: int  # of x, over the whole contraction
    columns: int  # of the weights, over the whole contraction
    block: int  # columns of one unrolled product
    slots: int  # tiles of weights held at once


class WgradTiles(NamedTuple):
    """Of the weights' gradient."""

    rows: int
    k: int  # of the result
    n: int
    block_k: int  # of one unrolled product
    block_n: int


@dataclasses.dataclass(frozen=True)
class _Generation:
    rows: int  # that keep the matrix units busy under one load of weights
    wgrad_rows: int  # that one addition to the sum is worth
    spare: int  # rows of a tile over the mean group's: 2 where a second task costs the most
    columns: int  # a product's columns are rounded up to what the matrix units take at once
    flops: int  # an instruction, at best
    fill: int  # instructions around each unrolled product in which the matrix units drain
    unrolled: int  # most instructions of one: longer ones gain less than they take to compile


_GENERATIONS = {
    5: _Generation(
        rows=128, wgrad_rows=512, spare=1, columns=256, flops=131072, fill=80, unrolled=4608
    ),
    6: _Generation(
        rows=256, wgrad_rows=512, spare=1, columns=512, flops=524288, fill=400, unrolled=16384
    ),
    7: _Generation(
        rows=512, wgrad_rows=1024, spare=2, columns=512, flops=1048576, fill=200, unrolled=4608
    ),
}


def chip(interpret: Any) -> pltpu.TpuInfo:
    """The chip of the current mesh or default device; when interpreting, one with two cores.

    Raises:
      ValueError: not a TPU, or one that this package has no tiles for.
    """
    if interpret:
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)
    info = pltpu.get_tpu_info()
    if info.generation not in _GENERATIONS:
        known = ", ".join(f"v{generation}" for generation in _GENERATIONS)
        raise ValueError(f"{info.chip_version} must be of {known} (grouped_matmul on TPU)")
    return info


def is_supported() -> bool:
    """Whether the kernels run on the current mesh's, or the default, device."""
    return pltpu.is_tpu_device() and pltpu.get_tpu_info().generation in _GENERATIONS


def _divisors(size: int) -> Iterator[int]:
    """Multiples of `_LANES` that divide `size`, the largest first."""
    units = size // _LANES
    return (units // parts * _LANES for parts in range(1, units + 1) if units % parts == 0)


def _passes(itemsize: int) -> int:
    """bfloat16 products that the compiler makes of one; six of float32 at full precision."""
    return 1 if itemsize == 2 else 6


def _rows(most: int, mean: float) -> int:
    """A power of two that holds `mean` rows, between `_FEWEST_ROWS` and `most`."""
    return min(most, max(_FEWEST_ROWS, 1 << (math.ceil(mean) - 1).bit_length()))


def _slower(generation: _Generation, flops_a_column: int, block: int) -> float:
    """Instructions of an unrolled product over those of perfectly busy matrix units.

    Infinity if there are too many of them to unroll.
    """
    padded = -(-block // generation.columns) * generation.columns
    ideal, taken = (flops_a_column * columns / generation.flops for columns in (block, padded))
    return (
        math.inf
        if taken > generation.unrolled and block > _LANES
        else (taken + generation.fill) / ideal
    )


def _seconds(chip: pltpu.TpuInfo, flops: float, traffic: float, tiles: int) -> float:
    """Of one call whose result has so many `tiles`, dealt out to the cores; traffic in bytes."""
    share = -(-tiles // chip.num_cores) / tiles
    both = sorted((flops / chip.bf16_ops_per_second, traffic / chip.mem_bw_bytes_per_second))
    return (both[1] + _NOT_HIDDEN * both[0]) * share


def _quickest(choices: Iterable[Any], seconds: Callable[[Any], float], shape: str) -> Any:
    """The choice of the least modelled time."""
    choices = list(choices)
    if not choices:
        raise ValueError(f"{shape} has no tile that fits the chip's VMEM (grouped_matmul on TPU)")
    return min(choices, key=seconds)


def product_tiles(
    chip: pltpu.TpuInfo, rows: int, groups: int, contracted: int, columns: int, itemsize: int
) -> ProductTiles:
    """Tiles for x [rows, contracted] times [groups, contracted, columns], all padded to 128.

    Raises:
      ValueError: a contraction too long for VMEM.
    """
    generation, bandwidth = _GENERATIONS[chip.generation], chip.mem_bw_bytes_per_second
    flops_a_byte = 2 * rows / groups * _passes(itemsize) / itemsize
    # Weights that are waited for, even if arithmetic takes a third more than at best: a third tile
    # of them, always on its way, matters more than rows.
    waiting = flops_a_byte < 0.75 * chip.bf16_ops_per_second / bandwidth
    slots, spare = (3, 1) if waiting else (2, generation.spare)
    tile = _rows(generation.rows, spare * rows / groups)

    def fits(wide: int) -> bool:
        size = 2 * tile * contracted + slots * contracted * wide + 2 * tile * wide
        return size * itemsize <= _VMEM_SHARE * chip.vmem_capacity_bytes

    def seconds(choice: ProductTiles) -> float:
        passes = columns // choice.columns
        # With fewer rows it is the load of the weights that takes the time.
        work = 2 * max(tile, generation.rows // 2) * contracted * _passes(itemsize)
        flops = 2 * rows * contracted * columns * _passes(itemsize)
        flops *= _slower(generation, work, choice.block)
        traffic = rows * contracted * passes + groups * contracted * columns + rows * columns
        first = contracted * choice.columns * itemsize / bandwidth
        return first + _seconds(chip, flops, traffic * itemsize, passes)

    return _quickest(
        (
            ProductTiles(tile, wide, block, slots)
            for wide in _divisors(columns)
            if fits(wide)
            for block in _divisors(wide)
        ),
        seconds,
        f"[{rows}, {contracted}] x [{groups}, {contracted}, {columns}]",
    )


def wgrad_tiles(
    chip: pltpu.TpuInfo, rows: int, groups: int, k: int, n: int, itemsize: int
) -> WgradTiles:
    """Tiles for x [rows, k] and dy [rows, n] -> [groups, k, n], k and n padded to 128.

    Raises:
      ValueError: not even the smallest tiles fit in VMEM.
    """
    generation, bandwidth = _GENERATIONS[chip.generation], chip.mem_bw_bytes_per_second
    tile = _rows(generation.wgrad_rows, generation.spare * rows / groups)

    def fits(tall: int, wide: int) -> bool:
        # A float32 sum, and two of each other tile.
        size = tall * wide * (4 + 2 * itemsize) + 2 * tile * (tall + wide) * itemsize
        return size <= _VMEM_SHARE * chip.vmem_capacity_bytes

    def seconds(choice: WgradTiles) -> float:
        down, across = k // choice.k, n // choice.n
        work = 2 * max(tile, generation.rows) * choice.block_k * _passes(itemsize)
        flops = 2 * rows * k * n * _passes(itemsize) * _slower(generation, work, choice.block_n)
        traffic = rows * (k * across + n * down) + groups * k * n
        last = choice.k * choice.n * itemsize / bandwidth
        return last + _seconds(chip, flops, traffic * itemsize, down * across)

    return _quickest(
        (
            WgradTiles(tile, tall, wide, block_k, block_n)
            for tall in _divisors(k)
            for wide in _divisors(n)
            if fits(tall, wide)
            for block_n in _divisors(wide)
            for block_k in _divisors(tall)
            if block_k <= _TALLEST
        ),
        seconds,
        f"[{rows}, {k}] and [{rows}, {n}] -> [{groups}, {k}, {n}]",
    )
