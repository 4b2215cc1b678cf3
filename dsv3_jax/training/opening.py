"""How a run starts: its directory, its data, and the state it goes on from."""

import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.checkpoints.store import CheckpointStore, config_to_dict
from dsv3_jax.config import ConfigError, TrainConfig
from dsv3_jax.data.pipeline import TrainingData, open_data
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.cluster import Cluster
from dsv3_jax.parallel.placement import state_shardings
from dsv3_jax.training.step import TrainState, init_state

_log = logging.getLogger(__name__)


def _fit_for_resume(saved: dict[str, Any], config: TrainConfig, data: TrainingData) -> None:
    """Refuses to continue a run whose network or token stream would be another one."""
    wanted = config_to_dict(config)
    for section in ("model", "data"):
        for key, value in wanted[section].items():
            before = saved["config"][section].get(key, value)
            # Where files are cached and how far they are read ahead changes no token.
            if before != value and key not in ("cache_dir", "prefetch"):
                raise ConfigError(
                    f"{section}.{key}={value!r} must be {before!r} as in the checkpoint (--resume)"
                )
    for key, value in data.describe().items():
        if key.endswith("_fingerprint") and saved["data"].get(key, value) != value:
            raise ConfigError(
                f"{key} {str(value)[:12]} must be {str(saved['data'][key])[:12]} as in the "
                "checkpoint: the corpus or tokenizer has changed (--resume)"
            )


def open_run(out: Path, config: TrainConfig, cluster: Cluster, *, resume: bool) -> CheckpointStore:
    """The store of the run's directory, which all processes must see alike.

    Raises:
      ConfigError: they do not; it is no directory; it holds a run, and `resume` is not set.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} must be a directory (--out)")
    store = CheckpointStore(out / "checkpoints", keep=config.checkpoint.keep)
    newest = store.latest_step()
    shared = "it must be one directory that all processes share (--out)"
    cluster.require_same(f"the newest checkpoint in {out}", newest, shared)
    if newest is not None and not resume:
        raise ConfigError(
            f"{out} already holds a run at step {newest}: continue it with --resume "
            "or choose another directory (--out)"
        )
    if newest is None and resume:
        _log.info("no checkpoint in %s: starting a new run (--resume)", out)
    probe = out / ".shared"
    if cluster.is_main:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
    cluster.gather("the probe is there", None)
    seen = "there" if probe.exists() else "not there"
    cluster.require_same(f"{probe}, made by process 0,", seen, shared)
    if cluster.is_main:
        probe.unlink()
    return store


def start_state(
    store: CheckpointStore,
    model: Transformer,
    config: TrainConfig,
    data: TrainingData,
    mesh: Mesh | None,
) -> TrainState:
    """The newest checkpoint's state, or a fresh one where there is none, on its devices."""
    abstract = jax.eval_shape(lambda: init_state(model, config))
    shardings = None if mesh is None else state_shardings(mesh, abstract)
    if store.latest_step() is None:
        return jax.jit(init_state, static_argnums=(0, 1), out_shardings=shardings)(model, config)
    _fit_for_resume(store.read_metadata(), config, data)
    if shardings is not None:
        abstract = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
    state, _ = store.restore(None, abstract)
    _log.info("resumed from step %d in %s", int(state.step), store.directory)
    return state


def open_data_together(config: TrainConfig, cluster: Cluster) -> TrainingData:
    """The same data in every process; who shares a disk builds its cache once."""
    data = cluster.in_turn("the data", lambda: open_data(config))
    for key, value in data.describe().items():
        if key.endswith("_fingerprint"):
            why = "every process must read the same corpus (data.corpus)"
            cluster.require_same(f"the data's {key}", str(value)[:12], why)
    return data
