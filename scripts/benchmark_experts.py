"""The whole routed-expert layer, forward and backward, beside its matmuls alone and transformers.

    python scripts/benchmark_experts.py [--tokens 4096] [--experts 32] [--hidden 7168] [--json FILE]

The layer is route -> permute -> gate and up -> SwiGLU -> down -> combine, with gradients by the
tokens and by every weight, in bfloat16. The defaults are one device's share of DeepSeek-V3: 32 of
its experts and 32,768 rows. "matmuls" are the same six grouped products (two forward, two by the
rows, two by the weights) on the same group sizes and nothing else. Sides take turns.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.cli import OneLineParser, run
from dsv3_jax.config import ModelConfig, RuntimeConfig
from dsv3_jax.model.moe import MoE
from pallas_kernels import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of every side. x, dout: bfloat16 [1, M, D]."""

    config: ModelConfig
    x: jax.Array
    dout: jax.Array
    variables: dict


def make_case(args: argparse.Namespace) -> Case:
    config = ModelConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.width,
        n_routed_experts=args.experts,
        num_experts_per_tok=args.choices,
        n_shared_experts=0,
        n_group=args.groups,
        topk_group=max(args.groups // 2, 1),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    x, dout = (jax.random.normal(k, (1, args.tokens, args.hidden), jnp.bfloat16) for k in keys[:2])
    layer = MoE(config, RuntimeConfig(grouped_matmul=args.implementation))
    variables = jax.jit(layer.init)(keys[2], x[:, :8])
    variables["params"]["experts"] = jax.tree.map(
        lambda w: w.astype(jnp.bfloat16), variables["params"]["experts"]
    )
    return Case(config, x, dout, variables)


def ours(case: Case, implementation: str | None) -> tuple[Callable, jax.Array]:
    """(a function that takes one pass, int32 [E] rows of each expert)."""
    layer = MoE(case.config, RuntimeConfig(grouped_matmul=implementation))
    state = {"router_state": case.variables["router_state"]}

    @jax.jit
    def both_ways(params, x, dout):
        def forward(params, x):
            out, stats = layer.apply({"params": params, **state}, x)
            return out, stats.load

        out, pull, load = jax.vjp(forward, params, x, has_aux=True)
        return out, pull(dout), load

    take = functools.partial(both_ways, case.variables["params"], case.x, case.dout)
    return take, take()[2]


def matmuls(case: Case, load: jax.Array, implementation: str | None) -> Callable:
    """The six grouped products of a pass, on rows that are already sorted."""
    rows = case.x.shape[1] * case.config.num_experts_per_tok
    width, hidden = case.config.moe_intermediate_size, case.config.hidden_size
    experts = case.variables["params"]["experts"]
    gate_up = experts["gate_up_proj"].reshape(-1, hidden, 2 * width)
    keys = jax.random.split(jax.random.key(1), 2)
    x, h = (
        jax.random.normal(k, (rows, n), jnp.bfloat16)
        for k, n in zip(keys, (hidden, width), strict=True)
    )

    @jax.jit
    def both_ways(x, h, gate_up, down):
        multiply = functools.partial(
            grouped_matmul, group_sizes=load, implementation=implementation
        )
        first, pull_first = jax.vjp(multiply, x, gate_up)
        second, pull_second = jax.vjp(multiply, h, down)
        return pull_first(first), pull_second(second)

    return functools.partial(both_ways, x, h, gate_up, experts["down_proj"])


def transformers_layer(case: Case) -> Callable | None:
    """transformers' DeepseekV3MoE with grouped_mm experts, on the GPU if torch sees one."""
    try:
        import torch
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3
    except ImportError:
        return None

    class Nothing(torch.nn.Module):
        """Stands for shared experts that add nothing."""

        def forward(self, x):
            return torch.zeros((), dtype=x.dtype, device=x.device)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw: dict[str, Any] = {**case.config.to_hf(), "n_shared_experts": 1}
    config = DeepseekV3Config(**raw)
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        layer = modeling_deepseek_v3.DeepseekV3MoE(config).to(torch.bfloat16)
    layer.add_module("shared_experts", Nothing())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=case.config.initializer_range)
    shape = case.x.shape
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def take() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(dout)
        if device == "cuda":
            torch.cuda.synchronize()

    return take


def measure(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, taken in turns after two passes to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, take in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(take())
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("experts", 32), ("hidden", 7168), ("width", 2048),
                          ("choices", 8), ("groups", 8), ("rounds", 15)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--implementation", help="of grouped_matmul; the platform's choice if absent"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    case = make_case(args)
    layer, load = ours(case, args.implementation)
    sides = {"layer": layer, "matmuls": matmuls(case, load, args.implementation)}
    if (peer := transformers_layer(case)) is not None:
        sides["transformers"] = peer
    ms = measure(sides, args.rounds)
    flops = 18 * args.tokens * args.choices * args.hidden * args.width
    sizes = np.asarray(load)
    print(
        f"{args.tokens} tokens x {args.choices}, {args.experts} experts of {sizes.min()} to "
        f"{sizes.max()} rows, {args.hidden} x {args.width}, {jax.devices()[0].device_kind}"
    )
    for name, value in ms.items():
        print(f"{name:14}{value:10.3f} ms{flops / value / 1e9:10.1f} TFLOP/s")
    print(f"matmuls / layer: {ms['matmuls'] / ms['layer']:.2f}")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": None, "ms": ms}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
