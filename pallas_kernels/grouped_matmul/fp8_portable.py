"""FP8 grouped products in plain JAX, for any platform: loops over tiles of rows.

e4m3 codes are exact in bfloat16 and TF32, so the products of codes are exact whatever a platform's
default matmul precision is; sums within a tile of 128 and across tiles are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._e4m3 import TILE
from pallas_kernels.quantize import TokenTiles

_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Codes a [m, c] times codes b [n, c] -> float32 [m, n]."""
    return lax.dot_general(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        _CONTRACT_LAST,
        preferred_element_type=jnp.float32,
    )


def _pad_columns(x: jax.Array) -> jax.Array:
    """`x` [..., c] with zeros up to a multiple of 128 columns."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])


def multiply(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Rows x [M, C] times the transposes of w [G, O, C] -> [M, O]; see `grouped_matmul_quantized`.

    The loop visits only tiles that hold rows, so the cost follows rows and not rows times groups.
    """
    rows, columns = x.shape[0], w.shape[1]
    tile = min(TILE, rows)
    x, w = _pad_columns(x), _pad_columns(w)
    w_scale = jnp.repeat(w_scale, TILE, axis=1)[:, :columns]
    ends = jnp.cumsum(group_sizes)
    tiles = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles)

    def visit(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, i, side="right", method="compare_all")
        first = ends[group] - group_sizes[group] + (i - tile_ends[group] + tiles[group]) * tile
        # The last tile is moved back to stay inside the array: it rereads rows it does not own.
        start = jnp.minimum(first, rows - tile)
        row = start + jnp.arange(tile)
        own = ((row >= first) & (row < ends[group]))[:, None]

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            codes = lax.dynamic_slice(x, (start, step * TILE), (tile, TILE))
            matrix = lax.dynamic_slice(w, (group, 0, step * TILE), (1, columns, TILE))[0]
            row_scale = lax.dynamic_slice(x_scale, (step, start), (1, tile))[0]
            column_scale = w_scale[group, :, step]
            return total + _dot(codes, matrix) * row_scale[:, None] * column_scale

        zeros = jnp.zeros((tile, columns), jnp.float32)
        product = lax.fori_loop(0, x.shape[1] // TILE, add, zeros)
        before = lax.dynamic_slice_in_dim(out, start, tile)
        after = jnp.where(own, product.astype(dtype), before)
        return lax.dynamic_update_slice_in_dim(out, after, start, 0)

    return lax.fori_loop(0, tile_ends[-1], visit, jnp.zeros((rows, columns), dtype))


def multiply_groups(x: TokenTiles, dy: TokenTiles, dtype: jnp.dtype) -> jax.Array:
    """Per-group products over rows, [K, P] and [N, P] -> [G, K, N]; zeros without rows."""

    def one_group(group: jax.Array) -> jax.Array:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            step = x.first[group] + i
            codes, dy_codes = (
                lax.dynamic_slice_in_dim(operand.codes, step * TILE, TILE, 1) for operand in (x, dy)
            )
            product = _dot(codes, dy_codes)
            return total + product * x.scale[step][:, None] * dy.scale[step]

        zeros = jnp.zeros((x.codes.shape[0], dy.codes.shape[0]), jnp.float32)
        return lax.fori_loop(0, x.count[group], add, zeros).astype(dtype)

    return lax.map(one_group, jnp.arange(x.first.shape[0]))
