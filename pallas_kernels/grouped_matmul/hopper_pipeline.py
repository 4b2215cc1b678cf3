"""The skeleton of every Hopper kernel here: persistent blocks, one producer, two consumers.

A block is three warpgroups. The producer keeps few registers and copies tiles from memory into a
ring of slots by TMA; the consumers multiply what is in a slot by WGMMA and hand it back. The ring
runs on across the tiles of a block, so the next tile's loads overlap this tile's epilogue, and
each consumer stores its own half of the outputs, so one can multiply while the other stores.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels._choose import multiprocessors
from pallas_kernels.grouped_matmul.hopper_tiles import ATOM, CONSUMERS

# Registers a thread, in multiples of 8: 128 threads each of 232 + 232 + 40 of 65,536.
_PRODUCER_REGISTERS = 40
_CONSUMER_REGISTERS = 232
_INTERPRETED_BLOCKS = 2
# Looks, of about a microsecond each, before a cluster goes on without the others.
_LOOKS = 32

BLOCK, CLUSTER, WARPGROUP = "block", "cluster", "warpgroup"
_PRODUCER = CONSUMERS


def _swizzled(rows: int, columns: int) -> tuple:
    """Atoms of so many rows, whose 16-byte pieces are permuted against bank conflicts."""
    return plgpu.TilingTransform((rows, columns)), plgpu.SwizzleTransform(2 * columns)


class Ring(NamedTuple):
    """The slots' barriers, and how the consumers take turns.

    Attributes:
      full: a barrier a slot, awaited by the consumers.
      empty: a barrier a slot, awaited by the producer.
      turn: awaited by the second consumer, at most once a tile.
      stages: number of slots.
      lead: steps the first consumer is ahead when the second one starts a tile; 0: any.
    """

    full: Any
    empty: Any
    turn: Any
    stages: int
    lead: int


def ring_barriers(copies: int, stages: int, cluster: int) -> dict[str, Any]:
    """Barriers of a ring whose slots are filled by `copies` copies each."""
    if cluster > 1:
        # A slot shared by multicast is free once the consumers of every block are done with it.
        empty = plgpu.ClusterBarrier(
            collective_axes=(CLUSTER,), num_arrivals=CONSUMERS, num_barriers=stages
        )
    else:
        empty = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return {"full": full, "empty": empty, "turn": plgpu.Barrier(num_arrivals=1, num_barriers=1)}


def launch(
    body: Callable,
    out_type: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    *,
    cluster: int,
    name: str,
    interpret: bool,
) -> Callable:
    """The kernel: one block a multiprocessor, in clusters of `cluster`."""
    blocks = _INTERPRETED_BLOCKS if interpret else multiprocessors()
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks // cluster,),
        grid_names=(BLOCK,),
        cluster=(cluster,),
        cluster_names=(CLUSTER,),
        num_threads=CONSUMERS + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Barriers and commit_smem order every access here: none needs one more around it.
            unsafe_no_auto_barriers=True,
        ),
        interpret=_compat.simulator() if interpret else None,
    )


def split_roles(ring: Ring, produce: Callable[[], None], consume: Callable[[], None]) -> None:
    """Runs `produce` in one warpgroup and `consume` in the two others."""

    def producer():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()
        # Every slot is handed back before a block leaves: its neighbours may still write here.
        for slot in range(ring.stages):
            plgpu.barrier_wait(ring.empty.at[slot])

    def consumer():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        for slot in range(ring.stages):
            plgpu.barrier_arrive(ring.empty.at[slot])
        consume()
        plgpu.wait_smem_to_gmem(0)

    # The branch not taken comes first in the lowering, which lowers it twice: the smaller one.
    lax.cond(lax.axis_index(WARPGROUP) != _PRODUCER, consumer, producer)


def for_each_tile(
    tiles: jax.Array | int,
    fetch: Callable[[jax.Array], tuple],
    visit: Callable[[tuple, Any], Any],
    state: Any = 0,
    *,
    alternate: bool = True,
    pace: Callable[[jax.Array], None] | None = None,
) -> Any:
    """Visits this cluster's tiles, one of every `clusters`, and returns the last state.

    With `alternate` every other turn goes backwards: where tiles come largest first, no cluster
    then always gets the largest of a turn. It costs a few registers all along. `pace(turn)` comes
    before the tile of a turn.

    `visit(record, state)` returns the state after the tile: the ring's step count, and what else
    `state` starts with. The record of the next tile is fetched before a tile is visited, so nobody
    waits for it.
    """
    cluster, clusters = lax.axis_index(BLOCK), lax.axis_size(BLOCK)

    def tile_of(turn: jax.Array) -> jax.Array:
        if not alternate:
            return cluster + turn * clusters
        back = lax.rem(turn, 2) == 1
        return turn * clusters + jnp.where(back, clusters - 1 - cluster, cluster)

    def loop(turn: jax.Array, carry: tuple) -> tuple:
        if pace is not None:
            pace(turn)
        state, record = carry
        ahead = fetch(jnp.minimum(tile_of(turn + 1), tiles - 1))
        return visit(record, state), ahead

    if alternate:
        whole = lax.div(tiles, clusters)
        turns = whole + jnp.where(tile_of(whole) < tiles, 1, 0)
    else:
        turns = lax.div(tiles - cluster + (clusters - 1), clusters)
    start = jax.tree.map(jnp.asarray, state), fetch(jnp.minimum(cluster, tiles - 1))
    return lax.fori_loop(0, turns, loop, start)[0]


def pacemaker(every: int) -> Callable[[jax.Array], None]:
    """What keeps the clusters together, for the producers' `for_each_tile`.

    The tiles of a turn share operands. Clusters that are left alone drift many turns apart, and
    each then reads from memory what it would have found in L2. So every `every` turns a cluster
    reports, and waits until all have reported the time before. It does not insist: where not all
    the clusters run at the same time, it goes on after `_LOOKS`.
    """
    reports = pl.get_global(plgpu.SemaphoreType.REGULAR((2,)))
    clusters = lax.axis_size(BLOCK)

    def pace(turn: jax.Array) -> None:
        time = lax.div(turn, every)

        @pl.when((lax.rem(turn, every) == 0) & (lax.axis_index(CLUSTER) == 0))
        def _report():
            plgpu.semaphore_signal(reports.at[lax.rem(time, 2)], memory_scope="gpu")
            # The times take the two counts in turn: nobody is two times ahead of anybody.
            before = jnp.maximum(time - 1, 0)
            wanted = jnp.where(time > 0, clusters * (lax.div(before, 2) + 1), 0)
            lax.while_loop(
                lambda seen: (seen[0] < _LOOKS) & (seen[1] < wanted),
                lambda seen: (seen[0] + 1, pl.semaphore_read(reports.at[lax.rem(before, 2)])),
                (jnp.int32(0), jnp.int32(0)),
            )
            # Each warp looked for itself: they go on together, as barriers have but two phases.
            plgpu.commit_smem()

    return pace


def fill(ring: Ring, count: jax.Array, step: jax.Array, copy: Callable) -> jax.Array:
    """Producer's side of a tile: `copy(i, slot, full)` for i below `count`; the next step."""

    def one(i: jax.Array, step: jax.Array) -> jax.Array:
        slot = lax.rem(step, ring.stages)
        plgpu.barrier_wait(ring.empty.at[slot])
        copy(i, slot, ring.full.at[slot])
        return step + 1

    return lax.fori_loop(0, count, one, step)


def drain(
    ring: Ring,
    count: jax.Array,
    step: jax.Array,
    shape: tuple[int, int],
    operands: Callable,
    meanwhile: Callable[[jax.Array], None] = lambda i: None,
) -> tuple[jax.Array, jax.Array]:
    """Consumer's side of a tile: the sum of products of `operands(i, slot)`, float32 of `shape`.

    One product stays in flight: a slot is handed back when the product after it was issued.
    Then `meanwhile(i)` is done under product `i`.

    The consumers share the tensor cores. Left alone they finish a tile together and store it
    together, and nobody multiplies meanwhile; so the second one starts `lead` steps late, which
    costs nothing, as the first has the tensor cores to itself until then. A tile of fewer steps
    than slots is left alone: the first consumer could come round to `turn` twice.
    """
    first = lax.axis_index(WARPGROUP) == 0
    turns = (count >= ring.stages) if ring.lead else False

    def release(step: jax.Array) -> None:
        plgpu.barrier_arrive(ring.empty.at[lax.rem(step, ring.stages)])

    def accumulate(total):
        def one(i: jax.Array, step: jax.Array) -> jax.Array:
            slot = lax.rem(step, ring.stages)
            plgpu.barrier_wait(ring.full.at[slot])
            plgpu.wgmma(total, *operands(i, slot))
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: release(step - 1))
            pl.when(first & turns & (i == ring.lead - 1))(
                lambda: plgpu.barrier_arrive(ring.turn.at[0])
            )
            meanwhile(i)
            return step + 1

        pl.when(~first & turns)(lambda: plgpu.barrier_wait(ring.turn.at[0]))
        last = lax.fori_loop(0, count, one, step)
        plgpu.wgmma_wait(0)
        pl.when(count > 0)(lambda: release(last - 1))
        return total[...], last

    return pl.run_scoped(accumulate, plgpu.ACC(shape))


def store_all(staged, *, out) -> None:
    """Copies `staged` to `out`, of the same shape; does not wait."""
    plgpu.copy_smem_to_gmem(staged, out, commit_group=False)


def store_rows(staged, *, out, low: jax.Array, high: jax.Array) -> None:
    """Copies rows low..high of `staged` [rows, 64] to the same rows of `out`; does not wait.

    A copy's length is fixed when it is compiled: a part of the rows goes in powers of two.
    """
    rows = staged.shape[0]
    length = jnp.minimum(high, rows) - jnp.maximum(low, 0)
    low = jnp.maximum(low, 0)

    def copy(start, count: int) -> None:
        store_all(staged.at[pl.ds(start, count)], out=out.at[pl.ds(start, count)])

    pl.when(length == rows)(lambda: copy(0, rows))

    @pl.when(length < rows)
    def _part():
        power = 1 << (rows.bit_length() - 1)
        while power:
            if power < rows:
                start = low + (length & ~(2 * power - 1))
                pl.when((length > 0) & ((length & power) != 0))(
                    lambda start=start, power=power: copy(start, power)
                )
            power //= 2


def slots(stages: int, shape: tuple[int, int], dtype, atom: int = ATOM) -> Any:
    """Shared memory of one operand's slots in the ring, in atoms of eight rows of `atom` values.

    A step contracts a multiple of `atom`.
    """
    return plgpu.SMEM((stages, *shape), dtype, transforms=_swizzled(8, atom))


def staging(rows: int, slots: int, dtype) -> Any:
    """Shared memory in which the consumers put outputs on their way to memory."""
    # Addressed row by row, so that a store may begin and end at any row.
    return plgpu.SMEM((CONSUMERS, slots, rows, ATOM), dtype, transforms=_swizzled(1, ATOM))


def send(staged, chunks: Iterable[tuple[int, Callable, Callable]]) -> None:
    """Sends chunks of outputs through the slots of `staged` [slots, rows, 64] in turn.

    A chunk is (rows, write, copy): `write(spot)` fills that many rows of a slot, `copy(spot)`
    starts the copies to memory.
    """
    for index, chunk in enumerate(chunks):
        send_chunk(staged, index, chunk)


def send_chunk(staged, index: int, chunk: tuple[int, Callable, Callable]) -> None:
    """Sends the `index`-th chunk of a tile, see `send`, once its slot's former copies have read it.

    Every tile begins with the first slot, wherever the tile before it ended.
    """
    slots = staged.shape[0]
    rows, write, copy = chunk
    plgpu.wait_smem_to_gmem(min(index, slots - 1), wait_read_only=True)
    spot = staged.at[index % slots, pl.ds(0, rows)]
    write(spot)
    plgpu.commit_smem()
    copy(spot)
    plgpu.commit_smem_to_gmem_group()
