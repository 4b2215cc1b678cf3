"""Where whole pytrees lie on a mesh: train states by the rules of their parameters, and batches."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, ParallelConfig
from dsv3_jax.parallel.mesh import ACTIVATION_AXES, make_mesh
from dsv3_jax.parallel.rules import parameter_spec


def mesh_for(parallel: ParallelConfig) -> Mesh | None:
    """The mesh that a run asks for; None for one device."""
    return None if parallel.is_one_device else make_mesh(parallel)


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
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


def batch_sharding(mesh: Mesh, microbatch: int) -> NamedSharding:
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
