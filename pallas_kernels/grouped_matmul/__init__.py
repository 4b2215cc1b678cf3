"""Grouped matrix product: each run of rows meets its own group's matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose
from pallas_kernels.grouped_matmul import portable

_IMPLEMENTATIONS = {"portable": portable.grouped_matmul}


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, implementation: str | None = None
) -> jax.Array:
    """Multiplies row m of `x` by `w[g]`, where g is the group that row m belongs to.

    Rows are sorted by group: the first `group_sizes[0]` rows belong to group 0, and so on. Groups
    may be empty. Rows past the sum are never read into a result and come out as zeros. Products
    accumulate in float32. Differentiable in `x` and `w`; a group without rows gets a zero gradient.

    Args:
      x: rows, [M, K], floating.
      w: one matrix a group, [G, K, N], the dtype of `x`.
      group_sizes: int32 [G], not negative, sum at most M (not checked: it is data).
      implementation: "portable" (any platform, cost proportional to rows), or None to pick.

    Returns:
      [M, N] in the dtype of `x`.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"{x.shape=}, {w.shape=}, {group_sizes.shape=} must be [M, K], [G, K, N], [G] "
            "(grouped_matmul)"
        )
    if x.shape[1] != w.shape[1] or w.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"{x.shape=}, {w.shape=}, {group_sizes.shape=} must agree in K and G (grouped_matmul)"
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.dtype=} and {w.dtype=} must be one floating dtype (grouped_matmul)")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{group_sizes.dtype=} must be an integer dtype (grouped_matmul)")
    run = choose("grouped_matmul", _IMPLEMENTATIONS, implementation)
    return run(x, w, group_sizes.astype(jnp.int32))
