"""Sizes of the FP8 kernels on Hopper: the one table, and the rule for shapes it does not list."""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu

# What WGMMA reads: atoms of eight rows of 128 swizzled bytes, 128 e4m3 codes.
OPERAND = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))

# Scales of blocks that a step copies, its own among them: a copy goes to a multiple of 128 bytes.
SCALES = 32


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Tile of forward and dgrad: at most 128 rows of one group by some columns, 128 deep.

    Attributes:
      rows: row counts that a loop is compiled for, ascending multiples of 8, the last one 128.
      columns: output columns a block computes, 128 or 256.
      stages: pipeline steps in shared memory.
      chain: sums that are unrolled, see `hopper_fp8_sums`.
      cluster: blocks that compute neighbouring columns of the same rows and share the loads of
        these rows by multicast, 1 or 2; 2 needs an even number of column tiles.
      panel: row tasks of one group that are walked together, column after column, so that the
        weights are read once for all of them while the rows stay in L2.
      store_slots: chunks of 64 by 64 outputs each consumer may have on their way to memory.
    """

    rows: tuple[int, ...]
    columns: int = 128
    stages: int = 6
    chain: int = 4
    cluster: int = 1
    panel: int = 16
    store_slots: int = 1


@dataclasses.dataclass(frozen=True)
class GroupTile:
    """Tile of wgrad: 128 by some outputs of one group, 128 of its rows a step.

    Attributes:
      columns, stages, chain, store_slots: as in `RowTile`.
    """

    columns: int = 128
    stages: int = 5
    chain: int = 2
    store_slots: int = 2


# Measured with scripts/benchmark_fp8.py. The chip's power is what limits both kernels, so the tile
# that moves fewer bytes wins, though only the other consumer hides the promotion of its sums.
_WIDE = {"columns": 256, "stages": 4, "chain": 1}
# Many rows a group: almost every task is whole. Fewer: its last rows are a good part of a group.
_MANY, _FEW = (128,), (16, 32, 64, 96, 128)
_MANY_FROM = 512


def row_tile(rows: int, groups: int, columns: int) -> RowTile:
    """The tile for `rows` rows in `groups` groups and `columns` output columns."""
    if rows < _MANY_FROM * groups:
        return RowTile(_FEW)
    return RowTile(_MANY) if columns % 256 else RowTile(_MANY, **_WIDE)


def group_tile(columns: int) -> GroupTile:
    """The tile of wgrad for `columns` output columns."""
    return GroupTile() if columns % 256 else GroupTile(**_WIDE, store_slots=1)
