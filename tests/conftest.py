"""Shared set-up: float32 arithmetic at full precision, on the CPU unless JAX_PLATFORMS names
another platform, and tiny random checkpoints."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Much is compiled here once and run on a few numbers: the backend's optimisation does not pay.
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
else:
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    # A test and the processes that it starts share the GPUs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_FLAGS", flags)

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@dataclasses.dataclass
class Checkpoint:
    """One variant of `tests.oracles.hf`: its folder and, computed once on demand, its results."""

    variant: str
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    folder: Path

    @property
    def depth(self) -> int:
        """Number of MTP modules."""
        return self.config["num_nextn_predict_layers"]

    @functools.cached_property
    def token_ids(self) -> np.ndarray:
        """Random token ids, int32 [2, 37]."""
        from tests.oracles import hf

        return hf.token_ids(self.config)

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, variables) of `load_pretrained` in float32."""
        from dsv3_jax import load_pretrained

        return load_pretrained(self.folder, dtype="float32")

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def variables(self) -> Any:
        return self.loaded[1]

    @functools.cached_property
    def forward(self) -> Callable[[Any, Any], Any]:
        """Jitted `(variables, ids) -> output`, with the MTP logits where there are modules."""
        model, mtp = self.model, self.depth > 0
        return jax.jit(lambda variables, ids: model.apply(variables, ids, mtp=mtp))

    @functools.cached_property
    def output(self) -> Any:
        """The library's output on `token_ids`."""
        return self.forward(self.variables, self.token_ids)

    @functools.cached_property
    def reference(self) -> Any:
        """The float64 reference's output on `token_ids`."""
        return self.reference_with()

    def reference_with(self, *mistakes: str, length: int | None = None) -> Any:
        """The reference with some mistakes brought in, on the first `length` tokens."""
        import torch

        from tests.oracles import hf, reference

        ids = torch.tensor(self.token_ids[:, :length], dtype=torch.long)
        return reference.forward(self.config, hf.as_torch(self.weights), ids, mistakes=mistakes)

    @functools.cached_property
    def transformers(self) -> Any:
        """transformers' model on the same folder."""
        from tests.oracles import hf

        return hf.load_transformers(self.folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Factory of checkpoints: `checkpoint("base")`; each variant is made once a session.

    `checkpoint("base", tag, change)` writes a changed copy: `change(config, weights)` edits both
    in place, `tag` names the copy.
    """
    from tests.oracles import hf

    made: dict[tuple[str, str], Checkpoint] = {}

    def make(
        variant: str,
        tag: str = "",
        change: Callable[[dict[str, Any], dict[str, np.ndarray]], None] | None = None,
    ) -> Checkpoint:
        if (variant, tag) not in made:
            config = hf.config_of(variant)
            weights = hf.random_weights(config, hf.SEEDS[variant])
            if change is not None:
                change(config, weights)
            folder = hf.save(tmp_path_factory.mktemp(f"{variant}{tag}"), config, weights)
            made[variant, tag] = Checkpoint(variant, config, weights, folder)
        return made[variant, tag]

    return make


@pytest.fixture(scope="session")
def relative_l2() -> Callable[[Any, Any], float]:
    """`relative_l2(got, want)` = |got - want| / |want|, in float64; infinite if not finite."""

    def distance(got: Any, want: Any) -> float:
        got, want = _as_float64(got), _as_float64(want)
        assert got.shape == want.shape, f"{got.shape} against {want.shape}"
        if not np.isfinite(got).all():
            return float("inf")
        norm = np.linalg.norm(want)
        difference = np.linalg.norm(got - want)
        return float(difference / norm) if norm else float(difference)

    return distance


def _as_float64(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().numpy()
    return np.asarray(array, dtype=np.float64)
