"""Grouped matmul on Hopper GPUs (Pallas Mosaic GPU): forward, dgrad and wgrad kernels.

Forward and dgrad (`hopper_rows`) compute the transposed product: a tile of the weights is WGMMA's
M operand, read as it is stored in either direction, and the rows are its N operand. N may be any
multiple of eight, so a group's rows are split evenly into tasks and each task runs in a loop
compiled for about its own number of rows: little is padded at the group edges where other tilings
lose a fifth, and decoding, with a few rows a group, streams the weights at the speed of memory.

Wgrad (`hopper_groups`) contracts over a group's rows, in steps of whole atoms of eight rows; the
few rows at a group's ragged ends are gathered apart and padded with zeros.

Both are persistent and warp-specialised (`hopper_pipeline`): per multiprocessor one producer
warpgroup that issues TMA copies into a ring, and two WGMMA consumers. Forward and dgrad keep the
consumers a few steps apart, so that one multiplies while the other stores; wgrad, which stores
more, stores a tile under the products of the next; where groups are small its clusters also keep
together, as they read what others have just read. What depends on the group sizes is data
(`hopper_tasks`): a launch with other sizes runs the same program. Sizes of tiles are in one table
(`hopper_tiles`).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._choose import device_kind, is_hopper, only_on_cuda
from pallas_kernels.grouped_matmul.hopper_groups import multiply_groups
from pallas_kernels.grouped_matmul.hopper_rows import multiply
from pallas_kernels.grouped_matmul.hopper_tiles import ALIGNED_ROWS, ATOM

_DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(x: jax.Array, w: jax.Array) -> str | None:
    """Why these operands cannot run here, or None."""
    if x.dtype not in _DTYPES:
        names = " or ".join(jnp.dtype(dtype).name for dtype in _DTYPES)
        return f"implementation='hopper' takes {names}, not {x.dtype=} (grouped_matmul)"
    kind = device_kind()
    if kind.startswith("NVIDIA") and not is_hopper():
        return f"implementation='hopper' needs a Hopper GPU, not {kind} (grouped_matmul)"
    if 0 in (*x.shape, *w.shape):
        return f"implementation='hopper' takes no empty {x.shape=} or {w.shape=} (grouped_matmul)"
    return None


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    first_row: jax.Array | int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`; bfloat16 or float16, on H100, H200 and their like.

    Args:
      x: [M, K].
      w: [G, K, N].
      group_sizes: int32 [G].
      first_row: int32 [], where group 0 begins. The rows before it, like those behind the groups,
        are not read and come out as zeros, in the result and in the gradient of `x`.
      interpret: simulate the GPU on the CPU, on JAX 0.11 or later; for tests.

    Raises:
      ValueError: another dtype, or an operand without elements.
    """
    if why := refusal(x, w):
        raise ValueError(why)
    if not interpret:
        group_sizes = only_on_cuda(group_sizes, "implementation='hopper' (grouped_matmul)")
    return _grouped_matmul(interpret, x, w, group_sizes, jnp.asarray(first_row, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(interpret, x, w, sizes, first_row):
    return _product(x, w, sizes, first_row, transposed=False, interpret=interpret)


def _forward(interpret, x, w, sizes, first_row):
    return _grouped_matmul(interpret, x, w, sizes, first_row), (x, w, sizes, first_row)


def _backward(interpret, residuals, dy):
    x, w, sizes, first_row = residuals
    dx = _product(dy, w, sizes, first_row, transposed=True, interpret=interpret)
    return dx, _weight_gradient(x, dy, sizes, first_row, interpret=interpret), None, None


_grouped_matmul.defvjp(_forward, _backward)


def _product(x, w, sizes, first_row, *, transposed, interpret):
    columns = w.shape[1] if transposed else w.shape[2]
    rows_x, whole_w = _pad(x, ALIGNED_ROWS, ATOM), _pad(w, ATOM, ATOM)
    y = multiply(rows_x, whole_w, sizes, first_row, transposed=transposed, interpret=interpret)
    return y[: x.shape[0], :columns]


def _weight_gradient(x, dy, sizes, first_row, *, interpret):
    sides = _pad(x, ALIGNED_ROWS, ATOM), _pad(dy, ALIGNED_ROWS, ATOM)
    dw = multiply_groups(*sides, sizes, first_row, interpret=interpret)
    return dw[:, : x.shape[1], : dy.shape[1]]


def _pad(operand: jax.Array, *multiples: int) -> jax.Array:
    """Zeros after the last dimensions, up to multiples; a copy only of a size that is none."""
    whole = operand.ndim - len(multiples)
    missing = [-n % m for n, m in zip(operand.shape[whole:], multiples, strict=True)]
    if not any(missing):
        return operand
    return jnp.pad(operand, [(0, 0)] * whole + [(0, n) for n in missing])
