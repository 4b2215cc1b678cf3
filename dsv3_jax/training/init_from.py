"""`--init-from`: a new run that starts from weights instead of at random."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.checkpoints.convert import load_variables
from dsv3_jax.checkpoints.origin import Origin, find_weights
from dsv3_jax.checkpoints.store import CheckpointError
from dsv3_jax.config import ConfigError, ModelConfig, TrainConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import Transformer, init_variables
from dsv3_jax.training.step import TrainState, state_of

_log = logging.getLogger(__name__)

# How a network begins and how long it may be asked for changes nothing that it computes; how many
# MTP modules there are is settled apart.
_FREE = ("initializer_range", "max_position_embeddings", "num_nextn_predict_layers")


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights that fit a run, not read yet.

    named: as `config.init_from` names them. mtp_modules: so many of them are taken over.
    """

    named: str
    origin: Origin
    mtp_modules: int

    def record(self) -> dict[str, Any]:
        """JSON values for the run's metadata."""
        return {
            "path": str(self.origin.root.absolute()),
            "kind": self.origin.kind,
            "step": self.origin.step,
            "mtp_modules": self.mtp_modules,
        }

    def __str__(self) -> str:
        step = "" if self.origin.step is None else f", step {self.origin.step}"
        return f"{self.named} ({self.origin.kind}{step})"


def find_start(config: TrainConfig) -> Start | None:
    """What `config.init_from` names, None if nothing; reads no weights.

    Raises:
      ConfigError: no weights; damaged ones; another network than the run's; fewer MTP modules,
        without `init_missing_mtp`. The message has the field, both values and the folder.
    """
    named = config.init_from
    if named is None:
        return None
    place = f"({named}, --init-from)"
    try:
        origin = find_weights(named)
        found = origin.mtp_modules()
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"{error} (--init-from)") from error
    for field, wanted, stored in _differences(config.model, origin.config):
        raise ConfigError(f"model.{field}={wanted!r} must be {stored!r} as in the weights {place}")
    wanted = config.model.num_nextn_predict_layers
    if found < wanted and not config.init_missing_mtp:
        raise ConfigError(
            f"model.num_nextn_predict_layers={wanted} must be at most {found}, the MTP modules "
            f"that the weights have, unless --init-missing-mtp True begins the others at random "
            f"{place}"
        )
    return Start(named, origin, min(found, wanted))


def _differences(run: ModelConfig, weights: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, value of the run, value of the weights) wherever the network would be another."""
    for field in dataclasses.fields(ModelConfig):
        one, other = (getattr(config, field.name) for config in (run, weights))
        if field.name in _FREE or one == other:
            continue
        if dataclasses.is_dataclass(one) and dataclasses.is_dataclass(other):
            for inner in dataclasses.fields(one):
                mine, theirs = (getattr(section, inner.name) for section in (one, other))
                if mine != theirs:
                    yield f"{field.name}.{inner.name}", mine, theirs
        else:
            yield field.name, one, other


def require_same_tokenizer(start: Start, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Checks that ids mean what they meant to the weights, where a tokenizer lies beside them.

    Raises:
      ConfigError: they do not, or the tokenizer there cannot be read.
    """
    file = start.origin.root / "tokenizer.json"
    if not file.is_file():
        _log.info("no tokenizer.json in %s: the run's is taken to be the same", start.origin.root)
        return
    if difference := tokenizer.difference(Tokenizer.load(file)):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} must be that of the weights, but has other "
            f"{difference}: --data.tokenizer {file} is theirs ({start.named}, --init-from)"
        )


def load_state(
    start: Start, model: Transformer, config: TrainConfig, mesh: Mesh | None, shardings: Any
) -> TrainState:
    """A new run's state around the weights: step, data position and optimizer begin anew.

    Every device reads its part only; parameters become float32, the master weights.

    Args:
      shardings: of the state; None for one device.

    Raises:
      ConfigError: the weights are damaged.
    """
    before = time.monotonic()
    try:
        variables = load_variables(
            start.origin, mesh, np.dtype(np.float32), mtp_modules=start.mtp_modules
        )
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"{error} (--init-from)") from error
    wanted = config.model.num_nextn_predict_layers
    if start.mtp_modules < wanted:
        for name, fresh in _fresh_modules(start, model, config, shardings).items():
            variables[name] |= fresh
    state = jax.jit(state_of, static_argnums=1, donate_argnums=0, out_shardings=shardings)(
        variables, config
    )
    jax.block_until_ready(state)
    _log.info("started from %s, read in %.1f s", start, time.monotonic() - before)
    _tell_of_modules(start, wanted)
    return state


def _fresh_modules(
    start: Start, model: Transformer, config: TrainConfig, shardings: Any
) -> dict[str, dict]:
    """{"params", "router_state"} of the MTP modules that the weights lack, from the run's seed."""
    count = config.model.num_nextn_predict_layers
    names = [f"mtp_{depth}" for depth in range(start.mtp_modules, count)]

    def modules(tree: dict) -> dict:
        return {name: tree[name] for name in names}

    def init() -> dict[str, dict]:
        variables = init_variables(model, jax.random.key(config.seed))
        return {name: modules(tree) for name, tree in variables.items()}

    placed = None
    if shardings is not None:
        placed = {n: modules(getattr(shardings, n)) for n in ("params", "router_state")}
    return jax.jit(init, out_shardings=placed)()


def _tell_of_modules(start: Start, wanted: int) -> None:
    """A line where not all MTP modules of run and weights are the same."""
    taken, stored = start.mtp_modules, start.origin.config.num_nextn_predict_layers
    if taken < wanted:
        _log.info(
            "%d of %d MTP modules begin at random: the weights have %d (--init-missing-mtp)",
            wanted - taken,
            wanted,
            taken,
        )
    elif taken < stored:
        _log.info(
            "%d of the %d MTP modules of the weights are used, as many as "
            "model.num_nextn_predict_layers says",
            taken,
            stored,
        )
