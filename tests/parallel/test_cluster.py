"""Where a process finds its place, and what each process reads; the rest needs real processes."""

import jax
import numpy as np
import pytest

from dsv3_jax.config import ClusterConfig, ConfigError, ParallelConfig
from dsv3_jax.parallel import cluster
from dsv3_jax.parallel.cluster import Cluster, join
from dsv3_jax.parallel.feeding import BatchFeed
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.placement import batch_sharding

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No cluster in the environment."""
    for name in (*VARIABLES, "JAX_COORDINATOR_PORT", "SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)


def place(config=None):
    return cluster._find_place(config or ClusterConfig())


def test_alone_without_a_cluster():
    assert place() is None
    with join(ClusterConfig(), {}) as alone:
        assert alone.is_main and alone.count == 1
        assert alone.gather("x", 3) == [3] and alone.largest(5) == 5
        assert alone.in_turn("x", lambda: "made") == "made"
        alone.require_same("x", 1, "")


def test_the_command_line_comes_before_the_environment(monkeypatch):
    for name, value in zip(VARIABLES, ("host:1234", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    found = place()
    assert (found.address, found.count, found.index) == ("host:1234", 4, 3)
    found = place(ClusterConfig(address="[::1]:99", count=2, index=0))
    assert (found.address, found.count, found.index) == ("[::1]:99", 2, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"address": "a:1"}, "count and index must be given too"),
        ({"address": "a:1", "count": 2}, "index must be given too"),
        ({"address": "a", "count": 2, "index": 0}, "address='a' must be host:port"),
        ({"address": "a:65535", "count": 2, "index": 0}, "must be host:port"),
        ({"address": "a:1", "count": 2, "index": 2}, r"index=2 must be in \[0, self.count=2\)"),
        ({"address": "a:1", "count": 0, "index": 0}, "count=0 must be positive"),
        ({"join_timeout_s": 0}, "join_timeout_s=0 must be positive"),
    ],
)
def test_bad_places_are_one_line(values, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**values)


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="'two'.*environment: JAX_COORDINATOR_ADDRESS"):
        place()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="address and index must be given too.*JAX_PROCESS_ID"):
        place()


@pytest.mark.parametrize(
    ("tasks", "devices"), [("8(x2)", [5]), ("1(x16)", None), ("1", None), ("8,7", [5])]
)
def test_slurm(monkeypatch, tasks, devices):
    for name, value in {
        "SLURM_JOB_ID": "4196", "SLURM_STEP_NODELIST": "gpu[07-08],x1", "SLURM_NTASKS": "16",
        "SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": tasks,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = place()
    assert (found.address, found.count, found.index) == ("gpu07:61540", 16, 13)
    assert found.devices == devices
    monkeypatch.setenv("SLURM_JOB_ID", "4095")  # JAX's port is the last one: ours is before it
    assert place().address == "gpu07:65534"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert place() is None


def test_a_tpu_pod_of_kubernetes(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,b.svc,c.svc")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    for name, value in (("NUM_SLICES", "2"), ("SLICE_ID", "1")):
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:8080")
    found = place()
    assert (found.address, found.count, found.index) == ("localhost:8482", 6, 5)
    assert found.devices is None


def test_facts_are_flat_and_hold_the_code(tmp_path):
    assert cluster._flat({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}
    versions = cluster._versions()
    assert versions["jax"] == jax.__version__ and len(versions["the code of dsv3_jax"]) == 12
    assert versions == cluster._versions()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"expert": 2, "tensor": 2, "context": 2}], ids=str)
def test_a_fed_batch_is_the_batch(sizes):
    mesh = make_mesh(ParallelConfig(**sizes))
    feed = BatchFeed(mesh, 8)
    np.testing.assert_array_equal(feed.part, np.arange(8))  # one process holds all devices
    tokens = np.arange(3 * 8 * 5, dtype=np.int32).reshape(3, 8, 5)
    placed = feed.place(tokens.reshape(24, 5))
    np.testing.assert_array_equal(placed, tokens)
    assert placed.sharding == batch_sharding(mesh, 8)


class _Device:
    """Stands for a device of another process in a sharding's map."""


@pytest.mark.parametrize(
    ("slices", "part"),
    [
        ([slice(0, 2), slice(0, 2)], [0, 1]),  # tensor axis inside the process
        ([slice(2, 4), slice(6, 8)], [2, 3, 6, 7]),  # devices far apart
        ([slice(None)], list(range(8))),
    ],
)
def test_a_process_reads_what_its_devices_hold(monkeypatch, slices, part):
    mesh = make_mesh(ParallelConfig(fsdp=8))
    held = {_Device(): (slice(None), rows, slice(None)) for rows in slices}
    monkeypatch.setattr(
        type(batch_sharding(mesh, 8)), "addressable_devices_indices_map", lambda *_: held
    )
    assert BatchFeed(mesh, 8).part.tolist() == part


def test_a_cluster_of_one_names_its_host():
    assert Cluster()._name(0).startswith("process 0 (")
