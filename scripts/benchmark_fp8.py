"""FP8 grouped matmul beside bfloat16 and what a user could pick instead, on one GPU.

    python scripts/benchmark_fp8.py [options of benchmark_kernels.py] [--fp8-tile wgrad:chain=4 ...]
    python scripts/benchmark_fp8.py --whole [--shapes A] [--rounds 5] [--json FILE]

Rows of `ours fp8` time the product of operands that were quantised beforehand, and their `error` is
the distance from the float32 product of the dequantised operands. `--whole` times what that leaves
out: each quantiser ("scales apart, share of codes apart, most steps of a code apart" from the
portable one), and whole operations, forward and backward, in FP8 and in bfloat16 (relative L2
distance of the result and of each gradient): the grouped matmul of the shape and the SwiGLU experts
whose gate and up projection it is.
"""

import argparse
import dataclasses
import functools
import json
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
from pallas_kernels.grouped_matmul import (
    fp8_mlp,
    hopper_fp8_groups,
    hopper_fp8_rows,
    hopper_fp8_tiles,
)
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


def quantisers(problem: base.Problem) -> dict[str, tuple[Callable, tuple, float]]:
    """name -> (quantiser, operands, bytes it must move) at the sizes of a problem."""
    x, dy, w, sizes = problem.jax_x, problem.jax_dy, problem.jax_w, problem.jax_sizes
    weight = jnp.ones(problem.rows)
    return {
        "rows": (quantize.quantize_tiles, (x,), 3 * x.size),
        "tokens": (quantize.transpose_quantize, (x, sizes), 3 * x.size),
        "rows and tokens": (quantize.quantize_both, (x, sizes), 4 * x.size),
        "weights": (quantize.quantize_weights, (w,), 4 * w.size),
        "swiglu": (quantize.swiglu_quantize, (x, weight), 2.5 * x.size),
        # The gradient of the activation has half the columns of `dy`.
        "swiglu backward": (
            quantize.swiglu_backward,
            (dy, dy[:, : dy.shape[1] // 2], weight, sizes),
            5.5 * dy.size,
        ),
    }


def _apart(ours: Any, theirs: Any) -> str:
    """Largest relative distance of scales and sums, share of codes that differ, most steps."""
    far, differing, codes, steps = 0.0, 0.0, 0, 0
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if mine.dtype == jnp.float8_e4m3fn:
            bits = (
                jax.lax.bitcast_convert_type(a, jnp.int8).astype(jnp.int16) for a in (mine, other)
            )
            gap = jnp.abs(jnp.subtract(*bits))
            differing, codes = differing + float((gap > 0).sum()), codes + gap.size
            steps = max(steps, int(gap.max()))
        elif mine.dtype == jnp.float32:
            far = max(far, float(jnp.max(jnp.abs(mine - other)) / jnp.max(jnp.abs(other))))
    return f"{far:.0e} {differing / codes:.0e} {steps}"


def _forward_and_backward(operation: Callable) -> Callable:
    """jit of `operation(first, *weights)` and its gradients for `dy`, all of them computed."""

    @jax.jit
    def run(dy, operands, shared):
        out, vjp = jax.vjp(lambda *operands: operation(*operands, shared), *operands)
        return out, vjp(dy)

    return run


def _mlp_bfloat16(x, gate_up, down, sizes):
    both = grouped_matmul(x, gate_up, sizes).astype(jnp.float32)
    gate, up = jnp.split(both, 2, axis=1)
    return grouped_matmul((jax.nn.silu(gate) * up).astype(x.dtype), down, sizes)


def operations(problem: base.Problem) -> dict[str, tuple[Callable, tuple]]:
    """name -> (run, operands): one grouped matmul, and the experts that it is the first part of."""
    x, dy, w, sizes = problem.jax_x, problem.jax_dy, problem.jax_w, problem.jax_sizes
    down = jnp.swapaxes(w[:, :, : problem.n // 2], 1, 2)
    weights = jax.jit(quantize.quantize_weights)(w)
    experts = jax.jit(fp8_mlp.quantize_experts)(w, down)
    run = _forward_and_backward
    product = run(lambda x, w, shared: grouped_matmul_fp8(x, w, sizes, weights=shared))
    mlp = run(lambda x, w, down, shared: fp8_mlp.expert_mlp_fp8(x, w, down, sizes, weights=shared))
    bfloat16 = run(lambda x, w, _: grouped_matmul(x, w, sizes))
    mlp_bfloat16 = run(lambda x, w, down, _: _mlp_bfloat16(x, w, down, sizes))
    return {
        "matmul bfloat16": (bfloat16, (dy, (x, w), None)),
        "matmul fp8": (product, (dy, (x, w), None)),
        "matmul fp8, weights quantised": (product, (dy, (x, w), weights)),
        "experts bfloat16": (mlp_bfloat16, (x, (x, w, down), None)),
        "experts fp8": (mlp, (x, (x, w, down), None)),
        "experts fp8, weights quantised": (mlp, (x, (x, w, down), experts)),
    }


def time_operations(shape: str, rounds: int) -> list[dict]:
    """Each quantiser, and whole operations forward and backward, FP8 beside bfloat16."""
    problem = base.Problem(shape)
    runs: dict[str, Callable] = {}
    notes: dict[str, str] = {}
    size: dict[str, float] = {}
    for name, (quantiser, operands, moved) in quantisers(problem).items():
        results = {}
        for way in ("portable", "triton"):
            run = jax.jit(functools.partial(quantiser, implementation=way))
            key = f"{way} {name}"
            runs[key], size[key] = functools.partial(run, *operands), moved
            results[way] = jax.block_until_ready(runs[key]())
        notes[f"triton {name}"] = _apart(results["triton"], results["portable"])
    exact: dict[str, Any] = {}
    for name, (run, operands) in operations(problem).items():
        runs[name] = functools.partial(run, *operands)
        result = jax.block_until_ready(runs[name]())
        kind = name.split()[0]
        pairs = zip(
            jax.tree.leaves(result), jax.tree.leaves(exact.setdefault(kind, result)), strict=True
        )
        notes[name] = " ".join(f"{_distance(mine, other):.3f}" for mine, other in pairs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for i in np.random.default_rng(0).permutation(len(runs)):
            name = list(runs)[i]
            times[name].append(base.seconds(runs[name], 5))
    records = []
    for name, measured in times.items():
        ms = statistics.median(measured) * 1e3
        record = {"shape": shape, "name": name, "ms": ms, "note": notes.get(name, "")}
        rate = f"{size[name] / ms / 1e6:7.0f} GB/s" if name in size else " " * 12
        print(f"{shape:4}{name:34}{ms:9.3f} ms {rate}  {record['note']}", flush=True)
        records.append(record)
    return records


def _distance(mine: jax.Array, other: jax.Array) -> float:
    """Relative L2 distance."""
    mine, other = (a.astype(jnp.float32) for a in (mine, other))
    return float(jnp.linalg.norm((mine - other).ravel()) / jnp.linalg.norm(other.ravel()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--fp8-tile", action="append", default=[])
    parser.add_argument("--whole", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.whole:
        base_options = base.parse(rest)
        print(f"{torch.cuda.get_device_name()}, jax {jax.__version__}", flush=True)
        records = []
        for shape in base_options.shapes:
            records += time_operations(shape, base_options.rounds)
        if base_options.json:
            base_options.json.write_text(json.dumps(records, indent=1))
        return 0
    for spec in options.fp8_tile:
        register_tile(spec)
    return base.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
