"""How a run opens: its directory, its data, and the state it starts or goes on from."""

import logging
from functools import partial
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
from dsv3_jax.training.init_from import Start, find_start, load_state, require_same_tokenizer
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


def open_run(
    out: Path, config: TrainConfig, cluster: Cluster, *, resume: bool
) -> tuple[CheckpointStore, Start | None]:
    """The store of the run's directory, which all processes must see alike; what it starts from.

    Where there is a checkpoint to go on from, the run starts from nothing else.

    Raises:
      ConfigError: they do not; it is no directory; it holds a run, and `resume` is not set; the
        weights of `config.init_from` do not fit.
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
    start = None
    if newest is None:
        start = find_start(config)
        why = "it must be the same on every process (--init-from)"
        cluster.require_same(f"what is in {config.init_from}", start and str(start), why)
        if resume:
            _log.info("no checkpoint in %s: starting a new run (--resume)", out)
    elif config.init_from is not None:
        _log.info("%s is not read: %s holds a run (--init-from)", config.init_from, out)
    probe = out / ".shared"
    if cluster.is_main:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
    cluster.gather("the probe is there", None)
    seen = "there" if probe.exists() else "not there"
    cluster.require_same(f"{probe}, made by process 0,", seen, shared)
    if cluster.is_main:
        probe.unlink()
    return store, start


def start_state(
    store: CheckpointStore,
    model: Transformer,
    config: TrainConfig,
    data: TrainingData,
    mesh: Mesh | None,
    start: Start | None,
) -> TrainState:
    """The newest checkpoint's state; where there is none, a fresh one, around the weights of
    `start` if given. On its devices."""
    abstract = jax.eval_shape(lambda: init_state(model, config))
    shardings = None if mesh is None else state_shardings(mesh, abstract)
    if start is not None:
        return load_state(start, model, config, mesh, shardings)
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


def recorded_start(store: CheckpointStore, start: Start | None) -> dict[str, Any] | None:
    """What checkpoints say of where the run's first weights came from; None: from a seed."""
    if start is not None:
        return start.record()
    return None if store.latest_step() is None else store.read_metadata().get("init_from")


def open_data_together(config: TrainConfig, cluster: Cluster, start: Start | None) -> TrainingData:
    """The same data in every process; who shares a disk builds its cache once.

    Raises:
      ConfigError: the weights of `start` have another tokenizer.
    """
    check = None if start is None else partial(require_same_tokenizer, start, config)
    data = cluster.in_turn("the data", lambda: open_data(config, check))
    for key, value in data.describe().items():
        if key.endswith("_fingerprint"):
            why = "every process must read the same corpus (data.corpus)"
            cluster.require_same(f"the data's {key}", str(value)[:12], why)
    return data
