"""Tile sizes of the Hopper kernels: the one table, and the rule for shapes it does not list."""

import dataclasses

# A swizzled row of shared memory is 128 bytes: 64 bfloat16. WGMMA takes operands in such atoms.
ATOM = 64
# Loads start at a multiple of the atom's height.
ALIGNED_ROWS = 8
CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Tile of the forward product and of dgrad: a run of one group's rows by some columns.

    Attributes:
      rows: row counts a task may have, ascending multiples of 8; a loop is compiled for each.
      columns: output columns a block computes; each of the two consumers takes half.
      depth: contraction length of one pipeline step.
      stages: pipeline steps in shared memory.
      cluster: blocks that compute neighbouring columns of the same rows and share the loads of
        these rows by multicast, 1 or 2.
      panel: row tasks of one group that are walked together, column after column, so that the
        weights are read once for all of them while the rows stay in L2.
      store_slots: chunks of 64 by 64 outputs each consumer may have on their way to memory.
      lead: steps between the consumers, see `hopper_pipeline.drain`.
    """

    rows: tuple[int, ...]
    columns: int = 128
    depth: int = 64
    stages: int = 4
    cluster: int = 1
    panel: int = 8
    store_slots: int = 2
    lead: int = 2

    def __post_init__(self):
        lead, stages, aligned = self.lead, self.stages, ALIGNED_ROWS * self.cluster
        if not 0 <= lead < stages:
            # The first consumer would wait for a slot that the second one, still waiting, holds.
            raise ValueError(f"{lead=} must be less than {stages=} (RowTile)")
        if wrong := [size for size in self.rows if size % aligned]:
            # Each block of a cluster loads its share of the rows, in whole atoms.
            raise ValueError(f"rows={wrong} must be multiples of {aligned} (RowTile)")


@dataclasses.dataclass(frozen=True)
class GroupTile:
    """Tile of wgrad: `k` by `n` outputs of one group, contracted over its rows.

    Attributes:
      k: output rows of a block; each of the two consumers takes half.
      n: output columns of a block.
      depth: rows contracted in one pipeline step, 32 or multiples of 64.
      stages, store_slots: as in `RowTile`.
      cluster: blocks that compute neighbouring `k` of the same `n` and share the loads of dy by
        multicast, 1 or 2.
      across: whether the tiles of a turn fill rows of the gradient, instead of columns.
      pace: turns after which the clusters wait for each other, see `hopper_pipeline.pacemaker`;
        0: never.
    """

    k: int = 128
    n: int = 256
    depth: int = 64
    stages: int = 4
    cluster: int = 1
    store_slots: int = 2
    across: bool = True
    pace: int = 0


# Measured on an H200 and an H100 with scripts/benchmark_kernels.py.
# Few rows a group: the weights are what is read, so many stages of them.
_STREAM = RowTile(rows=(8, 16, 32, 64), stages=8, lead=0)
# Hundreds of rows a group: one or two tasks, of every size in steps of 16.
_MIDDLE = RowTile(rows=(16, 32, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240, 256))
# A thousand rows a group: an even split never leaves less than two thirds of the largest task.
_MANY = RowTile(rows=(64, 128, 176, 192, 208, 224, 240, 256))
_STREAM_BELOW, _MANY_FROM = 48, 512
# Wgrad of hundreds of rows a group: what a turn reads again is soon washed out of L2 by its
# results.
_FEW_STEPS = GroupTile(cluster=2, pace=2)


def row_tile(rows: int, groups: int, columns: int) -> RowTile:
    """The tile for `rows` rows in `groups` groups and `columns` output columns."""
    mean = rows / groups
    if mean < _STREAM_BELOW:
        return _STREAM
    if mean < _MANY_FROM:
        return _MIDDLE
    # Multicast pays where rows are read again and again, if the columns come in pairs of tiles.
    pairs = columns % (2 * _MANY.columns) == 0
    return dataclasses.replace(_MANY, cluster=2 if pairs else 1)


def group_tile(rows: int, groups: int, k: int, n: int) -> GroupTile:
    """The tile for `rows` rows in `groups` groups, `k` output rows and `n` columns."""
    if k % (2 * GroupTile.k):
        return GroupTile()
    if rows / groups >= _MANY_FROM:
        return GroupTile(cluster=2)
    # The shorter side first: a turn is then nearly square, and reads the fewest columns.
    return dataclasses.replace(_FEW_STEPS, across=n <= k)
