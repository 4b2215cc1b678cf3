"""Grouped matmul beside what a user could pick instead, on one GPU, at DeepSeek-V3's shapes.

    python scripts/benchmark_kernels.py [--shapes A,B] [--operations fwd,wgrad] [--json FILE]
                                        [--only cublas,ours] [--tile fwd:columns=256,cluster=2 ...]

Every implementation of an operation runs in one process on the same bfloat16 data (random normal,
larger than L2, mildly skewed group sizes), in a new order every round, so that neither a drift of
the clock nor what ran before favours one. Figures are medians over rounds; `error` is the worst
group's relative L2 distance from a float32 product of every row. A peer that is not installed or
cannot run is left out with its reason. `cublas` multiplies all rows by one matrix: the same FLOPs
without groups. Needs torch for the data and the peers.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the memory

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels.grouped_matmul import hopper_groups, hopper_rows, hopper_tiles

# M rows, G groups, K -> N.
SHAPES = {
    "A": (32768, 32, 7168, 4096),
    "B": (32768, 32, 2048, 7168),
    "C": (65536, 256, 7168, 4096),
    "D": (65536, 256, 2048, 7168),
    "small": (4096, 256, 7168, 4096),
    "decode": (256, 256, 7168, 4096),
}
OPERATIONS = ("fwd", "dgrad", "wgrad")
# A device-to-device copy on an H200, bytes read and written.
BYTES_PER_SECOND = 4.3e12

# operation -> name -> function of a Problem that returns a function of no argument.
REGISTRY: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}


def implementation(name: str, *operations: str) -> Callable:
    """Registers `build(problem)` under `name` for these operations.

    `build` prepares and returns a function of no argument that starts the work and returns its
    result, a jax or torch array of the operation's shape.
    """

    def register(build: Callable) -> Callable:
        for operation in operations:
            REGISTRY[operation][name] = functools.partial(build, operation)
        return build

    return register


def group_sizes(rows: int, groups: int) -> np.ndarray:
    """Sizes of a router that is balanced but real: lognormal popularity, int32, sum `rows`."""
    generator = np.random.default_rng(0)
    popularity = generator.lognormal(0, 0.3, groups)
    return generator.multinomial(rows, popularity / popularity.sum()).astype(np.int32)


class Problem:
    """The operands of one shape, as torch tensors and, on the same memory, as jax arrays."""

    def __init__(self, name: str):
        self.name = name
        self.rows, self.groups, self.k, self.n = SHAPES[name]
        self.sizes = group_sizes(self.rows, self.groups)
        self.ends = np.cumsum(self.sizes)
        torch.manual_seed(0)
        self.x = self._normal((self.rows, self.k), 1.0)
        self.dy = self._normal((self.rows, self.n), 1.0)
        self.w = self._normal((self.groups, self.k, self.n), self.k**-0.5)
        self.offsets = torch.tensor(self.ends, dtype=torch.int32, device="cuda")
        self.jax_x, self.jax_dy, self.jax_w = map(jax.dlpack.from_dlpack, (self.x, self.dy, self.w))
        self.jax_sizes = jnp.asarray(self.sizes)

    @staticmethod
    def _normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)

    def flops(self) -> float:
        return 2.0 * self.rows * self.k * self.n

    def floor_ms(self, operation: str) -> float:
        """Time to read each input and write each output once, weights of groups with rows only."""
        hit = int((self.sizes > 0).sum()) if operation != "wgrad" else self.groups
        elements = self.rows * (self.k + self.n) + hit * self.k * self.n
        return 2 * elements / BYTES_PER_SECOND * 1e3

    def error(self, operation: str, result: torch.Tensor, operands: Any = None) -> float:
        """Worst group's relative L2 distance from the float32 product of `operands`, or ours."""
        operands = operands or self
        worst = 0.0
        for group, end in enumerate(self.ends):
            rows = slice(end - self.sizes[group], end)
            if operation == "wgrad":
                want = operands.x[rows].float().T @ operands.dy[rows].float()
                got = result[group].float()
            else:
                if not self.sizes[group]:
                    continue
                weight = operands.w[group].float()
                want = (
                    operands.x[rows].float() @ weight
                    if operation == "fwd"
                    else operands.dy[rows].float() @ weight.T
                )
                got = result[rows].float()
            size = want.norm().clamp_min(1e-30)
            distance = float((got - want).norm() / size)
            worst = max(worst, distance if distance == distance else float("inf"))
        return worst


@implementation("ours", *OPERATIONS)
def _ours(operation: str, problem: Problem, tile=None) -> Callable:
    if operation == "wgrad":
        run = jax.jit(functools.partial(hopper_groups.multiply_groups, tile=tile))
        return lambda: run(problem.jax_x, problem.jax_dy, problem.jax_sizes)
    transposed = operation == "dgrad"
    run = jax.jit(functools.partial(hopper_rows.multiply, transposed=transposed, tile=tile))
    rows = problem.jax_dy if transposed else problem.jax_x
    return lambda: run(rows, problem.jax_w, problem.jax_sizes)


@implementation("cublas", *OPERATIONS)
def _cublas(operation: str, problem: Problem) -> Callable:
    x, dy, w = problem.x, problem.dy, problem.w[0]
    return {"fwd": lambda: x @ w, "dgrad": lambda: dy @ w.T, "wgrad": lambda: x.T @ dy}[operation]


@implementation("torch", *OPERATIONS)
def _torch(operation: str, problem: Problem) -> Callable:
    x, dy, w, ends = problem.x, problem.dy, problem.w, problem.offsets
    grouped = torch._grouped_mm
    return {
        "fwd": lambda: grouped(x, w, ends),
        "dgrad": lambda: grouped(dy, w.transpose(1, 2), ends),
        "wgrad": lambda: grouped(x.T, dy, ends),
    }[operation]


@implementation("jax example", "fwd", "dgrad")
def _jax_example(operation: str, problem: Problem) -> Callable:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    rows = problem.jax_x if operation == "fwd" else problem.jax_dy
    run = jax.jit(
        lambda rows, w, sizes: ragged_dot_mgpu.ragged_dot(
            rows, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64,
            max_concurrent_steps=4, grid_block_n=8, transpose_rhs=operation == "dgrad",
        )
    )  # fmt: skip
    return lambda: run(rows, problem.jax_w, problem.jax_sizes)


@implementation("tokamax", *OPERATIONS)
def _tokamax(operation: str, problem: Problem) -> Callable:
    import tokamax  # pyrefly: ignore[missing-import]

    def forward(x, w):
        return tokamax.ragged_dot(x, w, problem.jax_sizes, implementation="mosaic")

    x, w, dy = problem.jax_x, problem.jax_w, problem.jax_dy
    if operation == "fwd":
        run = jax.jit(forward)
        return lambda: run(x, w)
    if operation == "dgrad":
        run = jax.jit(lambda x, w, dy: jax.vjp(lambda x: forward(x, w), x)[1](dy)[0])
    else:
        run = jax.jit(lambda x, w, dy: jax.vjp(lambda w: forward(x, w), w)[1](dy)[0])
    return lambda: run(x, w, dy)


def register_tiles(specs: list[str]) -> None:
    """Adds our kernels with other tiles: "fwd:columns=256,cluster=2", "rows=64+128", "n=192"."""
    for spec in specs:
        only, _, rest = spec.rpartition(":")
        fields = dict(part.split("=") for part in rest.split(","))
        values: dict[str, Any] = {
            name: tuple(map(int, value.split("+"))) if name == "rows" else int(value)
            for name, value in fields.items()
        }
        kinds = {"wgrad": hopper_tiles.GroupTile, "fwd": hopper_tiles.RowTile}
        kinds["dgrad"] = kinds["fwd"]
        for operation, kind in kinds.items():
            named = {field.name for field in dataclasses.fields(kind)}
            if only in ("", operation) and set(values) <= named:
                build = functools.partial(_ours, operation, tile=kind(**values))
                REGISTRY[operation][f"tile {rest}"] = build


def seconds(run: Callable, calls: int) -> float:
    """Time of a call: `calls` of them back to back, waiting once."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result) if isinstance(result, jax.Array) else torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


@dataclasses.dataclass
class Contender:
    """One implementation of one operation: how to start it, and what is reported of it."""

    operation: str
    name: str
    record: dict
    run: Any = None

    def build(self, problem: Problem) -> None:
        """Compiles and runs it once; a failure is a line of the table, not the end."""
        begin = time.perf_counter()
        try:
            self.run = REGISTRY[self.operation][self.name](problem)
            jax.block_until_ready(self.run())
        except Exception as error:
            self.run = None
            self.record["failed"] = f"{type(error).__name__}: {error}"[:300]
        self.record["first_call_s"] = time.perf_counter() - begin

    def check(self, problem: Problem) -> None:
        result = self.run()
        if isinstance(result, jax.Array):
            result = torch.from_dlpack(jax.block_until_ready(result))
        # What was multiplied, where that is not the problem's bfloat16.
        operands = getattr(self.run, "operands", None)
        self.record["error"] = problem.error(self.operation, result, operands)


def compare(problem: Problem, options: argparse.Namespace) -> list[dict]:
    """Builds, checks and times the implementations on one shape; one record each."""
    contenders = [
        Contender(operation, name, {"shape": problem.name, "operation": operation, "name": name})
        for operation in options.operations
        for name in REGISTRY[operation]
        if options.only is None or name.split(" ")[0] in options.only
    ]
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        list(pool.map(lambda contender: contender.build(problem), contenders))
    for operation in options.operations:
        ready = [c for c in contenders if c.operation == operation and c.run is not None]
        for contender in ready:
            if contender.name != "cublas":
                contender.check(problem)
        measure(ready, problem, options)
    return [contender.record for contender in contenders]


def measure(ready: list[Contender], problem: Problem, options: argparse.Namespace) -> None:
    """Times the contenders of one operation round by round."""
    calls = [max(1, round(options.window / seconds(c.run, 2))) for c in ready]
    times: list[list[float]] = [[] for _ in ready]
    shuffle = np.random.default_rng(0).permutation
    for _ in range(options.rounds):
        for i in shuffle(len(ready)):
            times[i].append(seconds(ready[i].run, calls[i]))
    for contender, measured in zip(ready, times, strict=True):
        ms = statistics.median(measured) * 1e3
        contender.record |= {
            "ms": ms,
            "tflops": problem.flops() / ms / 1e9,
            "of_floor": problem.floor_ms(contender.operation) / ms,
            "spread": (max(measured) - min(measured)) * 1e3 / ms,
        }


def print_table(records: list[dict]) -> None:
    speed = {(r["shape"], r["operation"], r["name"]): r.get("tflops") for r in records}
    print(f"{'shape':7}{'op':6}{'name':44}{'ms':>9}{'TFLOP/s':>9}{'/cublas':>9}{'/torch':>8}"
          f"{'floor':>7}{'error':>10}")  # fmt: skip
    for r in records:
        head = f"{r['shape']:7}{r['operation']:6}{r['name']:44}"
        if "failed" in r:
            print(head + "  " + r["failed"][:110].replace("\n", " "))
            continue
        ratios = [speed.get((r["shape"], r["operation"], peer)) for peer in ("cublas", "torch")]
        shares = [f"{r['tflops'] / ratio:.3f}" if ratio else "-" for ratio in ratios]
        print(f"{head}{r['ms']:9.3f}{r['tflops']:9.1f}{shares[0]:>9}{shares[1]:>8}"
              f"{r['of_floor']:7.2f}{r.get('error', float('nan')):10.1e}")  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = functools.partial(str.split, sep=",")
    parser.add_argument("--shapes", type=split, default=list(SHAPES))
    parser.add_argument("--operations", type=split, default=list(OPERATIONS))
    parser.add_argument("--only", type=split, help="implementations to run; default: all")
    parser.add_argument("--tile", action="append", default=[], help="our kernels with this tile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=0.03, help="seconds a measurement lasts")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds; start no shape after")
    parser.add_argument("--threads", type=int, default=8, help="compilations at a time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    begin = time.monotonic()
    register_tiles(options.tile)
    torch.backends.cuda.matmul.allow_tf32 = False
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    device = torch.cuda.get_device_name()
    print(f"{device}, {versions}", flush=True)
    records = []
    for shape in options.shapes:
        if time.monotonic() - begin > options.limit:
            break
        records += compare(Problem(shape), options)
        print(f"{shape}: {time.monotonic() - begin:.0f} s", flush=True)
        if options.json:
            report = {"device": device, "versions": versions, "records": records}
            options.json.write_text(json.dumps(report, indent=1))
        torch.cuda.empty_cache()
    print_table(records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
