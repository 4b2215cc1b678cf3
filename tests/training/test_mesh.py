"""Training on a mesh of devices is training on one: losses, gradients, loads and biases.

Meshes of eight are of the CPU's simulated devices; those of two run on two GPUs too, marked "gpu".
"""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax import cli
from dsv3_jax.checkpoints.store import CheckpointStore
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
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.placement import batch_sharding, state_shardings
from dsv3_jax.training.init_from import find_start
from dsv3_jax.training.loop import TrainingError, train
from dsv3_jax.training.opening import start_state
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
    # On two devices no more than two equal shares can come: 1.5 overflows there too.
    runtime=RuntimeConfig(compute_dtype="float32", remat_policy="full", expert_buffer_factor=1.5),
    data=DataConfig(sequence_length=12),
    batch=BatchConfig(size=16, microbatch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1, moment_dtype="float32"),
    total_tokens=10_000,
)


def in_dtype(dtype: str) -> TrainConfig:
    return dataclasses.replace(
        CONFIG, runtime=dataclasses.replace(CONFIG.runtime, compute_dtype=dtype)
    )


def initial_state(model: Transformer):
    """Every token of every layer goes to expert 3, and none to the last half of the experts."""
    state = init_state(model, CONFIG)

    def push(bias):
        return bias.at[..., 3].set(2.0).at[..., 8:].set(-2.0)

    return dataclasses.replace(state, router_state=jax.tree.map(push, state.router_state))


def mesh_of(parallel: ParallelConfig) -> Mesh | None:
    """On as many of the devices as the mesh asks for, on all where it leaves that open."""
    sizes = dataclasses.astuple(parallel)
    if math.prod(sizes) == 1:
        return None
    return make_mesh(parallel, jax.devices()[: None if -1 in sizes else math.prod(sizes)])


TOKENS = np.random.default_rng(0).integers(0, 96, (2, 2, 8, 13), np.int32)


@functools.cache
def jitted_step(parallel: ParallelConfig, dtype: str):
    """(state, tokens) -> (state, metrics) on a mesh; compiled once for all tests."""
    mesh, config = mesh_of(parallel), in_dtype(dtype)
    model = Transformer(config.model, config.runtime)
    if mesh is None:
        step = jax.jit(make_train_step(model, config))
    else:
        shardings = state_shardings(mesh, jax.eval_shape(lambda: initial_state(model)))
        everywhere = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(make_train_step(model, config), out_shardings=(shardings, everywhere))

    def run(state, tokens):
        if mesh is not None:
            tokens = jax.device_put(tokens, batch_sharding(mesh, 8))
        with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
            return step(state, {"tokens": tokens})

    return run


@functools.cache
def two_steps(parallel: ParallelConfig, dtype: str = "float32"):
    """(metrics, state) after each of two steps on a mesh, and the last state where it lies."""
    mesh, config = mesh_of(parallel), in_dtype(dtype)
    model = Transformer(config.model, config.runtime)
    state = jax.jit(initial_state, static_argnums=0)(model)
    if mesh is not None:
        state = jax.device_put(state, state_shardings(mesh, state))
    results = []
    for tokens in TOKENS:
        state, metrics = jitted_step(parallel, dtype)(state, tokens)
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
        # All tokens to one expert: its device gets more rows than the buffer holds.
        assert (b.buffer_overflows > 0) == (b.buffer_need > 1.5) == (parallel.expert != 1)
    for path, a, b in gradients(one[0][1], many[0][1]):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), path
    biases = [jax.tree.leaves(state.router_state) for _, state in (one[1], many[1])]
    assert all(np.array_equal(a, b) for a, b in zip(*biases, strict=True))


def test_a_mesh_trains_as_one_device():
    check(ParallelConfig(expert=4, fsdp=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"expert": 8},
        {"replica": 2, "expert": 4},
        {"tensor": 2, "expert": -1},
        {"context": 2, "fsdp": 4},
    ],
    ids=str,
)
def test_more_meshes_train_as_one_device(sizes):
    check(ParallelConfig(**sizes))


needs_two = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@needs_two
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_two_devices_train_as_one(axis):
    check(ParallelConfig(**{axis: 2}))


@needs_two
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_two_devices_in_bfloat16_are_nearly_as_exact_as_one(axis):
    """The kernels of the chip run inside the mesh. Bound: twice one device's distance from float32.

    Over a tensor axis halves of sums are rounded before they are added, and with every rounding
    other near-ties between experts fall the other way, which moves more than rounding itself.
    """
    exact, one, many = (
        two_steps(ParallelConfig(**sizes), dtype)[0][0]
        for sizes, dtype in (({}, "float32"), ({}, "bfloat16"), ({axis: 2}, "bfloat16"))
    )

    def distance(a, b):
        """Of all gradients together, relative."""
        pairs = [(x, y) for _, x, y in gradients(a[1], b[1])]
        squares = [(np.sum((x - y) ** 2), np.sum(y**2)) for x, y in pairs]
        return math.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares))

    assert 0 < distance(many, one)
    assert distance(many, exact) <= 2 * distance(one, exact) < 0.2
    assert abs(many[0].loss - one[0].loss) <= 2**-9 * one[0].loss
    # Few near-ties, as between the precisions.
    moved, of = np.abs(many[0].load - one[0].load).sum() / 2, one[0].load.sum()
    assert many[0].load.sum() == of and moved <= 0.01 * of


def test_each_device_holds_its_share():
    """Parameters and moments; routed experts are split by expert and within it."""
    _, state = two_steps(ParallelConfig(expert=4, fsdp=2))
    check_shares(state)


def check_shares(state) -> None:
    experts = state.params["moe_layers"]["mlp"]["experts"]
    assert experts["gate_up_proj"].addressable_shards[0].data.shape == (1, 4, 16, 2, 20)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size


@pytest.fixture(scope="module")
def from_transformers(tmp_path_factory):
    """(folder, loss of the first batch) of a model that transformers made, filled and saved."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    hf_config = DeepseekV3Config(**CONFIG.model.to_hf(), attn_implementation="eager")
    model = DeepseekV3ForCausalLM(hf_config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)  # without it the loss would be 1e-3 off
        rows = torch.from_numpy(TOKENS[0].reshape(-1, 13)).long()
        loss = model(input_ids=rows, labels=rows).loss.item()
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    return folder, loss


@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "fsdp": 2}], ids=str)
def test_the_first_loss_from_weights_is_transformers(from_transformers, tmp_path, sizes):
    folder, expected = from_transformers
    config = dataclasses.replace(CONFIG, init_from=str(folder), init_missing_mtp=True)
    parallel = ParallelConfig(**sizes)
    store, mesh = CheckpointStore(tmp_path / "checkpoints"), mesh_of(parallel)
    model = Transformer(config.model, config.runtime)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        state = start_state(store, model, config, None, mesh, find_start(config))
    if sizes:
        check_shares(state)
    _, metrics = jitted_step(parallel, "float32")(state, TOKENS[0])
    # Float32 on both sides; measured 2.0e-7, on one device and on eight.
    assert float(metrics.main_loss) == pytest.approx(expected, rel=1e-6)
    assert abs(float(metrics.mtp_loss) - np.log(96)) < 1  # of modules that begin at random


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
