"""The inner loop of the FP8 kernels on Hopper: products of codes, promoted every 128 of depth.

WGMMA adds products of FP8 codes with fewer bits than float32 has, and the scales change every 128
of the contraction. So each 128 are summed into registers of their own, and these are scaled and
added to the float32 total by the ordinary units. That is as much work as the tensor cores leave
time for, so a second sum runs while the first is promoted: a chain of sums, each begun before the
one before it is read. Chains are unrolled; only the last sum of a chain has nobody to hide behind.

A consumer of 64 by 256 outputs has registers for one sum of 64 by 128 beside them and no second
one: its sums are promoted one by one, and what hides them is the other consumer.

As in `hopper_pipeline.drain`, the second consumer starts a tile `lead` chains late, so that the two
do not store at the same time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.hopper_pipeline import Ring

# Registers of a thread that totals and running sums may take of its 232.
_SUM_REGISTERS = 192


class Products(NamedTuple):
    """What a consumer multiplies.

    Attributes:
      shape: of a sum, (64, n).
      parts: sums of a step, next to each other.
      operands: (slot, part) -> the two operands in shared memory.
      scales: (slot, index of the step in the tile) -> what `factor` takes, read from shared memory
        while the products run.
      factor: (slot, scales, part) -> float32 `shape` that scales the sum.
    """

    shape: tuple[int, int]
    parts: int
    operands: Callable[[jax.Array, int], tuple]
    scales: Callable[[jax.Array, jax.Array], Any]
    factor: Callable[[jax.Array, Any, int], jax.Array]


def promoted_sum(
    ring: Ring, counts: tuple, step: jax.Array, products: Products, chain: int
) -> tuple[tuple, jax.Array]:
    """Sums `products` over a tile's slots, of which `step` is the first.

    Args:
      counts: how many chains of `chain` steps, and how many single steps after them; the second
        is None where there never are any.

    Returns:
      float32 `products.shape` of each part, and the step after the tile.
    """

    def loop(times, length, carry):
        def body(_, carry):
            step, index, totals = carry
            totals = _run_chain(ring, step, index, products, length, totals)
            return step + length, index + length, totals

        return lax.fori_loop(0, times, body, carry)

    zeros = plgpu.layout_cast(jnp.zeros(products.shape, jnp.float32), plgpu.Layout.WGMMA)
    carry = loop(counts[0], chain, (step, jnp.int32(0), (zeros,) * products.parts))
    if counts[1] is not None:
        carry = loop(counts[1], 1, carry)
    step, _, totals = carry
    return totals, step


def _run_chain(
    ring: Ring,
    step: jax.Array,
    index: jax.Array,
    products: Products,
    length: int,
    totals: tuple,
) -> tuple:
    """`totals` and the promoted sums of `length` steps from `step`, the `index`-th of its tile."""
    order = [(i, part) for i in range(length) for part in range(products.parts)]
    registers = products.shape[1] // 2
    overlap = (products.parts + 2) * registers <= _SUM_REGISTERS
    slots = [lax.rem(step + i, ring.stages) for i in range(length)]
    scales = {}

    def promote(pending, totals, in_flight):
        (i, part), partial = pending
        if i not in scales:
            scales[i] = products.scales(slots[i], index + i)
        partial = plgpu.wgmma_accumulator_load(partial, wait_n=in_flight)
        factor = products.factor(slots[i], scales[i], part)
        if part == products.parts - 1:
            plgpu.barrier_arrive(ring.empty.at[slots[i]])
        total = totals[part] + partial * factor
        return (*totals[:part], total, *totals[part + 1 :])

    def begin(at, pending, totals):
        if at == len(order):
            return totals if pending is None else promote(pending, totals, 0)
        i, part = order[at]
        if part == 0:
            plgpu.barrier_wait(ring.full.at[slots[i]])

        def scope(partial):
            plgpu.wgmma(partial, *products.operands(slots[i], part))
            if at == len(order) - 1:
                _use_a_zero()
            mine = order[at], partial
            if not overlap:
                return begin(at + 1, None, promote(mine, totals, 0))
            return begin(at + 1, mine, totals if pending is None else promote(pending, totals, 1))

        return pl.run_scoped(scope, plgpu.ACC(products.shape))

    return begin(0, None, totals)


def _use_a_zero() -> None:
    """Lets the last sum of a chain begin at an immediate zero.

    ptxas drops the zeros that a sum starts from if it sees that they are a constant. The register
    that holds it becomes a register of the last sum if that is its last use; then it is not seen,
    and every register of the sum is cleared by an instruction of its own, after a wait.
    """
    pl.run_scoped(lambda _: None, plgpu.ACC((64, 8)))
