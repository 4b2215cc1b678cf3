"""FP8 quantisers of the report (section 3.3): tiles of 1 x 128 and blocks of 128 x 128, e4m3.

A value is its code times its tile's scale. The scale is float32, absolute maximum / 448, so codes
reach the whole range of e4m3; a code is the value times the float32 reciprocal of the scale,
rounded to nearest, ties to even, and saturates. A tile of zeros has scale 1. A number that is not
finite spoils its own tile only. Tiles at the edge of an array may be partial.

`implementation` is "portable" (plain JAX, any platform), "triton" (one pass over the numbers on
NVIDIA GPUs, for sizes that its tiles divide) or None: "triton" where we trace for a Hopper GPU and
its tiles divide the sizes, "portable" elsewhere.

Scales of rows are stored tile by tile, [tiles, rows], because the matrix products read the scales
of many rows for one tile of the contraction: next to each other in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_triton
from pallas_kernels._choose import is_hopper, only_on_cuda
from pallas_kernels._e4m3 import E4M3, MAX_CODE, SMALLEST_SCALE, TILE

_IMPLEMENTATIONS = ("portable", "triton")


class Weights(NamedTuple):
    """Matrices in blocks of 128 x 128, stored for products that contract over either dimension.

    Attributes:
      codes: e4m3 [G, K, N].
      turned: the same codes, [G, N, K].
      scale: float32 [G, ceil(K / 128), ceil(N / 128)], of `codes`.
    """

    codes: jax.Array
    turned: jax.Array
    scale: jax.Array


class TokenTiles(NamedTuple):
    """Rows of several groups, transposed: the operand of a product that contracts over rows.

    Every group starts at a multiple of 128 columns, so no tile holds rows of two groups.

    Attributes:
      codes: e4m3 [K, P], P a multiple of 128; column c of group g is its row c - 128 * first[g],
        zeros where the group has no such row.
      scale: float32 [P / 128, K].
      first: int32 [G], first tile of each group.
      count: int32 [G], tiles of each group.
    """

    codes: jax.Array
    scale: jax.Array
    first: jax.Array
    count: jax.Array


def _tiled(x: jax.Array, axis: int) -> jax.Array:
    """float32 `x` with axis `axis` split into [tiles, 128], zeros added at its end."""
    length = x.shape[axis]
    tiles = -(-length // TILE)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, tiles * TILE - length)
    x = jnp.pad(x.astype(jnp.float32), padding)
    return x.reshape(*x.shape[:axis], tiles, TILE, *x.shape[axis + 1 :])


def _scale(tiles: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Scales of the tiles spanned by `axes`, which are kept with length 1."""
    largest = jnp.max(jnp.abs(tiles), axis=axes, keepdims=True)
    # The divisor depends on data: compilers turn a division by a constant into a product with its
    # reciprocal, which is not the same number.
    empty = largest == 0
    scale = jnp.where(empty, 1.0, largest) / jnp.where(empty, 1.0, MAX_CODE)
    return jnp.maximum(scale, SMALLEST_SCALE)


def _codes(tiles: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(tiles * (1 / scale), -MAX_CODE, MAX_CODE).astype(E4M3)


def _fused(implementation: str | None, refusal: str | None, place: str) -> bool:
    """Whether to run the Triton kernel; raises if it was asked for and cannot run."""
    if implementation not in (None, *_IMPLEMENTATIONS):
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"{implementation=} must be one of: {known} ({place})")
    if implementation == "triton" and refusal:
        raise ValueError(f"implementation='triton': {refusal} ({place})")
    if implementation is None:
        return is_hopper() and not refusal
    return implementation == "triton"


def _on_cuda(x: jax.Array) -> jax.Array:
    return only_on_cuda(x, "implementation='triton' (quantize)")


def quantize_tiles(x: jax.Array, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantises each row in tiles of 1 x 128.

    Args:
      x: floating [M, K].
      implementation: see the module.

    Returns:
      Codes e4m3 [M, K] and scales float32 [ceil(K / 128), M].

    Raises:
      ValueError: an unknown implementation, or one that cannot take `x`.
    """
    if _fused(implementation, quantize_triton.refuses_rows(*x.shape), "quantize_tiles"):
        return quantize_triton.quantize_tiles(_on_cuda(x))
    tiles = _tiled(x, 1)
    scale = _scale(tiles, (2,))
    codes = _codes(tiles, scale).reshape(x.shape[0], -1)[:, : x.shape[1]]
    return codes, scale[:, :, 0].T


def quantize_blocks(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises matrices in blocks of 128 x 128.

    Args:
      w: floating [..., K, N].

    Returns:
      Codes e4m3 [..., K, N] and scales float32 [..., ceil(K / 128), ceil(N / 128)].
    """
    *_, k, n = w.shape
    blocks = _tiled(_tiled(w, w.ndim - 1), w.ndim - 2)
    scale = _scale(blocks, (w.ndim - 1, w.ndim + 1))
    codes = _codes(blocks, scale)
    codes = codes.reshape(*w.shape[:-2], codes.shape[-4] * TILE, codes.shape[-2] * TILE)
    return codes[..., :k, :n], scale[..., 0, :, 0]


def quantize_weights(w: jax.Array, implementation: str | None = None) -> Weights:
    """`quantize_blocks` of w [G, K, N], and the codes transposed.

    Raises:
      ValueError: an unknown implementation, or one that cannot take `w`.
    """
    if _fused(implementation, quantize_triton.refuses_weights(*w.shape), "quantize_weights"):
        return Weights(*quantize_triton.quantize_weights(_on_cuda(w)))
    codes, scale = quantize_blocks(w)
    return Weights(codes, codes.mT, scale)


def swiglu(gate_up: jax.Array, row_weight: jax.Array | None = None) -> jax.Array:
    """silu(gate) * up, times `row_weight` [M]; gate_up [M, 2F], gate first -> float32 [M, F]."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    hidden = jax.nn.silu(gate) * up
    return hidden if row_weight is None else hidden * row_weight.astype(jnp.float32)[:, None]


def swiglu_quantize(
    gate_up: jax.Array, row_weight: jax.Array | None = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """`swiglu` and `quantize_tiles` in one pass: the activation is never rounded in between.

    Args:
      gate_up: floating [M, 2F], all gates before all ups.
      row_weight: floating [M], or None: a factor for each row.
      implementation: see the module.

    Returns:
      Codes e4m3 [M, F] and scales float32 [ceil(F / 128), M].

    Raises:
      ValueError: an unknown implementation, or one that cannot take `gate_up`.
    """
    refusal = quantize_triton.refuses_rows(gate_up.shape[0], gate_up.shape[1] // 2)
    if _fused(implementation, refusal, "swiglu_quantize"):
        return quantize_triton.swiglu_quantize(_on_cuda(gate_up), row_weight)
    return quantize_tiles(swiglu(gate_up, row_weight), "portable")


def token_tiles(rows: int, groups: int) -> int:
    """The most tiles of 128 rows that `groups` groups of `rows` rows in all can need."""
    return max(rows // TILE + min(groups, rows), 1)


class _Tiling(NamedTuple):
    """The tiles of 128 rows of one group: int32 [G] first, count; int32 [T] row, live."""

    first: jax.Array
    count: jax.Array
    row: jax.Array
    live: jax.Array


def _tiling(rows: int, group_sizes: jax.Array) -> _Tiling:
    groups = group_sizes.shape[0]
    count = (group_sizes + TILE - 1) // TILE
    tile_ends = jnp.cumsum(count)
    first = tile_ends - count
    starts = jnp.cumsum(group_sizes) - group_sizes
    tiles = jnp.arange(token_tiles(rows, groups))
    group = jnp.searchsorted(tile_ends, tiles, side="right", method="compare_all")
    group = jnp.minimum(group, groups - 1)
    row = starts[group] + (tiles - first[group]) * TILE
    live = jnp.clip(starts[group] + group_sizes[group] - row, 0, TILE)
    return _Tiling(*(a.astype(jnp.int32) for a in (first, count, row, live)))


def _token_tiles(tokens: tuple[jax.Array, jax.Array], tiling: _Tiling) -> TokenTiles:
    codes, scale = tokens
    return TokenTiles(codes, scale, tiling.first, tiling.count)


def _transposed_tiles(x: jax.Array, tiling: _Tiling) -> TokenTiles:
    inside = jnp.arange(TILE)
    mine = inside < tiling.live[:, None]
    row = jnp.where(mine, tiling.row[:, None] + inside, 0)
    values = jnp.where(mine[..., None], x[row].astype(jnp.float32), 0)
    scale = _scale(values, (1,))
    codes = _codes(values, scale).reshape(-1, x.shape[1]).T
    return _token_tiles((codes, scale[:, 0]), tiling)


def transpose_quantize(
    x: jax.Array, group_sizes: jax.Array, implementation: str | None = None
) -> TokenTiles:
    """Transposes and quantises each column in tiles of 128 rows of one group ("token-wise").

    Args:
      x: floating [M, K], rows sorted by group; rows past the sum of the sizes are not read.
      group_sizes: int32 [G].
      implementation: see the module.

    Raises:
      ValueError: an unknown implementation, or one that cannot take `x`.
    """
    tiling = _tiling(x.shape[0], group_sizes)
    refusal = quantize_triton.refuses_tokens(tiling.row.shape[0], x.shape[1])
    if not _fused(implementation, refusal, "transpose_quantize"):
        return _transposed_tiles(x, tiling)
    tokens = quantize_triton.transpose_quantize(_on_cuda(x), tiling.row, tiling.live)
    return _token_tiles(tokens, tiling)


def quantize_both(
    x: jax.Array, group_sizes: jax.Array, implementation: str | None = None
) -> tuple[tuple[jax.Array, jax.Array], TokenTiles]:
    """`quantize_tiles` and `transpose_quantize` of `x`, which is read once.

    Codes and scales of rows past the sum of the sizes may be anything.

    Raises:
      ValueError: an unknown implementation, or one that cannot take `x`.
    """
    tiling = _tiling(x.shape[0], group_sizes)
    refusal = quantize_triton.refuses_both(tiling.row.shape[0], x.shape[1])
    if not _fused(implementation, refusal, "quantize_both"):
        return quantize_tiles(x, "portable"), _transposed_tiles(x, tiling)
    kernel = quantize_triton.quantize_both
    rows, tokens = kernel(_on_cuda(x), tiling.row, tiling.live)
    return rows, _token_tiles(tokens, tiling)


class SwigluGradient(NamedTuple):
    """What the backward products of a SwiGLU MLP multiply.

    Attributes:
      rows: codes e4m3 [M, 2F] and scales float32 [ceil(2F / 128), M] of the gradient of `gate_up`.
      tokens: the same gradient, transposed.
      hidden: the activation, transposed.
      row_weight: float32 [M], the gradient of `row_weight`.
    """

    rows: tuple[jax.Array, jax.Array]
    tokens: TokenTiles
    hidden: TokenTiles
    row_weight: jax.Array


def swiglu_backward(
    gate_up: jax.Array,
    dh: jax.Array,
    row_weight: jax.Array,
    group_sizes: jax.Array,
    implementation: str | None = None,
) -> SwigluGradient:
    """The gradient of `swiglu`, quantised both ways, and the activation again, in one pass.

    Args:
      gate_up: floating [M, 2F], all gates before all ups, rows sorted by group.
      dh: floating [M, F], the gradient of the activation.
      row_weight: floating [M].
      group_sizes: int32 [G]. Codes and scales of rows past their sum may be anything, and the
        gradients of their weights are zeros.
      implementation: see the module.

    Raises:
      ValueError: an unknown implementation, or one that cannot take `dh`.
    """
    tiling = _tiling(dh.shape[0], group_sizes)
    columns = dh.shape[1]
    # The gradient of `gate_up` is twice as wide.
    refusal = quantize_triton.refuses_both(tiling.row.shape[0], columns)
    refusal = refusal or quantize_triton.refuses_both(tiling.row.shape[0], 2 * columns)
    if _fused(implementation, refusal, "swiglu_backward"):
        operands = _on_cuda(gate_up), dh, row_weight, tiling.row, tiling.live
        rows, tokens, hidden, sums = quantize_triton.swiglu_backward(*operands)
        tokens, hidden = _token_tiles(tokens, tiling), _token_tiles(hidden, tiling)
        d_weight = jnp.sum(sums, axis=0)
    else:
        wide = gate_up.astype(jnp.float32), row_weight.astype(jnp.float32)
        h, vjp = jax.vjp(swiglu, *wide)
        d_gate_up, d_weight = vjp(dh.astype(jnp.float32))
        rows = quantize_tiles(d_gate_up, "portable")
        tokens, hidden = _transposed_tiles(d_gate_up, tiling), _transposed_tiles(h, tiling)
    used = jnp.arange(dh.shape[0]) < jnp.sum(group_sizes)
    return SwigluGradient(rows, tokens, hidden, jnp.where(used, d_weight, 0))
