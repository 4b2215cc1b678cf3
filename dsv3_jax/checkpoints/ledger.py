"""The ledger of a conversion: what becomes of every tensor, decided before any data is read.

Every tensor of a folder is mapped to a slot of a parameter, tied to another tensor that it
repeats, the scale of an FP8 weight, or ignored with a reason; every slot is filled exactly once.
Anything left over on either side is an error that names it.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError
from dsv3_jax.config import ConfigError, ModelConfig

LEDGER = "ledger.json"
SCALE_SUFFIX = "_scale_inv"  # X.weight is scaled by X.weight_scale_inv
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

_FORMAT = 1
_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))

Status = Literal["mapped", "tied", "scale", "ignored"]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What becomes of one tensor.

    row: the slot that a mapped tensor fills.
    scale: of a mapped FP8 weight, where its scales lie.
    other: of a tied tensor, the one it repeats; of a scale, its weight.
    reason: why an ignored tensor is.
    """

    name: str
    status: Status
    entry: TensorEntry
    row: hf_names.Row | None = None
    scale: TensorEntry | None = None
    other: str = ""
    reason: str = ""


def block_size(folder: Path) -> tuple[int, int] | None:
    """Rows and columns of a scale's block (`quantization_config` of config.json); None: not FP8.

    Raises:
      ConfigError: another kind of quantisation.
    """
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if raw is None:
        return None
    wanted: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3"}
    for key, value in wanted.items():
        found = raw.get(key, value) if isinstance(raw, dict) else raw
        if found != value:
            raise ConfigError(f"quantization_config {key}={found!r} must be {value!r} ({path})")
    block = raw.get("weight_block_size")
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise ConfigError(f"weight_block_size={block!r} must be two positive integers ({path})")
    return block[0], block[1]


def parameter_shapes(variables: Any) -> dict[hf_names.Path, tuple[int, ...]]:
    """{path: shape} of a pytree of parameters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    return {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}


def tensor_shape(shape: tuple[int, ...], row: hf_names.Row) -> tuple[int, ...]:
    """Shape in the file of the tensor that fills `row`'s slot of a parameter of `shape`."""
    kept = [n for n, i in zip(shape, row.index, strict=False) if isinstance(i, slice)]
    slot = (*kept, *shape[len(row.index) :])
    return slot[::-1] if row.transpose else slot


def assign(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[hf_names.Path, tuple[int, ...]],
    entries: Mapping[str, TensorEntry],
    block: tuple[int, int] | None,
) -> list[Assignment]:
    """Decides for every tensor of `folder`; reads no data.

    Mapped tensors come in the order of `hf_names.rows`, then the others by name.

    Args:
      shapes: of every parameter, see `parameter_shapes`.
      entries: of every tensor, see `open_folder`.
      block: see `block_size`.

    Raises:
      WeightsError: a tensor is unknown, missing or of another shape or dtype than the config
        says; an FP8 weight has no scale, or a scale no FP8 weight; a slot is filled twice or not
        at all. The message names tensor and file.
    """
    rows = {row.name: row for row in hf_names.rows(config)}
    _check_slots(rows.values(), shapes)
    tied = hf_names.tied_copies(config)
    plan = [_map(row, entries, shapes[row.path], block, folder) for row in rows.values()]
    for name in sorted(entries.keys() - rows.keys()):
        entry, weight = entries[name], name.removesuffix(SCALE_SUFFIX)
        if name in tied:
            _check_tied(name, entry, tied[name], entries[tied[name]])
            plan.append(Assignment(name, "tied", entry, other=tied[name]))
        elif weight != name and weight in rows:
            plan.append(Assignment(name, "scale", entry, other=weight))
        elif reason := hf_names.ignored_because(name):
            plan.append(Assignment(name, "ignored", entry, reason=reason))
        else:
            raise WeightsError(f"tensor {name!r} fills no parameter of this config ({entry.file})")
    return plan


def _check_slots(
    rows: Iterable[hf_names.Row], shapes: Mapping[hf_names.Path, tuple[int, ...]]
) -> None:
    """Every element of every parameter belongs to exactly one row."""
    filled: dict[hf_names.Path, int] = {}
    slots: set[tuple[hf_names.Path, str]] = set()
    for row in rows:
        slot = (row.path, str(row.index))
        if slot in slots:
            raise WeightsError(f"tensor {row.name!r} fills a slot that another one fills as well")
        slots.add(slot)
        if row.path not in shapes:
            raise WeightsError(f"tensor {row.name!r} has no parameter {'/'.join(row.path)}")
        size = math.prod(tensor_shape(shapes[row.path], row))
        filled[row.path] = filled.get(row.path, 0) + size
    for path, shape in shapes.items():
        if filled.get(path, 0) != math.prod(shape):
            raise WeightsError(
                f"parameter {'/'.join(path)} has {math.prod(shape)} elements, of which "
                f"{filled.get(path, 0)} have a tensor"
            )


def _map(
    row: hf_names.Row,
    entries: Mapping[str, TensorEntry],
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    folder: Path,
) -> Assignment:
    """The assignment of the tensor that fills `row`."""
    entry = entries.get(row.name)
    if entry is None:
        raise WeightsError(f"tensor {row.name!r} is missing ({folder})")
    expected = tensor_shape(shape, row)
    if entry.shape != expected:
        raise WeightsError(
            f"tensor {row.name!r} has shape {list(entry.shape)}, the config needs "
            f"{list(expected)} ({entry.file})"
        )
    scale_name = row.name + SCALE_SUFFIX
    scale = entries.get(scale_name)
    if entry.dtype != FP8:
        if entry.dtype not in _FLOATS:
            raise WeightsError(
                f"tensor {row.name!r} has dtype {entry.dtype}, must be a floating-point number "
                f"({entry.file})"
            )
        if scale is not None:
            raise WeightsError(
                f"tensor {scale_name!r} scales a weight of dtype {entry.dtype}, must be FP8 "
                f"({scale.file})"
            )
        return Assignment(row.name, "mapped", entry, row)
    if scale is None:
        raise WeightsError(f"FP8 tensor {row.name!r} has no {scale_name!r} ({entry.file})")
    if block is None:
        raise WeightsError(
            f"FP8 tensor {row.name!r} needs a quantization_config in config.json ({entry.file})"
        )
    if len(entry.shape) != 2:
        raise WeightsError(f"FP8 tensor {row.name!r} must have two dimensions ({entry.file})")
    grid = tuple(-(-n // size) for n, size in zip(entry.shape, block, strict=True))
    if scale.shape != grid or scale.dtype != np.float32:
        raise WeightsError(
            f"tensor {scale_name!r} is {scale.dtype} {list(scale.shape)}, must be float32 "
            f"{list(grid)}: a scale for each block of {list(block)} ({scale.file})"
        )
    return Assignment(row.name, "mapped", entry, row, scale)


def _check_tied(name: str, entry: TensorEntry, original: str, other: TensorEntry) -> None:
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        raise WeightsError(
            f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, must equal {original!r}, which "
            f"is {other.dtype} {list(other.shape)} ({entry.file})"
        )


def write_ledger(
    path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes `{**facts, "tensors": {name: record}}`, a line a tensor."""
    with path.open("w", encoding="utf-8") as file:
        file.write("{\n")
        for key, value in {"format": _FORMAT, **facts}.items():
            file.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
        file.write('"tensors": {\n')
        for number, (name, record) in enumerate(tensors.items()):
            comma = ",\n" if number else ""
            file.write(f"{comma}{json.dumps(name)}: {json.dumps(record)}")
        file.write("\n}\n}\n")


def read_ledger(path: Path) -> dict[str, Any]:
    """The ledger that `write_ledger` wrote.

    Raises:
      WeightsError: it cannot be read.
    """
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        if ledger["format"] != _FORMAT or not isinstance(ledger["tensors"], dict):
            raise ValueError(f"format {ledger['format']!r} must be {_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"the ledger cannot be read: {error} ({path})") from error
    return ledger
