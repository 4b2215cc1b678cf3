"""FP8 grouped products on Hopper GPUs (Pallas Mosaic GPU).

Persistent and warp-specialised like the bfloat16 kernels (`hopper_pipeline`). FP8 WGMMA reads both
operands with the contraction innermost, so nothing is transposed here: the quantisers write what
each product reads. Scales travel with the tiles; what is special is how they are applied
(`hopper_fp8_sums`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels._choose import device_kind, is_hopper, only_on_cuda
from pallas_kernels._e4m3 import TILE
from pallas_kernels.grouped_matmul import hopper_fp8_groups, hopper_fp8_rows
from pallas_kernels.grouped_matmul.hopper_tiles import ALIGNED_ROWS
from pallas_kernels.quantize import TokenTiles

_WHAT = "implementation='hopper' (FP8)"


def refusal(dtype: jnp.dtype, *sizes: int) -> str | None:
    """Why a product of `sizes` with results of `dtype` cannot run here, or None."""
    if dtype != jnp.bfloat16:
        return f"{_WHAT} gives bfloat16, not dtype={jnp.dtype(dtype).name}"
    kind = device_kind()
    if kind.startswith("NVIDIA") and not is_hopper():
        return f"{_WHAT} needs a Hopper GPU, not {kind}"
    if 0 in sizes:
        return f"{_WHAT} takes no empty operand, {sizes=}"
    return None


def multiply(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Rows x [M, C] times the transposes of w [G, O, C] -> [M, O]; see `grouped_matmul_quantized`.

    Args:
      interpret: simulate the GPU on the CPU, on JAX 0.11 or later; for tests.

    Raises:
      ValueError: a dtype other than bfloat16, or an operand without elements.
    """
    if why := refusal(dtype, *x.shape, *w.shape):
        raise ValueError(why)
    if not interpret:
        group_sizes = only_on_cuda(group_sizes, _WHAT)
    rows, columns = x.shape[0], w.shape[1]
    operands = _pad(x, ALIGNED_ROWS, TILE), _pad(x_scale, 1, ALIGNED_ROWS), _pad(w, TILE, TILE)
    y = hopper_fp8_rows.multiply(*operands, w_scale, group_sizes, interpret=interpret)
    return y[:rows, :columns]


def multiply_groups(
    x: TokenTiles, dy: TokenTiles, dtype: jnp.dtype = jnp.bfloat16, *, interpret: bool = False
) -> jax.Array:
    """Per-group products over rows, [K, P] and [N, P] -> [G, K, N]; zeros without rows.

    Args:
      interpret: simulate the GPU on the CPU, on JAX 0.11 or later; for tests.

    Raises:
      ValueError: a dtype other than bfloat16, or an operand without elements.
    """
    k, n = x.codes.shape[0], dy.codes.shape[0]
    if why := refusal(dtype, k, n, x.first.shape[0]):
        raise ValueError(why)
    if not interpret:
        x = x._replace(count=only_on_cuda(x.count, _WHAT))
    sides = (
        side._replace(codes=_pad(side.codes, TILE, 1), scale=_pad(side.scale, 1, TILE))
        for side in (x, dy)
    )
    return hopper_fp8_groups.multiply_groups(*sides, interpret=interpret)[:, :k, :n]


def _pad(operand: jax.Array, *multiples: int) -> jax.Array:
    """Zeros after the last dimensions, up to multiples; a copy only of a size that is none."""
    whole = operand.ndim - len(multiples)
    missing = [-n % m for n, m in zip(operand.shape[whole:], multiples, strict=True)]
    if not any(missing):
        return operand
    return jnp.pad(operand, [(0, 0)] * whole + [(0, n) for n in missing])
