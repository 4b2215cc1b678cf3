"""The arrays of a checkpoint beside those that are asked for."""

import math
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ConfigError, nearest_name

PyTree = Any


def gigabytes_at_a_time(stored: PyTree, targets: PyTree) -> int:
    """GB that Orbax may hold while it reads: one or two beyond the largest shard with its chunks.

    It refuses to read a shard that is larger.
    """
    largest, found = 0, _by_name(stored)
    for name, target in _by_name(targets).items():
        leaf, shape = found[name], target.sharding.shard_shape(target.shape)
        chunk = leaf.shape if leaf.storage is None else leaf.storage.chunk_shape
        # A shard that is no multiple of its chunks may begin and end inside of one.
        sizes = [
            -(-n // c) * c + (c if n % c else 0)
            for n, c in zip(shape, chunk or leaf.shape, strict=True)
        ]
        largest = max(largest, math.prod(sizes) * np.dtype(leaf.dtype).itemsize)
    return 2 + largest // 10**9


def require_same_arrays(
    stored: PyTree, targets: PyTree, partial: bool, cast: bool, place: str
) -> None:
    """Checks that a checkpoint has the arrays of `targets`, of the same dtype unless `cast`.

    Raises:
      ConfigError: it has not, or (unless `partial`) it has more; names the first, and both shapes.
    """
    have, want = _named_shapes(stored, cast), _named_shapes(targets, cast)
    for name, shape in want.items():
        if name not in have:
            hint = nearest_name(name, have)
            raise ConfigError(f"checkpoint has no {name} of the model configured{hint} ({place})")
        if have[name] != shape:
            raise ConfigError(
                f"{name} is {have[name]} in the checkpoint and {shape} in the model configured "
                f"({place})"
            )
    for name in have:
        if name not in want and not partial:
            raise ConfigError(f"the model configured has no {name} of the checkpoint ({place})")


def _named_shapes(tree: PyTree, any_dtype: bool) -> dict[str, str]:
    """{"params/norm/weight": "float32 [64]", ...}, or without the dtype."""
    return {
        name: f"{'' if any_dtype else f'{leaf.dtype} '}{list(leaf.shape)}"
        for name, leaf in _by_name(tree).items()
    }


def _by_name(tree: PyTree) -> dict[str, Any]:
    """{"params/norm/weight": leaf, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
