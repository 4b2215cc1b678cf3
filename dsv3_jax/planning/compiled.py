"""The real train step, compiled ahead of time for a TPU slice that need not be there."""

import dataclasses
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, TrainConfig
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.placement import batch_sharding
from dsv3_jax.planning import hlo
from dsv3_jax.planning.chips import Topology
from dsv3_jax.planning.memory import abstract_state
from dsv3_jax.training.step import compiler_options, jit_train_step

# The compiler's words for too little memory: all of a program, or its temporaries alone.
_COMPLAINTS = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program.

    arguments, outputs, aliased, temporaries, code: bytes in device memory; outputs that reuse an
    argument's memory are aliased. needed: their sum, or what the compiler says it would take where
    that is more than `limit`, the memory it has; then the rest is 0 and `collectives` is empty.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    needed: int
    limit: int | None
    collectives: tuple[hlo.Collective, ...]
    kernels: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.limit is None


def tpu_devices(topology: Topology) -> list:
    """The described devices of a slice.

    Raises:
      ConfigError: libtpu is not installed, or does not offer this slice.
    """
    settings = {
        # Else libtpu asks a cloud for metadata, and prints what it could not find out.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.devices}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Nobody here has a chip to be alone with.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401  # pyrefly: ignore[missing-import]
    except ImportError:
        raise ConfigError(
            "libtpu is not installed: pip install 'jax[tpu]', or plan with --memory-only"
        ) from None
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"--topology {topology.name!r} is not one of libtpu's: {line}") from None
    return list(described.devices)


def _arguments(config: TrainConfig, mesh: Mesh) -> tuple:
    """Shapes of the state and of the largest batch of the run, placed on the mesh."""
    batch = config.batch
    tokens = (
        batch.size // batch.microbatch_size,
        batch.microbatch_size,
        config.data.sequence_length + 1,
    )
    placed = jax.ShapeDtypeStruct(
        tokens, jnp.int32, sharding=batch_sharding(mesh, batch.microbatch_size)
    )
    return abstract_state(config, mesh), {"tokens": placed}


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step of the largest batch, as `training/loop.py` lowers it."""
    state, batch = _arguments(config, mesh)
    step = jit_train_step(Transformer(config.model, config.runtime), config, state, mesh)
    with jax.set_mesh(mesh):
        return step.lower(state, batch)


def over_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there) of the compiler's complaint; None for another one."""
    for pattern in _COMPLAINTS:
        if match := re.search(pattern, message):
            needed, there = (round(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
            return needed, there
    return None


def compile_step(config: TrainConfig, topology: Topology) -> Compiled:
    """Compiles the train step of `config` for a slice; a program that does not fit is a result.

    Raises:
      ConfigError: no compiler for this topology, or a mesh that does not fit devices or network.
    """
    mesh = make_mesh(config.parallel, tpu_devices(topology))
    start = time.monotonic()
    lowered = lower_step(config, mesh)
    try:
        with jax.set_mesh(mesh):
            program = lowered.compile(compiler_options=compiler_options(mesh))
    except jax.errors.JaxRuntimeError as error:
        over = over_memory(str(error))
        if over is None:
            raise
        seconds = time.monotonic() - start
        return Compiled(0, 0, 0, 0, 0, over[0], over[1], (), 0, seconds)
    seconds = time.monotonic() - start
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None  # libtpu gives both
    parts = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    arguments, outputs, aliased, temporaries, code = parts
    return Compiled(
        *parts,
        needed=arguments + outputs - aliased + temporaries + code,
        limit=None,
        collectives=tuple(hlo.collectives(text, dict(mesh.shape))),
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        seconds=seconds,
    )
