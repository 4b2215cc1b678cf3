"""FP8 grouped matmul against float64 products of what the codes and scales of NumPy hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pallas_kernels import expert_mlp_fp8
from pallas_kernels.grouped_matmul import (
    fp8_portable,
    hopper_fp8,
    hopper_fp8_groups,
    hopper_fp8_rows,
    hopper_fp8_tiles,
)
from pallas_kernels.grouped_matmul.fp8 import (
    grouped_matmul_fp8,
    grouped_matmul_of_tokens,
    grouped_matmul_quantized,
)
from pallas_kernels.grouped_matmul.fp8_mlp import quantize_experts
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_tiles,
    quantize_weights,
    transpose_quantize,
)
from tests.oracles import fp8

# Neither K nor N nor a group is a multiple of a tile, and K has one whole tile and a part.
ROWS, K, N = 301, 200, 150
CASES = {
    "ragged": [133, 0, 41, 1, 97, 29],
    "empty ends": [0, 17, 0, 163, 121, 0],
    "hot": [0, 0, 301, 0, 0, 0],
    "nothing": [0, 0, 0, 0, 0, 0],
    "tail": [33, 7, 0, 150, 0, 0],
    "one row each": [1, 1, 1, 1, 1, 1],
}
# Sums of K exact products in float32, in another order than float64's.
FLOAT32 = 1e-6
# The result rounded once to bfloat16: at most 2**-9 of each number.
BFLOAT16 = 3e-3

needs_gpu_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX before 0.11 cannot simulate a GPU's kernels"
)


@functools.cache
def _case():
    """x, w, dy in bfloat16, the scale of every row and column its own."""
    rng = np.random.default_rng(ROWS)
    x, w, dy = (
        rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
        for shape in ((ROWS, K), (6, K, N), (ROWS, N))
    )
    return [jnp.asarray(a, jnp.bfloat16) for a in (x, w, dy)]


def _oracle(x, w, dy, sizes):
    """Forward, dgrad and wgrad from quantised operands, float64."""
    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    out, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for group, rows in enumerate(fp8.groups_of(sizes)):
        if rows.start == rows.stop:
            continue
        matrix = fp8.round_trip(w[group], 128, 128)
        out[rows] = fp8.round_trip(x[rows], 1, 128) @ matrix
        dx[rows] = fp8.round_trip(dy[rows], 1, 128) @ matrix.T
        dw[group] = fp8.round_trip(x[rows], 128, 1).T @ fp8.round_trip(dy[rows], 128, 1)
    return out, dx, dw


@functools.partial(jax.jit, static_argnames="dtype")
def _products(x, w, dy, sizes, dtype):
    """The three products of the portable implementation, results in `dtype`."""
    codes, scale = quantize_blocks(w)
    run = functools.partial(grouped_matmul_quantized, dtype=dtype, implementation="portable")
    out = run(*quantize_tiles(x), codes.mT, scale.mT, sizes)
    dx = run(*quantize_tiles(dy), codes, scale, sizes)
    tokens = transpose_quantize(x, sizes), transpose_quantize(dy, sizes)
    return out, dx, grouped_matmul_of_tokens(*tokens, dtype=dtype, implementation="portable")


@jax.jit
def _value_and_vjp(x, w, dy, sizes):
    out, vjp = jax.vjp(lambda x, w: grouped_matmul_fp8(x, w, sizes, "portable"), x, w)
    return out, *vjp(dy)


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dequantised_operands(name, relative_l2):
    x, w, dy = _case()
    sizes = jnp.asarray(CASES[name], jnp.int32)
    ours = _products(x, w, dy, sizes, jnp.float32)
    for part, mine, theirs in zip("ydw", ours, _oracle(x, w, dy, CASES[name]), strict=True):
        assert relative_l2(mine, theirs) <= FLOAT32, part


@pytest.mark.parametrize("name", ["ragged", "tail"])
def test_forward_and_gradients_run_in_fp8(name, relative_l2):
    x, w, dy = _case()
    ours = _value_and_vjp(x, w, dy, jnp.asarray(CASES[name], jnp.int32))
    for part, mine, theirs in zip("ydw", ours, _oracle(x, w, dy, CASES[name]), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert relative_l2(mine, theirs) <= BFLOAT16, part


def test_weights_may_be_quantised_beforehand():
    x, w, dy = _case()
    sizes, weights = jnp.asarray(CASES["ragged"], jnp.int32), quantize_weights(_case()[1])

    @jax.jit
    def run(x, w, dy):
        out, vjp = jax.vjp(
            lambda x, w: grouped_matmul_fp8(x, w, sizes, "portable", weights=weights), x, w
        )
        return out, *vjp(dy)

    # Only `weights` is multiplied: the numbers of `w` do not matter.
    for mine, theirs in zip(run(x, 0 * w, dy), _value_and_vjp(x, w, dy, sizes), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    with pytest.raises(ValueError, match="weights.codes.shape=.* must be"):
        grouped_matmul_fp8(x, w[:3], sizes[:3], weights=weights)


def _bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def _mlp_oracle(x, gate_up, down, weight, dy, sizes):
    """Result and gradients of x, gate_up, down and the weights of rows, float64.

    What the kernels keep in bfloat16 is rounded to it; what they quantise is quantised.
    """
    x, gate_up, down, dy = (np.asarray(a, np.float64) for a in (x, gate_up, down, dy))
    weight = np.asarray(weight, np.float64)[:, None]
    results = [np.zeros(a.shape) for a in (x, x, gate_up, down, weight[:, 0])]
    out, dx, d_gate_up, d_down, d_weight = results
    for group, rows in enumerate(fp8.groups_of(sizes)):
        if rows.start == rows.stop:
            continue
        first, second = (fp8.round_trip(w[group], 128, 128) for w in (gate_up, down))
        gate, up = np.split(_bfloat16(fp8.round_trip(x[rows], 1, 128) @ first), 2, axis=1)
        sigmoid, factor = 1 / (1 + np.exp(-gate)), weight[rows]
        plain = gate * sigmoid * up
        hidden = plain * factor
        out[rows] = fp8.round_trip(hidden, 1, 128) @ second
        dh = _bfloat16(fp8.round_trip(dy[rows], 1, 128) @ second.T)
        d_weight[rows] = (dh * plain).sum(1)
        d_gate = dh * factor * up * sigmoid * (1 + gate * (1 - sigmoid))
        both = np.concatenate([d_gate, dh * factor * gate * sigmoid], axis=1)
        dx[rows] = fp8.round_trip(both, 1, 128) @ first.T
        d_gate_up[group] = fp8.round_trip(x[rows], 128, 1).T @ fp8.round_trip(both, 128, 1)
        d_down[group] = fp8.round_trip(hidden, 128, 1).T @ fp8.round_trip(dy[rows], 128, 1)
    return results


def _mlp_case():
    rng, (x, _, _) = np.random.default_rng(3), _case()
    gate_up, down, dy = (
        jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.bfloat16)
        for shape in ((6, K, 2 * N), (6, N, K), (ROWS, K))
    )
    return x, gate_up, down, jnp.asarray(rng.uniform(0.1, 2, ROWS), jnp.float32), dy


@functools.partial(jax.jit, static_argnames="implementation")
def _mlp_and_vjp(x, gate_up, down, weight, dy, sizes, weights=None, implementation="portable"):
    def mlp(x, gate_up, down, weight):
        return expert_mlp_fp8(x, gate_up, down, sizes, weight, implementation, weights=weights)

    out, vjp = jax.vjp(mlp, x, gate_up, down, weight)
    return out, *vjp(dy)


@pytest.mark.parametrize("name", ["ragged", "tail"])
def test_experts_are_the_products_of_what_they_quantise(name, relative_l2):
    """A code beside a tie may differ: the sums before it are of another order than float64's."""
    case, sizes = _mlp_case(), jnp.asarray(CASES[name], jnp.int32)
    ours = _mlp_and_vjp(*case, sizes)
    for part, mine, theirs in zip("yxgdw", ours, _mlp_oracle(*case, CASES[name]), strict=True):
        assert relative_l2(mine, theirs) <= 2 * BFLOAT16, part
    used = sum(CASES[name])
    poisoned = [case[0].at[used:].set(jnp.nan), *case[1:3], case[3].at[used:].set(jnp.nan)]
    weights = quantize_experts(*case[1:3])
    again = _mlp_and_vjp(*poisoned, case[4].at[used:].set(jnp.nan), sizes, weights)
    for mine, poison in zip(ours, again, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(poison))


def test_experts_refuse_what_does_not_fit():
    x, gate_up, down, weight, _ = _mlp_case()
    sizes = jnp.asarray(CASES["ragged"], jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[G, D, 2F\], \[G, F, D\]"):
        expert_mlp_fp8(x, gate_up, down[:, :, :7], sizes)
    with pytest.raises(ValueError, match=r"row_weight.shape=\(7,\) must be"):
        expert_mlp_fp8(x, gate_up, down, sizes, weight[:7])
    with pytest.raises(ValueError, match="one floating dtype.*down"):
        expert_mlp_fp8(x, gate_up, down.astype(jnp.float32), sizes)


def test_quantisation_costs_a_few_percent(relative_l2):
    """Two operands, each off by up to 1/16 and by 1/37 in the mean square: 4 % of a product."""
    x, w, dy = (np.asarray(a, np.float64) for a in _case())
    ours = _value_and_vjp(*_case(), jnp.asarray(CASES["ragged"], jnp.int32))
    exact = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for group, rows in enumerate(fp8.groups_of(CASES["ragged"])):
        exact[0][rows], exact[1][rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        exact[2][group] = x[rows].T @ dy[rows]
    for mine, theirs in zip(ours, exact, strict=True):
        assert 0.02 < relative_l2(mine, theirs) < 0.045


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=6, max_size=6))
def test_any_group_sizes(cuts, relative_l2):
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    x, w, dy = _case()
    ours = _products(x, w, dy, jnp.asarray(sizes), jnp.float32)
    for mine, theirs in zip(ours, _oracle(x, w, dy, sizes), strict=True):
        assert relative_l2(mine, theirs) <= FLOAT32


def test_rows_past_the_sum_and_idle_matrices_are_never_read():
    x, w, dy = _case()
    used, sizes = sum(CASES["tail"]), jnp.asarray(CASES["tail"], jnp.int32)
    clean = _value_and_vjp(x, w, dy, sizes)
    nan = jnp.nan
    poisoned = _value_and_vjp(x.at[used:].set(nan), w.at[2].set(nan), dy.at[used:].set(nan), sizes)
    for mine, poison in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(poison))
    assert not np.asarray(clean[0][used:]).any() and not np.asarray(clean[1][used:]).any()
    assert not np.asarray(clean[2][2]).any()


def _dot_sizes(groups):
    x, w = jnp.zeros((512, 128)), jnp.zeros((groups, 128, 256))
    run = functools.partial(grouped_matmul_fp8, implementation="portable")
    jaxpr = jax.make_jaxpr(run)(x, w, jnp.zeros(groups, jnp.int32))
    equations, found = list(jaxpr.jaxpr.eqns), []
    while equations:
        eqn = equations.pop()
        equations += [e for inner in jaxprs_in_params(eqn.params) for e in inner.eqns]
        if eqn.primitive.name == "dot_general":
            found.append([v.aval.size for v in eqn.invars])
    return found


def test_work_follows_rows_not_rows_times_groups():
    """One product in a loop, of a tile of rows and one matrix's 128 of depth."""
    assert _dot_sizes(4) == _dot_sizes(32) == [[128 * 128, 256 * 128]]


def _hopper_operands(sizes):
    """Operands whose sizes need no padding, and their dequantised product in float64."""
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(304, 640)), rng.normal(size=(3, 256, 640))
    codes, scale = zip(*(fp8.quantize(matrix, 128, 128) for matrix in w), strict=True)
    x_codes, x_scale = fp8.quantize(x, 1, 128)
    product = np.zeros((304, 256))
    for group, rows in enumerate(fp8.groups_of(sizes)):
        matrix = fp8.dequantize(codes[group], scale[group], 128, 128)
        product[rows] = fp8.dequantize(x_codes, x_scale, 1, 128)[rows] @ matrix.T
    return (x_codes, x_scale.T, np.stack(codes), np.stack(scale)), product


@needs_gpu_interpreter
def test_hopper_rows(relative_l2):
    """Whole tasks, tasks of few rows, a window that starts in another group, rows of no group."""
    sizes = np.asarray([5, 0, 270], np.int32)
    operands, product = _hopper_operands(sizes)
    operands[0][275:], operands[1][:, 275:] = np.nan, np.nan
    out = jax.jit(functools.partial(hopper_fp8.multiply, interpret=True))(*operands, sizes)
    assert relative_l2(out.astype(jnp.float32), product) <= BFLOAT16
    assert not np.asarray(out[275:]).any()


@needs_gpu_interpreter
def test_hopper_tokens(relative_l2):
    """An odd and an even number of steps, an empty group; K needs padding."""
    x, _, dy = _case()
    sizes = jnp.asarray([150, 0, 130], jnp.int32)
    tokens = transpose_quantize(x, sizes), transpose_quantize(dy, sizes)
    out = jax.jit(functools.partial(hopper_fp8.multiply_groups, interpret=True))(*tokens)
    portable = fp8_portable.multiply_groups(*tokens, jnp.float32)
    assert relative_l2(out.astype(jnp.float32), portable) <= BFLOAT16
    assert not np.asarray(out[1]).any()


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "tile",
    [
        hopper_fp8_tiles.RowTile(rows=(32, 128), columns=256, stages=4, chain=1),
        hopper_fp8_tiles.RowTile(rows=(128,), stages=3, chain=2, cluster=2),
    ],
    ids=["wide", "cluster"],
)
def test_every_hopper_row_tile_computes_the_same(tile, relative_l2):
    sizes = np.asarray([5, 0, 270], np.int32)
    operands, product = _hopper_operands(sizes)
    run = functools.partial(hopper_fp8_rows.multiply, tile=tile, interpret=True)
    out = jax.jit(run)(*map(jnp.asarray, operands), sizes)
    assert relative_l2(out.astype(jnp.float32), product) <= BFLOAT16


@needs_gpu_interpreter
def test_hopper_group_tile_of_256_columns(relative_l2):
    tile = hopper_fp8_tiles.GroupTile(columns=256, stages=3, chain=2, store_slots=1)
    x, dy = (jnp.asarray(np.random.default_rng(i).normal(size=(700, 256))) for i in range(2))
    sizes = jnp.asarray([150, 0, 540], jnp.int32)
    tokens = transpose_quantize(x, sizes), transpose_quantize(dy, sizes)
    run = functools.partial(hopper_fp8_groups.multiply_groups, tile=tile, interpret=True)
    out = jax.jit(run)(*tokens).astype(jnp.float32)
    assert relative_l2(out, fp8_portable.multiply_groups(*tokens, jnp.float32)) <= BFLOAT16


@pytest.mark.parametrize("groups", [2, 64])  # many rows a group, and few
def test_hopper_lowers_for_cuda_forward_and_backward(groups):
    x, w = jnp.zeros((4096, 256), jnp.bfloat16), jnp.zeros((groups, 256, 384), jnp.bfloat16)

    def loss(x, w, sizes):
        return grouped_matmul_fp8(x, w, sizes, "hopper").sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, w, jnp.zeros(groups, jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == 2  # dgrad and wgrad: nobody asks for the result
    with pytest.raises(ValueError, match="hopper.*runs on CUDA, not on cpu"):
        traced.lower(lowering_platforms=("cpu",))


def test_errors_name_what_does_not_fit():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="'nonsense' must be one of: portable, hopper"):
        grouped_matmul_fp8(x, w, sizes, "nonsense")
    with pytest.raises(ValueError, match=r"must be \[M, K\], \[G, K, N\]"):
        grouped_matmul_fp8(x[:, :2], w, sizes)
    with pytest.raises(ValueError, match="one floating dtype"):
        grouped_matmul_fp8(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="integer"):
        grouped_matmul_fp8(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="gives bfloat16, not dtype=float32"):
        grouped_matmul_fp8(x, w, sizes, "hopper")
    codes, scale = quantize_tiles(x)
    w_codes, w_scale = quantize_blocks(w.mT)
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        grouped_matmul_quantized(x, scale, w_codes, w_scale, sizes)
    with pytest.raises(ValueError, match="x_scale.shape=.* must be"):
        grouped_matmul_quantized(codes, scale.T, w_codes, w_scale, sizes)
    with pytest.raises(ValueError, match=r"must be \[M, C\] and \[G, O, C\]"):
        grouped_matmul_quantized(codes, scale, w_codes.mT, w_scale, sizes)
    tokens = transpose_quantize(x, sizes)
    with pytest.raises(ValueError, match="agree in rows and groups"):
        grouped_matmul_of_tokens(tokens, transpose_quantize(x, sizes[:1]))
