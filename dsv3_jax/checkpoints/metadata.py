"""What a checkpoint says about its run: configuration, package versions, data position."""

import dataclasses
import importlib.metadata
import platform
import typing
from typing import Any

from dsv3_jax.config import ConfigError, TrainConfig, nearest_name

_PACKAGES = ("dsv3-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_run(config: TrainConfig, *, sequences: int) -> dict[str, Any]:
    """Metadata of a checkpoint: configuration, package versions and sequences consumed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "config": config_to_dict(config),
        "versions": versions,
        "sequences": int(sequences),
    }


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `config_to_dict`; absent fields take their defaults.

    Raises:
      ConfigError: unknown field (with the nearest known name), or a broken rule.
    """
    return _dataclass_from_dict(TrainConfig, values, place="config of the checkpoint")


def _dataclass_from_dict(cls: type, values: dict[str, Any], place: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} must be an object ({place})")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"unknown field {key!r}{nearest_name(key, hints)} ({place})")
        options = typing.get_args(hints[key]) or (hints[key],)
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if section is not None and value is not None:
            value = _dataclass_from_dict(section, value, place=f"{key} in {place}")
        arguments[key] = value
    return cls(**arguments)
