"""FP8 grouped matmul beside bfloat16 and what a user could pick instead, on one GPU.

    python scripts/benchmark_fp8.py [options of benchmark_kernels.py] [--fp8-tile wgrad:chain=4 ...]
    python scripts/benchmark_fp8.py --quantisers --experts [--shapes A] [--rounds 5] [--json FILE]

Rows of `ours fp8` time the product of operands that were quantised beforehand, and their `error` is
the distance from the float32 product of the dequantised operands. The other two time what that
leaves out: each quantiser; and the SwiGLU experts whose gate and up projection the shape is,
forward and backward, in FP8 and in bfloat16. Beside a quantiser stand its distances from the
portable one: for each array of codes "share that differ/most steps apart", for each of scales
"relative L2/largest"; beside the experts in FP8 those of the result and of each gradient from
bfloat16.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import sys
import time
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


class _Rows:
    """Rows quantised in tiles of 1 x 128; indexed by a slice, float32."""

    def __init__(self, codes: jax.Array, scale: jax.Array):
        self.codes, self.scale = _codes_in_torch(codes), torch.from_dlpack(scale)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.codes[rows].float() * self.scale[:, rows].T.repeat_interleave(128, 1)


class _Matrices:
    """Matrices quantised in blocks of 128 x 128; indexed by the group, float32.

    `codes` and `scale` may be turned, as forward reads them: then they are turned back.
    """

    def __init__(self, codes: jax.Array, scale: jax.Array, turned: bool):
        self.codes, self.scale = _codes_in_torch(codes), torch.from_dlpack(scale)
        self.turned = turned

    def __getitem__(self, group: int) -> torch.Tensor:
        scale = self.scale[group].repeat_interleave(128, 0).repeat_interleave(128, 1)
        matrix = self.codes[group].float() * scale
        return matrix.T if self.turned else matrix


class _Tokens:
    """Rows quantised in tiles of 128 x 1; indexed by a group's slice, float32."""

    def __init__(self, tiles: quantize.TokenTiles, ends: np.ndarray):
        self.codes, self.scale = _codes_in_torch(tiles.codes), torch.from_dlpack(tiles.scale)
        self.first, self.ends = np.asarray(tiles.first), ends

    def __getitem__(self, rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start
        if not count:
            return self.codes[:, :0].T.float()
        first = int(self.first[np.searchsorted(self.ends, rows.start, side="right")])
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


def _quantised(operation: str, x: jax.Array, dy: jax.Array, w: jax.Array, sizes: jax.Array):
    """What our kernel of an operation multiplies, as it takes it."""
    if operation == "wgrad":
        return tuple(quantize.transpose_quantize(rows, sizes) for rows in (x, dy))
    weights = quantize.quantize_weights(w)
    if operation == "fwd":
        return *quantize.quantize_tiles(x), weights.turned, weights.scale.mT, sizes
    return *quantize.quantize_tiles(dy), weights.codes, weights.scale, sizes


@functools.cache
def _operands(operation: str, problem: base.Problem) -> tuple:
    """Of all our kernels of an operation: at C those of one take half of what its weights do."""
    tensors = problem.jax_x, problem.jax_dy, problem.jax_w, problem.jax_sizes
    return jax.jit(functools.partial(_quantised, operation))(*tensors)


class _Product:
    """One of our kernels, compiled; the operands are made when it is first called."""

    operand_bytes = 1

    def __init__(self, operation: str, problem: base.Problem, tile: Any):
        self.operation, self.problem = operation, problem
        groups = operation == "wgrad"
        kernel = hopper_fp8_groups.multiply_groups if groups else hopper_fp8_rows.multiply
        quantised = functools.partial(_quantised, operation)
        structs = jax.eval_shape(quantised, *problem.structs("x", "dy", "w"))
        run = jax.jit(functools.partial(kernel, tile=tile))
        self.run = run.lower(*structs).compile()

    def __call__(self) -> jax.Array:
        return self.run(*_operands(self.operation, self.problem))

    @property
    def operands(self) -> _Dequantized:
        values = _operands(self.operation, self.problem)
        if self.operation == "wgrad":
            x, dy = (_Tokens(tiles, self.problem.ends) for tiles in values)
            return _Dequantized(x=x, dy=dy)
        forward = self.operation == "fwd"
        rows, matrices = _Rows(*values[:2]), _Matrices(*values[2:4], turned=forward)
        return _Dequantized(w=matrices, **{"x" if forward else "dy": rows})


@base.implementation("ours fp8", *base.OPERATIONS)
def _ours_fp8(operation: str, problem: base.Problem, tile=None) -> Callable:
    return _Product(operation, problem, tile)


class _TorchProduct:
    """torch's kernel with one scale a row, all of them one; operands as in `_Product`."""

    operand_bytes = 1

    def __init__(self, problem: base.Problem):
        self.problem = problem

    @functools.cached_property
    def values(self) -> tuple:
        problem = self.problem
        groups, k, n = problem.w.shape
        w = torch.empty((groups, n, k), device="cuda", dtype=torch.float8_e4m3fn)
        w.copy_(problem.w.transpose(1, 2))
        ones = (torch.ones(size, device="cuda") for size in (problem.rows, (groups, n)))
        return problem.x.to(torch.float8_e4m3fn), w.transpose(1, 2), *ones

    def __call__(self) -> torch.Tensor:
        offsets = self.problem.offsets
        return torch._scaled_grouped_mm(
            *self.values, offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=True
        )


@base.implementation("torch fp8 row-wise", "fwd")
def _torch_fp8(operation: str, problem: base.Problem) -> Callable:
    return _TorchProduct(problem)


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


@jax.jit
def _gap(mine: jax.Array, other: jax.Array) -> jax.Array:
    """Of codes: share that differ, most steps apart; of other numbers: relative L2, largest."""
    if mine.dtype == jnp.float8_e4m3fn:
        bits = (jax.lax.bitcast_convert_type(a, jnp.int8).astype(jnp.int16) for a in (mine, other))
        steps = jnp.abs(jnp.subtract(*bits))
        return jnp.stack([jnp.mean(steps > 0, dtype=jnp.float32), jnp.max(steps)])
    mine, other = (a.astype(jnp.float32) for a in (mine, other))
    apart = mine - other
    norms = jnp.linalg.norm(apart.ravel()) / jnp.linalg.norm(other.ravel())
    return jnp.stack([norms, jnp.max(jnp.abs(apart)) / jnp.max(jnp.abs(other))])


def _gaps(ours: Any, theirs: Any) -> dict[str, list[list[float]]]:
    """`_gap` of each array of two results, codes and other numbers apart."""
    gaps: dict[str, list[list[float]]] = {"codes": [], "numbers": []}
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        kind = "codes" if mine.dtype == jnp.float8_e4m3fn else "numbers"
        if mine.dtype != jnp.int32:
            gaps[kind].append(_gap(mine, other).tolist())
    return gaps


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


def experts(problem: base.Problem) -> dict[str, tuple[Callable, tuple]]:
    """name -> (run, operands): SwiGLU experts whose gate and up projection is the problem's."""
    x, w, sizes = problem.jax_x, problem.jax_w, problem.jax_sizes
    down = jnp.swapaxes(w[:, :, : problem.n // 2], 1, 2)
    quantise = jax.jit(fp8_mlp.quantize_experts)
    fp8 = _forward_and_backward(
        lambda x, w, down, shared: fp8_mlp.expert_mlp_fp8(x, w, down, sizes, weights=shared)
    )
    bfloat16 = _forward_and_backward(lambda x, w, down, _: _mlp_bfloat16(x, w, down, sizes))
    return {
        "experts' weights quantised": (quantise, (w, down)),
        "experts bfloat16": (bfloat16, (x, (x, w, down), None)),
        "experts fp8, without weights": (fp8, (x, (x, w, down), quantise(w, down))),
    }


@dataclasses.dataclass
class _Line:
    """One line of the table: what to run, what is reported of it."""

    name: str
    function: Callable
    operands: tuple
    moved: float = 0.0
    note: str = ""
    compiled: Callable = dataclasses.field(default=lambda *_: None)
    times: list[float] = dataclasses.field(default_factory=list)

    def compile(self) -> None:
        self.compiled = jax.jit(self.function).lower(*self.operands).compile()

    def run(self) -> Any:
        return self.compiled(*self.operands)

    def start(self) -> jax.Array:
        return jax.tree.leaves(self.run())[0]

    def compare(self, other: "_Line") -> None:
        gaps = _gaps(self.run(), other.run())
        self.note = "  ".join(
            f"{kind}: " + " ".join(f"{share:.0e}/{most:.0e}" for share, most in values)
            for kind, values in gaps.items()
            if values
        )

    def record(self, shape: str) -> dict:
        ms = statistics.median(self.times) * 1e3
        rate = f"{self.moved / ms / 1e6:7.0f} GB/s" if self.moved else " " * 12
        print(f"{shape:4}{self.name:30}{ms:9.3f} ms {rate}  {self.note}", flush=True)
        return {"shape": shape, "name": self.name, "ms": ms, "note": self.note}


def _time(shape: str, lines: list[_Line], pairs: dict[str, str], options: Any) -> list[dict]:
    """Compiles all lines, runs each once, compares the `pairs` by name, then times in turn."""
    begin, named = time.monotonic(), {line.name: line for line in lines}

    def say(what: str) -> None:
        print(f"{shape}: {what} after {time.monotonic() - begin:.0f} s", flush=True)

    def prepare(line: _Line) -> None:
        line.compile()
        say(f"{line.name} compiled")

    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        list(pool.map(prepare, lines))
    for line in lines:
        jax.block_until_ready(line.start())
        say(f"{line.name} ran")
    for mine, other in pairs.items():
        named[mine].compare(named[other])
    calls = [max(5, round(options.window / base.seconds(line.start, 2))) for line in lines]
    shuffle = np.random.default_rng(0).permutation
    for _ in range(options.rounds):
        for i in shuffle(len(lines)):
            lines[i].times.append(base.seconds(lines[i].start, calls[i]))
    return [line.record(shape) for line in lines]


def time_quantisers(shape: str, options: argparse.Namespace) -> list[dict]:
    """Each quantiser beside the portable one."""
    table = quantisers(base.Problem(shape))
    lines = [
        _Line(f"{way} {name}", functools.partial(run, implementation=way), operands, moved)
        for name, (run, operands, moved) in table.items()
        for way in ("portable", "triton")
    ]
    return _time(shape, lines, {f"triton {name}": f"portable {name}" for name in table}, options)


def time_experts(shape: str, options: argparse.Namespace) -> list[dict]:
    """The experts forward and backward in FP8 beside bfloat16."""
    lines = [_Line(name, *work) for name, work in experts(base.Problem(shape)).items()]
    return _time(shape, lines, {"experts fp8, without weights": "experts bfloat16"}, options)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--fp8-tile", action="append", default=[])
    parser.add_argument("--quantisers", action="store_true")
    parser.add_argument("--experts", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    tables = [time_quantisers] * options.quantisers + [time_experts] * options.experts
    if tables:
        base_options = base.parse(rest)
        print(f"{torch.cuda.get_device_name()}, jax {jax.__version__}", flush=True)
        records = []
        for shape in base_options.shapes:
            for table in tables:
                records += table(shape, base_options)
        if base_options.json:
            base_options.json.write_text(json.dumps(records, indent=1))
        return 0
    for spec in options.fp8_tile:
        register_tile(spec)
    return base.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
