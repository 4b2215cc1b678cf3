"""Where whole pytrees lie on a mesh: train states by the rules of their parameters, and batches."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, ParallelConfig, TrainConfig
from dsv3_jax.parallel.mesh import ACTIVATION_AXES, make_mesh
from dsv3_jax.parallel.rules import parameter_spec


def mesh_for(parallel: ParallelConfig) -> Mesh | None:
    """The mesh that a run asks for; None for one device."""
    return None if parallel.is_one_device else make_mesh(parallel)


def require_fit(mesh: Mesh | AbstractMesh, config: TrainConfig) -> None:
    """Checks that the mesh divides what its axes share out, and that its devices can exchange it.

    Raises:
      ConfigError: an axis does not divide it; the message names both. Or rows of varying number
        would have to travel between GPUs of several processes, which XLA refuses.
    """
    shared_out = [
        ("context", "data", "sequence_length"),
        ("tensor", "model", "num_attention_heads"),
    ]
    if config.model.num_dense_layers:
        shared_out.append(("tensor", "model", "intermediate_size"))
    if config.model.num_moe_layers or config.model.num_nextn_predict_layers:
        shared_out.append(("tensor", "model", "moe_intermediate_size"))
        shared_out.append(("expert", "model", "n_routed_experts"))
    for axis, section, name in shared_out:
        value = getattr(getattr(config, section), name)
        if value % mesh.shape[axis]:
            raise ConfigError(
                f"parallel.{axis}={mesh.shape[axis]} must divide {section}.{name}={value}"
            )
    batch_sharding(mesh, config.batch.microbatch_size)
    if config.runtime.expert_exchange == "ragged" and _leaves_a_gpu_process(mesh):
        raise ConfigError(
            f"expert_exchange='ragged' needs parallel.expert={mesh.shape['expert']} within one "
            "process on GPUs: 'slots' does not (runtime.expert_exchange)"
        )


def _leaves_a_gpu_process(mesh: Mesh | AbstractMesh) -> bool:
    """Whether the expert axis joins GPUs of several processes."""
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "gpu":
        return False
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return bool((np.ptp(processes, axis=mesh.axis_names.index("expert")) > 0).any())


def state_shardings(mesh: Mesh | AbstractMesh, abstract: Any) -> Any:
    """A sharding for every leaf of a train state, or of {"params", "router_state"}.

    Parameters follow the rules; optimizer moments have their parameter's names and lie with it;
    counters and expert biases are on every device.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        names = tuple(name for name in names if name not in ("params", "router_state"))
        spec = parameter_spec(mesh.shape, names, leaf.shape) if names else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract)


def batch_sharding(mesh: Mesh | AbstractMesh, microbatch: int) -> NamedSharding:
    """Of tokens int32 [A, B, T + 1]: sequences shared out, microbatches one after the other.

    Raises:
      ConfigError: the axes that share sequences out do not divide B.
    """
    axes = ACTIVATION_AXES["batch"]
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if microbatch % ways:
        raise ConfigError(
            f"batch.microbatch_size={microbatch} must be a multiple of {ways}, the devices that "
            f"share sequences out ({' x '.join(f'{axis} {mesh.shape[axis]}' for axis in axes)})"
        )
    return NamedSharding(mesh, PartitionSpec(None, axes))
