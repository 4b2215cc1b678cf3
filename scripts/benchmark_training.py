"""Training throughput beside transformers: same network, weights, batch, machine and run.

    python scripts/benchmark_training.py configs/tiny.py [--replicas 2] [--rounds 5] [--json FILE]

Both sides take whole optimizer steps (forward, backward, clipping, AdamW) in float32 without MTP,
which transformers cannot train; ours also updates the expert biases. The sides take turns, so
that a drift of the machine meets both. Transformers runs once with each of its expert
implementations. `--replicas N` shares our batch out over N devices, on a CPU over N of its cores.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import to_hf_state_dict
from dsv3_jax.cli import load_config, run
from dsv3_jax.config import ParallelConfig, TrainConfig
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.placement import batch_sharding, mesh_for, state_shardings
from dsv3_jax.training.loop import keep_freed_memory
from dsv3_jax.training.step import TrainState, init_state, make_train_step

_PEER_EXPERTS = ("eager", "grouped_mm")


def _ours(config: TrainConfig, model: Transformer, state: TrainState, tokens: np.ndarray):
    """A function that takes one step and returns its loss."""
    mesh, placed, batch = mesh_for(config.parallel), None, {"tokens": tokens[None]}
    if mesh is not None:
        shardings = state_shardings(mesh, state)
        state = jax.device_put(state, shardings)
        batch = jax.device_put(batch, batch_sharding(mesh, config.batch.microbatch_size))
        placed = shardings, NamedSharding(mesh, PartitionSpec())
        jax.set_mesh(mesh)
    step = jax.jit(make_train_step(model, config), donate_argnums=0, out_shardings=placed)
    held = [state]

    def take() -> float:
        held[0], metrics = step(held[0], batch)
        return float(metrics.loss)

    return take


def _transformers(config: TrainConfig, weights: dict, tokens: np.ndarray, experts: str):
    """The same for transformers' DeepseekV3ForCausalLM with one expert implementation."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    hf_config = DeepseekV3Config(**config.model.to_hf())
    hf_config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(hf_config).float()
    folded = _stack_experts(weights, config)
    missing, unexpected = model.load_state_dict(folded, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"weights do not fit transformers: {missing=} {unexpected=}")
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.peak_lr / o.warmup_steps, betas=(o.beta1, o.beta2),
        weight_decay=o.weight_decay, fused=True,
    )  # fmt: skip
    inputs, targets = (torch.tensor(t, dtype=torch.long) for t in (tokens[:, :-1], tokens[:, 1:]))

    def take() -> float:
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        return loss.item()

    return take


def _stack_experts(weights: dict, config: TrainConfig) -> dict:
    """Released tensor names -> transformers' in-memory names, which stack a layer's experts."""
    import torch

    tensors = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()}
    for layer in range(config.model.num_dense_layers, config.model.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts: dict[str, list] = {"gate_proj": [], "up_proj": [], "down_proj": []}
        for expert in range(config.model.n_routed_experts):
            for name, stack in parts.items():
                stack.append(tensors.pop(f"{prefix}.{expert}.{name}.weight"))
        gate, up, down = (torch.stack(stack) for stack in parts.values())
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{prefix}.down_proj"] = down
    return tensors


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    keep_freed_memory()  # as training does; it serves both sides
    jax.config.update("jax_num_cpu_devices", args.replicas)
    config = load_config(args.config)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_nextn_predict_layers=0),
        runtime=dataclasses.replace(config.runtime, compute_dtype="float32"),
        parallel=ParallelConfig(replica=args.replicas),
        loss=dataclasses.replace(config.loss, balance_weight=0.0),
    )
    model = Transformer(config.model, config.runtime)
    state = jax.jit(init_state, static_argnums=(0, 1))(model, config)
    shape = (config.batch.microbatch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    variables = {"params": state.params, "router_state": state.router_state}
    weights = to_hf_state_dict(config.model, variables)
    sides = {"dsv3_jax": _ours(config, model, state, tokens)}
    for experts in _PEER_EXPERTS:
        sides[f"transformers {experts}"] = _transformers(config, weights, tokens, experts)

    losses = {name: take() for name, take in sides.items()}  # also compiles and warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, take in sides.items():
            start = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - start)
    step_tokens = shape[0] * (shape[1] - 1)
    rows = {
        name: {"ms": 1e3 * statistics.median(s), "tokens_per_s": step_tokens / statistics.median(s),
               "first_loss": losses[name]}
        for name, s in seconds.items()
    }  # fmt: skip
    best = max(row["tokens_per_s"] for name, row in rows.items() if name != "dsv3_jax")
    print(f"{'':26}{'ms/step':>9}{'tokens/s':>10}{'first loss':>12}")
    for name, row in rows.items():
        print(f"{name:26}{row['ms']:9.1f}{row['tokens_per_s']:10.0f}{row['first_loss']:12.5f}")
    print(f"dsv3_jax / best transformers: {rows['dsv3_jax']['tokens_per_s'] / best:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
