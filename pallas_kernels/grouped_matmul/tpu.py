"""Grouped matmul for TPU: Mosaic kernels that move every tile by hand.

The kernels walk a list of *tasks*, made outside of them from the group sizes: a task is at most one
tile of rows and all of one group. It begins at its group's own first row (rounded down to the 16
rows that memory is tiled by), so a group of r rows costs about r rows of work wherever it lies.

- `tpu_product.py`, forward and dgrad: a group's columns of weights stay in VMEM, over the whole
  contraction, for all of the group's tasks: no accumulator, and weights are read once. The weights
  of the groups that follow arrive meanwhile, in equal parts over the tasks of this one. dgrad
  contracts the last axis of the same weights; nothing is transposed in memory.
- `tpu_wgrad.py`: a tile of one group's gradient is summed in VMEM over the group's tasks.
- `tpu_tiles.py`: tile sizes, from the chip and the shape.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.tpu_product import product
from pallas_kernels.grouped_matmul.tpu_wgrad import wgrad

_DTYPES = (jnp.bfloat16, jnp.float32)


def refusal(x: jax.Array, w: jax.Array) -> str | None:
    """Why these operands cannot run, or None."""
    if x.dtype not in _DTYPES:
        names = " or ".join(jnp.dtype(dtype).name for dtype in _DTYPES)
        return f"implementation='tpu' takes {names}, not {x.dtype=} (grouped_matmul)"
    if 0 in (*x.shape, *w.shape):
        return (
            f"implementation='tpu' takes no empty operand: {x.shape=} {w.shape=} (grouped_matmul)"
        )
    return None


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    interpret: Any = False,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`; for TPU v5e, v5p, v6e and tpu7x.

    The chip is that of the mesh set with `jax.set_mesh`, or else the default device.

    Args:
      x: [M, K], bfloat16 or float32.
      w: [G, K, N].
      group_sizes: int32 [G].
      first_row: int32 [], where group 0 begins. The rows before it, like those behind the groups,
        are not read and come out as zeros, in the result and in the gradient of `x`.
      interpret: run as plain JAX; for tests.

    Raises:
      ValueError: operands that these kernels do not take, another chip, or a contraction so long
        that no tile fits in VMEM.
    """
    if why := refusal(x, w):
        raise ValueError(why)
    return _grouped_matmul(interpret, x, w, group_sizes, jnp.asarray(first_row, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(interpret, x, w, group_sizes, first_row):
    return product(x, w, group_sizes, first_row, transposed=False, interpret=interpret)


def _forward(interpret, x, w, group_sizes, first_row):
    out = _grouped_matmul(interpret, x, w, group_sizes, first_row)
    return out, (x, w, group_sizes, first_row)


def _backward(interpret, residuals, dy):
    x, w, group_sizes, first_row = residuals
    dx = product(dy, w, group_sizes, first_row, transposed=True, interpret=interpret)
    dw = wgrad(x, dy, group_sizes, first_row, interpret=interpret)
    return dx, dw, None, None


_grouped_matmul.defvjp(_forward, _backward)
