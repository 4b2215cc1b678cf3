"""The routed SwiGLU experts in FP8, forward and backward, as one operation (report section 3.3).

What stays in bfloat16 between the products is what has to be rounded there anyway: the gate and up
projections, which the backward pass needs, and the gradient of the activation. Everything else
leaves a product or a quantiser as the codes that the next product reads. Of the rows only their
transposed codes are kept for the backward pass, half of their bytes; the activation is computed
again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.fp8 import (
    check_operands,
    grouped_matmul_of_tokens,
    grouped_matmul_quantized,
)
from pallas_kernels.quantize import (
    Weights,
    quantize_both,
    quantize_tiles,
    quantize_weights,
    swiglu_backward,
    swiglu_quantize,
)


class ExpertWeights(NamedTuple):
    """The quantised matrices of the experts: gate and up [G, D, 2F], down [G, F, D]."""

    gate_up: Weights
    down: Weights


def quantize_experts(gate_up: jax.Array, down: jax.Array) -> ExpertWeights:
    """Both matrices, to share them between calls: they change once a step."""
    return ExpertWeights(quantize_weights(gate_up), quantize_weights(down))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _expert_mlp(x, gate_up, down, sizes, row_weight, weights, implementation):
    weights = quantize_experts(gate_up, down) if weights is None else weights
    return _products(quantize_tiles(x), sizes, row_weight, weights, implementation, x.dtype)[0]


def _products(rows, sizes, row_weight, weights, implementation, dtype):
    """The result, and the gate and up projections in `dtype`."""

    def multiply(rows, matrices: Weights):
        codes, scale = rows
        w, w_scale = matrices.turned, matrices.scale.mT
        return grouped_matmul_quantized(
            codes, scale, w, w_scale, sizes, dtype=dtype, implementation=implementation
        )

    both = multiply(rows, weights.gate_up)
    return multiply(swiglu_quantize(both, row_weight), weights.down), both


def _forward(x, gate_up, down, sizes, row_weight, weights, implementation):
    weights = quantize_experts(gate_up, down) if weights is None else weights
    rows, tokens = quantize_both(x, sizes)
    out, both = _products(rows, sizes, row_weight, weights, implementation, x.dtype)
    kept = [(w.codes, w.scale) for w in weights]
    return out, (tokens, both, row_weight, kept, sizes)


def _backward(implementation, residuals, dy):
    x_tokens, both, row_weight, (gate_up, down), sizes = residuals
    options = {"dtype": both.dtype, "implementation": implementation}

    def multiply(rows, matrices):
        (codes, scale), (w, w_scale) = rows, matrices
        return grouped_matmul_quantized(codes, scale, w, w_scale, sizes, **options)

    dy_rows, dy_tokens = quantize_both(dy, sizes)
    d_hidden = multiply(dy_rows, down)
    gradient = swiglu_backward(both, d_hidden, row_weight, sizes)
    d_down = grouped_matmul_of_tokens(gradient.hidden, dy_tokens, **options)
    d_gate_up = grouped_matmul_of_tokens(x_tokens, gradient.tokens, **options)
    dx = multiply(gradient.rows, gate_up)
    return dx, d_gate_up, d_down, None, gradient.row_weight.astype(row_weight.dtype), None


_expert_mlp.defvjp(_forward, _backward)


def expert_mlp_fp8(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    row_weight: jax.Array | None = None,
    implementation: str | None = None,
    *,
    weights: ExpertWeights | None = None,
) -> jax.Array:
    """`down` of the SwiGLU of `gate_up`, each row by its own expert, in FP8 forward and backward.

    Quantises as `grouped_matmul_fp8` does, the activation without rounding it in between. The
    weight of a row is applied before `down`, which is the same sum.

    Args:
      x: rows sorted by group, [M, D], bfloat16 or float32.
      gate_up: [G, D, 2F], all gates before all ups, the dtype of `x`.
      down: [G, F, D], the dtype of `x`.
      group_sizes: int32 [G], not negative, sum at most M (not checked: it is data).
      row_weight: floating [M], or None for ones.
      implementation: of the products, see `grouped_matmul_fp8`.
      weights: `quantize_experts(gate_up, down)`, to share it between calls; `gate_up` and `down`
        then only get their gradients.

    Returns:
      [M, D] in the dtype of `x`; rows past the sum of the sizes are zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run.
    """
    quantised = (None, None) if weights is None else weights
    check_operands(x, gate_up, quantised[0], "expert_mlp_fp8: gate_up")
    hidden = jax.ShapeDtypeStruct((x.shape[0], gate_up.shape[2] // 2), x.dtype)
    check_operands(hidden, down, quantised[1], "expert_mlp_fp8: down")
    if gate_up.shape[2] != 2 * down.shape[1] or down.shape[2] != x.shape[1]:
        raise ValueError(
            f"{gate_up.shape=}, {down.shape=} must be [G, D, 2F], [G, F, D] (expert_mlp_fp8)"
        )
    if row_weight is None:
        row_weight = jnp.ones(x.shape[0], jnp.float32)
    if row_weight.shape != x.shape[:1]:
        raise ValueError(f"{row_weight.shape=} must be {x.shape[:1]} (expert_mlp_fp8)")
    return _expert_mlp(x, gate_up, down, group_sizes, row_weight, weights, implementation)
