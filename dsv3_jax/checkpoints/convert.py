"""Weights in and out: `load_pretrained` and `to_hf_state_dict`."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.hf_parts import PartReader
from dsv3_jax.checkpoints.ledger import (
    FP8,
    SCALE_SUFFIX,
    Assignment,
    assign,
    block_size,
    parameter_shapes,
)
from dsv3_jax.checkpoints.origin import Origin, find_weights
from dsv3_jax.checkpoints.safetensors_io import WeightsError, open_folder, same_bytes
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ConfigError, ModelConfig, RuntimeConfig
from dsv3_jax.model.layers import FP8_BLOCK
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import parameter_spec
from pallas_kernels import only_shapes

_log = logging.getLogger(__name__)

Part = tuple[tuple[int, int], ...]  # start and end along each axis

# The gate and its bias decide routing: they keep float32 whatever the rest is loaded as.
_ROUTER_MODULE = "gate"
# Host memory for what is on its way to a device.
_PIECE_BYTES = 1 << 28


def load_pretrained(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    keep_fp8: bool = False,
    allow_nonfinite: bool = False,
) -> tuple[Transformer, dict]:
    """Loads a Hugging Face folder, or the newest checkpoint of a run or of a converted folder.

    A Hugging Face folder holds `config.json` and safetensors with the released tensor names; tied
    copies in the MTP layers are checked to be equal. The gate and its bias stay float32;
    everything else becomes `dtype`, which is also the model's compute dtype. FP8 weights are
    multiplied by their scales as they are read.

    With a mesh every array goes to its devices by the rules of `parallel/rules.py` as it is read,
    a piece at a time: each process reads what its devices hold and keeps none of it. Compute
    under the same mesh: `with jax.set_mesh(mesh): jax.jit(model.apply)(variables, input_ids)`.

    Args:
      path: a Hugging Face folder, the directory of a run, or its `checkpoints/`.
      mesh: see `parallel.mesh.make_mesh`; None is the default device.
      dtype: "bfloat16" or "float32".
      keep_fp8: leave FP8 weights as they are, with their scales in variables["scales"]; the model
        multiplies as it uses them. A parameter some of whose tensors are not FP8 becomes `dtype`.
      allow_nonfinite: accept NaN and infinite weights in a Hugging Face folder.

    Returns:
      The model and {"params", "router_state"}: `model.apply(variables, input_ids)`.

    Raises:
      WeightsError: damaged files; a tensor that is missing, fills no parameter, or has another
        shape or dtype than the config says; an FP8 weight without scale or a scale without one;
        NaN or infinite weights. The message names tensor and file.
      ConfigError: a config.json of another architecture, no checkpoint, a wrong `dtype`, or
        `keep_fp8` where nothing is FP8 in blocks of 128 x 128.
      CheckpointError: the checkpoint is damaged.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"{dtype=} must be 'bfloat16' or 'float32' (load_pretrained)")
    for axis in () if mesh is None else mesh.axis_names:
        if axis not in AXES:
            raise ConfigError(
                f"mesh axis {axis!r} must be one of {', '.join(AXES)} (load_pretrained)"
            )
    origin = find_weights(path)
    variables = load_variables(
        origin, mesh, np.dtype(dtype), keep_fp8=keep_fp8, allow_nonfinite=allow_nonfinite
    )
    return Transformer(origin.config, RuntimeConfig(compute_dtype=dtype)), variables


def load_variables(
    origin: Origin,
    mesh: Mesh | None,
    dtype: np.dtype,
    *,
    keep_fp8: bool = False,
    allow_nonfinite: bool = False,
    mtp_modules: int | None = None,
) -> dict:
    """{"params", "router_state"} as `load_pretrained` gives them.

    Args:
      mtp_modules: leave out those after the first so many; None loads all that the config has.
    """
    config = origin.config
    if mtp_modules is not None:
        config = dataclasses.replace(config, num_nextn_predict_layers=mtp_modules)
    if origin.step is None:
        variables = _load_hf_folder(origin, config, mesh, dtype, keep_fp8, allow_nonfinite)
    elif keep_fp8:
        raise ConfigError(
            f"{keep_fp8=} needs a Hugging Face folder with FP8 weights ({origin.folder})"
        )
    else:
        variables = _load_checkpoint(origin, config, mesh, dtype)
    variables.setdefault("router_state", {})
    return variables


def to_hf_state_dict(config: ModelConfig, variables: dict) -> dict[str, np.ndarray]:
    """{Hugging Face tensor name: NumPy array} of `variables`, tied copies included.

    `variables` is {"params", "router_state"} or a pytree of the same structure, such as gradients
    (their tied copies repeat the original's). Arrays keep their dtypes; FP8 weights come with
    their scales.
    """
    host = jax.tree.map(np.asarray, variables)
    scales = parameter_shapes(host.get("scales", {}))
    tensors = {}
    for row in hf_names.rows(config):
        collection, *inner = row.path
        tensors[row.name] = _tensor(host[collection], inner, row)
        if collection == "params" and tuple(inner) in scales:
            tensors[row.name + SCALE_SUFFIX] = _tensor(host["scales"], inner, row)
    for copy, original in hf_names.tied_copies(config).items():
        for suffix in ("", SCALE_SUFFIX):
            if original + suffix in tensors:
                tensors[copy + suffix] = tensors[original + suffix]
    return tensors


def _tensor(tree: Any, path: list[str], row: hf_names.Row) -> np.ndarray:
    for key in path:
        tree = tree[key]
    tensor = tree[row.index]
    return tensor.T if row.transpose else tensor


def abstract_variables(config: ModelConfig) -> dict:
    """Shapes of {"params", "router_state"} (router_state may be absent) without computing them."""
    return jax.tree.map(lambda leaf: leaf, _abstract_variables(config))  # the caller's own


@functools.cache
def _abstract_variables(config: ModelConfig) -> dict:
    model = Transformer(config)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    # Whatever the caller's mesh, which need not suit this input.
    with _only(jax.local_devices()[0]), only_shapes():
        return jax.eval_shape(model.init, jax.random.key(0), ids)


def _loaded_dtype(path: hf_names.Path, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if _ROUTER_MODULE in path else dtype


def _load_hf_folder(
    origin: Origin,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: np.dtype,
    keep_fp8: bool,
    allow_nonfinite: bool,
) -> dict:
    """Reads every parameter of `config` onto its devices, one after the other."""
    folder = origin.folder
    block, entries = block_size(folder), open_folder(folder)
    for name in list(entries):
        module = hf_names.mtp_module(name, origin.config)
        if module is not None and module >= config.num_nextn_predict_layers:
            del entries[name]
    shapes = parameter_shapes(abstract_variables(config))
    plan = assign(folder, config, shapes, entries, block)
    for item in plan:
        if item.status == "ignored":
            _log.info("skipped tensor %s: %s", item.name, item.reason)
        elif item.status == "tied" and not same_bytes(item.entry, entries[item.other]):
            raise WeightsError(
                f"tensor {item.name!r} must equal {item.other!r} ({item.entry.file})"
            )
    reader = PartReader(plan, block, allow_nonfinite)
    kept = {path for path in shapes if keep_fp8 and _can_stay_fp8(path, reader.slots(path))}
    if keep_fp8 and (not kept or block != (FP8_BLOCK, FP8_BLOCK)):
        raise ConfigError(
            f"{keep_fp8=} needs FP8 weights in blocks of {FP8_BLOCK} x {FP8_BLOCK} ({folder})"
        )
    scales = PartReader(
        (
            dataclasses.replace(a, name=a.name + SCALE_SUFFIX, entry=a.scale)
            for a in plan
            if a.scale is not None
        ),
        block,
        allow_nonfinite,
    )
    variables: dict = {}
    for path, shape in shapes.items():
        kind = FP8 if path in kept else _loaded_dtype(path, dtype)
        _set(variables, path, _place(reader, path, path, shape, kind, mesh))
        if path in kept:
            # The grid of scales has the weight's axes, those in blocks shortened.
            grid = _grid_shape(shape, scales.slots(path)[0])
            where = ("scales", *path[1:])
            array = _place(scales, path, where, grid, np.dtype(np.float32), mesh)
            _set(variables, where, array)
    return variables


def _can_stay_fp8(path: hf_names.Path, tensors: list[Assignment]) -> bool:
    """Whether the model can use a parameter as FP8, and all its tensors are."""
    linear = path[-1] == "kernel" or "experts" in path
    return linear and _ROUTER_MODULE not in path and all(t.scale is not None for t in tensors)


def _grid_shape(shape: tuple[int, ...], scale: Assignment) -> tuple[int, ...]:
    assert scale.row is not None
    grid = iter(scale.entry.shape[::-1] if scale.row.transpose else scale.entry.shape)
    index = [*scale.row.index, *[slice(None)] * (len(shape) - len(scale.row.index))]
    return tuple(
        next(grid) if isinstance(i, slice) else n for i, n in zip(index, shape, strict=True)
    )


def _set(tree: dict, path: hf_names.Path, value: jax.Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _sharding(mesh: Mesh, path: hf_names.Path, shape: tuple[int, ...]) -> NamedSharding:
    """Of a parameter, or of a weight's scales, which lie as the weight does."""
    return NamedSharding(mesh, parameter_spec(mesh.shape, path[1:], shape))


def _place(
    reader: PartReader,
    source: hf_names.Path,
    path: hf_names.Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    mesh: Mesh | None,
) -> jax.Array:
    """The array at `path`, of which `reader` has the parts under `source`, on its devices."""

    def read(part: Part) -> np.ndarray:
        return reader.read(source, part, dtype)

    if mesh is None:
        (array,) = _fill_devices({tuple((0, n) for n in shape): [None]}, dtype, read)
        return array
    sharding = _sharding(mesh, path, shape)
    devices: dict[Part, list[jax.Device | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        devices.setdefault(part, []).append(device)
    shards = _fill_devices(devices, dtype, read)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill_devices(
    parts: dict[Part, list[jax.Device | None]],
    dtype: np.dtype,
    read: Callable[[Part], np.ndarray],
) -> list[jax.Array]:
    """Each part of a parameter on each of its devices (None: the default one).

    Parts have one size. What several devices hold is read once; a large part goes there in pieces,
    the parts taking turns, as their pieces may lie in the same tensors.
    """
    shape = [stop - start for start, stop in next(iter(parts))]
    if math.prod(shape) * dtype.itemsize <= _PIECE_BYTES:
        return [
            jax.device_put(piece, device)
            for part, devices in parts.items()
            for piece in [read(part)]
            for device in devices
        ]
    wholes: dict[jax.Device | None, jax.Array] = {}
    for device in itertools.chain(*parts.values()):
        with _only(device):
            wholes[device] = jnp.zeros(shape, dtype, device=device)
    for pieces in zip(*(_pieces(part, dtype.itemsize) for part in parts), strict=True):
        for whole, piece in zip(parts, pieces, strict=True):
            array = read(piece)
            jax.block_until_ready(list(wholes.values()))  # at most one piece waits on the host
            start = [a - b for (a, _), (b, _) in zip(piece, whole, strict=True)]
            for device in parts[whole]:
                with _only(device):
                    placed = jax.device_put(array, device)
                    wholes[device] = _insert(wholes[device], placed, start)
    return list(wholes.values())


def _pieces(part: Part, itemsize: int) -> Iterator[Part]:
    """Cuts a part along its first axes until no piece is larger than _PIECE_BYTES."""
    lengths = [stop - start for start, stop in part]
    size = math.prod(lengths) * itemsize
    if size <= _PIECE_BYTES:
        yield part
        return
    axis = next(axis for axis, length in enumerate(lengths) if length > 1)
    start, stop = part[axis]
    step = max(1, lengths[axis] * _PIECE_BYTES // size)
    for first in range(start, stop, step):
        piece = (first, min(first + step, stop))
        yield from _pieces((*part[:axis], piece, *part[axis + 1 :]), itemsize)


@contextlib.contextmanager
def _only(device: jax.Device | None):
    """Computing on one device, though the caller's mesh may be of several."""
    if device is None:
        yield
    else:
        mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            yield


def _with_piece(whole: jax.Array, piece: jax.Array, start: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece, start)


_insert = jax.jit(_with_piece, donate_argnums=0)  # in place


def _load_checkpoint(
    origin: Origin, config: ModelConfig, mesh: Mesh | None, dtype: np.dtype
) -> dict:
    """The parameters of `config` in a checkpoint, without any optimizer state, cast to `dtype`."""
    store = CheckpointStore(origin.folder)

    def target(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(key.key for key in path)
        sharding = None if mesh is None else _sharding(mesh, names, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, _loaded_dtype(names, dtype), sharding=sharding)

    targets = jax.tree_util.tree_map_with_path(target, abstract_variables(config))
    variables, _ = store.restore(origin.step, targets, partial=True, cast=True)
    return variables


def stored_arrays(store: CheckpointStore) -> dict[hf_names.Path, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the arrays of a store's newest checkpoint; reads none of them."""
    step = store.latest_step()
    if step is None:
        raise ConfigError(f"no checkpoint in {store.directory}")
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored: Any = handler.metadata(epath.Path(store.state_folder(step))).tree
    finally:
        handler.close()
    leaves, _ = jax.tree_util.tree_flatten_with_path(stored)
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype
        )
        for path, leaf in leaves
    }
