"""Hot experts on several devices, for inference (report section 3.4, EPLB).

Experts differ in load, and the busiest device sets the pace. From measured loads,
`place_experts` decides which experts get further copies and where every copy lies;
`with_redundant_experts` lays the variables of a network out accordingly. The gate still chooses
among the E experts of the model; each token goes to one of the copies of every expert it chose, by
its position, so that outputs and loads are those of the network without copies.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.rules import parameter_spec


class Placement(NamedTuple):
    """Which expert lies in each slot of the devices, for one layer.

    expert: int32 [S], device d has the d-th run of S / devices slots.
    load: float64 [devices], what each device gets of the measured load when the copies of an
      expert share its tokens equally.
    """

    expert: np.ndarray
    load: np.ndarray


def place_experts(
    load: np.ndarray, devices: int, slots: int, *, n_group: int = 1, nodes: int = 1
) -> Placement:
    """Copies the busiest experts into spare slots and packs all onto devices, evenly by load.

    Args:
      load: tokens that each expert received, [E].
      devices: of the expert axis. slots: experts that each of them can hold.
      n_group: groups of experts, of the model's node-limited routing.
      nodes: runs of devices with fast links among them. Where they divide the groups, all experts
        of a group stay within one node, so that a token still reaches `topk_group` nodes at most.

    Raises:
      ConfigError: fewer slots than experts, or nodes that do not divide devices or groups.
    """
    load = np.asarray(load, np.float64)
    if devices * slots < load.size:
        raise ConfigError(
            f"slots={slots} on devices={devices} must hold all {load.size} experts (place_experts)"
        )
    for name, value in (("devices", devices), ("n_group", n_group)):
        if value % nodes:
            raise ConfigError(f"nodes={nodes} must divide {name}={value} (place_experts)")
    per_node = devices // nodes
    groups = np.arange(load.size).reshape(n_group, -1)
    node_of_group = _pack(load[groups].sum(1), np.arange(n_group), nodes, n_group // nodes)
    expert, loads = [], []
    for members in node_of_group:
        here = groups[members].reshape(-1)
        copies = _copies(load[here], per_node * slots)
        share = np.repeat(load[here] / copies, copies)
        packed = _pack(share, np.repeat(here, copies), per_node, slots)
        expert += [np.repeat(here, copies)[chosen] for chosen in packed]
        loads += [share[chosen].sum() for chosen in packed]
    return Placement(np.concatenate(expert).astype(np.int32), np.array(loads))


def _copies(load: np.ndarray, slots: int) -> np.ndarray:
    """Copies of each expert, `slots` in all: each further one to the highest load a copy."""
    copies = np.ones(load.size, np.int64)
    for _ in range(slots - load.size):
        copies[np.argmax(load / copies)] += 1
    return copies


def _pack(load: np.ndarray, kind: np.ndarray, bins: int, size: int) -> list[list[int]]:
    """Items into `bins` of exactly `size`, the heaviest first, each into the lightest with room.

    Bins without an item of the same `kind` come first: two copies of an expert on one device
    would help nobody.
    """
    packed: list[list[int]] = [[] for _ in range(bins)]
    weight = np.zeros(bins)
    for item in np.argsort(-load, kind="stable"):
        free = [b for b in range(bins) if len(packed[b]) < size]
        best = min(free, key=lambda b: (kind[item] in kind[packed[b]], weight[b], b))
        packed[best].append(int(item))
        weight[best] += load[item]
    return packed


def with_redundant_experts(
    variables: Mapping[str, Any], placements: Mapping[str, Any], mesh: Mesh | None = None
) -> dict:
    """`variables` with the experts' weights copied into their slots.

    The result goes to `model.apply` as any variables do, on one device or on a mesh whose expert
    axis divides the slots. It is for inference: gradients would take copies for experts.

    Args:
      variables: {"params", "router_state", ...} of a `Transformer`.
      placements: by module, "moe_layers" (a `Placement` for each layer) and "mtp_0", ... (one).
      mesh: where the copies are to lie; None leaves it to JAX.
    """
    result = dict(variables, placement={})
    for name, placed in placements.items():
        stacked = name == "moe_layers"
        expert = np.stack([p.expert for p in placed]) if stacked else placed.expert
        table = {"mlp": {"experts": jax.tree.map(jnp.asarray, _table(expert))}}
        result["placement"][name] = table if stacked else {"layer": table}
        for collection in {"params", "scales"} & variables.keys():
            tree = result[collection]
            result[collection] = {**tree, name: _spread(name, tree[name], expert, mesh)}
    return result


def _spread(name: str, tree: Mapping[str, Any], expert: np.ndarray, mesh: Mesh | None) -> dict:
    """The module's variables, the axis E of routed experts by slot."""

    def spread(path: tuple, leaf: jax.Array) -> jax.Array:
        names = (name, *(key.key for key in path))
        if "experts" not in names:
            return leaf
        take = functools.partial(jnp.take, axis=0)
        take = jax.vmap(take) if expert.ndim == 2 else take  # a placement for each layer
        shape = (*expert.shape, *leaf.shape[expert.ndim :])
        placed = mesh and NamedSharding(mesh, parameter_spec(mesh.shape, names, shape))
        return jax.jit(take, out_shardings=placed)(leaf, jnp.asarray(expert))

    return jax.tree_util.tree_map_with_path(spread, tree)


def _table(expert: np.ndarray) -> dict[str, np.ndarray]:
    """expert int32 [..., S] in each slot; copies int32 [..., E] of each expert, and their slots
    int32 [..., E, most copies]."""
    rows = expert.reshape(-1, expert.shape[-1])
    copies = np.stack([np.bincount(row, minlength=rows.max() + 1) for row in rows])
    slots = np.zeros((*copies.shape, copies.max()), np.int32)
    for layer, row in enumerate(rows):
        for e, count in enumerate(copies[layer]):
            slots[layer, e, :count] = np.flatnonzero(row == e)
    leading = expert.shape[:-1]
    return {
        "expert": expert,
        "copies": copies.astype(np.int32).reshape(*leading, -1),
        "slots": slots.reshape(*leading, *slots.shape[1:]),
    }


def choose_copies(topk_idx: jax.Array, copies: jax.Array, slots: jax.Array) -> jax.Array:
    """The slot of each choice: the copies of an expert take positions in turn.

    Args:
      topk_idx: chosen experts, int32 [B, T, K].
      copies: int32 [E]. slots: int32 [E, most copies].

    Returns:
      int32 [B, T, K].
    """
    batch, length, _ = topk_idx.shape
    position = jnp.arange(batch)[:, None] + jnp.arange(length)
    return slots[topk_idx, position[..., None] % copies[topk_idx]]
