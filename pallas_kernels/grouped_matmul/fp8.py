"""Grouped matmul in FP8 as in the report (section 3.3): forward, dgrad and wgrad on e4m3 operands.

Activations carry a scale for each 1 x 128 tile and weights one for each 128 x 128 block, so within
128 of the contraction a product of codes needs no scale: it is summed by itself, then scaled and
added in float32 ("promotion"). Both operands of every product are stored with the contraction
innermost, the one layout that Hopper's FP8 matrix units read.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose, is_hopper
from pallas_kernels._e4m3 import E4M3, TILE
from pallas_kernels.grouped_matmul import fp8_portable, hopper_fp8
from pallas_kernels.quantize import (
    TokenTiles,
    Weights,
    quantize_both,
    quantize_tiles,
    quantize_weights,
)

_MULTIPLY = {"portable": fp8_portable.multiply, "hopper": hopper_fp8.multiply}
_MULTIPLY_GROUPS = {
    "portable": fp8_portable.multiply_groups,
    "hopper": hopper_fp8.multiply_groups,
}


def _pick(
    place: str, table: dict[str, Callable], name: str | None, dtype: jnp.dtype, *sizes: int
) -> Callable:
    """The implementation of that name, or the one for the chip that is traced for."""
    if name is None:
        fits = is_hopper() and hopper_fp8.refusal(dtype, *sizes) is None
        name = "hopper" if fits else "portable"
    return choose(place, table, name)


def grouped_matmul_quantized(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies row m of `x` by the transpose of `w[g]`, g being the group of row m.

    Sums over 128 of the contraction are scaled and added in float32. Rows past the sum of the
    sizes are never read into a result and come out as zeros. Not differentiable.

    Args:
      x: codes e4m3 [M, C], rows sorted by group.
      x_scale: float32 [ceil(C / 128), M], as `quantize_tiles` returns it.
      w: codes e4m3 [G, O, C]: the contraction innermost.
      w_scale: float32 [G, ceil(O / 128), ceil(C / 128)].
      group_sizes: int32 [G], not negative, sum at most M (not checked: it is data).
      dtype: of the result.
      implementation: "portable" (any platform), "hopper" (bfloat16 results on an H100, an H200 or
        their like), or None to pick for the chip that is traced for, as `grouped_matmul` does.

    Returns:
      [M, O].

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run.
    """
    place = "grouped_matmul_quantized"
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"{x.shape=} and {w.shape=} must be [M, C] and [G, O, C] ({place})")
    if x.dtype != E4M3 or w.dtype != E4M3:
        raise ValueError(f"{x.dtype=} and {w.dtype=} must be float8_e4m3fn ({place})")
    tiles = -(-x.shape[1] // TILE)
    expected = (tiles, x.shape[0]), (w.shape[0], -(-w.shape[1] // TILE), tiles)
    if (x_scale.shape, w_scale.shape) != expected:
        raise ValueError(f"{x_scale.shape=}, {w_scale.shape=} must be {expected} ({place})")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"{group_sizes.shape=}, {group_sizes.dtype=} must be {w.shape[:1]}, integer ({place})"
        )
    run = _pick(place, _MULTIPLY, implementation, dtype, *x.shape, *w.shape)
    return run(x, x_scale, w, w_scale, group_sizes.astype(jnp.int32), dtype)


def grouped_matmul_of_tokens(
    x: TokenTiles, dy: TokenTiles, *, dtype=jnp.bfloat16, implementation: str | None = None
) -> jax.Array:
    """Sums over each group's rows: x [K, P] and dy [N, P] -> [G, K, N], the gradient of weights.

    Groups without rows get zeros. Both operands come from `transpose_quantize` with one
    `group_sizes`. Not differentiable.

    Raises:
      ValueError: operands that do not fit, or an implementation that cannot run.
    """
    place = "grouped_matmul_of_tokens"
    if x.codes.shape[1] != dy.codes.shape[1] or x.first.shape != dy.first.shape:
        raise ValueError(
            f"{x.codes.shape=}, {x.first.shape=} and {dy.codes.shape=}, {dy.first.shape=} must "
            f"agree in rows and groups ({place})"
        )
    sizes = x.codes.shape[0], dy.codes.shape[0], x.first.shape[0]
    run = _pick(place, _MULTIPLY_GROUPS, implementation, dtype, *sizes)
    return run(x, dy, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_matmul_fp8(x, w, group_sizes, weights, implementation):
    weights = quantize_weights(w) if weights is None else weights
    return _product(quantize_tiles(x), group_sizes, weights, implementation, x.dtype)


def _product(rows, group_sizes, weights, implementation, dtype):
    x, x_scale = rows
    w, w_scale = weights.turned, weights.scale.mT
    return grouped_matmul_quantized(
        x, x_scale, w, w_scale, group_sizes, dtype=dtype, implementation=implementation
    )


def _forward(x, w, group_sizes, weights, implementation):
    weights = quantize_weights(w) if weights is None else weights
    rows, tokens = quantize_both(x, group_sizes)
    out = _product(rows, group_sizes, weights, implementation, x.dtype)
    return out, (tokens, weights.codes, weights.scale, group_sizes)


def _backward(implementation, residuals, dy):
    x_tokens, w_codes, w_scale, group_sizes = residuals
    options = {"dtype": dy.dtype, "implementation": implementation}
    rows, tokens = quantize_both(dy, group_sizes)
    dx = grouped_matmul_quantized(*rows, w_codes, w_scale, group_sizes, **options)
    return dx, grouped_matmul_of_tokens(x_tokens, tokens, **options), None, None


_grouped_matmul_fp8.defvjp(_forward, _backward)


def check_operands(x, w, weights: Weights | None, place: str) -> None:
    """Raises ValueError if rows, matrices and quantised matrices do not fit."""
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"{x.shape=}, {w.shape=} must be [M, K], [G, K, N] ({place})")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.dtype=} and {w.dtype=} must be one floating dtype ({place})")
    if weights is not None and weights.codes.shape != w.shape:
        raise ValueError(f"{weights.codes.shape=} must be {w.shape=} ({place})")


def grouped_matmul_fp8(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    implementation: str | None = None,
    *,
    weights: Weights | None = None,
) -> jax.Array:
    """`grouped_matmul` computed in FP8 (report section 3.3), forward and backward.

    Quantises `x` in tiles of 1 x 128 along K and `w` in blocks of 128 x 128. The gradient of `x`
    quantises the output's gradient in tiles of 1 x 128 along N and reuses the blocks of `w`; the
    gradient of `w` quantises `x` and the output's gradient in tiles of 128 rows of one group.
    Partial sums are promoted to float32 every 128 of the contraction.

    Args:
      x: rows sorted by group, [M, K], bfloat16 or float32.
      w: one matrix a group, [G, K, N], the dtype of `x`.
      group_sizes: int32 [G], not negative, sum at most M (not checked: it is data).
      implementation: "portable" (any platform), "hopper" (bfloat16 results on an H100, an H200 or
        their like), or None to pick for the chip that is traced for, as `grouped_matmul` does.
      weights: `quantize_weights(w)`, to share it between calls; `w` then only gets its gradient.

    Returns:
      [M, N] in the dtype of `x`; rows past the sum of the sizes are zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run.
    """
    check_operands(x, w, weights, "grouped_matmul_fp8")
    return _grouped_matmul_fp8(x, w, group_sizes, weights, implementation)
