"""One configuration on one cluster: does it fit, and what bounds its speed."""

import dataclasses

from dsv3_jax.config import ConfigError, TrainConfig
from dsv3_jax.parallel.mesh import mesh_sizes
from dsv3_jax.planning.chips import Topology
from dsv3_jax.planning.compiled import Compiled, compile_step
from dsv3_jax.planning.hlo import Collective
from dsv3_jax.planning.memory import Memory, estimate
from dsv3_jax.planning.roofline import Roofline, roofline
from dsv3_jax.planning.traffic import estimate_collectives

# Compiled programs need up to this many times the modelled temporaries (docs/scaling.md), and the
# runtime keeps some memory for itself: a plan from shapes must leave room for both.
_MOST_OVER_MODEL = 1.3
_USABLE = 0.97


@dataclasses.dataclass(frozen=True)
class Plan:
    """One configuration on one cluster.

    compiled: None where nothing was compiled; `collectives` are then the model's.
    """

    config: TrainConfig
    topology: Topology
    sizes: dict[str, int]
    memory: Memory
    collectives: tuple[Collective, ...]
    bound: Roofline
    compiled: Compiled | None

    @property
    def fits(self) -> bool:
        if self.compiled is not None:
            return self.compiled.fits
        needed = self.memory.arguments + _MOST_OVER_MODEL * self.memory.temporaries
        return needed <= _USABLE * self.topology.chip.hbm


def make_plan(config: TrainConfig, topology: Topology, *, compile: bool) -> Plan:
    """Plans the largest step of a run.

    Args:
      config: the run; `parallel` must multiply to the devices of the topology.
      topology: where it would run.
      compile: compile the train step (TPUs only); otherwise everything is from shapes.

    Raises:
      ConfigError: sizes that do not fit together, or no compiler for this topology.
    """
    if compile and not topology.chip.is_tpu:
        raise ConfigError(
            f"{topology.name} cannot be compiled for ahead of time: plan with --memory-only"
        )
    if config.runtime.expert_exchange is None:
        way = "ragged" if topology.chip.is_tpu else "slots"  # as `way_of_devices` picks
        runtime = dataclasses.replace(config.runtime, expert_exchange=way)
        config = dataclasses.replace(config, runtime=runtime)
    sizes = mesh_sizes(config.parallel, topology.devices)
    memory = estimate(config, sizes, scores=not topology.chip.is_tpu)
    collectives = estimate_collectives(config, sizes)
    compiled = compile_step(config, topology) if compile else None
    if compiled is not None and compiled.fits:
        collectives = list(compiled.collectives)
    bound = roofline(config, sizes, topology, memory, collectives)
    return Plan(config, topology, sizes, memory, tuple(collectives), bound, compiled)
