"""The checkpoint store: bit-exact states, retention, and kills, damage and full disks."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.checkpoints.inventory import find_damage, read_inventory
from dsv3_jax.checkpoints.store import (
    CheckpointError,
    CheckpointStore,
    config_from_dict,
    config_to_dict,
    describe_run,
)
from dsv3_jax.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    RopeScaling,
    RuntimeConfig,
    TrainConfig,
)


class State(NamedTuple):
    """The kinds of leaves and containers a train state has."""

    step: jax.Array
    sequences: jax.Array
    params: Any
    opt_state: Any


def make_state(seed: int, width: int = 24) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed_tokens": {"embedding": jax.random.normal(keys[0], (7, width))},
        "norm": {"weight": jax.random.normal(keys[1], (width,), jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
    )
    # NaN, infinity and -0.0 have bit patterns that a conversion would lose.
    odd = jnp.asarray([math.nan, -math.inf, -0.0, 1e-40], jnp.float32)
    params["lm_head"] = {"kernel": odd}
    return State(jnp.int32(seed), jnp.uint32(2**32 - 1 - seed), params, optimizer.init(params))


def abstract(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with whole checkpoints of steps 4 and 9; tests copy it."""
    directory = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    store = CheckpointStore(directory, keep=2)
    for step in (4, 9):
        store.save(step, make_state(step), {"sequences": step})
    store.close()
    return directory


@pytest.fixture
def copied(two_steps, tmp_path) -> CheckpointStore:
    shutil.copytree(two_steps, tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_state_and_metadata_return_bit_for_bit(store):
    state, metadata = make_state(3), describe_run(TrainConfig(), sequences=2**32 - 1)
    store.save(3, state, metadata)
    store.wait()
    restored, restored_metadata = CheckpointStore(store.directory).restore(None, abstract(state))
    assert_same_bits(restored, state)
    assert restored_metadata == metadata == store.read_metadata()
    assert metadata["sequences"] == 2**32 - 1
    assert metadata["versions"]["jax"] == jax.__version__


def test_restored_arrays_take_the_sharding_asked_for(copied):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    target = abstract(make_state(9))
    target.params["norm"]["weight"] = jax.ShapeDtypeStruct((24,), jnp.bfloat16, sharding=sharding)
    restored, _ = copied.restore(9, target)
    assert restored.params["norm"]["weight"].sharding == sharding


def test_saving_survives_donation_of_the_state(store):
    # The training step donates its state, so the buffers are reused while the write runs.
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32), "step": jnp.int32(0)}
    update = jax.jit(lambda s: {"w": s["w"] * -1.5, "step": s["step"] + 1}, donate_argnums=0)
    state = update(state)
    before = jax.tree.map(np.array, state)
    store.save(1, state, {})
    for _ in range(20):
        state = update(state)
    jax.block_until_ready(state)
    restored, _ = _wait_and_restore(store, before)
    assert_same_bits(restored, before)


def _wait_and_restore(store: CheckpointStore, like: Any) -> tuple[Any, dict[str, Any]]:
    store.wait()
    return store.restore(None, abstract(like))


def test_save_returns_before_the_checkpoint_is_whole(store):
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 22,))}
    store.save(1, state, {})
    assert store.steps() == []
    store.wait()
    assert store.steps() == [1]


def test_retention_keeps_the_newest_and_the_best(store):
    state = {"w": jnp.zeros(3)}
    losses = [3.0, 1.5, 2.0, None, math.nan, 1.75]
    kept = []
    for step, loss in enumerate(losses):
        store.save(step, state, {}, metric=loss)
        store.wait()
        kept.append(store.steps())
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5]]
    assert store.best_step() == 1
    # A store opened later knows which one was best, and lets it go when it is beaten.
    store.close()
    again = CheckpointStore(store.directory, keep=2)
    again.save(6, state, {}, metric=2.0)
    again.wait()
    assert (again.steps(), again.best_step()) == ([1, 5, 6], 1)
    again.save(7, state, {}, metric=1.0)
    again.close()
    assert (again.steps(), again.best_step(), again.latest_step()) == ([6, 7], 7, 7)


def test_the_newest_step_again_is_no_work_and_an_older_one_is_refused(copied):
    changed = sorted((p, p.stat().st_mtime_ns) for p in copied.directory.rglob("*"))
    copied.save(9, make_state(1), {})
    copied.close()
    assert sorted((p, p.stat().st_mtime_ns) for p in copied.directory.rglob("*")) == changed
    with pytest.raises(CheckpointError, match=r"step=5 is older than the newest .* step 9"):
        copied.save(5, make_state(5), {})


def test_reading_leaves_an_unfinished_write_alone_and_saving_clears_it(copied):
    unfinished = copied.directory / "12.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_bytes(b"x")
    assert copied.steps() == [4, 9]
    copied.restore(None, abstract(make_state(9)))
    assert unfinished.exists()
    copied.save(10, make_state(10), {})
    copied.close()
    assert copied.steps() == [9, 10]
    assert not unfinished.exists()


def test_partial_restore_reads_only_what_is_asked_for(copied):
    state = make_state(4)
    restored, metadata = copied.restore(4, {"params": abstract(state.params)}, partial=True)
    assert_same_bits(restored, {"params": state.params})
    assert metadata == {"sequences": 4}
    with pytest.raises(ConfigError, match="no opt_state/1/0/count of the checkpoint"):
        copied.restore(4, {"params": abstract(state.params)})


def test_a_checkpoint_of_another_model_is_named_by_parameter_and_shapes(copied):
    with pytest.raises(ConfigError) as caught:
        copied.restore(None, abstract(make_state(9, width=32)))
    message = str(caught.value)
    assert "params/embed_tokens/embedding" in message
    assert "float32 [7, 24]" in message and "float32 [7, 32]" in message
    other = abstract(make_state(9))
    other.params["norm"]["weight"] = jax.ShapeDtypeStruct((24,), jnp.float32)
    with pytest.raises(ConfigError, match=r"params/norm/weight is bfloat16 \[24\] .* float32"):
        copied.restore(None, other)
    other = abstract(make_state(9))
    other.params["nomr"] = other.params.pop("norm")
    with pytest.raises(ConfigError, match="no params/nomr/weight .* 'params/norm/weight'"):
        copied.restore(None, other)


def test_a_missing_checkpoint_is_bad_input(tmp_path, copied):
    empty = CheckpointStore(tmp_path / "nothing")
    assert (empty.steps(), empty.latest_step(), empty.best_step()) == ([], None, None)
    with pytest.raises(ConfigError, match="no checkpoint in .*nothing"):
        empty.restore(None, {})
    assert not empty.directory.exists()
    with pytest.raises(ConfigError, match=r"no checkpoint of step=5 .* it has \[4, 9\]"):
        copied.read_metadata(5)


def test_every_damaged_file_is_found_and_nothing_older_is_taken(copied):
    state = abstract(make_state(9))
    folder = copied.directory / "9" / "state"
    listed = json.loads((folder / "inventory.json").read_text())["files"]
    assert len(listed) >= 5
    for name in ["inventory.json", *listed]:
        path = folder / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x10
        for damage in (whole[: len(whole) // 2], b"", bytes(flipped), None):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(CheckpointError) as caught:
                copied.restore(None, state)
            message = str(caught.value)
            assert "\n" not in message and "step 9" in message
            assert f"delete {copied.directory / '9'} to go back to step 4" in message
            path.write_bytes(whole)
    restored, _ = copied.restore(None, state)
    assert_same_bits(restored, make_state(9))


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_processes_share_out_the_checking(copied, count):
    folder = copied.state_folder(9)
    for name in read_inventory(folder):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole + b"x")
        found = [find_damage(folder, share=(index, count)) for index in range(count)]
        assert [problem is not None for problem in found].count(True) == 1, name
        path.write_bytes(whole)


def test_a_process_lists_what_it_wrote(two_steps, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(two_steps / "9" / "state", folder)
    (own,) = folder.glob("ocdbt.process_*")
    listed = read_inventory(own)
    name = max(listed, key=lambda name: listed[name][0])
    assert read_inventory(folder)[f"{own.name}/{name}"] == listed[name]
    assert {path.name for path in own.iterdir()} >= {"inventory.json"}


def test_damaged_metadata_is_not_read(copied):
    path = copied.directory / "9" / "state" / "_METADATA"
    path.write_text(path.read_text().replace('"sequences"', '"sequencez"'))
    with pytest.raises(CheckpointError, match="_METADATA was changed"):
        copied.read_metadata()
    assert copied.read_metadata(4) == {"sequences": 4}


def test_a_directory_that_cannot_be_made_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="step 1 was not written to .*checkpoints"):
        store.save(1, {"w": jnp.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="step 1 was not written"):
        store.close()


def test_metadata_that_json_cannot_hold_is_refused_before_writing(store):
    with pytest.raises(TypeError):
        store.save(1, {"w": jnp.zeros(2)}, {"path": Path("x")})
    store.close()
    assert store.steps() == []


# The child process of the tests below: its first argument says how it ends. The state of a step
# is a function of the step, so whoever reads it later knows what must be inside.
_CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from dsv3_jax.checkpoints.store import CheckpointError, CheckpointStore

def state(step):
    return {"w": jax.random.normal(jax.random.key(step), (1 << 20,)), "step": jnp.uint32(step)}

store = CheckpointStore(sys.argv[2], keep=2)
first = (store.latest_step() or 0) + 1
if sys.argv[1] == "limit":
    store.save(first, state(first), {}, metric=1.0)
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    store.save(first + 1, state(first + 1), {})
    try:
        store.wait()
    except CheckpointError as error:
        print(error)
        try:
            store.close()
        except CheckpointError as again:
            sys.exit(3 if again is error else 4)
else:
    for step in range(first, first + 1000):
        store.save(step, state(step), {"sequences": step})
"""


def child_state(step: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(step), (1 << 20,)), "step": jnp.uint32(step)}


def start_child(how: str, directory: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, how, str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_in_the_middle_of_a_save_leaves_the_last_whole_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    seen, unfinished = 0, 0
    for delay in (0.0, 0.1):
        child = start_child("forever", store.directory)
        deadline = time.monotonic() + 60
        # Kill while a write is visible, some way into it.
        while not (len(store.steps()) > 0 and _writes(store) and store.latest_step() > seen):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        unfinished += bool(_writes(store))
        step = store.latest_step()
        assert step is not None and step > seen
        restored, metadata = store.restore(None, abstract(child_state(step)))
        assert_same_bits(restored, child_state(step))
        assert metadata == {"sequences": step}
        seen = step
    assert unfinished > 0, "no kill hit a write: the test did not test it"


def _writes(store: CheckpointStore) -> list[Path]:
    return list(store.directory.glob("*-tmp*"))


def test_a_write_that_fails_is_an_error_and_costs_no_earlier_checkpoint(tmp_path):
    # A file-size limit fails a write in the background as a full disk does.
    child = start_child("limit", tmp_path / "checkpoints")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 3, err
    assert err == ""
    assert out.count("\n") == 1
    assert "step 2 was not written" in out and str(tmp_path / "checkpoints") in out
    assert "File too large" in out and "[1]" in out
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [1]
    restored, _ = store.restore(None, abstract(child_state(1)))
    assert_same_bits(restored, child_state(1))


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            model=ModelConfig(q_lora_rank=None, rope_scaling=RopeScaling(mscale=None)),
            runtime=RuntimeConfig(grouped_matmul="portable"),
            data=DataConfig(held_out="here", cache_dir="there"),
            batch=BatchConfig(size=64, microbatch_size=8, initial_size=16),
            steps=7,
        ),
    ],
)
def test_configuration_returns_from_json_unchanged(config):
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(values) == config
    optional = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not dataclasses.is_dataclass(getattr(config, field.name))
    }
    assert optional.keys() <= values.keys()


def test_configuration_of_another_version_is_explained():
    with pytest.raises(ConfigError, match=r"unknown field 'beta_1' \(did you mean 'beta1'\?\)"):
        config_from_dict({"optimizer": {"beta_1": 0.9}})
    with pytest.raises(ConfigError, match="must be an object"):
        config_from_dict({"model": 3})
    with pytest.raises(ConfigError, match="must be positive"):
        config_from_dict({"model": {"vocab_size": 0}})
    assert config_from_dict({"seed": 5}) == TrainConfig(seed=5)
