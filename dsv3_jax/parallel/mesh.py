"""The device mesh, and where activations lie on it.

Model code names what an axis of an array means ("batch", "heads"); the table here says which axes
of the mesh hold it. Without a mesh (`jax.set_mesh`) everything here does nothing, so the model
reads, and runs, as for one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.config import ConfigError, ParallelConfig

AXES = ("replica", "fsdp", "expert", "tensor", "context")

# Logical axis of an activation -> axes of the mesh that share it out, in this order. The expert
# axis carries batch too: outside the routed experts its devices hold different sequences.
ACTIVATION_AXES = {
    "batch": ("replica", "fsdp", "expert"),
    "sequence": ("context",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
}


def mesh_sizes(parallel: ParallelConfig, devices: int) -> dict[str, int]:
    """Size of every axis on so many devices; -1 becomes as many as are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        said = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in AXES)
        raise ConfigError(f"{said} must multiply to the {devices} devices (ParallelConfig)")
    return sizes


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all `devices` (None: every device of every process).

    One size may be -1: as many as are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(mesh_sizes(parallel, len(devices)).values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def axis_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes; all 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return {axis: shape.get(axis, 1) for axis in AXES}


def mesh_axes(logical: str | None, size: int) -> tuple[str, ...]:
    """Axes of the current mesh that share out a dimension of `size`.

    Where they do not divide it, the last ones are left out: their devices hold copies.
    """
    sizes = axis_sizes()
    axes = [axis for axis in ACTIVATION_AXES.get(logical or "", ()) if sizes[axis] > 1]
    while axes and size % math.prod(sizes[axis] for axis in axes):
        axes.pop()
    return tuple(axes)


def activation_spec(shape: Sequence[int], logical: Sequence[str | None]) -> PartitionSpec:
    """Where an activation of `shape` lies, given the meaning of each of its dimensions."""
    return PartitionSpec(
        *(mesh_axes(name, size) or None for name, size in zip(logical, shape, strict=True))
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x`, laid out on the current mesh by the meaning of its dimensions."""
    if max(axis_sizes().values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, logical))


def per_token(function: Callable[..., Any], tokens: jax.Array, *shared: jax.Array) -> Any:
    """`function(tokens, *shared)`, each device computing its own tokens.

    For operations that XLA would gather the tokens of all devices for, such as top-k.

    Args:
      function: treats every [b, t] of `tokens` alike; returns arrays [B, T, ...].
      tokens: [B, T, ...].
      shared: arrays that every token needs; every device holds them whole.
    """
    if max(axis_sizes().values()) == 1:
        return function(tokens, *shared)
    spec = activation_spec(tokens.shape[:2], ("batch", "sequence"))
    return jax.shard_map(
        function,
        in_specs=(spec, *(PartitionSpec(),) * len(shared)),
        out_specs=spec,
        check_vma=False,
    )(tokens, *shared)


def per_head(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`, each device computing its own sequences and heads.

    For kernels, which XLA cannot divide among devices by itself. Positions stay whole.

    Args:
      function: treats every batch entry and head alike; [B, T, N, X] each -> [B, T, N, X].
      arrays: [B, T, N, X], with any X.
    """
    if max(axis_sizes().values()) == 1:
        return function(*arrays)
    spec = activation_spec(arrays[0].shape, ("batch", None, "heads", None))
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(
        *arrays
    )
