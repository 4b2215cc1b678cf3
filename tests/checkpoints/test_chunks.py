"""What is held of a checkpoint while it is read: chunks of arrays, not whole ones."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoints import hf_names, state_handler
from dsv3_jax.checkpoints.metadata import describe_run
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.checkpoints.stored_arrays import gigabytes_at_a_time
from dsv3_jax.checkpoints.to_hf import to_hf
from dsv3_jax.checkpoints.weight_sources import _crossed_bytes
from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from tests.checkpoints.conftest import assert_same_tensors, tensors_of


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(state_handler, "_CHUNK", 1 << 14)
    monkeypatch.setattr(state_handler, "_CRUMB", 1 << 10)


def test_layers_then_experts_are_chunks_of_their_own(small_chunks, tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {
        "experts of a stack": ((3, 4, 64, 2, 32), (1, 1, 64, 2, 32)),
        "a stack of which a layer fits": ((3, 4, 64, 2, 8), (1, 4, 64, 2, 8)),
        "experts of an MTP module": ((8, 512, 2, 4), (1, 512, 2, 4)),
        "large experts": ((2, 128, 2, 64), (1, 32, 2, 64)),
        "a table": ((96, 80), (48, 80)),
        "what is small": ((3, 5), (3, 5)),
        "shared out": ((16, 64, 64), (1, 64, 64)),
        "a number": ((), ()),
    }
    rng = np.random.default_rng(0)
    state = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, (shape, _) in shapes.items()
    }
    placed = NamedSharding(mesh, PartitionSpec("x"))
    state["shared out"] = jax.device_put(state["shared out"], placed)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(0, state, {})
    store.close()
    handler = ocp.PyTreeCheckpointHandler()
    found = handler.metadata(epath.Path(store.state_folder(0))).tree
    handler.close()
    chunks = {name: tuple(leaf.storage.chunk_shape or ()) for name, leaf in found.items()}
    assert chunks == {name: chunk for name, (_, chunk) in shapes.items()}
    halves = NamedSharding(mesh, PartitionSpec(None, "x"))
    for sharding in (None, halves):
        targets = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim > 2 else None
            )
            for name, leaf in state.items()
            if sharding is None or leaf.ndim < 3 or leaf.shape[1] % 8 == 0
        }
        restored, _ = store.restore(0, targets, partial=True)
        for name, leaf in restored.items():
            assert np.asarray(leaf).tobytes() == np.asarray(state[name]).tobytes(), name


def test_a_run_in_small_chunks_exports_the_same(small_chunks, bf16, tmp_path):
    released = bf16("two_mtp_modules")
    _, variables = load_pretrained(released.folder, dtype="float32")
    model = ModelConfig.from_hf(released.folder)
    config = TrainConfig(model=model, data=DataConfig(sequence_length=64), total_tokens=640)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(0, variables, describe_run(config, sequences=0))
    store.close()
    to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), released.tensors)


def test_loading_rounds_as_it_reads(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[0, :3] = 1.00390625, np.inf, -0.0  # a tie; what rounding must keep
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(0, {"a": jnp.asarray(values)}, {})
    store.close()
    target = {"a": jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)}
    restored, _ = store.restore(0, target, cast=True)
    expected = jnp.asarray(values).astype(jnp.bfloat16)
    assert np.asarray(restored["a"]).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        ((1, 1000, 1000), 2 + 12),  # its own 3,000 chunks
        ((3000, 1000, 1000), 2 + 12),
        ((7, 1000, 1000), 2 + 12),  # a few more than its own rows, and one that it begins inside
        ((2999, 1000, 1000), 2 + 35),
        (None, 2 + 12),
    ],
)
def test_what_is_read_at_a_time_has_room_for_the_largest_shard(chunk, expected):
    storage = SimpleNamespace(chunk_shape=chunk)
    shape = (3000, 1000, 1000)
    stored = {"a": SimpleNamespace(shape=shape, dtype=np.dtype(np.float32), storage=storage)}
    device = SingleDeviceSharding(jax.devices()[0])
    targets = {"a": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)}
    assert gigabytes_at_a_time(stored, targets) == expected


MB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "chunk", "index", "transpose", "expected"),
    [
        # Written as one chunk: all of it. By layers: that of a tensor and that of the next.
        ((3, 4, 512, 2, 256), (3, 4, 512, 2, 256), (2, 3, slice(None), 1), True, 12 * MB),
        ((3, 4, 512, 2, 256), (1, 4, 512, 2, 256), (2, 3, slice(None), 1), True, 8 * MB),
        ((3, 4, 512, 2, 256), (1, 1, 512, 2, 256), (2, 3, slice(None), 1), True, 2 * MB),
        # A table: a band of 1,024 rows, the chunk in which it may begin, and the next band.
        ((16384, 64), (256, 64), (), False, 2 * (1024 + 256) * 64 * 4),
        ((64, 16384), (64, 256), (), True, 2 * (1024 + 256) * 64 * 4),
        # Chunks across a tensor's rows: all of them are crossed by every band.
        ((64, 16384), (16, 16384), (), True, 4 * MB),
    ],
)
def test_an_export_keeps_what_neighbouring_bands_cross(shape, chunk, index, transpose, expected):
    array = ts.open(
        {"driver": "zarr", "kvstore": "memory://", "metadata": {"chunks": list(chunk)}},
        create=True,
        dtype=ts.float32,
        shape=shape,
    ).result()
    row = hf_names.Row("a", ("params", "a"), index, transpose)
    assert _crossed_bytes(array, row) == expected
