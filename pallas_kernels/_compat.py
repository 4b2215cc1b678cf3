"""The few names of JAX that differ between 0.10 and 0.12, or that it keeps to itself.

What changed only its default or has an older alias in Pallas Mosaic GPU (`lowering_semantics`,
`num_barriers`, `out_type`) is spelled out where it is used and needs nothing here.
"""

from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import mosaic_gpu as plgpu

_BEFORE_0_11 = jax.__version_info__ < (0, 11)


def transposed(ref):
    """The transposed view of a matrix in shared memory."""
    return plgpu.transpose_ref(ref, (1, 0)) if _BEFORE_0_11 else ref.T


def store_transposed(ref, value: jax.Array) -> None:
    """Writes `value` [a, b] into the matrix `ref` [b, a] of shared memory."""
    if _BEFORE_0_11:
        # Later releases transpose on the way (stmatrix); this one needs the registers so first.
        value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    transposed(ref)[...] = value


def simulator() -> Any:
    """What `interpret=` of a kernel takes to simulate the GPU on the CPU.

    Raises:
      NotImplementedError: this JAX has no simulator, which came with 0.11.
    """
    if _BEFORE_0_11:
        raise NotImplementedError(
            f"JAX {jax.__version__} simulates no Mosaic GPU kernel, 0.11 does"
        )
    return getattr(plgpu, "InterpretGPUParams")()  # noqa: B009  # Not there for the type checker.


def has_cudnn() -> bool:
    """Whether this process has cuDNN, which comes with JAX's CUDA plugin."""
    return fused_attention_stablehlo.cuda_versions is not None


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    """cuDNN's causal attention of [B, T, N, D], [B, T, N, D], [B, T, N, H]."""
    # A tuple only where softmax statistics are asked for.
    return fused_attention_stablehlo.dot_product_attention(  # pyrefly: ignore[bad-return]
        q, k, v, scale=scale, mask_type=fused_attention_stablehlo.MaskType.CAUSAL
    )
