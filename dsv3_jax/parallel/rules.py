"""Where parameters lie: one table from a parameter's path to axes of the mesh.

Every parameter matches exactly one row. Matrices outside the routed experts are shared out over
the fsdp and expert axes together, because both hold different sequences there; the experts
themselves over expert (whole experts), fsdp (D) and tensor (F).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec

_SHARED = ("fsdp", "expert")
_WHOLE: tuple[str, ...] = ()

# Path of a parameter inside its layer or module -> axes of its dimensions.
PARAMETER_AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    r"embed_tokens/embedding": (("tensor",), _SHARED),
    r"lm_head/kernel": (_SHARED, ("tensor",)),
    r"self_attn/(q_a_proj|kv_a_proj_with_mqa)/kernel": (_SHARED, _WHOLE),
    # Their input, a low rank, is too narrow for large meshes.
    r"self_attn/(q_proj|q_b_proj|kv_b_proj)/kernel": (_WHOLE, ("tensor", *_SHARED)),
    r"self_attn/o_proj/kernel": (("tensor",), _SHARED),
    r"mlp/(shared_experts/)?(gate_proj|up_proj)/kernel": (_SHARED, ("tensor",)),
    r"mlp/(shared_experts/)?down_proj/kernel": (("tensor",), _SHARED),
    r"mlp/gate/kernel": (_SHARED, _WHOLE),
    r"mlp/gate/e_score_correction_bias": (_WHOLE,),
    r"mlp/experts/gate_up_proj": (("expert",), ("fsdp",), _WHOLE, ("tensor",)),
    r"mlp/experts/down_proj": (("expert",), ("tensor",), ("fsdp",)),
    r"eh_proj/kernel": (_SHARED, _WHOLE),
    r"(.*_layernorm|norm|enorm|hnorm|shared_head_norm)/weight": (_WHOLE,),
}

# What stands before a layer's own path. Scanned stacks have a leading axis L, which stays whole.
_PREFIX = re.compile(r"(dense_layers|moe_layers|mtp_\d+/layer|mtp_\d+)/")


def parameter_axes(path: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The row of a parameter such as ("moe_layers", "mlp", "gate", "kernel"), L included.

    Raises:
      KeyError: no row, or more than one, matches.
    """
    whole = "/".join(path)
    prefix = _PREFIX.match(whole)
    inner = whole[prefix.end() :] if prefix else whole
    rows = [axes for pattern, axes in PARAMETER_AXES.items() if re.fullmatch(pattern, inner)]
    if len(rows) != 1:
        raise KeyError(f"parameter {whole!r} matches {len(rows)} rows, must match 1 (rules.py)")
    stacked = prefix is not None and prefix[1].endswith("_layers")
    return (_WHOLE, *rows[0]) if stacked else rows[0]


def parameter_spec(
    sizes: Mapping[str, int], path: Sequence[str], shape: Sequence[int]
) -> PartitionSpec:
    """Where a parameter lies on a mesh with axes of these `sizes`.

    Where the axes of a row do not divide a dimension, the last of them are left out: their devices
    hold copies.

    Raises:
      KeyError: no row, or more than one, matches the path.
    """

    def fitting(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        while axes and size % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None

    rows = zip(parameter_axes(path), shape, strict=True)
    return PartitionSpec(*(fitting(axes, size) for axes, size in rows))


class Placed(NamedTuple):
    """A parameter on a mesh: path, shape, axes of each dimension, shape of a device's part."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]


def placed_parameters(
    sizes: Mapping[str, int], shapes: Mapping[tuple[str, ...], Sequence[int]]
) -> Iterator[Placed]:
    """Where every parameter lies; `shapes` by path, such as ("norm", "weight").

    Raises:
      KeyError: a path that no row matches, or more than one.
    """
    for path, shape in shapes.items():
        spec = parameter_spec(sizes, path, shape)
        axes = tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)
        ways = (math.prod(sizes[axis] for axis in group) for group in axes)
        shard = tuple(size // way for size, way in zip(shape, ways, strict=True))
        yield Placed("/".join(path), tuple(shape), axes, shard)


def parameter_table(
    sizes: Mapping[str, int], shapes: Mapping[tuple[str, ...], Sequence[int]]
) -> str:
    """`placed_parameters` as text, a line each, and at the end the elements of all and of a device.

    A dimension that is shared out is followed by its axes, as in `256 expert`.
    """
    lines, whole, held = [("parameter", "shape and axes", "on a device")], 0, 0
    for path, shape, axes, shard in placed_parameters(sizes, shapes):
        named = (
            " ".join([str(n), "·".join(group)]).strip()
            for n, group in zip(shape, axes, strict=True)
        )
        lines.append((path, " x ".join(named), " x ".join(map(str, shard))))
        whole, held = whole + math.prod(shape), held + math.prod(shard)
    lines.append((f"{len(lines) - 1} parameters", f"{whole:,}", f"{held:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
