"""Frozen configuration dataclasses: the network, how it is computed, its data and its training.

`ModelConfig` carries Hugging Face's field names, so a released `config.json` reads one to one
(`ModelConfig.from_hf`). Every other dataclass is one section of `TrainConfig`, which the files in
`configs/` return and the command line overrides (`--optimizer.peak-lr 3e-4`).

Validation happens on construction: a `ConfigError` names the value, the rule and the class.
"""

from dsv3_jax.config.checks import ConfigError, nearest_name
from dsv3_jax.config.cluster import ClusterConfig
from dsv3_jax.config.model import ModelConfig, RopeScaling
from dsv3_jax.config.train import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "RuntimeConfig",
    "TrainConfig",
    "nearest_name",
]
