"""The ledger's decisions, from names, shapes and dtypes alone: none of these files exists."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoints import hf_names, ledger
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError
from dsv3_jax.config import ConfigError, ModelConfig
from tests.checkpoints.conftest import FP8_SIZES
from tests.oracles import hf

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FOLDER = Path("/nowhere")
RAW = hf.config_of("base", **FP8_SIZES)
CONFIG = ModelConfig.from_hf(RAW)
NAME = "model.layers.1.mlp.shared_experts.down_proj.weight"  # [200, 272]


@pytest.fixture(scope="module")
def shapes():
    return ledger.parameter_shapes(abstract_variables(CONFIG))


@pytest.fixture
def entries():
    return {
        name: TensorEntry(FOLDER / "model-00001-of-00002.safetensors", BF16, shape, 0)
        for name, shape in hf.tensor_shapes(RAW).items()
    }


def entry(dtype, *shape):
    return TensorEntry(FOLDER / "model-00002-of-00002.safetensors", np.dtype(dtype), shape, 0)


def assign(shapes, entries, block=(128, 128)):
    return ledger.assign(FOLDER, CONFIG, shapes, entries, block)


def test_every_tensor_has_one_fate_and_every_slot_one_tensor(shapes, entries):
    entries[NAME] = entry(FP8, 200, 272)
    entries[NAME + "_scale_inv"] = entry(np.float32, 2, 3)
    leftover = "model.layers.0.self_attn.rotary_emb.inv_freq"
    entries[leftover] = entry(np.float32, 4)
    plan = {item.name: item for item in assign(shapes, entries)}
    assert plan.keys() == entries.keys()
    assert plan[NAME].scale == entries[NAME + "_scale_inv"]
    assert (plan[NAME + "_scale_inv"].status, plan[NAME + "_scale_inv"].other) == ("scale", NAME)
    assert plan["model.layers.2.shared_head.head.weight"].other == "lm_head.weight"
    assert plan[leftover].status == "ignored" and plan[leftover].reason
    filled = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for item in plan.values():
        if item.status == "mapped":
            filled[item.row.path][item.row.index] += 1
    assert all((count == 1).all() for count in filled.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (NAME, None, f"tensor '{NAME}' is missing"),
        ("model.layers.3.mlp.gate.weight", entry(BF16, 4, 200), "fills no parameter"),
        ("extra_scale_inv", entry(np.float32, 1, 1), "'extra_scale_inv' fills no parameter"),
        (NAME, entry(BF16, 272, 200), r"has shape \[272, 200\], the config needs \[200, 272\]"),
        (NAME, entry(np.int32, 200, 272), "has dtype int32, must be a floating-point number"),
        (NAME, entry(ml_dtypes.float8_e5m2, 200, 272), "has dtype float8_e5m2"),
        (NAME, entry(FP8, 200, 272), f"FP8 tensor '{NAME}' has no '{NAME}_scale_inv'"),
        (NAME + "_scale_inv", entry(np.float32, 2, 3), "scales a weight of dtype bfloat16"),
        (
            "model.layers.2.embed_tokens.weight",
            entry(np.float32, 89, 200),
            r"is float32 \[89, 200\], must equal 'model.embed_tokens.weight', which is bfloat16",
        ),
    ],
)
def test_left_over_missing_and_misfitting_tensors_are_named(shapes, entries, name, value, message):
    entries[name] = value
    if value is None:
        del entries[name]
    with pytest.raises(WeightsError, match=message) as caught:
        assign(shapes, entries)
    assert str(FOLDER) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "block", "message"),
    [
        (entry(np.float32, 2, 2), (128, 128), r"float32 \[2, 2\], must be float32 \[2, 3\]"),
        (entry(BF16, 2, 3), (128, 128), "bfloat16"),
        (entry(np.float32, 2, 3), None, "needs a quantization_config"),
        (entry(np.float32, 2, 3), (64, 128), r"must be float32 \[4, 3\]"),
    ],
)
def test_scales_must_fit_the_declared_blocks(shapes, entries, scale, block, message):
    entries[NAME], entries[NAME + "_scale_inv"] = entry(FP8, 200, 272), scale
    with pytest.raises(WeightsError, match=message):
        assign(shapes, entries, block)


def test_a_parameter_without_a_tensor_and_one_filled_twice_are_errors(shapes, entries, monkeypatch):
    with pytest.raises(WeightsError, match="parameter params/new has 6 elements, of which 0"):
        assign({**shapes, ("params", "new"): (2, 3)}, entries)
    with pytest.raises(WeightsError, match="'lm_head.weight' has no parameter params/lm_head"):
        assign({p: s for p, s in shapes.items() if "lm_head" not in p}, entries)
    rows = list(hf_names.rows(CONFIG))
    twice = [*rows, hf_names.Row("again", rows[0].path, rows[0].index)]
    monkeypatch.setattr(hf_names, "rows", lambda config: iter(twice))
    with pytest.raises(WeightsError, match="'again' fills a slot that another one fills"):
        assign(shapes, entries | {"again": entries[rows[0].name]})


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method='awq' must be 'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' must be 'e4m3'"),
        ({"quant_method": "fp8"}, "weight_block_size=None must be two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
        ("fp8", "fmt='fp8' must be"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, quantization, message):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=message):
        ledger.block_size(tmp_path)


def test_a_ledger_reads_back_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "ledger.json"
    ledger.write_ledger(path, {"direction": "x"}, {"a": {"crc32": 1}, "b": {"crc32": 2}})
    read = ledger.read_ledger(path)
    assert (read["direction"], read["tensors"]) == ("x", {"a": {"crc32": 1}, "b": {"crc32": 2}})
    path.write_text(path.read_text()[:-4])
    with pytest.raises(WeightsError, match="the ledger cannot be read.*ledger.json"):
        ledger.read_ledger(path)
