"""Training throughput of meshes beside one device, and how much of a step is exchange.

    python scripts/benchmark_meshes.py configs/bench_h200.py --mesh one --mesh expert=2 \\
        --mesh fsdp=2 --sequences 2 [--steps 10] [--profile DIR] [--json FILE] \\
        [--SECTION.FIELD VALUE ...]

Whole optimizer steps as training takes them, each mesh in a process of its own: all compile at
once, then they are measured in turn. Every device gets the same sequences, so that every mesh must
find the losses of one device, and its loads but for near-ties in bfloat16.

On GPUs two more steps are traced. Exchange is time in which a communication kernel runs on the
device (waiting for the others included), exposed the part of it without any other kernel.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _turns import take_turns  # pyrefly: ignore[missing-import]

from dsv3_jax.cli import OneLineParser, parse_config, run
from dsv3_jax.config import BatchConfig, ConfigError, ParallelConfig, TrainConfig

_EXCHANGE = re.compile(r"nccl|ragged_all_to_all|barrier|p2p|all_?reduce|one_?shot", re.IGNORECASE)

_TRACED = 2  # steps

Spans = list[tuple[float, float]]


def on_mesh(config: TrainConfig, mesh: str, sequences: int) -> TrainConfig:
    """`config` on a mesh such as "expert=2,fsdp=2" or "one", one microbatch a step.

    Raises:
      ConfigError: no such mesh.
    """
    pairs = [] if mesh == "one" else [part.partition("=") for part in mesh.split(",")]
    try:
        parallel = ParallelConfig(**{axis: int(size) for axis, _, size in pairs})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{mesh!r} must be one or like expert=2,fsdp=4 (--mesh)") from error
    batch = sequences * parallel.replica * parallel.fsdp * parallel.expert
    return dataclasses.replace(
        config, parallel=parallel, batch=BatchConfig(size=batch, microbatch_size=batch)
    )


class _Program:
    """The compiled train step of a configuration, its first state and its batch."""

    def __init__(self, config: TrainConfig, sequences: int) -> None:
        import jax
        import numpy as np

        from dsv3_jax.model.transformer import Transformer
        from dsv3_jax.parallel.feeding import BatchFeed
        from dsv3_jax.parallel.placement import mesh_for, require_fit, state_shardings
        from dsv3_jax.training.step import compiler_options, init_state, jit_train_step

        mesh, model = mesh_for(config.parallel), Transformer(config.model, config.runtime)
        abstract = jax.eval_shape(lambda: init_state(model, config))
        placed = None
        if mesh is not None:
            require_fit(mesh, config)
            jax.set_mesh(mesh)
            placed = state_shardings(mesh, abstract)
            abstract = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed
            )
        self.ways = config.batch.size // sequences
        shape = (sequences, config.data.sequence_length + 1)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
        feed = BatchFeed(mesh, config.batch.size)
        self.batch = {"tokens": feed.place(np.tile(tokens, (self.ways, 1)))}
        init = jax.jit(init_state, static_argnums=(0, 1), out_shardings=placed)
        self.start = init.lower(model, config).compile()
        before = time.monotonic()
        lowered = jit_train_step(model, config, abstract, mesh).lower(abstract, self.batch)
        self.step = lowered.compile(compiler_options=compiler_options(mesh))
        self.compiled_s = time.monotonic() - before


def measure(config: TrainConfig, args: argparse.Namespace, trace: Path) -> Iterator[dict]:
    """Compiles, then measures; to be run in a process of its own."""
    signal.alarm(args.limit)  # a collective that never ends is one mesh's failure, not all's
    program = _Program(config, args.sequences)
    yield {"compiled_s": program.compiled_s, "text": program.step.as_text()}

    import jax
    import numpy as np

    state, seconds, rows, loads = program.start(), [], [], []
    for _ in range(args.steps):
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(program.step(state, program.batch))
        seconds.append(time.perf_counter() - before)
        rows.append({k: float(getattr(metrics, k)) for k in ("loss", "grad_norm", "buffer_need")})
        loads.append(np.asarray(metrics.load) / program.ways)
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "tokens": config.batch.size * config.data.sequence_length,
        "ms": [1e3 * s for s in seconds],
        "steps": rows,
        "first_load": loads[0].tolist(),
        "peak_gb": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
    }
    if device.platform == "gpu":
        with jax.profiler.trace(str(trace)):
            for _ in range(_TRACED):
                state, metrics = jax.block_until_ready(program.step(state, program.batch))
        result["trace"] = read_trace(next(trace.rglob("*.xplane.pb")))
    yield result


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time without overlaps, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def shares(compute: Spans, exchange: Spans) -> dict[str, float]:
    """Time of either, and of the exchange alone; in the unit of the spans, which may overlap."""
    compute, exchange = union(compute), union(exchange)
    both = length(union([*compute, *exchange]))
    return {
        "compute": length(compute),
        "exchange": length(exchange),
        "exposed": both - length(compute),
        "busy": both,
    }


def read_trace(source: Path) -> dict[str, Any]:
    """Milliseconds a step of the first GPU in a JAX profile of two steps: see `summarise`."""
    from jax.profiler import ProfileData

    return summarise(ProfileData.from_file(str(source)))


def summarise(profile: Any) -> dict[str, Any]:
    """Milliseconds a step: `shares`, the span from first to last kernel, the longest kernels."""
    plane = next(plane for plane in profile.planes if plane.name == "/device:GPU:0")
    spans: dict[bool, Spans] = {False: [], True: []}
    kernels: Counter[str] = Counter()
    for line in plane.lines:
        if line.name.startswith("Stream"):
            for event in line.events:
                is_exchange = _EXCHANGE.search(event.name) is not None
                spans[is_exchange].append((event.start_ns, event.start_ns + event.duration_ns))
                kernels[event.name] += event.duration_ns
    everything = union([*spans[False], *spans[True]])
    times = shares(spans[False], spans[True])
    times["span"] = everything[-1][1] - everything[0][0]
    ms = {name: ns / _TRACED / 1e6 for name, ns in times.items()}
    return {**ms, "kernels": {k: ns / _TRACED / 1e6 for k, ns in kernels.most_common(60)}}


def table(results: dict[str, dict | None]) -> Iterator[str]:
    """Lines that compare the meshes; "moved": choices of experts that are not those of the first,
    in the first step."""
    names = "ms/step", "tokens/s", "exchange", "exposed", "idle", "peak GB", "moved"
    yield f"{'mesh':>16}" + "".join(f"{name:>10}" for name in names) + "  loss, gradient norm"
    first = next(iter(results.values()))
    for mesh, result in results.items():
        if result is None:
            yield f"{mesh:>16}  failed"
            continue
        ms, trace = statistics.median(result["ms"]), result.get("trace")
        cells = [f"{ms:.1f}", f"{result['tokens'] / ms * 1e3:.0f}"]
        times = trace and (trace["exchange"], trace["exposed"], trace["span"] - trace["busy"])
        cells += [f"{t:.1f} ms" for t in times] if times else ["-"] * 3
        cells.append(f"{result['peak_gb']:.1f}")
        cells.append("-" if first is None else f"{moved(result, first):.2%}")
        losses = "; ".join(f"{r['loss']:.5f}, {r['grad_norm']:.4f}" for r in result["steps"][:3])
        yield f"{mesh:>16}" + "".join(f"{cell:>10}" for cell in cells) + f"  {losses}"


def moved(result: dict, first: dict) -> float:
    """Share of the choices that are other experts', at least: from the loads of the first step."""
    import numpy as np

    a, b = np.array(result["first_load"]), np.array(first["first_load"])
    return float(np.abs(a - b).sum() / 2 / b.sum())


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", action="append", required=True, help="one, expert=2, ...")
    parser.add_argument("--sequences", type=int, default=1, help="of a device in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=600, help="seconds for one mesh")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile at once"
    )
    parser.add_argument("--profile", type=Path, help="keep the traces and programs here")
    parser.add_argument("--json", type=Path)
    args, rest = parser.parse_known_args(argv)
    config = parse_config(rest)
    configs = [on_mesh(config, mesh, args.sequences) for mesh in args.mesh]
    # What is compiled beside others must leave them room.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as scratch:
        place = args.profile or Path(scratch)
        tasks = [(each, args, place / mesh) for each, mesh in zip(configs, args.mesh, strict=True)]
        results: dict[str, dict | None] = {}
        turns = take_turns(measure, tasks, args.processes)
        for mesh, (early, late) in zip(args.mesh, turns, strict=True):
            if early is not None and args.profile:
                (place / mesh).mkdir(parents=True, exist_ok=True)
                (place / mesh / "step.hlo").write_text(early.pop("text"))
            results[mesh] = late
            took = "failed" if early is None else f"compiled in {early['compiled_s']:.1f} s"
            print(f"{mesh}: {took}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    return 1 if None in results.values() else 0


if __name__ == "__main__":
    run(main)
