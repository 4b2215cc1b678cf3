"""Meshes and remat policies that fit a cluster, the fastest bound first."""

import dataclasses
import math
from collections.abc import Iterator

from dsv3_jax.config import ConfigError, ParallelConfig, TrainConfig
from dsv3_jax.planning.chips import Topology
from dsv3_jax.planning.plan import Plan, make_plan

_POLICIES = ("none", "dots", "attention", "full")
_MOST_SEQUENCES = 4  # of a device in one microbatch


def _divisors(size: int) -> Iterator[int]:
    return (part for part in range(1, size + 1) if size % part == 0)


def _meshes(config: TrainConfig, devices: int) -> Iterator[ParallelConfig]:
    """fsdp x expert x tensor; one slice has no replicas, and a context axis is for long runs."""
    model, given = config.model, config.parallel
    for expert in _divisors(math.gcd(devices, model.n_routed_experts)):
        rest = devices // expert
        tensors = math.gcd(model.num_attention_heads, model.moe_intermediate_size)
        for tensor in _divisors(math.gcd(rest, math.gcd(tensors, 8))):
            if rest % (tensor * given.context) == 0:
                yield ParallelConfig(
                    fsdp=rest // tensor // given.context,
                    expert=expert,
                    tensor=tensor,
                    context=given.context,
                )


def candidates(config: TrainConfig, devices: int) -> Iterator[TrainConfig]:
    """The run on every mesh, with every policy and microbatch that its rules allow."""
    batch = config.batch
    for parallel in _meshes(config, devices):
        ways = parallel.fsdp * parallel.expert
        for sequences in range(1, _MOST_SEQUENCES + 1):
            try:
                changed = dataclasses.replace(batch, microbatch_size=ways * sequences)
            except ConfigError:
                continue  # does not divide the batch or its ramp
            for policy in _POLICIES:
                runtime = dataclasses.replace(config.runtime, remat_policy=policy)
                yield dataclasses.replace(config, parallel=parallel, batch=changed, runtime=runtime)


def search(config: TrainConfig, topology: Topology) -> list[Plan]:
    """Every plan from shapes that fits, by the time of a step with communication exposed.

    Raises:
      ConfigError: no mesh at all fits the devices, the batch and the network.
    """
    plans = [
        make_plan(candidate, topology, compile=False)
        for candidate in candidates(config, topology.devices)
    ]
    if not plans:
        raise ConfigError(
            f"no mesh of {topology.devices} devices divides batch.size={config.batch.size} and "
            f"batch.initial_size={config.batch.initial_size}"
        )
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.bound.exposed)
