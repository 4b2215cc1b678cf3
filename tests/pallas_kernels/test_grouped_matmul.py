"""Every implementation of grouped_matmul against the masked dense float32 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pallas_kernels import grouped_matmul, reference
from pallas_kernels.grouped_matmul import _IMPLEMENTATIONS

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
# Rows, groups, sizes: ragged, empty at either end, one hot group, nothing at all, fewer rows than
# a tile, and a tail that belongs to nobody.
CASES = {
    "ragged": (97, [13, 0, 41, 1, 29, 13]),
    "empty ends": (40, [0, 17, 23, 0]),
    "hot": (75, [0, 0, 75, 0, 0]),
    "nothing": (9, [0, 0, 0]),
    "few rows": (3, [1, 0, 2]),
    "tail": (130, [33, 7, 0, 50]),
    "one group": (65, [65]),
}
# Sums of K products each rounded once: float32 oracle against float32, or bf16 in and out.
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-3}


@functools.partial(jax.jit, static_argnames="implementation")
def _value_and_vjp(x, w, sizes, dy, implementation=None):
    out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w)
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


def _case(rows, sizes, dtype, k=19, n=23):
    rng = np.random.default_rng(len(sizes) * 1000 + rows)
    x, dy = rng.normal(size=(rows, k)), rng.normal(size=(rows, n))
    w = rng.normal(size=(len(sizes), k, n))
    return [jnp.asarray(a, dtype) for a in (x, w, dy)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients(name, dtype, implementation):
    rows, sizes = CASES[name]
    x, w, dy = _case(rows, sizes, dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    ours = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    for part, mine, oracle in zip(("out", "dx", "dw"), ours, _oracle(x, w, sizes, dy), strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        assert _relative(mine, oracle) <= TOLERANCE[dtype], part


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_past_the_sum_are_never_read(implementation):
    rows, sizes = CASES["tail"]
    x, w, dy = _case(rows, sizes, "float32")
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
    rows, sizes = CASES["ragged"]
    x, w, dy = _case(rows, sizes, "float32")
    w = w.at[1].set(jnp.nan)
    sizes = jnp.asarray(sizes, jnp.int32)
    out, dx, dw = _value_and_vjp(x, w, sizes, dy, implementation=implementation)
    assert np.isfinite(out).all() and np.isfinite(dx).all()
    np.testing.assert_array_equal(dw[1], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 61), min_size=5, max_size=5))
def test_any_group_sizes(implementation, cuts):
    edges = np.sort(cuts)
    sizes = np.diff(edges, prepend=0).astype(np.int32)
    x, w, dy = _case(61, sizes, "float32")
    ours = _value_and_vjp(x, w, jnp.asarray(sizes), dy, implementation=implementation)
    for mine, oracle in zip(ours, _oracle(x, w, jnp.asarray(sizes), dy), strict=True):
        assert _relative(mine, oracle) <= TOLERANCE["float32"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_work_follows_rows_not_rows_times_groups(implementation):
    """The compiled program multiplies at most a tile by one matrix at a time."""

    def dot_sizes(groups):
        x, w = jnp.zeros((256, 64)), jnp.zeros((groups, 64, 32))
        jaxpr = jax.make_jaxpr(functools.partial(grouped_matmul, implementation=implementation))(
            x, w, jnp.zeros(groups, jnp.int32)
        )
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
