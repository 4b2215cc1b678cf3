"""Weights in and out: `load_pretrained` and `to_hf_state_dict`."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.metadata import config_from_dict
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError, open_folder
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ConfigError, ModelConfig, RuntimeConfig
from dsv3_jax.model.transformer import Transformer

_log = logging.getLogger(__name__)

_READABLE = [np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]

# The gate and its bias decide routing: they keep float32 whatever the rest is loaded as.
_ROUTER_MODULE = "gate"


def _keeps_float32(path: tuple) -> bool:
    return _ROUTER_MODULE in [key.key for key in path]


def abstract_variables(config: ModelConfig) -> dict:
    """Shapes of {"params", "router_state"} (router_state may be absent) without computing them."""
    model = Transformer(config)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)


def _get(tree: Any, path: hf_names.Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check_names(folder: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
    """Every tensor maps, is a tied copy or is named as ignored; every parameter has a tensor."""
    needed = {row.name for row in hf_names.rows(config)}
    tied = hf_names.tied_copies(config)
    for name, entry in entries.items():
        if entry.dtype not in _READABLE:
            raise WeightsError(
                f"tensor {name!r} has dtype {entry.dtype}, must be float64, float32, float16 or "
                f"bfloat16 ({entry.file})"
            )
        if name in needed or name in tied:
            continue
        reason = hf_names.ignored_because(name)
        if reason is None:
            raise WeightsError(f"tensor {name!r} fills no parameter of this config ({folder})")
        _log.info("skipped tensor %s: %s", name, reason)
    for name in needed:
        if name not in entries:
            raise WeightsError(f"tensor {name!r} is missing ({folder})")
    for copy, original in tied.items():
        if copy in entries and not np.array_equal(entries[copy].read(), entries[original].read()):
            raise WeightsError(f"tensor {copy!r} must equal {original!r} ({folder})")


def _slot_shape(shape: tuple[int, ...], row: hf_names.Row) -> tuple[int, ...]:
    """Shape of the tensor that `row` expects, for a parameter of `shape`."""
    indexed = shape[len(row.index) :]
    kept = [n for n, i in zip(shape, row.index, strict=False) if isinstance(i, slice)]
    slot = (*kept, *indexed)
    return slot[::-1] if row.transpose else slot


def _read_all(config: ModelConfig, entries: dict[str, TensorEntry], dtype: np.dtype) -> dict:
    """Fills host arrays from the tensors, a parameter at a time."""
    shapes = abstract_variables(config)

    def empty(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.empty(leaf.shape, np.float32 if _keeps_float32(path) else dtype)

    arrays = jax.tree_util.tree_map_with_path(empty, shapes)
    for row in hf_names.rows(config):
        target, entry = _get(arrays, row.path), entries[row.name]
        expected = _slot_shape(target.shape, row)
        if entry.shape != expected:
            raise WeightsError(
                f"tensor {row.name!r} has shape {list(entry.shape)}, the config needs "
                f"{list(expected)} ({entry.file})"
            )
        tensor = entry.read()
        target[row.index] = (tensor.T if row.transpose else tensor).astype(target.dtype)
    return arrays


def _read_hf_folder(folder: Path, dtype: str) -> tuple[ModelConfig, dict]:
    config = ModelConfig.from_hf(folder)
    entries = open_folder(folder)
    _check_names(folder, config, entries)
    return config, _read_all(config, entries, np.dtype(jnp.dtype(dtype)))


def _read_checkpoint(folder: Path, dtype: str) -> tuple[ModelConfig, dict]:
    """The network of a run's newest checkpoint, without its optimizer state."""
    store = CheckpointStore(folder)
    config = config_from_dict(store.read_metadata()["config"]).model
    arrays, _ = store.restore(None, abstract_variables(config), partial=True)

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf if _keeps_float32(path) else leaf.astype(dtype)

    return config, jax.tree_util.tree_map_with_path(cast, arrays)


def load_pretrained(
    path: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str = "bfloat16"
) -> tuple[Transformer, dict]:
    """Loads a Hugging Face folder or the newest checkpoint of a training run.

    A Hugging Face folder holds `config.json` and safetensors with the released tensor names; tied
    copies in the MTP layers are checked to be equal. The gate and its bias stay float32;
    everything else becomes `dtype`, which is also the model's compute dtype.

    Args:
      path: a Hugging Face folder, the directory of a run, or its `checkpoints/`.
      mesh: every array is replicated over its devices; None is the default device.
      dtype: "bfloat16" or "float32".

    Returns:
      The model and {"params", "router_state"}: `model.apply(variables, input_ids)`.

    Raises:
      WeightsError: damaged files; a tensor that is missing, fills no parameter, or has another
        shape than the config says.
      ConfigError: a config.json of another architecture, no checkpoint, or a wrong `dtype`.
      CheckpointError: the checkpoint is damaged.
    """
    folder = Path(path)
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"{dtype=} must be 'bfloat16' or 'float32' (load_pretrained)")
    run = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if (folder / "config.json").is_file():
        config, arrays = _read_hf_folder(folder, dtype)
    elif run.name == "checkpoints" and run.is_dir():
        config, arrays = _read_checkpoint(run, dtype)
    else:
        raise WeightsError(f"neither a config.json nor checkpoints/ of a run ({folder})")
    if mesh is None:
        variables = jax.tree.map(jnp.asarray, arrays)
    else:
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        variables = jax.device_put(arrays, replicated)
    variables.setdefault("router_state", {})
    return Transformer(config, RuntimeConfig(compute_dtype=dtype)), variables


def to_hf_state_dict(config: ModelConfig, variables: dict) -> dict[str, np.ndarray]:
    """{Hugging Face tensor name: NumPy array} of `variables`, tied copies included.

    `variables` is {"params", "router_state"} or a pytree of the same structure, such as gradients
    (their tied copies repeat the original's). Arrays keep their dtypes.
    """
    host = jax.tree.map(np.asarray, variables)
    tensors = {}
    for row in hf_names.rows(config):
        tensor = _get(host, row.path)[row.index]
        tensors[row.name] = tensor.T if row.transpose else tensor
    for copy, original in hf_names.tied_copies(config).items():
        tensors[copy] = tensors[original]
    return tensors
