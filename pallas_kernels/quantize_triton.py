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

# The first dimension of every grid runs fastest: along the rows of what is read.
_ROWS = 32  # of a program of `quantize_tiles`
_CHANNELS = 64  # of a program of `transpose_quantize`
# Rows that `swiglu_backward` holds at a time, while it looks for the largest and while it
# transposes. More do not fit two programs' registers, fewer store pieces of less than 32 bytes.
_PASS_ROWS = (16, 32)
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
    # Not clipped: no product is further above the largest code than a few units in float32's last
    # place, and these round to it.
    return (x * (1 / scale)).astype(E4M3)


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
        pl.BlockSpec((_ROWS, TILE), lambda j, i: (i, j)),
        pl.BlockSpec((1, _ROWS), lambda j, i: (j, i)),
    )
    grid = columns // TILE, rows // _ROWS
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

    spec = pl.BlockSpec((_ROWS, TILE), lambda j, i: (i, j))
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
        pl.BlockSpec((_ROWS, TILE), lambda j, i: (i, j)),
        pl.BlockSpec((_ROWS, TILE), lambda j, i: (i, j + ups)),
    ]
    operands = [gate_up, gate_up]
    if row_weight is not None:
        in_specs.append(pl.BlockSpec((_ROWS,), lambda j, i: (i,)))
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

    straight = pl.BlockSpec((1, TILE, TILE), lambda j, i, g: (g, i, j))
    across = pl.BlockSpec((1, TILE, TILE), lambda j, i, g: (g, j, i))
    return _call(
        body,
        (n // TILE, k // TILE, groups),
        (
            jax.ShapeDtypeStruct((groups, k, n), E4M3),
            jax.ShapeDtypeStruct((groups, n, k), E4M3),
            jax.ShapeDtypeStruct((groups, k // TILE, n // TILE), jnp.float32),
        ),
        [straight],
        (straight, across, pl.BlockSpec((1, 1, 1), lambda j, i, g: (g, i, j))),
        warps=16,
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
        tile, column = _Tile(row, live, _CHANNELS), pl.program_id(0)
        tile.store_transposed(tile.load(x, column), outs, column)

    return _call(
        body,
        (channels // _CHANNELS, tiles),
        _token_shapes(channels, tiles),
        [_WHOLE] * 3,
        (_WHOLE,) * 2,
        warps=4,
        name="transpose_quantize",
        interpret=interpret,
    )(row, live, x)


class _Tile:
    """A program's 128 rows of one group, of which the first `live` are there.

    Every method takes all of them, or `rows` from the `start`-th of them on.
    """

    def __init__(self, row, live, channels: int):
        self.tile, self.channels = pl.program_id(1), channels
        self.first, self.live = row[self.tile], live[self.tile]

    def _rows(self, start, rows: int):
        return pl.ds(self.first + start, rows)

    def _mask(self, start, shape: tuple[int, ...]) -> jax.Array:
        return start + lax.broadcasted_iota(jnp.int32, shape, 0) < self.live

    def _own(self, column):
        return pl.ds(column * self.channels, self.channels)

    def load(self, ref, column, start=0, rows: int = TILE) -> jax.Array:
        """Columns `column * channels`.. of rows, float32, zeros for rows that are not there."""
        at = ref.at[self._rows(start, rows), self._own(column)]
        mask = self._mask(start, (rows, self.channels))
        return plgpu.load(at, mask=mask, other=0.0).astype(jnp.float32)

    def load_rows(self, ref, start=0, rows: int = TILE) -> jax.Array:
        """A number a row, float32 [rows, 1]."""
        at, mask = ref.at[self._rows(start, rows)], self._mask(start, (rows,))
        return plgpu.load(at, mask=mask, other=0.0).astype(jnp.float32)[:, None]

    def store_rows(self, ref, column, numbers: jax.Array, start=0) -> None:
        """A number a row to line `column` of `ref` [columns, M]."""
        at = ref.at[column, self._rows(start, numbers.shape[0])]
        plgpu.store(at, numbers, mask=self._mask(start, numbers.shape))

    def store_codes(self, x: jax.Array, out: tuple, column, start=0) -> None:
        """Quantises `x` float32 [rows, 128] in tiles of one row."""
        codes, scale = out
        row_scale = _scale(jnp.max(jnp.abs(x), axis=1))
        at = codes.at[self._rows(start, x.shape[0]), self._own(column)]
        plgpu.store(at, _codes(x, row_scale[:, None]), mask=self._mask(start, x.shape))
        self.store_rows(scale, column, row_scale, start)

    def store_scale(self, scale: jax.Array, out: tuple, column) -> None:
        """The scales [channels] of tiles of one column."""
        plgpu.store(out[1].at[self.tile, self._own(column)], scale)

    def store_turned(self, x: jax.Array, scale: jax.Array, out: tuple, column, start=0) -> None:
        """The codes of `x` float32 [rows, channels] for these scales, transposed."""
        across = pl.ds(self.tile * TILE + start, x.shape[0])
        plgpu.store(out[0].at[self._own(column), across], _codes(x, scale[None, :]).T)

    def store_transposed(self, x: jax.Array, out: tuple, column) -> None:
        """Quantises `x` float32 [128, channels] in tiles of one column, transposed."""
        scale = _scale(jnp.max(jnp.abs(x), axis=0))
        self.store_turned(x, scale, out, column)
        self.store_scale(scale, out, column)


def quantize_both(
    x: jax.Array, row: jax.Array, live: jax.Array, *, interpret: bool = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`quantize_tiles` and `transpose_quantize` of x [M, K] in one pass; rows of no tile: anything.

    Returns:
      Codes [M, K] and scales [K / 128, M]; codes [K, 128 T] and scales [T, K].
    """
    (rows, channels), tiles = x.shape, row.shape[0]

    def body(row, live, x, *outs):
        tile, column = _Tile(row, live, TILE), pl.program_id(0)
        numbers = tile.load(x, column)
        tile.store_codes(numbers, outs[:2], column)
        tile.store_transposed(numbers, outs[2:], column)

    codes, scale, token_codes, token_scale = _call(
        body,
        (channels // TILE, tiles),
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
        tile, gate_at = _Tile(row, live, TILE), pl.program_id(0)
        up_at = gate_at + blocks

        def results(start, count):
            """The activation and the gradients of gate and up; summands of the weights' own."""
            gate, up, d_hidden = (
                tile.load(ref, column, start, count)
                for ref, column in ((gate_up, gate_at), (gate_up, up_at), (dh, gate_at))
            )
            factor = tile.load_rows(weight, start, count)
            sigmoid = 1 / (1 + jnp.exp(-gate))
            silu = gate * sigmoid
            activation = silu * up
            summands = d_hidden * activation
            d_hidden = d_hidden * factor
            d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
            return (activation * factor, d_gate, d_hidden * silu), summands

        # Twice over the rows, a few at a time: all at once do not fit the registers.
        first, second = _PASS_ROWS

        def along_rows(i, largest):
            start = i * first
            values, summands = results(start, first)
            tile.store_rows(sums, gate_at, jnp.sum(summands, axis=1), start)
            tile.store_codes(values[1], rows, gate_at, start)
            tile.store_codes(values[2], rows, up_at, start)
            return tuple(map(jnp.maximum, largest, map(jnp.abs, values)))

        zeros = (jnp.zeros((first, TILE), jnp.float32),) * 3
        largest = lax.fori_loop(0, TILE // first, along_rows, zeros)
        outputs = ((hidden, gate_at), (tokens, gate_at), (tokens, up_at))
        scales = [_scale(jnp.max(most, axis=0)) for most in largest]
        for scale, output in zip(scales, outputs, strict=True):
            tile.store_scale(scale, *output)

        def along_columns(i, _):
            values, _ = results(i * second, second)
            for value, scale, output in zip(values, scales, outputs, strict=True):
                tile.store_turned(value, scale, *output, i * second)

        lax.fori_loop(0, TILE // second, along_columns, None)

    codes, scale, turned, turned_scale, hidden, hidden_scale, sums = _call(
        body,
        (blocks, tiles),
        (
            *_row_shapes(rows, 2 * columns),
            *_token_shapes(2 * columns, tiles),
            *_token_shapes(columns, tiles),
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        [_WHOLE] * 5,
        (_WHOLE,) * 7,
        warps=8,
        name="swiglu_backward",
        interpret=interpret,
    )(row, live, gate_up, dh, row_weight)
    return (codes, scale), (turned, turned_scale), (hidden, hidden_scale), sums
