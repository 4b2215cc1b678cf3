"""Grouped matmul in plain JAX: a loop over tiles of rows, for any platform.

The loop visits only tiles that hold rows, so the cost follows rows and not rows times groups (as
`jax.lax.ragged_dot` does on CPU and GPU). A tile begins anywhere; its last rows may reach into
the next group, whose own first tile comes later in the loop and overwrites them.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: the power of two near half a mean group, between 8 and 256."""
    target = max(rows // (2 * groups), 1)
    return min(max(1 << (target.bit_length() - 1), 8), 256)


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    """Room for the last tile's overhang."""
    return jnp.pad(x, ((0, rows), (0, 0)))


def _multiply(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transposed: bool
) -> jax.Array:
    """x [M, K] times w[g] ([G, K, N], or [G, N, K] when `transposed`) -> [M, N]."""
    rows, groups = x.shape[0], w.shape[0]
    columns = w.shape[1] if transposed else w.shape[2]
    tile = _tile_rows(rows, groups)
    ends = jnp.cumsum(group_sizes)
    tiles = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles)
    padded = _pad_rows(x, tile)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def visit(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, i, side="right", method="compare_all")
        first = ends[group] - group_sizes[group] + (i - tile_ends[group] + tiles[group]) * tile
        block = lax.dynamic_slice_in_dim(padded, first, tile)
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = lax.dot_general(block, matrix, contract, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), first, 0)

    out = lax.fori_loop(0, tile_ends[-1], visit, jnp.zeros((rows + tile, columns), x.dtype))
    # The last tile's overhang multiplied rows past the sum: those results are dropped here.
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out[:rows], 0)


def _multiply_groups(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Per-group xᵀ dy: x [M, K], dy [M, N] -> float32 [G, K, N]; zeros for groups without rows."""
    rows, groups = x.shape[0], group_sizes.shape[0]
    tile = _tile_rows(rows, groups)
    ends = jnp.cumsum(group_sizes)
    x_padded, dy_padded = _pad_rows(x, tile), _pad_rows(dy, tile)

    def one_group(group: jax.Array) -> jax.Array:
        start = ends[group] - group_sizes[group]

        def visit(i: jax.Array, total: jax.Array) -> jax.Array:
            first = start + i * tile
            inside = (first + jnp.arange(tile) < ends[group])[:, None]
            # Both sides: a row past the end may hold NaN, and NaN times zero is NaN.
            block = jnp.where(inside, lax.dynamic_slice_in_dim(x_padded, first, tile), 0)
            dy_block = jnp.where(inside, lax.dynamic_slice_in_dim(dy_padded, first, tile), 0)
            contract = (((0,), (0,)), ((), ()))
            return total + lax.dot_general(
                block, dy_block, contract, preferred_element_type=jnp.float32
            )

        tiles = (group_sizes[group] + tile - 1) // tile
        zeros = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        return lax.fori_loop(0, tiles, visit, zeros)

    return lax.map(one_group, jnp.arange(groups))


@jax.custom_vjp
def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`."""
    return _multiply(x, w, group_sizes, transposed=False)


def _forward(x, w, group_sizes):
    return _multiply(x, w, group_sizes, transposed=False), (x, w, group_sizes)


def _backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = _multiply(dy, w, group_sizes, transposed=True)
    dw = _multiply_groups(x, dy, group_sizes).astype(w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)
