"""Block-scaled FP8 against torch's float8 type: exact both ways, errors at the format's limit."""

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from dsv3_jax.checkpoints.fp8 import dequantize_blocks, quantize_blocks

FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# More rows than one band of blocks, and partial blocks at both edges.
SHAPE, BLOCK = (93, 50), (16, 24)


def codes_of(shape, seed=0):
    """Every finite code, in random places, as e4m3."""
    rng = np.random.default_rng(seed)
    codes = np.resize(rng.permutation(FINITE), shape)
    return rng.permuted(codes, axis=1).view(ml_dtypes.float8_e4m3fn)


def scales_of(shape, block, exponents, seed=1):
    """Random float32 scales, 2^low to 2^high."""
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    return np.exp2(np.random.default_rng(seed).uniform(*exponents, grid)).astype(np.float32)


def spread(scales, shape, block):
    row, column = np.indices(shape)
    return scales[row // block[0], column // block[1]]


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def in_torch(codes, scales, block, dtype):
    """The oracle: torch's conversion of the codes, times the scales, rounded by torch."""
    weight = torch.from_numpy(bits(codes)).view(torch.float8_e4m3fn).to(torch.float32)
    product = weight * torch.from_numpy(spread(scales, codes.shape, block))
    if dtype == "float32":
        return product.numpy()
    return product.to(torch.bfloat16).view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


# Scales as released; a wide range; so small that products are subnormal or vanish (the path without
# compiled code); so large that they overflow.
@pytest.mark.parametrize("exponents", [(-14, -10), (-80, 100), (-149, -90), (115, 127.9)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_weights_are_torchs(dtype, exponents):
    codes, scales = codes_of(SHAPE), scales_of(SHAPE, BLOCK, exponents)
    expected = in_torch(codes, scales, BLOCK, dtype)
    kind = np.dtype(dtype)
    got = dequantize_blocks(codes, scales, kind, BLOCK)
    assert got.dtype == kind
    np.testing.assert_array_equal(bits(got), bits(expected))
    turned = dequantize_blocks(codes, scales, kind, BLOCK, transpose=True)
    np.testing.assert_array_equal(bits(turned), bits(expected.T))


def test_a_tensor_of_released_proportions_and_a_band_of_it():
    codes = codes_of((576, 272))  # as kv_a_proj_with_mqa: 4.5 blocks of rows
    scales = scales_of(codes.shape, (128, 128), (-14, -10))
    expected = in_torch(codes, scales, (128, 128), "bfloat16")
    whole = dequantize_blocks(codes, scales, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(whole), bits(expected))
    # The kernel's place in a stack of gates and ups: strided, and turned.
    stack = np.zeros((272, 2, 576), ml_dtypes.bfloat16)
    band = dequantize_blocks(
        codes[128:384], scales[1:3], stack.dtype, out=stack[:, 1, 128:384], transpose=True
    )
    assert np.shares_memory(band, stack)
    np.testing.assert_array_equal(bits(stack[:, 1, 128:384]), bits(expected[128:384].T))
    assert not stack[:, 0].any() and not stack[:, 1, 384:].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_its_scales_kept_a_weight_returns_byte_for_byte(dtype):
    rng = np.random.default_rng(2)
    # Two rows of 127 columns hold the 254 finite codes; each pair of rows has a scale of its own,
    # from where the smallest product is still a normal number to where the largest is finite.
    codes = np.stack([rng.permutation(FINITE) for _ in range(400)]).reshape(800, 127)
    codes = codes.view(ml_dtypes.float8_e4m3fn)
    scales = scales_of(codes.shape, (2, 127), (-117, 119))
    weight = dequantize_blocks(codes, scales, np.dtype(dtype), (2, 127))
    again, kept = quantize_blocks(weight, (2, 127), scales)
    np.testing.assert_array_equal(bits(again), bits(codes))
    np.testing.assert_array_equal(bits(kept), bits(scales))


def test_even_nan_codes_return():
    codes = codes_of((4, 6))
    codes.view(np.uint8)[[0, 3], [1, 5]] = 0x7F
    scales = scales_of(codes.shape, (2, 3), (-14, -10))
    weight = dequantize_blocks(codes, scales, ml_dtypes.bfloat16, (2, 3))
    again, kept = quantize_blocks(weight, (2, 3), scales)
    np.testing.assert_array_equal(bits(again), bits(codes))
    np.testing.assert_array_equal(kept, scales)


def test_scales_that_no_longer_reproduce_a_block_are_replaced():
    codes, scales = codes_of(SHAPE), scales_of(SHAPE, BLOCK, (-14, -10))
    weight = dequantize_blocks(codes, scales, ml_dtypes.bfloat16, BLOCK)
    weight[20, 30] *= 1.01  # in block (1, 1)
    again, kept = quantize_blocks(weight, BLOCK, scales)
    fresh_codes, fresh = quantize_blocks(weight, BLOCK)
    changed = np.zeros(scales.shape, bool)
    changed[1, 1] = True
    np.testing.assert_array_equal(kept, np.where(changed, fresh, scales))
    inside = spread(changed, SHAPE, BLOCK)
    np.testing.assert_array_equal(bits(again), np.where(inside, bits(fresh_codes), bits(codes)))
    # The sign of a zero is kept.
    flipped = weight.copy()
    zero = tuple(np.argwhere(bits(codes) == 0)[0])
    flipped[zero] = -0.0
    again, _ = quantize_blocks(flipped, BLOCK, scales)
    assert bits(again)[zero] == 0x80


@pytest.mark.parametrize("unusable", [0.0, np.nan, np.inf, -1.0])
def test_unusable_scales_are_replaced(unusable):
    weight = np.random.default_rng(3).normal(size=SHAPE).astype(ml_dtypes.bfloat16)
    fresh_codes, fresh = quantize_blocks(weight, BLOCK)
    codes, scales = quantize_blocks(weight, BLOCK, np.full_like(fresh, unusable))
    np.testing.assert_array_equal(bits(codes), bits(fresh_codes))
    np.testing.assert_array_equal(scales, fresh)


# Blocks of ordinary weights, of weights over 20 binades, of tiny ones (path without compiled code).
@pytest.mark.parametrize("exponents", [(0, 0), (-20, 0), (-130, -100)])
def test_quantized_weights_are_torchs_and_as_near_as_the_format_allows(exponents):
    rng = np.random.default_rng(4)
    weight = rng.normal(size=SHAPE) * np.exp2(rng.uniform(*exponents, SHAPE))
    weight = weight.astype(np.float32)
    codes, scales = quantize_blocks(weight, BLOCK)
    row, column = (range(0, n, b) for n, b in zip(SHAPE, BLOCK, strict=True))
    absmax = np.array(
        [[np.abs(weight[i : i + BLOCK[0], j : j + BLOCK[1]]).max() for j in column] for i in row]
    )
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(scales, np.maximum(absmax / np.float32(448), tiny))
    scale = spread(scales, SHAPE, BLOCK)
    oracle = (torch.from_numpy(weight) / torch.from_numpy(scale)).clamp(-448, 448)
    oracle = oracle.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(bits(codes), oracle)
    # Half the distance of neighbouring codes at weight / scale: 2^-4 of the binade, 2^-10 among
    # the subnormal codes. The quotient and the product each round once in float32.
    exact = np.abs(weight.astype(np.float64) / scale)
    half = np.maximum(np.exp2(np.floor(np.log2(np.maximum(exact, 2.0**-20))) - 4), 2.0**-10)
    bound = scale * (half + exact * 2.0**-23) + 2.0**-149  # products round among subnormals too
    error = dequantize_blocks(codes, scales, np.float32, BLOCK).astype(np.float64) - weight
    assert (np.abs(error) <= bound).all()
    # The bound is reached, so it is not loose; the largest weight of a block has the top code.
    assert (np.abs(error) / bound).max() > 0.9
    if exponents[0] > -100:
        assert all(
            (bits(codes)[i : i + BLOCK[0], j : j + BLOCK[1]] & 0x7F).max() == 0x7E
            for i in row
            for j in column
        )


def test_zeros_infinities_and_nan():
    weight = np.ones((4, 6), np.float32)
    weight[:2, :3] = [[0, -0.0, 0], [0, 0, 0]]
    weight[:2, 3:] = [[np.inf, -np.inf, np.nan], [2, -1, 0]]
    codes, scales = quantize_blocks(weight, (2, 3))
    np.testing.assert_array_equal(bits(codes)[:2, :3], [[0, 0x80, 0], [0, 0, 0]])
    np.testing.assert_array_equal(bits(codes)[0, 3:] & 0x7F, [0x7E, 0x7E, 0x7F])
    expected = np.array([[1e-4, 2], [1, 1]], np.float32) / np.float32(448)
    np.testing.assert_array_equal(scales, expected)
    again = dequantize_blocks(codes, scales, np.float32, (2, 3))
    assert np.isnan(again[0, 5]) and np.isfinite(np.delete(again, 5, axis=1)).all()


def test_the_callers_mesh_does_not_matter():
    codes, scales = codes_of(SHAPE), scales_of(SHAPE, BLOCK, (-14, -10))
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        got = dequantize_blocks(codes, scales, np.float32, BLOCK)
    np.testing.assert_array_equal(got, in_torch(codes, scales, BLOCK, "float32"))


def test_shapes_and_dtypes_must_fit():
    codes, scales = codes_of((6, 8)), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"float32 \[2, 2\], must be float32 \[3, 2\]"):
        dequantize_blocks(codes, scales, np.float32, (2, 4))
    with pytest.raises(ValueError, match="scale_inv is float64"):
        quantize_blocks(np.ones((6, 8), np.float32), (4, 4), scales.astype(np.float64))
    with pytest.raises(ValueError, match=r"weight.dtype=dtype\('float64'\) must be float32"):
        quantize_blocks(np.ones((6, 8)))
    with pytest.raises(ValueError, match="weight.dtype=float32 must be float8_e4m3fn"):
        dequantize_blocks(np.ones((6, 8), np.float32), scales, np.float32, (4, 4))
    with pytest.raises(ValueError, match=r"out is float32 \[6, 8\], must be float32 \[8, 6\]"):
        out = np.empty((6, 8), np.float32)
        dequantize_blocks(codes, scales, np.float32, (4, 4), out, transpose=True)
    with pytest.raises(ValueError, match="two dimensions"):
        quantize_blocks(np.ones(3, np.float32))
