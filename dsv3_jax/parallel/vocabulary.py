"""The embedding table and the output head on a mesh.

Both matrices are shared out over every axis that holds parameters, and the same axes share out
sequences. Left to itself XLA may then bring whole batches to the slices of a matrix; here every
device keeps its own tokens, weights travel in the compute dtype, and gradients of weights are
summed in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import axis_sizes, mesh_axes
from dsv3_jax.parallel.rules import parameter_spec

Axes = tuple[str, ...]


class _Layout(NamedTuple):
    """Axes of the mesh that share out B and T of the tokens, and V and D of a matrix."""

    batch: Axes
    sequence: Axes
    vocab: Axes
    hidden: Axes

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.sequence or None)


def _layout(path: tuple[str, str], matrix: jax.Array, tokens: jax.Array) -> _Layout:
    spec = parameter_spec(axis_sizes(), path, matrix.shape)
    first, second = ((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)
    vocab, hidden = (first, second) if path[0] == "embed_tokens" else (second, first)
    batch, sequence = mesh_axes("batch", tokens.shape[0]), mesh_axes("sequence", tokens.shape[1])
    return _Layout(batch, sequence, vocab, hidden)


def _ways(axes: Sequence[str]) -> int:
    return math.prod(axis_sizes()[axis] for axis in axes)


def _gather(shard: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    return jax.lax.all_gather(shard, axes, axis=dimension, tiled=True) if axes else shard


def _return(gradient: jax.Array, axes: Axes, dimension: int, tokens: Axes) -> jax.Array:
    """Sums a gradient over the devices of other `tokens`; each keeps its part along `axes`."""
    if axes:
        copies = _ways([axis for axis in axes if axis not in tokens])
        gradient = jax.lax.psum_scatter(
            gradient / copies if copies > 1 else gradient,
            axes,
            scatter_dimension=dimension,
            tiled=True,
        )
    rest = tuple(axis for axis in tokens if axis not in axes)
    return jax.lax.psum(gradient, rest) if rest else gradient


def lookup(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of `table` [V, D] at `ids` (int32 [B, T]) in `dtype`: [B, T, D]."""
    if max(axis_sizes().values()) == 1:
        return table[ids].astype(dtype)
    layout = _layout(("embed_tokens", "embedding"), table, ids)
    return _lookup(layout, jnp.dtype(dtype), table, ids)


def _plan_lookup(layout: _Layout) -> tuple[str | None, Axes]:
    """(axis whose devices exchange tokens for slices of D, axes over which slices are gathered).

    The exchange costs tokens · D, gathering V · D: for the last axis that holds sequences too it
    is the exchange.
    """
    last = layout.hidden[-1] if layout.hidden else None
    if last is None or last not in layout.batch:
        return None, layout.hidden
    return last, layout.hidden[:-1]


def _local_rows(layout: _Layout, ids: jax.Array, rows: int) -> jax.Array:
    """Where `ids` lie in this device's `rows` rows of the table; `rows` for those elsewhere."""
    if not layout.vocab:
        return ids
    local = ids - jax.lax.axis_index(layout.vocab) * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(layout: _Layout, dtype: Any, table: jax.Array, ids: jax.Array) -> jax.Array:
    exchanged, gathered = _plan_lookup(layout)

    def look(table: jax.Array, ids: jax.Array) -> jax.Array:
        table = _gather(table.astype(dtype), gathered, 1)
        if exchanged:
            ids = _gather(ids, (exchanged,), 0)
        rows = _local_rows(layout, ids, table.shape[0])
        out = table.at[rows].get(mode="fill", fill_value=0)
        if layout.vocab:
            out = jax.lax.psum(out, layout.vocab)  # all but one are zero
        if exchanged:
            # Own tokens, columns by (device, gathered slice); D wants them by (slice, device).
            out = jax.lax.all_to_all(out, exchanged, split_axis=0, concat_axis=2, tiled=True)
            out = _swap(out, _ways((exchanged,)), _ways(gathered))
        return out

    return jax.shard_map(
        look,
        in_specs=(PartitionSpec(layout.vocab or None, layout.hidden or None), layout.tokens),
        out_specs=layout.tokens,
        check_vma=False,
    )(table, ids)


def _swap(x: jax.Array, slow: int, fast: int) -> jax.Array:
    """The last axis, blocks in the order (slow, fast), put in the order (fast, slow)."""
    parts = x.reshape(*x.shape[:-1], slow, fast, -1)
    return jnp.swapaxes(parts, -3, -2).reshape(x.shape)


def _lookup_forward(layout, dtype, table, ids):
    return _lookup(layout, dtype, table, ids), (ids, jnp.zeros((0, table.shape[0]), table.dtype))


def _lookup_backward(layout, dtype, residuals, dout):
    del dtype
    ids, like = residuals
    exchanged, gathered = _plan_lookup(layout)
    vocab_rows = like.shape[1] // _ways(layout.vocab)
    # Tokens of the other devices of the exchange have come here already.
    tokens = tuple(axis for axis in (*layout.batch, *layout.sequence) if axis != exchanged)

    def add(ids: jax.Array, dout: jax.Array) -> jax.Array:
        if exchanged:
            dout = _swap(dout, _ways(gathered), _ways((exchanged,)))
            dout = jax.lax.all_to_all(dout, exchanged, split_axis=2, concat_axis=0, tiled=True)
            ids = _gather(ids, (exchanged,), 0)
        rows = _local_rows(layout, ids, vocab_rows)
        dtable = jnp.zeros((vocab_rows, dout.shape[-1]), jnp.float32)
        dtable = dtable.at[rows].add(dout.astype(jnp.float32), mode="drop")
        return _return(dtable, gathered, 1, tokens).astype(like.dtype)

    dtable = jax.shard_map(
        add,
        in_specs=(layout.tokens, layout.tokens),
        out_specs=PartitionSpec(layout.vocab or None, layout.hidden or None),
        check_vma=False,
    )(ids, dout)
    return dtable, None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Columns(NamedTuple):
    """The columns of the output head that a device holds: V' of V, from column `first`."""

    first: jax.Array | int
    axes: Axes

    def sum(self, x: jax.Array) -> jax.Array:
        """Summed over the devices that share out V."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        """The greatest of the devices that share out V."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def min(self, x: jax.Array) -> jax.Array:
        """The least of the devices that share out V."""
        return jax.lax.pmin(x, self.axes) if self.axes else x


def run_head(
    function: Callable[..., tuple[jax.Array, ...]],
    outputs: Sequence[str],
    kernel: jax.Array,
    *tokens: jax.Array,
) -> tuple[jax.Array, ...]:
    """`function(columns, kernel, *tokens)`, each device with its own tokens and columns.

    Args:
      function: what to do with `columns` (`Columns`), the matching part [D, V'] of the output head
        and tokens [b, t, ...].
      outputs: what it returns: "tokens", an array [b, t, ...]; "sum", an array to be summed over
        all tokens; "kernel", a float32 gradient [D, V'] of its tokens, to be summed.
      kernel: [D, V] in the compute dtype.
      tokens: [B, T, ...] each.
    """
    if max(axis_sizes().values()) == 1:
        return function(Columns(0, ()), kernel, *tokens)
    layout = _layout(("lm_head", "kernel"), kernel, tokens[0])
    shared = (*layout.batch, *layout.sequence)
    kernel_spec = PartitionSpec(layout.hidden or None, layout.vocab or None)

    def finish(kind: str, out: jax.Array) -> jax.Array:
        if kind == "sum":
            return jax.lax.psum(out, shared) if shared else out
        return _return(out, layout.hidden, 0, shared) if kind == "kernel" else out

    def body(kernel: jax.Array, *tokens: jax.Array) -> tuple[jax.Array, ...]:
        kernel = _gather(kernel, layout.hidden, 0)
        index = jax.lax.axis_index(layout.vocab) if layout.vocab else 0
        columns = Columns(index * kernel.shape[1], layout.vocab)
        return tuple(map(finish, outputs, function(columns, kernel, *tokens)))

    specs = {"tokens": layout.tokens, "sum": PartitionSpec(), "kernel": kernel_spec}
    return jax.shard_map(
        body,
        in_specs=(kernel_spec, *(layout.tokens,) * len(tokens)),
        out_specs=tuple(specs[kind] for kind in outputs),
        check_vma=False,
    )(kernel, *tokens)
