"""The Hopper kernels of grouped_matmul: their task lists, the simulated GPU, and lowering for CUDA.

A simulated kernel is compiled once and run for several group sizes, which are data.
"""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import _choose, grouped_matmul
from pallas_kernels.grouped_matmul import hopper, hopper_groups, hopper_rows, hopper_tasks
from pallas_kernels.grouped_matmul.hopper_tiles import GroupTile, RowTile, group_tile, row_tile

needs_simulator = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX simulates Mosaic GPU kernels from 0.11 on"
)
# One rounding of each result to bfloat16, products and sums in float32.
TOLERANCE = 3e-3


def _random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(jnp.bfloat16)


def _float32(a):
    return np.asarray(a, np.float32)


def _runs(sizes, first_row=0):
    """(group, slice of its rows)."""
    ends = first_row + np.cumsum(sizes)
    return [
        (g, slice(end - size, end)) for g, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]


def _assert_close(got, want):
    got = _float32(got)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)
    # Where nothing may be written but zeros.
    assert not got[want == 0].any()


# Six groups' sizes, and which of them the four matrices belong to.
CASES = {
    "ragged": ([13, 40, 0, 1, 71, 19], 1),
    "from the first on": ([3, 64, 8, 0, 33, 17], 0),
    "hot": ([0, 0, 0, 200, 0, 0], 2),
    "nothing": ([0, 0, 0, 0, 0, 0], 1),
    "one row each": ([1, 1, 1, 1, 1, 1], 2),
    "only other shards' rows": ([90, 0, 0, 0, 0, 60], 1),
}


ROWS, K, N, OWN = 203, 72, 136, 4


@functools.cache
def _simulated():
    """The result and both gradients, compiled: for any sizes."""

    @jax.jit
    def value_and_vjp(x, w, sizes, first_row, dy):
        run = functools.partial(hopper.grouped_matmul, interpret=True)
        y, vjp = jax.vjp(lambda x, w: run(x, w, sizes, first_row), x, w)
        return y, *vjp(dy)

    shapes = [(ROWS, K), (OWN, K, N), (OWN,), (), (ROWS, N)]
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32, jnp.bfloat16]
    return value_and_vjp.lower(*map(jax.ShapeDtypeStruct, shapes, dtypes)).compile()


@needs_simulator
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_of_a_slice_of_the_groups(case):
    sizes, offset = CASES[case]
    x, w, dy = _random(ROWS, K), _random(OWN, K, N), _random(ROWS, N)
    first_row, own = sum(sizes[:offset]), sizes[offset : offset + OWN]
    mine = np.zeros(ROWS, bool)
    mine[first_row : first_row + sum(own)] = True
    x[~mine], dy[~mine] = np.nan, np.inf

    y, dx, dw = _simulated()(x, w, np.asarray(own, np.int32), np.int32(first_row), dy)

    want_y, want_dx, want_dw = map(np.zeros, (y.shape, dx.shape, dw.shape))
    for group, run in _runs(own, first_row):
        want_y[run] = _float32(x[run]) @ _float32(w[group])
        want_dx[run] = _float32(dy[run]) @ _float32(w[group]).T
        want_dw[group] = _float32(x[run]).T @ _float32(dy[run])
    _assert_close(y, want_y)
    _assert_close(dx, want_dx)
    _assert_close(dw, want_dw)


def test_portable_takes_a_slice_of_the_groups():
    sizes, offset = CASES["ragged"]
    x, w = _float32(_random(ROWS, K)), _float32(_random(OWN, K, N))
    first_row, own = sum(sizes[:offset]), sizes[offset : offset + OWN]
    x[:first_row] = x[first_row + sum(own) :] = np.nan
    y = jax.jit(functools.partial(grouped_matmul, implementation="portable"))(
        x, w, jnp.asarray(sizes), group_offset=jnp.int32(offset)
    )
    want = np.zeros((ROWS, N))
    for group, run in _runs(own, first_row):
        want[run] = x[run] @ w[group]
    _assert_close(y, want)


@needs_simulator
@pytest.mark.parametrize(
    "tile",
    [
        # Several chunks a task; tasks of a group in two panels; two halves of columns a consumer.
        RowTile(rows=(16, 48, 96), stages=2, panel=2, lead=1, columns=256),
        RowTile(rows=(64, 128), stages=3, store_slots=1, cluster=2),
    ],
    ids=["panels", "cluster"],
)
def test_every_row_tile_computes_the_same(tile):
    sizes, k, n = [61, 5, 230, 11], 192, 320
    rows = sum(sizes) + 5
    x, w = _random(rows, n), _random(len(sizes), k, n)
    x[sum(sizes) :] = np.nan
    x = np.pad(x, ((0, -rows % 8), (0, 0)))
    multiply = functools.partial(hopper_rows.multiply, transposed=True, tile=tile, interpret=True)
    got = jax.jit(multiply)(x, w, jnp.asarray(sizes, jnp.int32))
    want = np.zeros((x.shape[0], k))
    for group, run in _runs(sizes):
        want[run] = _float32(x[run]) @ _float32(w[group]).T
    _assert_close(got, want)


@needs_simulator
@pytest.mark.parametrize(
    "tile",
    [
        GroupTile(stages=2, cluster=2, across=False),
        GroupTile(depth=32, stages=3, store_slots=3),
    ],
    ids=["cluster", "half atoms"],
)
def test_a_group_never_reads_its_neighbours_rows_in_wgrad(tile):
    # Starts at row 1: 7 rows, 7 atoms and 7 rows, which do not fit in a step of 64 or two of 32.
    sizes, k, n = [1, 70, 130, 7], 192, 320
    multiply = functools.partial(hopper_groups.multiply_groups, tile=tile, interpret=True)
    for poisoned in (0, 2):
        x, dy = _random(208, k), _random(208, n)
        groups = _runs(sizes)
        x[groups[poisoned][1]], dy[groups[poisoned][1]] = np.nan, np.inf
        got = jax.jit(multiply)(x, dy, jnp.asarray(sizes, jnp.int32))
        for group, run in groups:
            if group != poisoned:
                _assert_close(got[group], _float32(x[run]).T @ _float32(dy[run]))


# Sizes of five groups and how many of the rows are nobody's; what is left lies before the first.
LISTED = 1000
SIZES = st.lists(st.integers(0, LISTED), min_size=6, max_size=6).map(
    lambda cuts: np.diff([*sorted(cuts), LISTED]).tolist()
)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([1, 2, 8]))
def test_row_tasks_own_every_row_once(cuts, panel):
    first_row, sizes = LISTED - sum(cuts), cuts[:5]
    choices = (8, 48, 128)
    lines, count = _row_tasks(jnp.asarray(sizes), jnp.int32(first_row), choices, panel)
    lines = np.asarray(lines)[: int(count[0])]
    assert len(lines) <= hopper_tasks.most_row_tasks(LISTED, 5, choices[-1])
    owner = np.full(LISTED, -1)
    for group, window, low, high, variant, live, _, _ in lines:
        assert 0 <= low < high <= choices[variant] and low < 8
        assert variant == 0 or high > choices[variant - 1]
        owned = owner[window * 8 + low : window * 8 + high]
        assert len(owned) == high - low and (owned == -1).all()
        owned[:] = group if live else 5
    want = np.full(LISTED, 5)
    for group, run in _runs(sizes, first_row):
        want[run] = group
    np.testing.assert_array_equal(owner, want)

    # Panels: consecutive tasks of one group; and those of the largest tasks come first.
    for i, (first, length) in enumerate(lines[:, 6:]):
        assert first <= i < first + length <= first + panel
        assert (lines[first : first + length, 6:] == (first, length)).all()
        assert len(set(lines[first : first + length, 0])) == 1
    of_groups = lines[lines[:, 5] == 1]
    opens = np.diff(of_groups[:, 0], prepend=-1) != 0
    assert (np.diff(of_groups[opens, 4]) <= 0).all()
    # Rows of nobody last.
    assert (np.diff(lines[:, 5]) <= 0).all()


@functools.partial(jax.jit, static_argnums=(2, 3))
def _row_tasks(sizes, first_row, choices, panel):
    return hopper_tasks.row_tasks(sizes, first_row, LISTED, choices, panel)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([32, 64]))
def test_group_steps_contract_every_row_once(cuts, depth):
    first_row, sizes = LISTED - sum(cuts), cuts[:5]
    lines, edges = _group_steps(jnp.asarray(sizes), jnp.int32(first_row), depth)
    for (group, run), line, gathered in zip(
        _runs(sizes, first_row), np.asarray(lines), np.asarray(edges), strict=True
    ):
        first_atom, full, more, steps = line
        whole = range(first_atom * 8, first_atom * 8 + full * depth + more * 8)
        rows = [*whole, *gathered[gathered >= 0]]
        assert sorted(rows) == list(range(run.start, run.stop)), group
        # Gathered rows come first, they follow `more` atoms, and one more step holds the others.
        assert (np.diff((gathered >= 0).astype(int)) <= 0).all()
        left = more * 8 + (gathered >= 0).sum()
        assert steps == full + -(-left // depth) and (left <= depth or more == depth // 8 - 1)


@functools.partial(jax.jit, static_argnums=2)
def _group_steps(sizes, first_row, depth):
    return hopper_tasks.group_steps(sizes, first_row, depth)


SHAPES = {
    "A": (32768, 32, 7168, 4096),
    "C": (65536, 256, 7168, 4096),
    "decode": (256, 256, 7168, 4096),
    "awkward": (201, 7, 100, 1000),
}


# A and C: a loop for each of 8 and 13 row counts.
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=pytest.mark.slow) if s in "AC" else s for s in SHAPES]
)
def test_lowers_for_cuda_to_three_kernels_and_no_transposed_weights(shape):
    rows, groups, k, n = SHAPES[shape]
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    def all_three(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, "hopper"), x, w)
        return y, vjp(dy)

    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    operands = struct((rows, k)), struct((groups, k, n)), sizes, struct((rows, n))
    text = jax.jit(all_three).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 3
    assert "stablehlo.transpose" not in text


def test_tile_rule():
    assert row_tile(256, 256, 4096).rows[-1] == 64
    assert row_tile(65536, 256, 4096).cluster == 1
    assert row_tile(32768, 32, 4096).cluster == 2
    # Eleven tiles of columns: no pairs.
    assert row_tile(32768, 32, 1408).cluster == 1
    assert group_tile(65536, 256, 7168, 4096) == GroupTile(cluster=2, pace=2)
    # Fewer tiles down than across: they come first.
    assert group_tile(65536, 256, 2048, 7168) == GroupTile(cluster=2, pace=2, across=False)
    assert group_tile(32768, 32, 2048, 7168) == GroupTile(cluster=2)
    assert group_tile(65536, 256, 1408, 2048).cluster == 1
    with pytest.raises(ValueError, match="lead=4 must be less than stages=4"):
        RowTile(rows=(64,), lead=4)
    with pytest.raises(ValueError, match=r"rows=\[8, 24\] must be multiples of 16"):
        RowTile(rows=(8, 16, 24), cluster=2)


def test_what_cannot_run_says_so():
    x, w, sizes = jnp.ones((8, 64)), jnp.ones((1, 64, 64)), jnp.asarray([8])
    with pytest.raises(ValueError, match="takes bfloat16 or float16, not x.dtype=.*float32"):
        grouped_matmul(x, w, sizes, "hopper")
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"'hopper' .* runs on CUDA, not on cpu"):
        jax.jit(grouped_matmul, static_argnums=3)(x, w, sizes, "hopper")


@pytest.mark.parametrize(
    ("kind", "dtype", "want"),
    [
        ("NVIDIA H200", "bfloat16", "hopper"),
        ("NVIDIA GH200 480GB", "float16", "hopper"),
        ("NVIDIA H200", "float32", "portable"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", "portable"),
        ("cpu", "bfloat16", "portable"),
    ],
)
def test_none_picks_by_chip_and_dtype(kind, dtype, want, monkeypatch, caplog):
    device = types.SimpleNamespace(device_kind=kind, core_count=132)
    monkeypatch.setattr(_choose, "_device", lambda: device)
    _choose._log_once.cache_clear()
    x, w = jnp.ones((8, 64), dtype), jnp.ones((1, 64, 64), dtype)
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        jax.eval_shape(lambda *operands: grouped_matmul(*operands), x, w, jnp.asarray([8]))
    assert f"using the {want} implementation" in caplog.text
