"""Task lists of the Hopper kernels, computed on the device: group sizes are data, not shapes.

A row task is a run of rows of one group that starts at a multiple of eight rows (loads must) and
owns the rows low..high of its window. Each group's rows are split evenly, so no task is a sliver.
Rows before the first group and past the last one form two more groups, whose product is zero.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.hopper_tiles import ALIGNED_ROWS

# Columns of the list of row tasks.
GROUP, WINDOW, LOW, HIGH, VARIANT, LIVE, PANEL_FIRST, PANEL_LENGTH = range(8)
# Columns of the list of groups.
FIRST_ATOM, FULL_STEPS, MORE_ATOMS, STEPS = range(4)


def _cumsum(x: jax.Array) -> jax.Array:
    """Inclusive sums of a short vector, as one fused comparison and sum."""
    i = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(i[:, None] >= i[None, :], x[None, :], 0), axis=1, dtype=x.dtype)


def _sum_before(key: jax.Array, x: jax.Array) -> jax.Array:
    """For each element the sum of `x` over those before it, by descending `key`, then in order."""
    i = jnp.arange(x.shape[0])
    earlier = (key[None, :] == key[:, None]) & (i[None, :] < i[:, None])
    before = (key[None, :] > key[:, None]) | earlier
    return jnp.sum(jnp.where(before, x[None, :], 0), axis=1, dtype=x.dtype)


def most_row_tasks(rows: int, groups: int, largest: int) -> int:
    """How many row tasks there can be, whatever the sizes."""
    runs = min(groups + 2, rows)
    # Each run of rows may reach back to a multiple of eight, and its last task may be a short one.
    return -(-(rows + (ALIGNED_ROWS - 1) * runs) // largest) + runs


def row_tasks(
    group_sizes: jax.Array, first_row: jax.Array, rows: int, choices: tuple[int, ...], panel: int
) -> tuple[jax.Array, jax.Array]:
    """Row tasks of the groups, those of the groups with the largest tasks first.

    Blocks take tiles in turns: in this order what they take in a turn costs them about the same.

    Args:
      group_sizes: int32 [G].
      first_row: int32 [], row where group 0 starts.
      rows: M.
      choices: row counts a task may be compiled for, ascending.
      panel: row tasks of one group that are walked together.

    Returns:
      int32 [tasks, 8], a task a line, and int32 [1], how many lines count.
    """
    total = jnp.sum(group_sizes, dtype=jnp.int32)
    sizes = jnp.concatenate([first_row[None], group_sizes, (rows - first_row - total)[None]])
    ends = _cumsum(sizes)
    starts = ends - sizes
    windows = starts // ALIGNED_ROWS
    spans = jnp.where(sizes > 0, ends - windows * ALIGNED_ROWS, 0)
    counts = -(-spans // choices[-1])
    pitches = _round_up(-(-spans // jnp.maximum(counts, 1)), choices)
    groups = group_sizes.shape[0]
    runs = jnp.arange(groups + 2)
    live = (runs > 0) & (runs <= groups)
    firsts = _sum_before(jnp.where(live, pitches, 0), counts)

    task = jnp.arange(most_row_tasks(rows, groups, choices[-1]))
    inside = (task[:, None] >= firsts) & (task[:, None] < firsts + counts)
    run = jnp.sum(jnp.where(inside, runs, 0), axis=1, dtype=jnp.int32)
    count, pitch, first = counts[run], pitches[run], firsts[run]
    local = task - first
    high = jnp.minimum(spans[run] - local * pitch, pitch)
    low = jnp.where(local == 0, starts[run] - windows[run] * ALIGNED_ROWS, 0)
    in_panel = local // panel * panel
    table = {
        GROUP: jnp.clip(run - 1, 0, groups - 1),
        WINDOW: windows[run] + local * (pitch // ALIGNED_ROWS),
        LOW: low,
        HIGH: high,
        VARIANT: jnp.minimum(_index(high, choices), len(choices) - 1),
        LIVE: live[run],
        PANEL_FIRST: first + in_panel,
        PANEL_LENGTH: jnp.minimum(panel, count - in_panel),
    }
    lines = jnp.stack([table[i].astype(jnp.int32) for i in range(len(table))], axis=1)
    return lines, jnp.sum(counts, keepdims=True, dtype=jnp.int32)


def group_steps(
    group_sizes: jax.Array, first_row: jax.Array, depth: int
) -> tuple[jax.Array, jax.Array]:
    """How the rows of each group are contracted in steps of `depth`.

    The steps read the rows themselves in whole atoms of eight that start at a multiple of eight.
    A group's few other rows, at its head and its tail, are gathered apart: they follow the last
    whole atom, and zeros follow them, so no row of a neighbour is ever multiplied.

    Args:
      group_sizes: int32 [G].
      first_row: int32 [], row where group 0 starts.
      depth: rows a step.

    Returns:
      int32 [G, 4], a group a line: first whole atom, steps of whole atoms alone, atoms in the step
      after them, all steps; and int32 [G, 16], the rows gathered, -1 for none.
    """
    ends = first_row + _cumsum(group_sizes)
    starts = ends - group_sizes
    first_atom = -(-starts // ALIGNED_ROWS)
    atoms = jnp.maximum(ends // ALIGNED_ROWS - first_atom, 0)
    full = atoms * ALIGNED_ROWS // depth
    steps = -(-group_sizes // depth)
    lines = jnp.stack([first_atom, full, atoms - full * (depth // ALIGNED_ROWS), steps], axis=1)

    head = jnp.minimum(first_atom * ALIGNED_ROWS, ends) - starts
    left = group_sizes - atoms * ALIGNED_ROWS
    i = jnp.arange(2 * ALIGNED_ROWS)[None, :]
    row = starts[:, None] + i + jnp.where(i >= head[:, None], atoms[:, None] * ALIGNED_ROWS, 0)
    return lines, jnp.where(i < left[:, None], row, -1)


def _index(x: jax.Array, choices: tuple[int, ...]) -> jax.Array:
    """Index of the smallest choice that is at least `x`."""
    return jnp.sum(x[..., None] > jnp.asarray(choices), axis=-1, dtype=jnp.int32)


def _round_up(x: jax.Array, choices: tuple[int, ...]) -> jax.Array:
    """The smallest choice that is at least `x`."""
    fits = jnp.where(x[..., None] <= jnp.asarray(choices), jnp.asarray(choices), choices[-1])
    return jnp.min(fits, axis=-1)
