"""`describe`: what it says of folders and checkpoints, whole and odd ones."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoints.inspect import describe
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, WeightsError
from dsv3_jax.checkpoints.store import CheckpointStore, describe_run
from dsv3_jax.config import ConfigError, DataConfig, TrainConfig
from dsv3_jax.training.flops import parameter_counts
from tests.oracles import hf


def lines_of(text):
    """{title: its lines} of a description."""
    found, title = {}, ""
    for line in filter(None, text.splitlines()[1:]):
        title = line[:13].strip() or title  # without one it continues the line before
        found.setdefault(title, []).append(" ".join(line[13:].split()))
    return found


@pytest.fixture
def no_weights_read(monkeypatch):
    def refuse(self):
        raise AssertionError("inspecting reads headers only")

    monkeypatch.setattr(TensorEntry, "read", refuse)


def test_a_whole_folder(checkpoint, tmp_path, no_weights_read):
    base = checkpoint("base")
    hf.save(tmp_path, base.config, base.weights, shards=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    text = describe(tmp_path)
    lines = lines_of(text)
    assert text.startswith(f"{tmp_path}: Hugging Face folder, model_type 'deepseek_v3'")
    assert lines["layers"] == [
        "2 dense + 2 MoE (12 experts in 4 groups, 3 a token, 2 shared) + 1 MTP module"
    ]
    assert lines["quantisation"] == ["none"]
    total = sum(array.nbytes for array in base.weights.values())
    assert lines["F32"] == [f"{len(base.weights)} tensors {total / 1000:.2f} kB"]
    assert lines["files"][0].startswith("3 shards, ")
    assert lines["tokenizer"] == ["tokenizer.json"]
    assert lines["tied copies"] == [
        "model.layers.4.embed_tokens.weight = model.embed_tokens.weight",
        "model.layers.4.shared_head.head.weight = lm_head.weight",
    ]
    assert lines["unmapped"] == lines["missing"] == ["none"]
    assert lines["verdict"] == ["every tensor and parameter has its place"]
    assert re.search(r"  lm_head.weight +14.24 kB  F32 \[89, 40\]", text)


@pytest.mark.parametrize("variant", ["base", "moonlight", "all_dense"])
def test_parameters_are_counted_as_for_training(checkpoint, variant):
    loaded = checkpoint(variant)
    counts = parameter_counts(loaded.model.config)
    said = lines_of(describe(loaded.folder))["parameters"][0]
    expected = f"{counts.total / 1e3:.2f} k, {counts.active / 1e3:.2f} k active a token"
    if counts.mtp:
        expected += f"; MTP {counts.mtp / 1e3:.2f} k more"
    assert said == expected


def test_what_does_not_fit_is_named_and_not_refused(checkpoint, tmp_path, no_weights_read):
    base = checkpoint("base")
    weights = dict(base.weights)
    zeros = np.zeros((2, 3), np.float32)
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]
    weights["model.norm.weight"] = weights["model.norm.weight"][:7]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = zeros
    weights |= {f"model.extra{number}": zeros for number in range(10)}
    weights["model.codes"] = zeros.astype(np.int8)
    lines = lines_of(describe(hf.save(tmp_path, base.config, weights)))
    assert lines["missing"] == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert lines["misshapen"] == ["model.norm.weight [7], needs [40]"]
    assert lines["ignored"] == ["1 tensor: recomputed from the configuration"]
    assert lines["unmapped"][0] == "model.codes" and lines["unmapped"][-1] == "and 3 more"
    assert lines["I8"] == ["1 tensor 6 B"]
    assert lines["verdict"][0].startswith("refused on loading: tensor 'model.norm.weight' has")


def test_quantisation(checkpoint, tmp_path, no_weights_read):
    base = checkpoint("base")
    weights = dict(base.weights)
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = np.zeros(weights[name].shape, np.int8)
    weights[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    described = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    hf.save(tmp_path, {**base.config, "quantization_config": described}, weights)
    # The NumPy writer has no FP8: the other type of one byte is renamed in the header.
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = (int.from_bytes(raw[:8], "little") + 5).to_bytes(8, "little")
    renamed = raw[8:].replace(b'"I8"', b'"F8_E4M3"', 1)
    (tmp_path / "model.safetensors").write_bytes(length + renamed)
    lines = lines_of(describe(tmp_path))
    assert lines["quantisation"] == [
        "1 FP8 weights; config.json: quant_method fp8, fmt e4m3, weight_block_size [128, 128]"
    ]
    assert lines["F8_E4M3"] == [f"1 tensor {weights[name].nbytes / 1000:.2f} kB"]
    assert lines["unmapped"] == ["none"]


def test_another_architecture_is_described_by_its_tensors(checkpoint, tmp_path):
    base = checkpoint("base")
    hf.save(tmp_path, {"model_type": "llama", "quantization_config": "?"}, base.weights)
    lines = lines_of(describe(tmp_path))
    assert "model_type='llama' must be one of deepseek_v3" in lines["refused"][0]
    assert "verdict" not in lines and lines["all"]
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="not valid JSON.*config.json"):
        describe(tmp_path)


def test_a_run(checkpoint, tmp_path):
    base = checkpoint("base")
    model, variables = base.loaded
    config = TrainConfig(
        model=model.config, data=DataConfig(sequence_length=64), total_tokens=10**6
    )
    half = variables["params"]["norm"]["weight"].astype(ml_dtypes.bfloat16)
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (3, 8):
        state = {**variables, "moments": {"norm": half}}
        store.save(step, state, describe_run(config, sequences=1500))
    store.close()
    for path in (tmp_path, tmp_path / "checkpoints"):
        lines = lines_of(describe(path))
        assert lines["steps"] == ["3, 8; 1,500 sequences seen"]
        assert lines["bfloat16"] == ["1 array 80 B"]
        assert lines["besides"] == ["moments (1 array)"]
        assert lines["unmapped"] == lines["missing"] == ["none"]
        assert lines["layers"] == lines_of(describe(base.folder))["layers"]
    _, loaded = load_pretrained(tmp_path, dtype="float32")
    assert "norm" in loaded["params"]


def test_neither(tmp_path):
    with pytest.raises(WeightsError, match="neither a config.json nor checkpoints/"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf.BASE))
    with pytest.raises(WeightsError, match="0 .safetensors files"):
        describe(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in"):
        describe(tmp_path)
