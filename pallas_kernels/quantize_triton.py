"""The FP8 quantisers as one pass each on NVIDIA GPUs (Pallas Triton); meanings in `quantize`.

A pass reads every number once and writes every code once. The compiler would read twice, once for
the largest numbers and once for the codes, and transpose in a third pass. Divisions here may be off
by two units in the last place, so a scale may differ by as much from that of `quantize`, and a code
next to a tie by one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._e4m3 import E4M3, MAX_CODE, SMALLEST_SCALE, TILE

_ROWS = 32  # of a program of `quantize_tiles`
_CHANNELS = 64  # of a program of `transpose_quantize`
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def _call(body, grid, out_shape, in_specs, out_specs, *, warps, name, interpret):
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=out_shape,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


def _scale(largest: jax.Array) -> jax.Array:
    scale = jnp.where(largest == 0, 1.0, largest / MAX_CODE)
    return jnp.maximum(scale, SMALLEST_SCALE)


def _codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(x * (1 / scale), -MAX_CODE, MAX_CODE).astype(E4M3)


def _store_rows(x: jax.Array, codes, scale) -> None:
    """Quantises `x` float32 [rows, 128] in tiles of one row."""
    row_scale = _scale(jnp.max(jnp.abs(x), axis=1))
    codes[...] = _codes(x, row_scale[:, None])
    scale[...] = row_scale[None, :]


def _row_shapes(rows: int, channels: int) -> tuple:
    return (
        jax.ShapeDtypeStruct((rows, channels), E4M3),
        jax.ShapeDtypeStruct((channels // TILE, rows), jnp.float32),
    )


def _rows_call(body, operands, shape, in_specs, *, name, interpret):
    rows, columns = shape
    out_specs = (
        pl.BlockSpec((_ROWS, TILE), lambda i, j: (i, j)),
        pl.BlockSpec((1, _ROWS), lambda i, j: (j, i)),
    )
    grid = rows // _ROWS, columns // TILE
    shapes = _row_shapes(rows, columns)
    return _call(body, grid, shapes, in_specs, out_specs, warps=4, name=name, interpret=interpret)(
        *operands
    )


def _refuses_size(codes: int) -> str | None:
    # Offsets have 64 bits in arrays of more than 2**32 bytes and a sign bit below.
    if 2**31 < codes <= 2**32:
        return f"{codes=} in one array must not lie between 2**31 and 2**32"
    return None


def refuses_rows(rows: int, columns: int) -> str | None:
    """Why `quantize_tiles` and `swiglu_quantize` cannot take so many rows and results, or None."""
    if rows % _ROWS or columns % TILE:
        return f"{rows=}, {columns=} must be multiples of {_ROWS} and {TILE}"
    return _refuses_size(rows * columns)


def quantize_tiles(x: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> codes [M, K] and scales [K / 128, M]."""

    def body(x, codes, scale):
        _store_rows(x[...].astype(jnp.float32), codes, scale)

    spec = pl.BlockSpec((_ROWS, TILE), lambda i, j: (i, j))
    return _rows_call(body, (x,), x.shape, [spec], name="quantize_tiles", interpret=interpret)


def swiglu_quantize(
    gate_up: jax.Array, row_weight: jax.Array | None = None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """gate_up [M, 2F], row_weight [M] -> codes [M, F] and scales [F / 128, M]."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2

    def body(gate, up, *refs):
        gate, up = gate[...].astype(jnp.float32), up[...].astype(jnp.float32)
        hidden = gate / (1 + jnp.exp(-gate)) * up
        if row_weight is not None:
            hidden = hidden * refs[0][...].astype(jnp.float32)[:, None]
        _store_rows(hidden, *refs[-2:])

    ups = columns // TILE
    in_specs = [
        pl.BlockSpec((_ROWS, TILE), lambda i, j: (i, j)),
        pl.BlockSpec((_ROWS, TILE), lambda i, j: (i, j + ups)),
    ]
    operands = [gate_up, gate_up]
    if row_weight is not None:
        in_specs.append(pl.BlockSpec((_ROWS,), lambda i, j: (i,)))
        operands.append(row_weight)
    return _rows_call(
        body, operands, (rows, columns), in_specs, name="swiglu_quantize", interpret=interpret
    )


def refuses_weights(groups: int, k: int, n: int) -> str | None:
    """Why `quantize_weights` cannot take matrices of k x n, or None."""
    if k % TILE or n % TILE:
        return f"{k=}, {n=} must be multiples of {TILE}"
    return _refuses_size(groups * k * n)


def quantize_weights(w: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, ...]:
    """w [G, K, N] -> codes [G, K, N], codes [G, N, K], scales [G, K / 128, N / 128]."""
    groups, k, n = w.shape

    def body(w, codes, turned, scale):
        block = w[0].astype(jnp.float32)
        block_scale = _scale(jnp.max(jnp.abs(block)))
        block_codes = _codes(block, block_scale)
        codes[0] = block_codes
        turned[0] = block_codes.T
        scale[...] = jnp.full(scale.shape, block_scale)

    straight = pl.BlockSpec((1, TILE, TILE), lambda g, i, j: (g, i, j))
    across = pl.BlockSpec((1, TILE, TILE), lambda g, i, j: (g, j, i))
    return _call(
        body,
        (groups, k // TILE, n // TILE),
        (
            jax.ShapeDtypeStruct((groups, k, n), E4M3),
            jax.ShapeDtypeStruct((groups, n, k), E4M3),
            jax.ShapeDtypeStruct((groups, k // TILE, n // TILE), jnp.float32),
        ),
        [straight],
        (straight, across, pl.BlockSpec((1, 1, 1), lambda g, i, j: (g, i, j))),
        warps=8,
        name="quantize_weights",
        interpret=interpret,
    )(w)


def refuses_tokens(tiles: int, channels: int) -> str | None:
    """Why `transpose_quantize` cannot take tiles of so many channels, or None."""
    if channels % _CHANNELS:
        return f"{channels=} must be a multiple of {_CHANNELS}"
    return _refuses_size(tiles * TILE * channels)


def refuses_both(tiles: int, channels: int) -> str | None:
    """Why `quantize_both` and `swiglu_backward` cannot take so many results, or None."""
    if channels % TILE:
        return f"{channels=} must be a multiple of {TILE}"
    return _refuses_size(tiles * TILE * channels)


def _token_shapes(channels: int, tiles: int) -> tuple:
    return (
        jax.ShapeDtypeStruct((channels, tiles * TILE), E4M3),
        jax.ShapeDtypeStruct((tiles, channels), jnp.float32),
    )


def transpose_quantize(
    x: jax.Array, row: jax.Array, live: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> codes [K, 128 T] and scales [T, K]; tile t is rows `row[t]`.. of it.

    Args:
      row: int32 [T], where each tile of rows starts.
      live: int32 [T], how many rows it has; codes of the others are zeros.
    """
    (_, channels), tiles = x.shape, row.shape[0]

    def body(row, live, x, *outs):
        tile, column = _Tile(row, live, _CHANNELS), pl.program_id(1)
        tile.store_transposed(tile.load(x, column), outs, column)

    return _call(
        body,
        (tiles, channels // _CHANNELS),
        _token_shapes(channels, tiles),
        [_WHOLE] * 3,
        (_WHOLE,) * 2,
        warps=4,
        name="transpose_quantize",
        interpret=interpret,
    )(row, live, x)


class _Tile:
    """A program's 128 rows of one group, of which the first `live` are there."""

    def __init__(self, row, live, channels: int):
        self.tile, self.channels = pl.program_id(0), channels
        self.rows, self.live = pl.ds(row[self.tile], TILE), live[self.tile]
        self.mask = lax.broadcasted_iota(jnp.int32, (TILE, channels), 0) < self.live

    def _at(self, ref, column):
        return ref.at[self.rows, pl.ds(column * self.channels, self.channels)]

    def load(self, ref, column) -> jax.Array:
        """Columns `column * channels`.. of the rows, float32, zeros for rows that are not there."""
        return plgpu.load(self._at(ref, column), mask=self.mask, other=0.0).astype(jnp.float32)

    def load_rows(self, ref) -> jax.Array:
        """A number a row, float32 [128, 1]."""
        mask = lax.iota(jnp.int32, TILE) < self.live
        numbers = plgpu.load(ref.at[self.rows], mask=mask, other=0.0)
        return numbers.astype(jnp.float32)[:, None]

    def store_rows(self, ref, column, numbers: jax.Array) -> None:
        """A number a row to line `column` of `ref` [columns, M]."""
        mask = lax.iota(jnp.int32, TILE) < self.live
        plgpu.store(ref.at[column, self.rows], numbers, mask=mask)

    def store_transposed(self, x: jax.Array, out: tuple, column) -> None:
        """Quantises `x` float32 [128, channels] in tiles of one column, transposed."""
        codes, scale = out
        channel_scale = _scale(jnp.max(jnp.abs(x), axis=0))
        own = pl.ds(column * self.channels, self.channels)
        turned = _codes(x, channel_scale[None, :]).T
        plgpu.store(codes.at[own, pl.ds(self.tile * TILE, TILE)], turned)
        plgpu.store(scale.at[self.tile, own], channel_scale)

    def store_both(self, x: jax.Array, rows: tuple, tokens: tuple, column) -> None:
        """Quantises `x` float32 [128, 128] in tiles of one row and, transposed, of one column."""
        codes, scale = rows
        row_scale = _scale(jnp.max(jnp.abs(x), axis=1))
        plgpu.store(self._at(codes, column), _codes(x, row_scale[:, None]), mask=self.mask)
        self.store_rows(scale, column, row_scale)
        self.store_transposed(x, tokens, column)


def quantize_both(
    x: jax.Array, row: jax.Array, live: jax.Array, *, interpret: bool = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`quantize_tiles` and `transpose_quantize` of x [M, K] in one pass; rows of no tile: anything.

    Returns:
      Codes [M, K] and scales [K / 128, M]; codes [K, 128 T] and scales [T, K].
    """
    (rows, channels), tiles = x.shape, row.shape[0]

    def body(row, live, x, *outs):
        tile, column = _Tile(row, live, TILE), pl.program_id(1)
        tile.store_both(tile.load(x, column), outs[:2], outs[2:], column)

    codes, scale, token_codes, token_scale = _call(
        body,
        (tiles, channels // TILE),
        (*_row_shapes(rows, channels), *_token_shapes(channels, tiles)),
        [_WHOLE] * 3,
        (_WHOLE,) * 4,
        warps=8,
        name="quantize_both",
        interpret=interpret,
    )(row, live, x)
    return (codes, scale), (token_codes, token_scale)


def swiglu_backward(
    gate_up: jax.Array,
    dh: jax.Array,
    row_weight: jax.Array,
    row: jax.Array,
    live: jax.Array,
    *,
    interpret: bool = False,
) -> tuple:
    """Gradients of `swiglu` for gate_up [M, 2F], dh [M, F], row_weight [M], quantised both ways.

    Returns:
      Of the gradient of `gate_up`: codes [M, 2F] and scales [2F / 128, M]; transposed, codes
      [2F, 128 T] and scales [T, 2F]. Of the activation, transposed: codes [F, 128 T] and scales
      [T, F]. float32 [F / 128, M], which add up to the gradient of `row_weight`. Rows of no tile
      may be anything.
    """
    (rows, columns), tiles = dh.shape, row.shape[0]
    blocks = columns // TILE

    def body(row, live, gate_up, dh, weight, *outs):
        rows, tokens, hidden, sums = outs[:2], outs[2:4], outs[4:6], outs[6]
        tile, column = _Tile(row, live, TILE), pl.program_id(1)
        gate, up = tile.load(gate_up, column), tile.load(gate_up, column + blocks)
        d_hidden, factor = tile.load(dh, column), tile.load_rows(weight)
        sigmoid = 1 / (1 + jnp.exp(-gate))
        silu = gate * sigmoid
        tile.store_rows(sums, column, jnp.sum(d_hidden * silu * up, axis=1))
        tile.store_transposed(silu * up * factor, hidden, column)
        d_hidden = d_hidden * factor
        tile.store_both(d_hidden * silu, rows, tokens, column + blocks)
        d_silu = sigmoid + silu * (1 - sigmoid)
        tile.store_both(d_hidden * up * d_silu, rows, tokens, column)

    codes, scale, turned, turned_scale, hidden, hidden_scale, sums = _call(
        body,
        (tiles, blocks),
        (
            *_row_shapes(rows, 2 * columns),
            *_token_shapes(2 * columns, tiles),
            *_token_shapes(columns, tiles),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        [_WHOLE] * 5,
        (_WHOLE,) * 7,
        warps=16,
        name="swiglu_backward",
        interpret=interpret,
    )(row, live, gate_up, dh, row_weight)
    return (codes, scale), (turned, turned_scale), (hidden, hidden_scale), sums
