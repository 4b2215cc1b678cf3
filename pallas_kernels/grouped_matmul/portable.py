"""Grouped matmul in plain JAX: a loop over tiles of rows, for any platform.

The loop visits only tiles that hold rows, so the cost follows rows and not rows times groups (as
`jax.lax.ragged_dot` does on CPU and GPU). A tile begins anywhere and may reach into neighbouring
groups or past the end; rows that are not its own are masked.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: the power of two up to the mean group, between 8 and 256, at most all."""
    target = max(rows // groups, 1)
    return min(max(1 << (target.bit_length() - 1), 8), 256, rows)


def _own_rows(first: jax.Array, end: jax.Array, tile: int, rows: int) -> tuple:
    """Where the tile of rows `first`.. is read, and which of its rows it owns, bool [tile, 1].

    The last tiles are moved back to stay inside the array: they reread rows that are not theirs.
    """
    start = jnp.minimum(first, rows - tile)
    row = start + jnp.arange(tile)
    return start, ((row >= first) & (row < end))[:, None]


def _multiply(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """x [M, K] times w[g] ([G, K, N], or [G, N, K] when `transposed`) -> [M, N]."""
    rows, groups = x.shape[0], w.shape[0]
    columns = w.shape[1] if transposed else w.shape[2]
    tile = _tile_rows(rows, groups)
    ends = jnp.cumsum(group_sizes)
    tiles = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def visit(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, i, side="right", method="compare_all")
        first = ends[group] - group_sizes[group] + (i - tile_ends[group] + tiles[group]) * tile
        start, own = _own_rows(first, ends[group], tile, rows)
        block = lax.dynamic_slice_in_dim(x, start, tile)
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = lax.dot_general(block, matrix, contract, preferred_element_type=jnp.float32)
        before = lax.dynamic_slice_in_dim(out, start, tile)
        after = jnp.where(own, product.astype(x.dtype), before)
        return lax.dynamic_update_slice_in_dim(out, after, start, 0)

    return lax.fori_loop(0, tile_ends[-1], visit, jnp.zeros((rows, columns), x.dtype))


def _multiply_groups(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Per-group xᵀ dy: x [M, K], dy [M, N] -> float32 [G, K, N]; zeros for groups without rows."""
    rows, groups = x.shape[0], group_sizes.shape[0]
    tile = _tile_rows(rows, groups)
    ends = jnp.cumsum(group_sizes)
    contract = (((0,), (0,)), ((), ()))

    def one_group(group: jax.Array) -> jax.Array:
        def visit(i: jax.Array, total: jax.Array) -> jax.Array:
            first = ends[group] - group_sizes[group] + i * tile
            start, own = _own_rows(first, ends[group], tile, rows)
            # Both sides: a row that is not ours may hold NaN, and NaN times zero is NaN.
            block = jnp.where(own, lax.dynamic_slice_in_dim(x, start, tile), 0)
            dy_block = jnp.where(own, lax.dynamic_slice_in_dim(dy, start, tile), 0)
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
