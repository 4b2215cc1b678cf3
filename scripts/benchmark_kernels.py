"""Grouped matmul beside what a user could pick instead, on one GPU, at DeepSeek-V3's shapes.

    python scripts/benchmark_kernels.py [--shapes A,B] [--operations fwd,wgrad] [--json FILE]
                                        [--only cublas,ours] [--tile fwd:columns=256,cluster=2 ...]

Every implementation of an operation runs in one process on the same bfloat16 data (random normal,
larger than L2, mildly skewed group sizes), in a new order every round, so that neither a drift of
the clock nor what ran before favours one. Figures are medians over rounds. `error` is the worst
group's relative L2 distance from a float32 product of every row; `floor` is the time in which a
device-to-device copy moves the bytes that must be read and written, as a share of the time taken.
A peer that is not installed or cannot run is left out with its reason. `cublas` multiplies all rows
by one matrix: the same FLOPs without groups. Needs torch for the data and the peers.

Compiling takes longer than measuring, so every operation of every shape has a process of its own:
`--processes` of them compile at a time, and when all are ready they measure, one after another.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the memory

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _turns import take_turns  # pyrefly: ignore[missing-import]

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
    """The operands of one shape, as torch tensors and, on the same memory, as jax arrays.

    An operand is made when it is first looked at; `compile` needs none.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows, self.groups, self.k, self.n = SHAPES[name]
        self.sizes = group_sizes(self.rows, self.groups)
        self.ends = np.cumsum(self.sizes)

    @functools.cached_property
    def x(self) -> torch.Tensor:
        return self._normal(1, (self.rows, self.k), 1.0)

    @functools.cached_property
    def dy(self) -> torch.Tensor:
        return self._normal(2, (self.rows, self.n), 1.0)

    @functools.cached_property
    def w(self) -> torch.Tensor:
        return self._normal(3, (self.groups, self.k, self.n), self.k**-0.5)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return torch.tensor(self.ends, dtype=torch.int32, device="cuda")

    jax_x = functools.cached_property(lambda self: jax.dlpack.from_dlpack(self.x))
    jax_dy = functools.cached_property(lambda self: jax.dlpack.from_dlpack(self.dy))
    jax_w = functools.cached_property(lambda self: jax.dlpack.from_dlpack(self.w))
    jax_sizes = functools.cached_property(lambda self: jnp.asarray(self.sizes))

    @staticmethod
    def _normal(seed: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)

    def structs(self, *operands: str) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of these of "x", "dy", "w", then of the group sizes."""
        shapes = {
            "x": (self.rows, self.k),
            "dy": (self.rows, self.n),
            "w": (self.groups, self.k, self.n),
        }
        structs = [jax.ShapeDtypeStruct(shapes[name], jnp.bfloat16) for name in operands]
        return [*structs, jax.ShapeDtypeStruct((self.groups,), jnp.int32)]

    def compile(self, function: Callable, *operands: str) -> Callable:
        """`function` of these of "x", "dy", "w", then the group sizes; of no argument, compiled."""
        run = jax.jit(function).lower(*self.structs(*operands)).compile()
        return lambda: run(*(getattr(self, f"jax_{name}") for name in operands), self.jax_sizes)

    def flops(self) -> float:
        return 2.0 * self.rows * self.k * self.n

    def floor_bytes(self, operation: str, operand_bytes: int) -> int:
        """Each input read once and each output written, weights of groups with rows only."""
        x, dy = self.rows * self.k, self.rows * self.n
        if operation == "wgrad":
            return operand_bytes * (x + dy) + 2 * self.groups * self.k * self.n
        rows, out = (x, dy) if operation == "fwd" else (dy, x)
        hit = int((self.sizes > 0).sum())
        return operand_bytes * (rows + hit * self.k * self.n) + 2 * out

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
        multiply = functools.partial(hopper_groups.multiply_groups, tile=tile)
        return problem.compile(multiply, "x", "dy")
    transposed = operation == "dgrad"
    multiply = functools.partial(hopper_rows.multiply, transposed=transposed, tile=tile)
    return problem.compile(multiply, "dy" if transposed else "x", "w")


@implementation("cublas", *OPERATIONS)
def _cublas(operation: str, problem: Problem) -> Callable:
    return {
        "fwd": lambda: problem.x @ problem.w[0],
        "dgrad": lambda: problem.dy @ problem.w[0].T,
        "wgrad": lambda: problem.x.T @ problem.dy,
    }[operation]


@implementation("torch", *OPERATIONS)
def _torch(operation: str, problem: Problem) -> Callable:
    grouped = torch._grouped_mm
    return {
        "fwd": lambda: grouped(problem.x, problem.w, problem.offsets),
        "dgrad": lambda: grouped(problem.dy, problem.w.transpose(1, 2), problem.offsets),
        "wgrad": lambda: grouped(problem.x.T, problem.dy, problem.offsets),
    }[operation]


@implementation("jax example", "fwd", "dgrad")
def _jax_example(operation: str, problem: Problem) -> Callable:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    def multiply(rows, w, sizes):
        return ragged_dot_mgpu.ragged_dot(
            rows, w, group_sizes=sizes, block_m=128, block_n=128, block_k=64,
            max_concurrent_steps=4, grid_block_n=8, transpose_rhs=operation == "dgrad",
        )  # fmt: skip

    return problem.compile(multiply, "x" if operation == "fwd" else "dy", "w")


@implementation("tokamax", *OPERATIONS)
def _tokamax(operation: str, problem: Problem) -> Callable:
    import tokamax  # pyrefly: ignore[missing-import]

    def product(x, w, sizes):
        return tokamax.ragged_dot(x, w, sizes, implementation="mosaic")

    def dgrad(x, w, dy, sizes):
        return jax.vjp(lambda x: product(x, w, sizes), x)[1](dy)[0]

    def wgrad(x, w, dy, sizes):
        return jax.vjp(lambda w: product(x, w, sizes), w)[1](dy)[0]

    if operation == "fwd":
        return problem.compile(product, "x", "w")
    return problem.compile(dgrad if operation == "dgrad" else wgrad, "x", "w", "dy")


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
        result = None  # Two results of C's wgrad are 30 GB.
        result = run()
    jax.block_until_ready(result) if isinstance(result, jax.Array) else torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def copy_rate() -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), 3) for _ in range(3))


@dataclasses.dataclass
class Contender:
    """One implementation of one operation: how to start it, and what is reported of it."""

    operation: str
    name: str
    record: dict
    run: Any = None

    def attempt(self, step: Callable[[], Any]) -> Any:
        """What `step` returns; a failure is a line of the table, not the end."""
        begin = time.perf_counter()
        try:
            return step()
        except Exception as error:
            self.record["failed"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            self.record["build_s"] = self.record.get("build_s", 0) + time.perf_counter() - begin

    def build(self, problem: Problem) -> None:
        """Compiles it."""
        self.run = self.attempt(lambda: REGISTRY[self.operation][self.name](problem))

    def warm(self) -> bool:
        """Runs it once; whether it can."""
        if "failed" not in self.record:
            self.attempt(lambda: jax.block_until_ready(self.run()))
        return "failed" not in self.record

    def check(self, problem: Problem) -> None:
        result = self.run()
        if isinstance(result, jax.Array):
            result = torch.from_dlpack(jax.block_until_ready(result))
        # What was multiplied, where that is not the problem's bfloat16.
        operands = getattr(self.run, "operands", None)
        self.record["error"] = problem.error(self.operation, result, operands)


def compare(options: argparse.Namespace, shape: str, operation: str) -> Iterator[Any]:
    """Work in turns: compiles and yields the device's name; then checks, times, yields records."""
    problem = Problem(shape)
    contenders = [
        Contender(operation, name, {"shape": shape, "operation": operation, "name": name})
        for name in REGISTRY[operation]
        if options.only is None or name.split(" ")[0] in options.only
    ]
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        list(pool.map(lambda contender: contender.build(problem), contenders))
    yield torch.cuda.get_device_name()
    ready = [contender for contender in contenders if contender.warm()]
    for contender in ready:
        if contender.name != "cublas":
            contender.check(problem)
    measure(ready, problem, options)
    yield [contender.record for contender in contenders]


def measure(ready: list[Contender], problem: Problem, options: argparse.Namespace) -> None:
    """Times the contenders of one operation round by round."""
    rate = copy_rate()
    calls = [max(1, round(options.window / seconds(c.run, 2))) for c in ready]
    times: list[list[float]] = [[] for _ in ready]
    shuffle = np.random.default_rng(0).permutation
    for _ in range(options.rounds):
        for i in shuffle(len(ready)):
            times[i].append(seconds(ready[i].run, calls[i]))
    for contender, measured in zip(ready, times, strict=True):
        ms = statistics.median(measured) * 1e3
        operand_bytes = getattr(contender.run, "operand_bytes", 2)
        moved = problem.floor_bytes(contender.operation, operand_bytes)
        contender.record |= {
            "ms": ms,
            "tflops": problem.flops() / ms / 1e9,
            "of_floor": moved / rate / ms * 1e3,
            "quartiles_ms": [q * 1e3 for q in statistics.quantiles(measured)],
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
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--window", type=float, default=0.01, help="seconds a measurement lasts")
    parser.add_argument("--processes", type=int, default=18, help="operations compiled at a time")
    parser.add_argument("--threads", type=int, default=4, help="compilations at a time in each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    begin = time.monotonic()
    register_tiles(options.tile)
    torch.backends.cuda.matmul.allow_tf32 = False
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    tasks = list(itertools.product(options.shapes, options.operations))
    records, device = [], None
    turns = take_turns(functools.partial(compare, options), tasks, options.processes)
    for (shape, operation), (found, new) in zip(tasks, turns, strict=True):
        device = device or found
        failed = {"shape": shape, "operation": operation, "name": "all", "failed": "process ended"}
        records += new or [failed]
        print(f"{shape} {operation}: {time.monotonic() - begin:.0f} s", flush=True)
        if options.json:
            report = {"device": device, "versions": versions, "records": records}
            options.json.write_text(json.dumps(report, indent=1))
    print(f"{device}, {versions}")
    print_table(records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
