"""Grouped matrix product: each run of rows meets its own group's matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose, is_hopper
from pallas_kernels.grouped_matmul import hopper, portable, tpu, tpu_tiles


def _portable(x, w, group_sizes, first_row=None):
    if first_row is None:
        return portable.grouped_matmul(x, w, group_sizes)
    # Its groups start at row 0; rows that are not theirs are past the sum wherever they come.
    y = portable.grouped_matmul(jnp.roll(x, -first_row, axis=0), w, group_sizes)
    return jnp.roll(y, first_row, axis=0)


_IMPLEMENTATIONS = {
    "hopper": hopper.grouped_matmul,
    "tpu": tpu.grouped_matmul,
    "portable": _portable,
}


def _pick(x: jax.Array, w: jax.Array) -> str:
    """The implementation for the chip that is traced for."""
    if is_hopper() and hopper.refusal(x, w) is None:
        return "hopper"
    if tpu_tiles.is_supported() and tpu.refusal(x, w) is None:
        return "tpu"
    return "portable"


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    implementation: str | None = None,
    *,
    group_offset: jax.Array | int | None = None,
) -> jax.Array:
    """Multiplies row m of `x` by `w[g]`, where g is the group that row m belongs to.

    Rows are sorted by group: the first `group_sizes[0]` rows belong to group 0, and so on. Groups
    may be empty. Rows past the sum are never read into a result and come out as zeros. Products
    accumulate in float32. Differentiable in `x` and `w`; a group without rows gets a zero gradient.

    Args:
      x: rows, [M, K], floating.
      w: one matrix a group, [G, K, N], the dtype of `x`.
      group_sizes: int32 [G], not negative, sum at most M (not checked: it is data); longer where
        `w` is a shard's slice of the groups and `group_offset` says which.
      implementation: "portable" (any platform, cost proportional to rows), "hopper" (bfloat16 and
        float16 on an H100, an H200 or their like), "tpu" (bfloat16 and float32 on v5e, v5p, v6e and
        tpu7x), or None to pick for the chip of the mesh set with `jax.set_mesh`, or else the
        default device. The choice is made while tracing: to lower for another platform, name one.
      group_offset: int32 [], which of the sizes is that of `w[0]`. Rows of groups outside the slice
        are not read and come out as zeros, in the result and in the gradient of `x`.

    Returns:
      [M, N] in the dtype of `x`.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that is unknown or does
        not take them.
    """
    sliced = group_offset is not None
    if x.ndim != 2 or w.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"{x.shape=}, {w.shape=}, {group_sizes.shape=} must be [M, K], [G, K, N], [G] "
            "(grouped_matmul)"
        )
    groups = group_sizes.shape[0]
    if x.shape[1] != w.shape[1] or not (w.shape[0] == groups or w.shape[0] < groups and sliced):
        raise ValueError(
            f"{x.shape=}, {w.shape=}, {group_sizes.shape=} must agree in K and G (grouped_matmul)"
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.dtype=} and {w.dtype=} must be one floating dtype (grouped_matmul)")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{group_sizes.dtype=} must be an integer dtype (grouped_matmul)")
    name = implementation or _pick(x, w)
    run = choose("grouped_matmul", _IMPLEMENTATIONS, name)
    sizes = group_sizes.astype(jnp.int32)
    if not sliced:
        return run(x, w, sizes)
    first_row = jnp.sum(jnp.where(jnp.arange(groups) < group_offset, sizes, 0), dtype=jnp.int32)
    return run(x, w, jax.lax.dynamic_slice_in_dim(sizes, group_offset, w.shape[0]), first_row)
