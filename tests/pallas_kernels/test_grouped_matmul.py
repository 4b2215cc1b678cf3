"""Every implementation of grouped_matmul that runs here against the masked dense float32 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pallas_kernels import grouped_matmul, reference
from pallas_kernels.grouped_matmul import tpu

IMPLEMENTATIONS = {
    "portable": functools.partial(grouped_matmul, implementation="portable"),
    # Scratch memory that nothing was written to holds NaN.
    "tpu": functools.partial(tpu.grouped_matmul, interpret=True),
}
# Rows, K, N; always six groups. Neither a multiple of anything; several tiles; less than one tile.
SHAPES = {"odd": (97, 19, 23), "tiles": (160, 256, 384), "few": (3, 19, 23)}
CASES = {
    "ragged": ("odd", [13, 0, 41, 1, 29, 13]),
    "empty ends": ("odd", [0, 17, 0, 63, 17, 0]),
    "hot": ("odd", [0, 0, 97, 0, 0, 0]),
    "nothing": ("odd", [0, 0, 0, 0, 0, 0]),
    "tail": ("odd", [33, 7, 0, 50, 0, 0]),
    "one row each": ("odd", [1, 1, 1, 1, 1, 1]),
    "whole tiles": ("tiles", [32, 0, 64, 32, 16, 16]),
    "one beside": ("tiles", [31, 33, 65, 15, 0, 15]),
    "fewer rows than a tile": ("few", [1, 0, 0, 2, 0, 0]),
}
# Sums of K products each rounded once: float32 oracle against float32, or bf16 in and out.
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-3}


@functools.partial(jax.jit, static_argnames="implementation")
def _value_and_vjp(x, w, sizes, dy, implementation):
    run = IMPLEMENTATIONS[implementation]
    out, vjp = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
    return out, *vjp(dy)


@jax.jit
def _oracle(x, w, sizes, dy):
    """Forward and gradients of the oracle, rows past the sum left out of both."""
    f32 = [jnp.asarray(a, jnp.float32) for a in (x, w, dy)]
    out, vjp = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes), f32[0], f32[1])
    return out, *vjp(f32[2])


def _relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def _case(shape, dtype):
    rows, k, n = SHAPES[shape]
    rng = np.random.default_rng(rows)
    x, dy, w = (rng.normal(size=size) for size in ((rows, k), (rows, n), (6, k, n)))
    return [jnp.asarray(a, dtype) for a in (x, w, dy)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, (shape, _) in CASES.items()
        for dtype in ("float32", "bfloat16")
        # Another shape is another compilation, and this one adds nothing in another dtype.
        if (shape, dtype) != ("few", "bfloat16")
    ],
)
def test_forward_and_both_gradients(name, dtype, implementation):
    shape, sizes = CASES[name]
    x, w, dy = _case(shape, dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    ours = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    for part, mine, oracle in zip(("out", "dx", "dw"), ours, _oracle(x, w, sizes, dy), strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        assert _relative(mine, oracle) <= TOLERANCE[dtype], part


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_past_the_sum_are_never_read(implementation, dtype):
    shape, sizes = CASES["tail"]
    x, w, dy = _case(shape, dtype)
    used = sum(sizes)
    sizes = jnp.asarray(sizes, jnp.int32)
    clean = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    poisoned = _value_and_vjp(
        x.at[used:].set(jnp.nan), w, sizes, dy.at[used:].set(jnp.nan), implementation=implementation
    )
    for mine, poison in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(mine, poison)
    assert not np.asarray(clean[0][used:]).any() and not np.asarray(clean[1][used:]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_group_without_rows_is_never_read_and_gets_a_zero_gradient(implementation):
    shape, sizes = CASES["ragged"]
    x, w, dy = _case(shape, "float32")
    w = w.at[1].set(jnp.nan)
    sizes = jnp.asarray(sizes, jnp.int32)
    out, dx, dw = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    assert np.isfinite(out).all() and np.isfinite(dx).all()
    np.testing.assert_array_equal(dw[1], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_group_never_reads_its_neighbours_rows(implementation):
    """The groups share tiles; a NaN in one group's rows stays in that group."""
    shape, sizes = CASES["ragged"]
    x, w, dy = _case(shape, "float32")
    first, end = sum(sizes[:2]), sum(sizes[:3])
    sizes = jnp.asarray(sizes, jnp.int32)
    clean = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    poisoned = _value_and_vjp(
        x.at[first:end].set(jnp.nan),
        w,
        sizes,
        dy.at[first:end].set(jnp.nan),
        implementation=implementation,
    )
    others = np.delete(np.arange(x.shape[0]), slice(first, end))
    for mine, poison, kept in zip(clean, poisoned, (others, others, [0, 1, 3, 4, 5]), strict=True):
        np.testing.assert_array_equal(np.asarray(mine)[kept], np.asarray(poison)[kept])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 97), min_size=6, max_size=6))
def test_any_group_sizes(implementation, cuts):
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    x, w, dy = _case("odd", "float32")
    ours = _value_and_vjp(x, w, jnp.asarray(sizes), dy, implementation=implementation)
    for mine, oracle in zip(ours, _oracle(x, w, jnp.asarray(sizes), dy), strict=True):
        assert _relative(mine, oracle) <= TOLERANCE["float32"]


def test_compiled_work_follows_rows_not_rows_times_groups():
    """The portable program multiplies at most a tile by one matrix at a time."""

    def dot_sizes(groups):
        x, w = jnp.zeros((256, 64)), jnp.zeros((groups, 64, 32))
        jaxpr = jax.make_jaxpr(IMPLEMENTATIONS["portable"])(x, w, jnp.zeros(groups, jnp.int32))
        return [
            (eqn.invars[0].aval.size, eqn.invars[1].aval.size)
            for eqn in _equations(jaxpr.jaxpr)
            if eqn.primitive.name == "dot_general"
        ]

    few, many = dot_sizes(4), dot_sizes(32)
    assert len(few) == len(many) > 0  # not a product a group
    for left, right in many:
        assert right == 64 * 32 and left <= 2 * (256 // 32) * 64


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def test_errors_name_what_does_not_fit():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="'nonsense' must be one of: .*portable"):
        grouped_matmul(x, w, sizes, implementation="nonsense")
    with pytest.raises(ValueError, match="agree in K and G"):
        grouped_matmul(x[:, :2], w, sizes)
    with pytest.raises(ValueError, match="agree in K and G"):
        grouped_matmul(x, w, sizes[:1])
    with pytest.raises(ValueError, match="one floating dtype"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="integer dtype"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"\[M, K\], \[G, K, N\], \[G\]"):
        grouped_matmul(x[0], w, sizes)
