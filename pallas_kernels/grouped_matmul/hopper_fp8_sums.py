"""The inner loop of the FP8 kernels on Hopper: products of codes, promoted every 128 of depth.

WGMMA adds products of FP8 codes with fewer bits than float32 has, and the scales change every 128
of the contraction. So each 128 are summed into registers of their own, and these are scaled and
added to the float32 total by the ordinary units. That is as much work as the tensor cores leave
time for, so a second sum runs while the first is promoted: a chain of sums, each begun before the
one before it is read. Chains are unrolled; only the last sum of a chain has nobody to hide behind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.hopper_pipeline import Ring


class Products(NamedTuple):
    """What a consumer multiplies.

    Attributes:
      shape: of the sum, (64, n).
      operands: slot -> the two operands in shared memory.
      row_scale: slot -> scales in shared memory that are read while the products run.
      factor: (slot, row scale, early scale) -> float32 `shape` that scales the sum.
      early_scale: index of a step -> its scalar from memory, read a chain ahead because memory is
        far; any index may be asked for. None: nothing to read.
    """

    shape: tuple[int, int]
    operands: Callable[[jax.Array], tuple]
    row_scale: Callable[[jax.Array], jax.Array]
    factor: Callable[[jax.Array, jax.Array, Any], jax.Array]
    early_scale: Callable[[jax.Array], jax.Array] | None = None


def promoted_sum(
    ring: Ring, counts: tuple, step: jax.Array, products: Products, chain: int
) -> tuple[jax.Array, jax.Array]:
    """Sums `products` over a tile's slots, of which `step` is the first.

    Args:
      counts: how many chains of `chain` steps, and how many single steps after them; the second
        is None where there never are any.

    Returns:
      float32 `products.shape`, and the step after the tile.
    """

    def early(index, length):
        if products.early_scale is None:
            return (None,) * length
        return tuple(products.early_scale(index + i) for i in range(length))

    def loop(times, length, carry):
        step, index, total = carry

        def body(_, carry):
            step, index, scales, total = carry
            following = early(index + length, length)
            total = _run_chain(ring, step, products, scales, total)
            return step + length, index + length, following, total

        carry = step, index, early(index, length), total
        step, index, _, total = lax.fori_loop(0, times, body, carry)
        return step, index, total

    total = plgpu.layout_cast(jnp.zeros(products.shape, jnp.float32), plgpu.Layout.WGMMA)
    carry = loop(counts[0], chain, (step, jnp.int32(0), total))
    if counts[1] is not None:
        carry = loop(counts[1], 1, carry)
    step, _, total = carry
    return total, step


def _run_chain(ring: Ring, step: jax.Array, products: Products, scales: tuple, total: jax.Array):
    """`total` and the promoted sums of steps `step`, `step` + 1, .. , one for each of `scales`."""

    def promote(pending, total, in_flight):
        i, slot, partial = pending
        row_scale = products.row_scale(slot)
        partial = plgpu.wgmma_accumulator_load(partial, wait_n=in_flight)
        factor = products.factor(slot, row_scale, scales[i])
        plgpu.barrier_arrive(ring.empty.at[slot])
        return total + partial * factor

    def begin(i, pending, total):
        if i == len(scales):
            return promote(pending, total, 0)
        slot = lax.rem(step + i, ring.stages)
        plgpu.barrier_wait(ring.full.at[slot])

        def scope(partial):
            plgpu.wgmma(partial, *products.operands(slot))
            if i == len(scales) - 1:
                _use_a_zero()
            promoted = total if pending is None else promote(pending, total, 1)
            return begin(i + 1, (i, slot, partial), promoted)

        return pl.run_scoped(scope, plgpu.ACC(products.shape))

    return begin(0, None, total)


def _use_a_zero() -> None:
    """Lets the last sum of a chain begin at an immediate zero.

    ptxas drops the zeros that a sum starts from if it sees that they are a constant. The register
    that holds it becomes a register of the last sum if that is its last use; then it is not seen,
    and every register of the sum is cleared by an instruction of its own, after a wait.
    """
    pl.run_scoped(lambda _: None, plgpu.ACC((64, 8)))
