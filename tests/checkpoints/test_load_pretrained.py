"""`load_pretrained` of FP8 folders and onto meshes: exact values, each device its slice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from dsv3_jax import load_pretrained, to_hf_state_dict
from dsv3_jax.checkpoints import convert
from dsv3_jax.checkpoints.from_hf import from_hf
from dsv3_jax.checkpoints.hf_parts import PartReader
from dsv3_jax.checkpoints.inspect import describe
from dsv3_jax.checkpoints.safetensors_io import WeightsError
from dsv3_jax.checkpoints.store import CheckpointStore, describe_run
from dsv3_jax.config import ConfigError, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.mesh import make_mesh
from pallas_kernels import _choose
from tests.oracles import hf

# Sizes past one block of 128, most of them leaving partial blocks; 8 experts and a hidden size
# that 8 devices share out.
CONFIG = hf.config_of(
    "base",
    hidden_size=136,
    intermediate_size=144,
    moe_intermediate_size=152,
    n_shared_experts=1,
    q_lora_rank=28,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    v_head_dim=36,
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
)
NOT_QUANTIZED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")


def is_quantized(name):
    return not any(part in name for part in NOT_QUANTIZED)


def quantized(weights):
    """The released layout of float32 weights, in torch: codes and scales, the rest in bfloat16."""
    tensors = {}
    for name, weight in weights.items():
        weight = torch.from_numpy(weight)
        if not is_quantized(name):
            keeps = "e_score" in name or "mlp.gate." in name
            tensors[name] = weight if keeps else weight.to(torch.bfloat16)
            continue
        grid = [-(-n // 128) for n in weight.shape]
        scale = torch.empty(grid)
        for i, j in np.ndindex(*grid):
            block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            scale[i, j] = block.abs().max() / 448
        tensors[name] = (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    return tensors


def spread(scale, shape):
    row, column = np.indices(shape)
    return scale[row // 128, column // 128]


def dequantized(tensors):
    """Float32 NumPy values of every weight, by torch."""
    values = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale_inv"):
            value = tensor.to(torch.float32)
            if is_quantized(name):
                value = value * spread(tensors[f"{name}_scale_inv"], tensor.shape)
            values[name] = value.numpy()
    return values


def save(folder, tensors, config=CONFIG):
    """Weights in one shard, scales in another, as happens in releases."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"{name.endswith('_scale_inv')}.safetensors" for name in tensors}
    for shard in set(weight_map.values()):
        part = {n: t.clone() for n, t in tensors.items() if weight_map[n] == shard}
        safetensors.torch.save_file(part, folder / shard)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def tensors():
    return quantized(hf.random_weights(CONFIG, seed=1))


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    return save(tmp_path_factory.mktemp("fp8"), tensors)


@pytest.fixture(scope="module")
def ids():
    return hf.token_ids(CONFIG, batch=8, length=13)


@pytest.fixture(scope="module")
def loaded(folder):
    """(model, variables) on one device, dequantised to float32."""
    return load_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def logits(loaded, ids):
    """`logits(variables)`: the main and the MTP logits in float32, compiled once a layout."""
    model, _ = loaded

    def run(variables, ids):
        output = model.apply(variables, ids, mtp=True)
        return jnp.stack([output.logits, *output.mtp_logits])

    jitted = jax.jit(run)
    return lambda variables: np.asarray(jitted(variables, ids))


@pytest.fixture(scope="module")
def expected(loaded, logits):
    return logits(loaded[1])


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(expert=4, fsdp=2))


def same_bits(one, other):
    one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_fp8_folders_load_as_float32_and_as_bfloat16(folder, tensors, loaded):
    values = dequantized(tensors)
    model, variables = loaded
    got = to_hf_state_dict(model.config, variables)
    assert set(got) == set(values)
    assert all(same_bits(got[name], value) for name, value in values.items())
    model, variables = load_pretrained(folder)
    for name, tensor in to_hf_state_dict(model.config, variables).items():
        value = values[name]
        if "mlp.gate." not in name:
            # From the float32 product at once, not by way of a rounded scale or weight.
            value = torch.from_numpy(value).to(torch.bfloat16).view(torch.uint16).numpy()
            tensor = tensor.view(np.uint16)
        assert same_bits(tensor, value), name


def test_fp8_can_be_kept(folder, tensors, logits, expected, relative_l2):
    model, variables = load_pretrained(folder, dtype="float32", keep_fp8=True)
    assert set(variables) == {"params", "router_state", "scales"}
    got = to_hf_state_dict(model.config, variables)
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert str(got[name].dtype) == "float8_e4m3fn"
            assert same_bits(got[name].view(np.uint8), tensor.view(torch.uint8).numpy()), name
        else:
            assert same_bits(got[name], tensor.to(torch.float32).numpy()), name
    # The same float32 weights; how the products with them are fused may round differently.
    assert relative_l2(logits(variables), expected) < 1e-6


def test_kept_fp8_decodes(folder, loaded, ids, expected, relative_l2):
    model, variables = load_pretrained(folder, dtype="float32", keep_fp8=True)
    cache = init_cache(model.config, len(ids), ids.shape[1], "float32")
    decode = jax.jit(lambda variables, ids, cache: model.apply(variables, ids, cache=cache).logits)
    # The absorbed form splits kv_b_proj's kernel; float32 sums in another order.
    assert relative_l2(decode(variables, ids, cache), expected[0]) < 1e-5


def test_kept_fp8_without_its_scales_is_an_error(folder, ids):
    model, variables = load_pretrained(folder, dtype="float32", keep_fp8=True)
    del variables["scales"]["moe_layers"]["mlp"]["experts"]["down_proj"]
    with pytest.raises(ValueError, match="moe_layers/mlp/experts/down_proj must have its scales"):
        jax.eval_shape(model.apply, variables, ids)


def check_layout(variables, whole, mesh):
    """Each device holds its slice and nothing else, and the slices make up `whole`."""
    held = dict.fromkeys(mesh.devices.flat, 0)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables)]
    for name, leaf, want in zip(names, jax.tree.leaves(variables), whole, strict=True):
        assert leaf.sharding.mesh == mesh and len(leaf.addressable_shards) == mesh.size
        for shard in leaf.addressable_shards:
            assert same_bits(shard.data, np.asarray(want)[shard.index]), name
            held[shard.device] += shard.data.nbytes
        ways = leaf.size // leaf.addressable_shards[0].data.size
        if "'experts'" in name and "scales" not in name:
            assert ways == 8  # whole experts over 4, D over 2
            assert leaf.sharding.shard_shape(leaf.shape)[-4 if "gate_up" in name else -3] == 2
        elif "kernel" in name and "gate'" not in name:
            assert ways == 8 or leaf.shape[-2] % 8, name
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    # All but the norms, the router and dimensions of 28 that 8 does not divide is shared out.
    assert max(held.values()) < 0.2 * total


@pytest.mark.parametrize("keep_fp8", [False, True])
def test_a_mesh_gets_each_device_its_slice(
    folder, loaded, logits, expected, mesh, keep_fp8, monkeypatch, relative_l2
):
    whole = loaded[1]
    if keep_fp8:
        whole = load_pretrained(folder, dtype="float32", keep_fp8=True)[1]
    # Pieces smaller than most shards: what passes through the host is bounded by them.
    monkeypatch.setattr(convert, "_PIECE_BYTES", 20_000)
    read, sizes = PartReader.read, []

    def recorded(self, path, part, dtype):
        array = read(self, path, part, dtype)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(PartReader, "read", recorded)
    model, variables = load_pretrained(folder, mesh, "float32", keep_fp8=keep_fp8)
    assert max(sizes) <= 20_000
    # Nothing is read for one device that another already got.
    unique = 0
    for leaf in jax.tree.leaves(variables):
        parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        unique += sum(parts.values())
    assert sum(sizes) == unique
    check_layout(variables, jax.tree.leaves(whole), mesh)
    with jax.set_mesh(mesh):
        got = logits(variables)
    # float32 sums over D and over experts, in parts on each device.
    assert relative_l2(got, expected) < 1e-5


def test_loading_inside_the_mesh_and_onto_few_axes(folder, loaded):
    other = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ConfigError, match="mesh axis 'data' must be one of replica, fsdp"):
        load_pretrained(folder, other)
    mesh = jax.make_mesh((8,), ("tensor",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        _, variables = load_pretrained(folder, mesh, "float32")
    kernel = variables["params"]["dense_layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 136, 144 // 8)
    np.testing.assert_array_equal(
        np.asarray(kernel), loaded[1]["params"]["dense_layers"]["mlp"]["up_proj"]["kernel"]
    )


def test_our_checkpoint_onto_a_mesh(tmp_path, loaded, logits, expected, mesh, relative_l2):
    model, variables = loaded
    run = TrainConfig(model=model.config, data=DataConfig(sequence_length=64), total_tokens=10**6)
    stored = jax.tree.map(lambda leaf: leaf, variables)
    # As a converted folder may hold it: each array with a dtype of its own.
    norm = stored["params"]["norm"]
    norm["weight"] = norm["weight"].astype(jnp.bfloat16)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(3, {**stored, "moments": stored["params"]["norm"]}, describe_run(run, sequences=5))
    store.close()
    model, restored = load_pretrained(tmp_path, mesh, "float32")
    check_layout(restored, jax.tree.leaves(variables), mesh)
    with jax.set_mesh(mesh):
        assert relative_l2(logits(restored), expected) < 1e-5
    _, rounded = load_pretrained(tmp_path, mesh)
    dtypes = {
        jax.tree_util.keystr(path): str(leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(rounded)
    }
    assert {name for name, kind in dtypes.items() if kind == "float32"} == {
        name for name in dtypes if "'gate'" in name
    }
    with pytest.raises(ConfigError, match="keep_fp8=True needs a Hugging Face folder"):
        load_pretrained(tmp_path, keep_fp8=True)


def test_a_converted_folder_onto_a_mesh(tmp_path, folder, loaded, mesh):
    from_hf(folder, tmp_path / "converted", dtype="float32")
    for path in (tmp_path / "converted", tmp_path / "converted" / "checkpoints"):
        _, restored = load_pretrained(path, mesh, "float32")
        check_layout(restored, jax.tree.leaves(loaded[1]), mesh)
    lines = describe(tmp_path / "converted").splitlines()
    assert lines[0].endswith("converted weights, checkpoint of step 0")
    assert any("scales of the FP8 original in fp8_scales" in line for line in lines)


WEIGHT = "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALE), f"'{WEIGHT}' has no '{SCALE}' .*False.safetensors"),
        (lambda t: t.pop(WEIGHT), f"'{WEIGHT}' is missing"),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.bfloat16)}),
            f"'{SCALE}' scales a weight of dtype bfloat16.*True.safetensors",
        ),
        (
            lambda t: t.update({SCALE: t[SCALE][:1]}),
            rf"'{SCALE}' is float32 \[1, 2\], must be float32 \[2, 2\].*True.safetensors",
        ),
        (lambda t: t.update({SCALE: t[SCALE].to(torch.bfloat16)}), f"'{SCALE}' is bfloat16"),
        (
            lambda t: t.update({"model.norm.weight_scale_inv": t[SCALE]}),
            "'model.norm.weight_scale_inv' scales a weight of dtype bfloat16",
        ),
        (
            lambda t: t.update({"model.x.weight_scale_inv": t[SCALE]}),
            "'model.x.weight_scale_inv' fills no parameter .*True.safetensors",
        ),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].view(torch.uint8)}),
            f"'{WEIGHT}' has dtype uint8, must be a floating-point",
        ),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e5m2)}),
            f"'{WEIGHT}' has dtype float8_e5m2, must be a floating-point",
        ),
    ],
)
def test_scales_and_weights_must_belong_together(tmp_path, tensors, change, message):
    changed = dict(tensors)
    change(changed)
    with pytest.raises(WeightsError, match=message):
        load_pretrained(save(tmp_path, changed))


def test_quantization_must_be_described(tmp_path, tensors):
    described = CONFIG["quantization_config"]
    for config, message in (
        (None, "FP8 tensor .* needs a quantization_config"),
        ({**described, "quant_method": "awq"}, "quant_method='awq' must be 'fp8'"),
        ({**described, "weight_block_size": [128]}, r"weight_block_size=\[128\] must be two"),
    ):
        folder = save(tmp_path, tensors, {**CONFIG, "quantization_config": config})
        with pytest.raises(ConfigError, match=message):
            load_pretrained(folder)


def test_fp8_is_kept_only_where_it_can_be(tmp_path, tensors, checkpoint):
    with pytest.raises(ConfigError, match="keep_fp8=True needs FP8 weights in blocks of 128"):
        load_pretrained(checkpoint("base").folder, keep_fp8=True)
    mixed = dict(tensors)
    mixed[WEIGHT] = torch.zeros(tensors[WEIGHT].shape, dtype=torch.bfloat16)
    del mixed[SCALE]
    _, variables = load_pretrained(save(tmp_path, mixed), keep_fp8=True)
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]
    assert str(experts["gate_up_proj"].dtype) == "bfloat16"
    assert str(experts["down_proj"].dtype) == "float8_e4m3fn"
    assert set(variables["scales"]["moe_layers"]["mlp"]["experts"]) == {"down_proj"}


@pytest.mark.parametrize("keep_fp8", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.2.mlp.gate.weight", np.nan),
        ("model.layers.2.input_layernorm.weight", -np.inf),
        (WEIGHT, np.nan),
        (SCALE, np.inf),
    ],
)
def test_nan_and_infinity_are_named(tmp_path, tensors, mesh, name, value, keep_fp8):
    changed = dict(tensors)
    changed[name] = tensors[name].clone()
    changed[name].view(-1)[-1] = value
    folder = save(tmp_path, changed)
    file = folder / f"{name.endswith('_scale_inv')}.safetensors"
    with pytest.raises(WeightsError) as caught:
        load_pretrained(folder, mesh, keep_fp8=keep_fp8)
    assert str(caught.value) == f"tensor {name!r} has NaN or infinite weights ({file})"
    load_pretrained(folder, keep_fp8=keep_fp8, allow_nonfinite=True)


def test_shapes_alone_choose_no_kernel_aloud(caplog):
    config = ModelConfig.from_hf(CONFIG | {"num_hidden_layers": 2, "first_k_dense_replace": 1})
    caplog.set_level("INFO", "pallas_kernels")
    _choose._log_once.cache_clear()
    convert.abstract_variables(config)["params"].clear()
    assert not caplog.records
    assert convert.abstract_variables(config)["params"]  # what a caller does to it is its own
    jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert "grouped_matmul: using the portable implementation" in caplog.text
