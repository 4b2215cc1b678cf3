"""MLA's causal attention (heads of 192 and 128) beside what torch gives, on one GPU.

    python scripts/benchmark_attention.py [--cases 1x4096x128,4x4096x16] [--portable] [--json FILE]

A case is sequences x positions x heads, bfloat16. "forward" and "both" (forward and the gradients
of q, k and v) run in one process on the same data, in a new order every round; figures are medians.
TFLOP/s count what a causal mask leaves, 3.5 times as much for both. `error` is the largest relative
L2 distance of the result and the three gradients, of one head, from float32. `--portable` adds the
plain JAX of other platforms.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_kernels as base  # pyrefly: ignore[missing-import]
import jax
import numpy as np
import torch

from pallas_kernels import causal_attention

QUERY, VALUE = 192, 128  # widths of a head
SCALE = QUERY**-0.5


def operands(case: tuple[int, int, int]) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result, [B, T, N, 192 or 128]."""
    torch.manual_seed(0)
    widths = (QUERY, QUERY, VALUE, VALUE)
    return [torch.randn(*case, width, device="cuda", dtype=torch.bfloat16) for width in widths]


def ours(implementation: str, tensors: list[torch.Tensor]) -> dict[str, Callable]:
    q, k, v, dout = map(jax.dlpack.from_dlpack, tensors)
    attend = functools.partial(causal_attention, scale=SCALE, implementation=implementation)

    @jax.jit
    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    forward = jax.jit(attend)
    return {"forward": lambda: forward(q, k, v), "both": lambda: both(q, k, v, dout)[::-1]}


def in_torch(tensors: list[torch.Tensor]) -> dict[str, Callable]:
    """scaled_dot_product_attention with the same arrays, by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = (tensor.transpose(1, 2).detach() for tensor in tensors)
    inputs = (q, k, v)

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=SCALE
            )

    def both() -> tuple[torch.Tensor, ...]:
        for tensor in inputs:
            tensor.requires_grad_().grad = None
        with torch.enable_grad():
            out = forward()
            gradients = torch.autograd.grad(out, inputs, dout)
        for tensor in inputs:
            tensor.requires_grad_(False)
        return tuple(t.transpose(1, 2) for t in (*gradients[::-1], out.detach()))

    return {"forward": forward, "both": both}


def error(results: Any, tensors: list[torch.Tensor]) -> float:
    """Of the first sequence's last head: [dv, dk, dq, out] against float32."""
    got = [
        torch.from_dlpack(jax.block_until_ready(r)) if isinstance(r, jax.Array) else r
        for r in results
    ]
    q, k, v, dout = (t[0, :, -1].float().requires_grad_() for t in tensors)
    scores = (q @ k.T) * SCALE
    seen = torch.ones_like(scores, dtype=torch.bool).tril()
    out = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
    want = (*torch.autograd.grad(out, (v, k, q), dout.detach()), out)
    distances = [
        float((mine[0, :, -1].float() - exact).norm() / exact.norm())
        for mine, exact in zip(got, want, strict=True)
    ]
    return max(distances) if np.isfinite(distances).all() else float("inf")


def measure(case: tuple[int, int, int], rounds: int, portable: bool) -> list[dict]:
    """One record for each implementation and direction."""
    tensors = operands(case)
    sides = {"ours": ours("cudnn", tensors), "torch": in_torch(tensors)}
    if portable:
        sides["portable"] = ours("portable", tensors)
    runs = {(name, way): run for name, ways in sides.items() for way, run in ways.items()}
    errors = {name: error(ways["both"](), tensors) for name, ways in sides.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    keys, shuffle = list(runs), np.random.default_rng(0).permutation
    for key in keys:
        base.seconds(runs[key], 1)
    for _ in range(rounds):
        for i in shuffle(len(keys)):
            times[keys[i]].append(base.seconds(runs[keys[i]], 3))
    batch, length, heads = case
    flops = batch * heads * length**2 * (QUERY + VALUE)

    def record(name: str, way: str) -> dict:
        seconds = statistics.median(times[name, way])
        rate = (3.5 if way == "both" else 1) * flops / seconds / 1e12
        shape = "x".join(map(str, case))
        return {"case": shape, "name": name, "operation": way, "ms": 1e3 * seconds,
                "tflops": rate, "error": errors[name]}  # fmt: skip

    return [record(*key) for key in keys]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="1x4096x128,4x4096x16,1x16384x32,2x1000x5")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print(f"{torch.cuda.get_device_name()}, jax {jax.__version__}, torch {torch.__version__}")
    print(f"{'case':14}{'':14}{'':10}{'ms':>9}{'TFLOP/s':>9}{'error':>10}", flush=True)
    records = []
    for text in options.cases.split(","):
        batch, length, heads = map(int, text.split("x"))
        for r in measure((batch, length, heads), options.rounds, options.portable):
            records.append(r)
            print(f"{r['case']:14}{r['name']:14}{r['operation']:10}{r['ms']:9.3f}"
                  f"{r['tflops']:9.1f}{r['error']:10.1e}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
