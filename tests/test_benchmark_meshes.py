"""scripts/benchmark_meshes.py: what it takes from a trace, and its meshes; the steps need GPUs."""

import importlib.util
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from dsv3_jax.config import ConfigError, TrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_meshes.py"

# Two streams of the first GPU, microseconds: a product 0..10 and 30..40, an exchange 5..20 and
# 32..36; another GPU's and the host's lines count for nothing.
_TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_AllGather_RING_LL" } }
  event_metadata { key: 3 value { id: 3 name: "ragged_all_to_all_kernel_2_bytes" } }
  lines { name: "Stream #1(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 }
    events { metadata_id: 1 offset_ps: 30000000 duration_ps: 10000000 } }
  lines { name: "Stream #2(Compute)"
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 15000000 }
    events { metadata_id: 3 offset_ps: 32000000 duration_ps: 4000000 } }
  lines { name: "XLA Ops" events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 } }
}
planes {
  name: "/device:GPU:1"
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion" } }
  lines { name: "Stream #1" events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 } }
}
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_meshes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exchange_is_told_from_what_hides_it(script):
    found = script.summarise(ProfileData.from_text_proto(_TRACE))
    kernels = found.pop("kernels")
    # Of both traced steps together; a step is half, in milliseconds.
    microseconds = {name: round(2e3 * ms, 6) for name, ms in found.items()}
    assert microseconds == {
        "compute": 20.0, "exchange": 19.0, "exposed": 10.0, "busy": 30.0, "span": 40.0
    }  # fmt: skip
    assert list(kernels)[:2] == ["gemm_fusion", "ncclDevKernel_AllGather_RING_LL"]


def test_a_mesh_by_name(script):
    config = script.on_mesh(TrainConfig(), "expert=2,tensor=2", 3)
    assert (config.parallel.expert, config.parallel.tensor) == (2, 2)
    assert config.batch.size == config.batch.microbatch_size == 6
    assert script.on_mesh(TrainConfig(), "one", 3).parallel.is_one_device
    for wrong in ("experts=2", "expert=two", ""):
        with pytest.raises(ConfigError, match="must be one or like expert=2,fsdp=4"):
            script.on_mesh(TrainConfig(), wrong, 1)
