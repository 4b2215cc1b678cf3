"""The FP8 quantisers against loops over tiles in NumPy, bit for bit, and torch's e4m3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize, quantize_triton
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    quantize_weights,
    swiglu_quantize,
    token_tiles,
    transpose_quantize,
)
from tests.oracles import fp8

_tiles = jax.jit(quantize_tiles)
_blocks = jax.jit(quantize_blocks)
_tokens = jax.jit(transpose_quantize)


def _numbers(*shape, dtype="bfloat16"):
    """Magnitudes over many binades, so that tiles differ and subnormal codes appear."""
    rng = np.random.default_rng(shape[0])
    return jnp.asarray(rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape)), dtype)


def _same_bits(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(37, 300), (5, 128), (3, 17)])
def test_tiles_of_rows(shape, dtype):
    x = _numbers(*shape, dtype=dtype)
    codes, scale = _tiles(x)
    expected, expected_scale = fp8.quantize(x, 1, 128)
    np.testing.assert_array_equal(scale, expected_scale.T)
    _same_bits(codes, expected)


def test_codes_are_torchs_rounding_of_value_over_scale():
    torch = pytest.importorskip("torch")
    x = _numbers(37, 300)
    codes, scale = _tiles(x)
    whole = np.repeat(np.asarray(scale).T, 128, 1)[:, :300]
    quotient = torch.tensor(np.asarray(x, np.float32) * (1 / whole))
    _same_bits(np.asarray(codes).view(np.uint8), quotient.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("shape", [(200, 300), (2, 130, 129), (2, 3, 64, 128)])
def test_blocks_of_matrices(shape):
    w = _numbers(*shape)
    codes, scale = _blocks(w)
    for at in np.ndindex(shape[:-2]):
        expected, expected_scale = fp8.quantize(w[at], 128, 128)
        np.testing.assert_array_equal(scale[at], expected_scale)
        _same_bits(codes[at], expected)


def test_ties_go_to_even_and_the_largest_number_is_reached():
    # The scale is 1. 17 lies between 16 and 18, 19 between 18 and 20; 2**-10 between 0 and 2**-9.
    x = np.zeros((1, 128), np.float32)
    x[0, :7] = 448, -448, 17, 19, -19, 2**-10, 3 * 2**-10
    codes, scale = _tiles(jnp.asarray(x))
    assert scale == 1
    assert np.asarray(codes, np.float32)[0, :7].tolist() == [448, -448, 16, 20, -20, 0, 2**-8]


def test_tiles_of_zeros_tiny_and_not_finite_numbers():
    x = np.zeros((5, 256), np.float32)
    x[1, 3] = 1e-44  # below every normal number
    x[2, 3] = np.nan
    x[3, 3] = 3e38
    x[4] = 1
    codes, scale = (np.asarray(a, np.float32) for a in _tiles(jnp.asarray(x)))
    assert not codes[:2].any() and (scale[:, 0] == 1).all()
    assert np.isnan(codes[2, :128]).any() and not codes[2, 128:].any()
    np.testing.assert_allclose(codes[3, 3] * scale[0, 3], 3e38, rtol=1e-6)
    np.testing.assert_allclose(codes[4, 0] * scale[0, 4], 1, rtol=1e-6)


SIZES = [5, 0, 128, 131, 1, 0]


def _check_token_tiles(x, sizes, tiles):
    """Each group's tiles hold its rows, transposed and then zeros; nobody else's."""
    codes, scale, first, count = (np.asarray(a) for a in tiles)
    assert codes.shape[1] == scale.shape[0] * 128 == token_tiles(len(x), len(sizes)) * 128
    used = 0
    for group, rows in enumerate(fp8.groups_of(sizes)):
        assert first[group] == used and count[group] == -(-sizes[group] // 128)
        used += count[group]
        if sizes[group]:
            expected, expected_scale = fp8.quantize(np.asarray(x[rows], np.float32).T, 1, 128)
            at = 128 * first[group]
            _same_bits(codes[:, at : at + sizes[group]], expected)
            assert not codes[:, at + sizes[group] : 128 * used].astype(np.float32).any()
            np.testing.assert_array_equal(scale[first[group] : used].T, expected_scale)


def test_token_tiles_hold_one_group_each():
    x = _numbers(301, 70)
    poisoned = x.at[sum(SIZES) :].set(jnp.nan)  # rows past the sum
    tiles = _tokens(poisoned, jnp.asarray(SIZES, jnp.int32))
    _check_token_tiles(x, SIZES, tiles)
    assert np.isfinite(np.asarray(tiles.codes, np.float32)).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 301), min_size=6, max_size=6))
def test_token_tiles_of_any_group_sizes(cuts):
    x = _numbers(301, 70)
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    _check_token_tiles(x, sizes, _tokens(x, jnp.asarray(sizes)))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_is_quantised_unrounded(weighted):
    gate_up = _numbers(19, 2 * 200)
    weight = jnp.asarray(np.linspace(0.1, 2, 19), jnp.float32) if weighted else None
    codes, scale = jax.jit(swiglu_quantize)(gate_up, weight)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    hidden = gate / (1 + np.exp(-gate)) * up
    if weighted:
        hidden *= np.asarray(weight, np.float64)[:, None]
    largest = np.pad(np.abs(hidden), ((0, 0), (0, 56))).reshape(19, 2, 128).max(2)
    np.testing.assert_allclose(np.asarray(scale).T, largest / 448, rtol=1e-6)
    # Half a unit of a code's last place: 1/16 of it, or of a subnormal 2**-10; float32 beside.
    whole = np.repeat(largest / 448, 128, 1)[:, :200]
    got = np.asarray(codes, np.float64) * whole
    assert (np.abs(got - hidden) <= np.maximum(np.abs(hidden) / 16, whole * 2**-10) * 1.001).all()


def test_weights_come_in_both_orders():
    weights = jax.jit(quantize_weights)(_numbers(2, 130, 129))
    codes, scale = _blocks(_numbers(2, 130, 129))
    _same_bits(weights.codes, codes)
    _same_bits(weights.turned, np.swapaxes(np.asarray(codes), 1, 2))
    np.testing.assert_array_equal(weights.scale, scale)


def _close(ours, theirs, rtol=1e-6, atol=0.0):
    """The same up to the last places of a division or exp: scales, and codes beside a tie."""
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = np.asarray(mine), np.asarray(other)
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if mine.dtype == np.float32:
            np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)
        else:
            bits = mine.view(np.uint8).astype(int), other.view(np.uint8).astype(int)
            apart = np.abs(bits[0] - bits[1])
            assert apart.max() <= 1 and np.mean(apart) < 3e-3


def _with_zero_tile(*shape):
    return _numbers(*shape).at[..., 5, :128].set(0)


def test_triton_rows():
    x, weight = _with_zero_tile(96, 512), jnp.linspace(0.1, 2, 96)
    _close(quantize_triton.quantize_tiles(x, interpret=True), _tiles(x))
    for factor in (None, weight):
        ours = quantize_triton.swiglu_quantize(x, factor, interpret=True)
        _close(ours, jax.jit(swiglu_quantize)(x, factor))


def test_triton_codes_are_not_clipped_and_need_not_be():
    """Some largest numbers times the reciprocal of their scale exceed 448, all by too little."""
    x = np.random.default_rng(0).normal(size=(1024, 128)).astype(np.float32)
    codes, scale = quantize_triton.quantize_tiles(jnp.asarray(x), interpret=True)
    products = np.abs(x * (np.float32(1) / np.asarray(scale).T))
    assert products.max() > 448
    codes = np.asarray(codes, np.float32)
    assert (np.abs(codes).max(1) == 448).all()  # nan, if one of them had overflowed


def test_triton_weights():
    w = _numbers(2, 128, 384).at[1, :, :128].set(0)
    _close(quantize_triton.quantize_weights(w, interpret=True), jax.jit(quantize_weights)(w))


@pytest.fixture
def interpreted(monkeypatch):
    """`implementation="triton"` runs in Pallas' interpreter."""
    monkeypatch.setattr(quantize, "_on_cuda", lambda x: x)
    for name in ("transpose_quantize", "quantize_both", "swiglu_backward"):
        kernel = functools.partial(getattr(quantize_triton, name), interpret=True)
        monkeypatch.setattr(quantize_triton, name, kernel)


USED = sum(SIZES)


def _used(rows):
    """Codes [M, K] and scales [tiles, M] of the rows that belong to a group."""
    codes, scale = rows
    return codes[:USED], scale[:, :USED]


def test_triton_tokens(interpreted):
    """Rows past the sum and the neighbours' are masked, also where a tile reaches past the end."""
    x = _numbers(301, 128).at[USED:].set(jnp.nan)
    sizes = jnp.asarray(SIZES, jnp.int32)
    ours = transpose_quantize(x, sizes, "triton")
    _close(ours[:2], _tokens(x, sizes)[:2])


@pytest.mark.parametrize("implementation", ["portable", "triton"])
def test_both_ways_are_each_way(interpreted, implementation):
    x, sizes = _numbers(301, 256).at[USED:].set(jnp.nan), jnp.asarray(SIZES, jnp.int32)
    rows, tokens = quantize_both(x, sizes, implementation)
    _close(_used(rows), _used(_tiles(x)))
    _close(tokens[:2], _tokens(x, sizes)[:2])


def _swiglu_gradient(gate_up, dh, weight):
    """Gradients of gate_up and of the weights, and the activation, float64."""
    (gate, up), dh, weight = np.split(gate_up, 2, axis=1), dh, weight[:, None]
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    d_gate = dh * weight * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up = np.concatenate([d_gate, dh * weight * silu], axis=1)
    return d_gate_up, (dh * silu * up).sum(1), silu * up * weight


# Terms of size 1 that may cancel, rounded to float32; a scale is 1/448 of such a sum.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-9}


@pytest.mark.parametrize("implementation", ["portable", "triton"])
def test_gradient_of_swiglu_comes_quantised_both_ways(interpreted, implementation):
    rng, sizes = np.random.default_rng(0), jnp.asarray(SIZES, jnp.int32)
    gate_up, dh, weight = (rng.normal(size=s).astype("f4") for s in ((301, 512), (301, 256), 301))
    poisoned = [a.copy() for a in (gate_up, dh, weight)]
    for a in poisoned:
        a[USED:] = np.nan
    ours = quantize.swiglu_backward(*poisoned, sizes, implementation)
    exact = [np.asarray(a, np.float64)[:USED] for a in (gate_up, dh, weight)]
    d_gate_up, d_weight, hidden = (np.asarray(a, np.float32) for a in _swiglu_gradient(*exact))
    np.testing.assert_allclose(ours.row_weight[:USED], d_weight, rtol=1e-4, atol=1e-5)
    assert not np.asarray(ours.row_weight[USED:]).any()
    _close(_used(ours.rows), _tiles(jnp.asarray(d_gate_up)), **FLOAT32)
    for tiles, numbers in ((ours.tokens, d_gate_up), (ours.hidden, hidden)):
        whole = np.zeros((301, numbers.shape[1]), np.float32)
        whole[:USED] = numbers
        _close(tiles[:2], _tokens(jnp.asarray(whole), sizes)[:2], **FLOAT32)


def test_triton_lowers_for_cuda():
    h200 = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("all",), axis_types=kinds, abstract_device=h200)
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((320, 256), (2, 256, 384)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def run(x, w, sizes, ones):
        rows = quantize_tiles(x), swiglu_quantize(x), quantize_both(x, sizes)
        gradient = quantize.swiglu_backward(x, x[:, :128], ones, sizes)
        return rows, gradient, quantize_weights(w), transpose_quantize(x, sizes)

    # None picks them for the chip that is traced for.
    with jax.sharding.use_abstract_mesh(mesh):
        ones = jax.ShapeDtypeStruct((320,), jnp.float32)
        lowered = jax.jit(run).trace(x, w, sizes, ones).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 6


def test_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match="'nonsense' must be one of: portable, triton"):
        quantize_tiles(jnp.zeros((32, 128)), "nonsense")
    with pytest.raises(ValueError, match="rows=33, columns=128 must be multiples of 32 and 128"):
        quantize_tiles(jnp.zeros((33, 128)), "triton")
    with pytest.raises(ValueError, match="k=128, n=100 must be multiples of 128"):
        quantize_weights(jnp.zeros((2, 128, 100)), "triton")
    with pytest.raises(ValueError, match="channels=100 must be a multiple of 64"):
        transpose_quantize(jnp.zeros((32, 100)), jnp.zeros(2, jnp.int32), "triton")
    huge = jax.ShapeDtypeStruct((128, 7168, 4096), jnp.bfloat16)  # offsets would overflow
    with pytest.raises(ValueError, match="must not lie between 2\\*\\*31 and 2\\*\\*32"):
        jax.eval_shape(functools.partial(quantize_weights, implementation="triton"), huge)
    run = jax.jit(lambda x: quantize_tiles(x, "triton"))
    with pytest.raises(ValueError, match="triton.*runs on CUDA, not on cpu"):
        run(jnp.zeros((32, 128)))
