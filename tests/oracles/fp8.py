"""FP8 quantisation in NumPy loops over tiles: the independent reference of the FP8 kernels."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


def quantize(x, height: int, width: int):
    """Codes and scales of `x` [M, N] in tiles of `height` x `width`, partial at the edges."""
    x = np.asarray(x, np.float32)
    codes = np.zeros(x.shape, E4M3)
    scale = np.ones((-(-x.shape[0] // height), -(-x.shape[1] // width)), np.float32)
    for i, j in np.ndindex(scale.shape):
        at = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        largest = np.abs(x[at]).max()
        if largest > 0:
            scale[i, j] = np.float32(largest) / np.float32(448)
        codes[at] = (x[at] * (np.float32(1) / scale[i, j])).astype(E4M3)
    return codes, scale


def dequantize(codes, scale, height: int, width: int):
    """float64 `codes` [M, N] times the scale of each tile."""
    whole = np.repeat(np.repeat(np.asarray(scale, np.float64), height, 0), width, 1)
    return np.asarray(codes, np.float64) * whole[: codes.shape[0], : codes.shape[1]]


def round_trip(x, height: int, width: int):
    """`x` as its codes and scales hold it, float64."""
    return dequantize(*quantize(x, height, width), height, width)


def groups_of(sizes):
    """The slice of rows of each group."""
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
