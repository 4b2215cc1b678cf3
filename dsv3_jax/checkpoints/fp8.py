"""Released FP8 weights: e4m3 codes with one float32 scale for each block of 128 x 128.

A weight is code times scale (`weight_scale_inv`); blocks at the last rows and columns may be
partial. The arithmetic is float32, rounded once, on the CPU: compiled where that is exact, in
NumPy otherwise, with equal results.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

_log = logging.getLogger(__name__)

DEFAULT_BLOCK = (128, 128)
MAX_CODE = 448.0  # the largest e4m3 number

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# DeepSeek's kernels take a block's absolute maximum to be at least this: no division by zero.
_ABSMAX_OF_ZEROS = 1e-4
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# Compiled code takes float32 numbers below 2^-126 for zero. Scales from here on keep every product
# and every quotient that matters far above.
_SMALLEST_COMPILED_SCALE = 2.0**-90
_BAND_BLOCKS = 4  # block rows at a time: small enough for the caches


def dequantize_blocks(
    weight: np.ndarray,
    scale_inv: np.ndarray,
    dtype: DTypeLike,
    block: tuple[int, int] = DEFAULT_BLOCK,
    out: np.ndarray | None = None,
    *,
    transpose: bool = False,
) -> np.ndarray:
    """float32(weight) times its block's scale, rounded once (to nearest even) to `dtype`.

    Several threads may call it at once: most of the work runs outside the interpreter's lock.

    Args:
      weight: e4m3 [O, I]: a whole tensor, or whole rows of blocks.
      scale_inv: float32 [ceil(O / block[0]), ceil(I / block[1])].
      dtype: of the result: bfloat16 or float32.
      out: array of that dtype to fill, of any strides; None makes one.
      transpose: the result is [I, O].

    Raises:
      ValueError: a shape or dtype that does not fit.
    """
    _check(weight, scale_inv, block)
    if weight.dtype != _E4M3:
        raise ValueError(f"weight.dtype={weight.dtype} must be {_E4M3} (dequantize_blocks)")
    dtype, shape = np.dtype(dtype), weight.shape[::-1] if transpose else weight.shape
    if out is None:
        out = np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, must be {dtype} {list(shape)} "
            "(dequantize_blocks)"
        )
    compiled = _compiles(scale_inv)
    if transpose:
        # Codes are turned and not results: they are the smaller.
        weight, scale_inv, block = weight.T, scale_inv.T, block[::-1]
    axis = int(transpose)
    for band, scale_band in _bands(weight.shape[axis], block[axis]):
        at, scale_at = ((slice(None),) * axis + (part,) for part in (band, scale_band))
        out[at] = _run(
            _multiply, weight[at], scale_inv[scale_at], compiled=compiled, block=block, dtype=dtype
        )
    return out


def quantize_blocks(
    weight: np.ndarray,
    block: tuple[int, int] = DEFAULT_BLOCK,
    scale_inv: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The e4m3 codes [O, I] and float32 scales of a weight [O, I], by blocks.

    A block's scale is its absolute maximum / 448; codes are weight / scale, rounded to nearest
    even. A block of zeros gets DeepSeek's smallest scale, 1e-4 / 448. Infinities become the largest
    code and NaN stays NaN; neither counts for the maximum.

    Args:
      weight: bfloat16 or float32.
      scale_inv: earlier scales, float32 [ceil(O / block[0]), ceil(I / block[1])]. Those that give
        a block back bit for bit, in the weight's dtype, are kept: weights that were dequantised
        with them become the codes they were.

    Raises:
      ValueError: a shape or dtype that does not fit.
    """
    if weight.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise ValueError(f"{weight.dtype=} must be float32 or bfloat16 (quantize_blocks)")
    grid = _grid(weight.shape, block)
    if scale_inv is not None:
        _check(weight, scale_inv, block)
    codes, scales = np.empty(weight.shape, _E4M3), np.empty(grid, np.float32)
    for band, scale_band in _bands(weight.shape[0], block[0]):
        earlier = None if scale_inv is None else scale_inv[scale_band]
        codes[band], scales[scale_band] = _quantize_band(weight[band], block, earlier)
    return codes, scales


def _quantize_band(weight, block, earlier):
    wrong = None
    if earlier is not None:
        fast = _compiles(earlier)
        codes = _run(_divide, weight, earlier, compiled=fast, block=block)
        again = _run(_multiply, codes, earlier, compiled=fast, block=block, dtype=weight.dtype)
        unsigned = f"u{weight.dtype.itemsize}"  # bits: NaN equals itself
        differs = np.ascontiguousarray(weight).view(unsigned) != again.view(unsigned)
        if not differs.any():
            return codes, earlier
        wrong = _absmax(np, differs, block=block) > 0
    absmax = _run(_absmax, weight, compiled=True, block=block)
    # Compiled code would take a block of subnormal numbers for zeros.
    compiled = bool(absmax.min(initial=np.inf) / MAX_CODE >= _SMALLEST_COMPILED_SCALE)
    if not compiled:
        absmax = _absmax(np, weight, block=block)
    absmax = np.where(absmax == 0, np.float32(_ABSMAX_OF_ZEROS), absmax)
    scales = np.maximum(absmax / np.float32(MAX_CODE), np.float32(_SMALLEST_SCALE))
    if wrong is not None:
        scales = np.where(wrong, scales, earlier)
    compiled = compiled and _compiles(scales)
    return _run(_divide, weight, scales, compiled=compiled, block=block), scales


def _multiply(xp, weight, scale, *, block, dtype):
    scale = _spread(xp, scale, weight.shape, block)
    return (weight.astype(np.float32) * scale).astype(dtype)


def _divide(xp, weight, scale, *, block):
    quotient = weight.astype(np.float32) / _spread(xp, scale, weight.shape, block)
    return xp.clip(quotient, -MAX_CODE, MAX_CODE).astype(_E4M3)


def _absmax(xp, weight, *, block):
    """Largest finite magnitude of each block, float32."""
    rows, columns = _grid(weight.shape, block)
    size = xp.abs(weight.astype(np.float32))
    size = xp.where(xp.isfinite(size), size, 0)
    edge = [(0, n * b - m) for n, b, m in zip((rows, columns), block, size.shape, strict=True)]
    blocks = xp.pad(size, edge).reshape(rows, block[0], columns, block[1])
    return blocks.max((1, 3))


def _spread(xp, scale, shape, block):
    """Scales repeated over their blocks and cut to `shape`."""
    return xp.repeat(xp.repeat(scale, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


def _compiles(scale: np.ndarray) -> bool:
    """Whether compiled code is exact with these scales."""
    return bool(((scale >= _SMALLEST_COMPILED_SCALE) & (scale < np.inf)).all())


@functools.cache
def _compiled(function: Callable[..., Any], **static: Any) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(function, jnp, **static))


@functools.cache
def _cpu() -> jax.sharding.Mesh | None:
    """The first CPU device, as a mesh."""
    try:
        devices = jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        _log.info("JAX_PLATFORMS names no cpu: FP8 weights are computed in NumPy, more slowly")
        return None
    return jax.make_mesh((1,), ("cpu",), (jax.sharding.AxisType.Auto,), devices=devices)


def _run(
    function: Callable[..., Any], *arrays: np.ndarray, compiled: bool, **static: Any
) -> np.ndarray:
    cpu = _cpu()
    if not compiled or cpu is None or arrays[0].size == 0:
        with np.errstate(all="ignore"):  # overflow to infinity and NaN are results here
            return function(np, *arrays, **static)
    # The caller's mesh may be of other devices. device_put also turns transposed arrays, several
    # times faster than NumPy.
    with jax.set_mesh(cpu):
        on_cpu = jax.device_put(arrays, cpu.devices.item())
        return np.asarray(_compiled(function, **static)(*on_cpu))


def _bands(length: int, block: int):
    """(rows, their scales) a few rows of blocks at a time."""
    for first in range(0, _blocks(length, block), _BAND_BLOCKS):
        last = first + _BAND_BLOCKS
        yield slice(first * block, min(last * block, length)), slice(first, last)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"weight.shape={list(shape)} must have two dimensions (fp8)")
    return _blocks(shape[0], block[0]), _blocks(shape[1], block[1])


def _check(weight: np.ndarray, scale_inv: np.ndarray, block: tuple[int, int]) -> None:
    grid = _grid(weight.shape, block)
    if scale_inv.shape != grid or scale_inv.dtype != np.float32:
        raise ValueError(
            f"scale_inv is {scale_inv.dtype} {list(scale_inv.shape)}, must be float32 {list(grid)} "
            f"for a weight {list(weight.shape)} in blocks of {list(block)} (fp8)"
        )
