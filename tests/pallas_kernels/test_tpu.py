"""What is the TPU kernels' own: lists of tasks, tiles, copies, a shard's slice of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import reference
from pallas_kernels.grouped_matmul import tpu, tpu_tasks, tpu_tiles

CHIPS = {
    "v5e": pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1),
    "v5p": pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2),
    "v6e": pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1),
    "tpu7x": pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_7X, 1),
}


@functools.partial(jax.jit, static_argnames=("rows", "fill"))
def _tasks(sizes, skipped, *, rows, fill):
    return tpu_tasks.make_tasks(sizes, rows, first_row=skipped, tile=32, fill=fill)


@pytest.mark.parametrize("fill", [True, False])
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 208), min_size=6, max_size=6), past=st.booleans())
def test_tasks_own_every_row_once_and_in_order(fill, cuts, past):
    edges = np.sort(cuts)
    sizes, skipped = np.diff(edges), edges[0]
    if past:  # sizes that do not fit must not make the kernels leave the array
        sizes[-1] += 1000
    tasks = _tasks(jnp.asarray(sizes, jnp.int32), jnp.int32(skipped), rows=208, fill=fill)
    count, runs = tasks.counts
    assert count <= tasks.first.shape[0] and runs <= tasks.group.shape[0]
    seen = []
    for task in range(count):
        first, end, run = (int(a[task]) for a in (tasks.first, tasks.end, tasks.run))
        assert 0 <= first <= end <= 208 and end - first // 16 * 16 <= 32
        group = int(tasks.group[run]) if run >= 0 else -1
        if run >= 0:
            assert int(tasks.start[run]) <= task < int(tasks.start[run + 1])
        seen += [group] * (end - first) if end > first else [("empty", group)]
    ends = np.minimum(skipped + np.cumsum(sizes), 208)
    owner = np.full(208, -1)
    for group in reversed(range(5)):
        owner[min(skipped, 208) : ends[group]] = group
    owner[: min(skipped, 208)] = -1
    if fill:
        assert seen == list(owner)
    else:
        assert [s for s in seen if not isinstance(s, tuple)] == [o for o in owner if o >= 0]
        empty = [group for group in range(5) if group not in owner]
        assert [s[1] for s in seen if isinstance(s, tuple)] == empty


def test_no_copy_races_another(monkeypatch, capfd):
    """Several tiles of columns, tasks of four pieces; copies happen as late as they may."""
    small = tpu_tiles.ProductTiles(rows=64, columns=128, block=128, slots=3)
    monkeypatch.setattr(tpu_tiles, "product_tiles", lambda *_: small)
    monkeypatch.setattr(
        tpu_tiles, "wgrad_tiles", lambda *_: tpu_tiles.WgradTiles(64, 128, 128, 128, 128)
    )
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((110, 128), (4, 128, 384), (110, 384))
    )
    interpret = pltpu.InterpretParams(detect_races=True)
    # Full tiles, a tail of a tile, and a group that begins in another's memory tile.
    sizes = jnp.asarray([70, 7, 0, 20], jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_vjp(run, x, w, dy):
        out, vjp = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
        return out, *vjp(dy)

    ours = value_and_vjp(functools.partial(tpu.grouped_matmul, interpret=interpret), x, w, dy)
    f32 = [jnp.asarray(a, jnp.float32) for a in (x, w, dy)]
    for mine, theirs in zip(ours, value_and_vjp(reference.grouped_matmul, *f32), strict=True):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(mine - theirs) <= 3e-3 * np.linalg.norm(theirs)
    said = capfd.readouterr()
    assert "RACE" not in (said.out + said.err).upper()


def test_a_shards_slice_of_the_groups():
    """Each of two shards gives its own groups' rows and gradients, and zeros elsewhere."""
    rng = np.random.default_rng(1)
    x, w, dy = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((90, 24), (4, 24, 40), (90, 40))
    )
    sizes = jnp.asarray([21, 9, 0, 37], jnp.int32)

    @jax.jit
    def shard(w, sizes, first_row, x, dy):
        run = functools.partial(tpu.grouped_matmul, interpret=True)
        out, vjp = jax.vjp(lambda x, w: run(x, w, sizes, first_row), x, w)
        return out, *vjp(dy)

    oracle, vjp = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes), x, w)
    dx, dw = vjp(dy)
    for groups, rows in ((slice(0, 2), slice(0, 30)), (slice(2, 4), slice(30, 67))):
        poison = jnp.full((90, 1), jnp.nan).at[rows].set(0)  # what the shard must not read
        first_row = jnp.int32(rows.start)
        ours = shard(w[groups], sizes[groups], first_row, x + poison, dy + poison)
        wanted = [jnp.zeros_like(a).at[rows].set(a[rows]) for a in (oracle, dx)]
        for mine, theirs in zip(ours, (*wanted, dw[groups]), strict=True):
            assert np.linalg.norm(mine - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_divide_the_arrays_and_fit_in_vmem(chip, itemsize):
    info = CHIPS[chip]
    for rows, groups in ((16, 1), (256, 256), (4096, 8), (32768, 32), (65536, 256)):
        for k, n in ((128, 128), (2048, 7168), (7168, 4096), (1408, 2048), (640, 1664)):
            tiles = tpu_tiles.product_tiles(info, rows, groups, k, n, itemsize)
            assert n % tiles.columns == tiles.columns % tiles.block == tiles.block % 128 == 0
            assert tiles.rows % 32 == 0
            vmem = 2 * tiles.rows * (k + tiles.columns) + tiles.slots * k * tiles.columns
            assert vmem * itemsize < info.vmem_capacity_bytes
            tiles = tpu_tiles.wgrad_tiles(info, rows, groups, k, n, itemsize)
            assert k % tiles.k == tiles.k % tiles.block_k == tiles.block_k % 128 == 0
            assert n % tiles.n == tiles.n % tiles.block_n == tiles.block_n % 128 == 0
            assert tiles.rows % 32 == 0
            vmem = 2 * tiles.rows * (tiles.k + tiles.n) * itemsize
            assert vmem + tiles.k * tiles.n * (4 + 2 * itemsize) < info.vmem_capacity_bytes


def test_errors_name_what_does_not_fit():
    x, w, sizes = jnp.zeros((8, 128)), jnp.zeros((2, 128, 128)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="takes bfloat16 or float32, not"):
        tpu.grouped_matmul(x.astype(jnp.float16), w.astype(jnp.float16), sizes, interpret=True)
    with pytest.raises(ValueError, match="takes no empty operand"):
        tpu.grouped_matmul(x[:0], w, sizes, interpret=True)
    with pytest.raises(ValueError, match="no tile that fits"):
        tpu_tiles.product_tiles(CHIPS["v5p"], 256, 2, 1 << 18, 128, 2)
    assert not tpu_tiles.is_supported()
