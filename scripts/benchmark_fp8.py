"""FP8 grouped matmul beside bfloat16 and what a user could pick instead, on one GPU.

    python scripts/benchmark_fp8.py [options of benchmark_kernels.py] [--fp8-tile wgrad:chain=4 ...]
    python scripts/benchmark_fp8.py --quantisers [--shapes A,B]

Rows of `ours fp8` time the product of operands that were quantised beforehand, and their `error` is
the distance from the float32 product of the dequantised operands. `--quantisers` times what that
leaves out, and the whole differentiable operation, forward and backward, in FP8 and in bfloat16.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import benchmark_kernels as base  # pyrefly: ignore[missing-import]
import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import grouped_matmul, quantize
from pallas_kernels.grouped_matmul import hopper_fp8_groups, hopper_fp8_rows, hopper_fp8_tiles
from pallas_kernels.grouped_matmul.fp8 import grouped_matmul_fp8


class _Rows:
    """Rows quantised in tiles of 1 x 128; indexed by a slice, float32."""

    def __init__(self, codes: jax.Array, scale: jax.Array):
        self.codes, self.scale = _codes_in_torch(codes), torch.from_dlpack(scale)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.codes[rows].float() * self.scale[:, rows].T.repeat_interleave(128, 1)


class _Matrices:
    """Matrices quantised in blocks of 128 x 128; indexed by the group, float32."""

    def __init__(self, codes: jax.Array, scale: jax.Array):
        self.codes, self.scale = _codes_in_torch(codes), torch.from_dlpack(scale)

    def __getitem__(self, group: int) -> torch.Tensor:
        scale = self.scale[group].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return self.codes[group].float() * scale


class _Tokens:
    """Rows quantised in tiles of 128 x 1; indexed by a group's slice, float32."""

    def __init__(self, tiles: quantize.TokenTiles, ends: np.ndarray):
        self.codes, self.scale = _codes_in_torch(tiles.codes), torch.from_dlpack(tiles.scale)
        self.first, self.ends = np.asarray(tiles.first), ends

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first = int(self.first[np.searchsorted(self.ends, rows.start, side="right")])
        count = rows.stop - rows.start
        codes = self.codes[:, 128 * first : 128 * first + count].T.float()
        tiles = self.scale[first : first - (-count // 128)]
        return codes * tiles.repeat_interleave(128, 0)[:count]


@dataclasses.dataclass
class _Dequantized:
    x: Any = None
    w: Any = None
    dy: Any = None


def _codes_in_torch(codes: jax.Array) -> torch.Tensor:
    bits = jax.block_until_ready(jax.lax.bitcast_convert_type(codes, jnp.uint8))
    return torch.from_dlpack(bits).view(torch.float8_e4m3fn)


@base.implementation("ours fp8", *base.OPERATIONS)
def _ours_fp8(operation: str, problem: base.Problem, tile=None) -> Callable:
    if operation == "wgrad":
        tokens = jax.jit(quantize.transpose_quantize)
        x, dy = (tokens(rows, problem.jax_sizes) for rows in (problem.jax_x, problem.jax_dy))
        run = jax.jit(functools.partial(hopper_fp8_groups.multiply_groups, tile=tile))
        start = functools.partial(run, x, dy)
        start.operands = _Dequantized(x=_Tokens(x, problem.ends), dy=_Tokens(dy, problem.ends))  # pyrefly: ignore[missing-attribute]
        return start
    weights = jax.jit(quantize.quantize_weights)(problem.jax_w)
    matrices = _Matrices(weights.codes, weights.scale)
    run = jax.jit(functools.partial(hopper_fp8_rows.multiply, tile=tile))
    forward = operation == "fwd"
    rows = jax.jit(quantize.quantize_tiles)(problem.jax_x if forward else problem.jax_dy)
    codes, scale = weights.codes, weights.scale
    if forward:
        codes, scale = weights.turned, jnp.copy(scale.mT)
    start = functools.partial(run, *rows, codes, scale, problem.jax_sizes)
    side = {"x" if forward else "dy": _Rows(*rows)}
    start.operands = _Dequantized(w=matrices, **side)  # pyrefly: ignore[missing-attribute]
    return start


@base.implementation("torch fp8 row-wise", "fwd")
def _torch_fp8(operation: str, problem: base.Problem) -> Callable:
    x, (groups, n) = problem.x.to(torch.float8_e4m3fn), (problem.groups, problem.n)
    w = torch.empty((groups, n, problem.k), device="cuda", dtype=torch.float8_e4m3fn)
    w.copy_(problem.w.transpose(1, 2))
    ones = (torch.ones(size, device="cuda") for size in (problem.rows, (groups, n)))
    return functools.partial(
        torch._scaled_grouped_mm, x, w.transpose(1, 2), *ones,
        offs=problem.offsets, out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def register_tile(spec: str) -> None:
    """Adds our FP8 kernels with another tile: "fwd:rows=32+64+128,chain=2", "wgrad:stages=6"."""
    operation, _, rest = spec.partition(":")
    fields = dict(part.split("=") for part in rest.split(","))
    values: dict[str, Any] = {
        name: tuple(map(int, value.split("+"))) if name == "rows" else int(value)
        for name, value in fields.items()
    }
    wgrad = operation == "wgrad"
    kind = hopper_fp8_tiles.GroupTile if wgrad else hopper_fp8_tiles.RowTile
    build = functools.partial(_ours_fp8, operation, tile=kind(**values))
    base.REGISTRY[operation][f"fp8 {rest}"] = build


def time_quantisers(shape: str) -> None:
    """Milliseconds and bytes a second of each quantiser, and of the whole operation."""
    problem = base.Problem(shape)
    x, dy, w, sizes = problem.jax_x, problem.jax_dy, problem.jax_w, problem.jax_sizes
    runs: dict[str, tuple[Callable, tuple, float]] = {}
    for name in ("portable", "triton"):
        tiles, tokens, weights, swiglu = (
            jax.jit(functools.partial(f, implementation=name))
            for f in (
                quantize.quantize_tiles,
                quantize.transpose_quantize,
                quantize.quantize_weights,
                quantize.swiglu_quantize,
            )
        )
        runs[f"{name} tiles"] = tiles, (x,), 3 * x.size
        runs[f"{name} tokens"] = tokens, (x, sizes), 3 * x.size
        runs[f"{name} weights"] = weights, (w,), 4 * w.size
        runs[f"{name} swiglu"] = swiglu, (x,), 2.5 * x.size
    for name, operation in (
        ("fp8", functools.partial(grouped_matmul_fp8, implementation="hopper")),
        ("bfloat16", grouped_matmul),
    ):

        @jax.jit
        def both(x, w, dy, operation=operation):
            out, vjp = jax.vjp(lambda x, w: operation(x, w, sizes), x, w)
            return out, *vjp(dy)

        runs[f"{name} forward and backward"] = both, (x, w, dy), float("nan")
    for name, (run, operands, size) in runs.items():
        start = functools.partial(lambda run, operands: run(*operands)[0], run, operands)
        try:
            jax.block_until_ready(start())
        except Exception as error:  # a line of the table, not the end
            print(f"{shape:7}{name:34} {type(error).__name__}: {str(error)[:90]}")
            continue
        ms = statistics.median(base.seconds(start, 5) for _ in range(5)) * 1e3
        print(f"{shape:7}{name:34}{ms:9.3f} ms {size / ms / 1e6:7.0f} GB/s", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--fp8-tile", action="append", default=[])
    parser.add_argument("--quantisers", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.quantisers:
        for shape in base.parse(rest).shapes:
            time_quantisers(shape)
        return 0
    for spec in options.fp8_tile:
        register_tile(spec)
    return base.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
