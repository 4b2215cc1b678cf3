"""Training on a mesh of eight devices is training on one: losses, gradients, loads and biases."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import cli
from dsv3_jax.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.placement import batch_sharding, mesh_for, state_shardings
from dsv3_jax.training.loop import TrainingError, train
from dsv3_jax.training.step import init_state, make_train_step

# Accumulation, remat, MTP, groups, two shared experts; every axis below divides something.
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    ),
    runtime=RuntimeConfig(compute_dtype="float32", remat_policy="full"),
    data=DataConfig(sequence_length=12),
    batch=BatchConfig(size=16, microbatch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1, moment_dtype="float32"),
    total_tokens=10_000,
)
MODEL = Transformer(CONFIG.model, CONFIG.runtime)


def initial_state():
    """Every token of every layer goes to expert 3, and none to the last half of the experts."""
    state = init_state(MODEL, CONFIG)

    def push(bias):
        return bias.at[..., 3].set(2.0).at[..., 8:].set(-2.0)

    return dataclasses.replace(state, router_state=jax.tree.map(push, state.router_state))


@functools.cache
def two_steps(parallel: ParallelConfig):
    """Metrics of two steps on a mesh, and the state after the first."""
    mesh = mesh_for(parallel)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 2, 8, 13), np.int32)
    state = jax.jit(initial_state)()
    if mesh is None:
        step = jax.jit(make_train_step(MODEL, CONFIG))
        batches = list(tokens)
    else:
        shardings = state_shardings(mesh, state)
        state = jax.device_put(state, shardings)
        everywhere = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(make_train_step(MODEL, CONFIG), out_shardings=(shardings, everywhere))
        batches = [jax.device_put(t, batch_sharding(mesh, 8)) for t in tokens]
    results = []
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        for batch in batches:
            state, metrics = step(state, {"tokens": batch})
            results.append(jax.device_get((metrics, state)))
    return results, state


def gradients(*states):
    """(path, gradient of each state) of every parameter, float64: AdamW's first moment after one
    step is 0.1 x the clipped gradient, here in float32."""
    moments = [
        jax.tree_util.tree_leaves_with_path(optax.tree.get(state.opt_state, "mu"))
        for state in states
    ]
    for leaves in zip(*moments, strict=True):
        yield leaves[0][0], *(np.asarray(leaf, np.float64) for _, leaf in leaves)


def check(parallel: ParallelConfig) -> None:
    (one, many) = (two_steps(p)[0] for p in (ParallelConfig(), parallel))
    for (a, _), (b, _) in zip(one, many, strict=True):
        for name in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert np.isclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=0), name
        assert np.array_equal(a.load, b.load)
        # All tokens to one expert: its device gets more rows than the default buffer holds.
        assert (b.buffer_overflows > 0) == (b.buffer_need > 2) == (parallel.expert != 1)
    for path, a, b in gradients(one[0][1], many[0][1]):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), path
    biases = [jax.tree.leaves(state.router_state) for _, state in (one[1], many[1])]
    assert all(np.array_equal(a, b) for a, b in zip(*biases, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 4, "fsdp": 2}, {"context": 2, "fsdp": 4}],
    ids=str,
)
def test_a_mesh_trains_as_one_device(sizes):
    check(ParallelConfig(**sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"expert": 8}, {"replica": 2, "expert": 4}, {"tensor": 2, "expert": -1}],
    ids=str,
)
def test_more_meshes_train_as_one_device(sizes):
    check(ParallelConfig(**sizes))


def test_each_device_holds_its_share():
    """Parameters and moments; routed experts are split by expert and within it."""
    _, state = two_steps(ParallelConfig(expert=4, fsdp=2))
    experts = state.params["moe_layers"]["mlp"]["experts"]
    assert experts["gate_up_proj"].addressable_shards[0].data.shape == (1, 4, 16, 2, 20)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size


@pytest.mark.slow
def test_an_overflow_ends_the_run_where_asked(config, tmp_path):
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(expert=8),
        batch=BatchConfig(size=8, microbatch_size=8),
        runtime=dataclasses.replace(config.runtime, expert_buffer_factor=1.0, on_overflow="stop"),
    )
    told = r"step 1: a device's buffer overflowed in \d MoE layers .*=1\.0, .*changed nothing"
    with pytest.raises(TrainingError, match=told):
        train(config, tmp_path / "run")


def test_a_microbatch_that_cannot_be_shared_out():
    with pytest.raises(ConfigError, match=r"microbatch_size=6 must be a multiple of 8"):
        batch_sharding(make_mesh(ParallelConfig(expert=4, fsdp=2)), 6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--parallel.tensor 3", "fsdp 1 x expert 1 x tensor 3 x context 1 must multiply to the 8 "),
        ("--parallel.expert -1 --parallel.fsdp 3", "must multiply to the 8 devices"),
        ("--parallel.tensor 8", "parallel.tensor=8 must divide model.num_attention_heads=2"),
        (
            "--parallel.tensor 2 --parallel.context 4 --model.moe-intermediate-size 13",
            "parallel.tensor=2 must divide model.moe_intermediate_size=13",
        ),
        (
            "--parallel.expert 8 --model.n-routed-experts 12",
            "parallel.expert=8 must divide model.n_routed_experts=12",
        ),
        (
            "--parallel.context 8 --data.sequence-length 12",
            "parallel.context=8 must divide data.sequence_length=12",
        ),
        ("--parallel.fsdp -1", "batch.microbatch_size=2 must be a multiple of 8"),
        ("--runtime.expert-buffer-factor 0.5", "expert_buffer_factor=0.5 must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(config_file, tmp_path, capsys, options, line):
    """Before anything is read or written."""
    out = tmp_path / "run"

    def main(argv):
        config, out, resume = cli.parse_train_args(argv)
        return train(config, out, resume=resume)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            "sys.argv", ["train.py", str(config_file), "--out", str(out), *options.split()]
        )
        cli.run(main)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1 and not out.exists()
