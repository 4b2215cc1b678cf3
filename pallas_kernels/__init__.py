"""Kernels of DeepSeek-V3's hot loops, one public function per operation.

    from pallas_kernels import causal_attention, grouped_matmul

Every operation takes `implementation=None`, which picks by platform; naming one that cannot run
raises. This package knows arrays only: no mesh, no configuration, no model.
"""

from pallas_kernels._choose import only_shapes
from pallas_kernels.attention import causal_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.fp8 import grouped_matmul_fp8
from pallas_kernels.grouped_matmul.fp8_mlp import expert_mlp_fp8

__all__ = [
    "causal_attention",
    "expert_mlp_fp8",
    "grouped_matmul",
    "grouped_matmul_fp8",
    "only_shapes",
]
