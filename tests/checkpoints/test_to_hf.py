"""Export to Hugging Face folders: bit-exact round trips, FP8, shards, and who can read them."""

import json

import jax
import numpy as np
import pytest

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoints.from_hf import from_hf
from dsv3_jax.checkpoints.metadata import describe_run
from dsv3_jax.checkpoints.safetensors_io import WeightsError
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.checkpoints.to_hf import to_hf
from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from tests.checkpoints.conftest import (
    BF16,
    E4M3,
    IN_BF16,
    assert_same_tensors,
    save,
    tensors_of,
)
from tests.oracles import hf


@pytest.fixture
def converted(bf16, tmp_path):
    from_hf(bf16().folder, tmp_path / "converted")
    return tmp_path / "converted"


@pytest.mark.parametrize("variant", ["base", "moonlight", "two_mtp_modules", "all_dense"])
def test_bf16_comes_back_bit_for_bit(variant, bf16, tmp_path):
    released = bf16(variant)
    count = len(released.tensors)
    depth = released.config["num_nextn_predict_layers"]
    said = from_hf(released.folder, tmp_path / "ours")
    tied = f", {2 * depth} tied" if depth else ""
    assert said.startswith(f"{count} tensors: {count - 2 * depth} mapped{tied} (")
    said = to_hf(tmp_path / "ours", tmp_path / "back")
    assert said.startswith(f"{count} tensors, {count} of {count} with the bytes they came with (")
    assert_same_tensors(tensors_of(tmp_path / "back"), released.tensors)
    assert ModelConfig.from_hf(tmp_path / "back") == ModelConfig.from_hf(released.folder)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (released.folder / name).read_bytes()
    ledger = json.loads((tmp_path / "back" / "ledger.json").read_text())
    assert ledger["tensors"].keys() == released.tensors.keys()
    assert ledger["same_bytes"] == ledger["compared_to_origin"] == count


def test_transformers_computes_the_same_from_the_export(checkpoint, tmp_path):
    import torch

    loaded = checkpoint("base")
    from_hf(loaded.folder, tmp_path / "ours", dtype="float32")
    to_hf(tmp_path / "ours", tmp_path / "back")
    ids = torch.tensor(loaded.token_ids, dtype=torch.long)
    with torch.no_grad():
        want = loaded.transformers(ids).logits
        got = hf.load_transformers(tmp_path / "back")(ids).logits
    assert torch.equal(got, want)  # the same numbers in the same order of operations
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


def test_fp8_comes_back_bit_for_bit(fp8, tmp_path):
    from_hf(fp8.folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", fp8=True)
    assert_same_tensors(tensors_of(tmp_path / "back"), fp8.tensors)
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw["quantization_config"] == fp8.config["quantization_config"]
    assert raw["torch_dtype"] == "bfloat16"


def test_fp8_to_bf16_is_the_product_rounded_once(fp8, tmp_path):
    from_hf(fp8.folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    want = {n: a for n, a in fp8.tensors.items() if not n.endswith("_scale_inv")}
    want |= {name: value.astype(BF16) for name, value in fp8.values.items()}
    assert_same_tensors(tensors_of(tmp_path / "back"), want)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_bf16_to_fp8_quantises_the_linears_of_the_release(bf16, converted, tmp_path):
    to_hf(converted, tmp_path / "back", fp8=True)
    got = tensors_of(tmp_path / "back")
    weights = bf16().tensors
    linears = {
        name for name, a in weights.items() if a.ndim == 2 and not any(p in name for p in IN_BF16)
    }
    assert {name for name, array in got.items() if array.dtype == E4M3} == linears
    assert got.keys() == weights.keys() | {f"{name}_scale_inv" for name in linears}
    for name in linears:
        scale = got[f"{name}_scale_inv"]
        assert scale.shape == (1, 1)
        value, error = weights[name].astype(np.float64), float(scale[0, 0])
        off = np.abs(got[name].astype(np.float64) * error - value)
        # Half the distance between neighbours: 2^-4 of the value, 2^-10 scales near zero.
        assert (off <= np.maximum(np.abs(value) * 2**-4, error * 2**-10) * (1 + 1e-6)).all(), name


def test_a_hugging_face_folder_is_sharded_anew_and_cast(bf16, fp8, tmp_path):
    to_hf(bf16().folder, tmp_path / "small", max_shard_size="60KB")
    assert_same_tensors(tensors_of(tmp_path / "small"), bf16().tensors)
    files = sorted(file.name for file in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "small" / file).stat().st_size < 80_000 for file in files)
    to_hf(fp8.folder, tmp_path / "same", fp8=True)
    assert_same_tensors(tensors_of(tmp_path / "same"), fp8.tensors)
    to_hf(fp8.folder, tmp_path / "cast")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    got = tensors_of(tmp_path / "cast")[name]
    assert got.tobytes() == fp8.values[name].astype(BF16).tobytes()


def test_tied_copies_are_written_where_there_were_any(bf16, tmp_path):
    released = bf16()
    copy = "model.layers.4.shared_head.head.weight"
    tensors = {name: array for name, array in released.tensors.items() if name != copy}
    from_hf(save(tmp_path / "without", released.config, tensors), tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors)


def test_a_hugging_face_folder_with_unequal_copies_is_refused(bf16, tmp_path):
    released = bf16()
    copy = "model.layers.4.shared_head.head.weight"
    tensors = released.tensors | {copy: released.tensors[copy] + BF16(1)}
    folder = save(tmp_path / "unequal", released.config, tensors)
    with pytest.raises(WeightsError, match=rf"'{copy}' .* must equal 'lm_head\.weight'"):
        to_hf(folder, tmp_path / "back")


def test_layers_are_in_order_over_the_shards(bf16, tmp_path):
    to_hf(bf16().folder, tmp_path / "small", max_shard_size="60KB")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    files = list(index["weight_map"].values())
    assert files == sorted(files)
    first_mtp = next(i for i, name in enumerate(names) if ".layers.4." in name)
    assert {"lm_head.weight", "model.norm.weight"} == set(names[first_mtp - 2 : first_mtp])


def test_a_run_exports_its_newest_step_as_released(bf16, tmp_path):
    released = bf16("two_mtp_modules")
    _, variables = load_pretrained(released.folder, dtype="float32")
    config = TrainConfig(
        model=ModelConfig.from_hf(released.folder),
        data=DataConfig(sequence_length=64),
        total_tokens=640,
    )
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step, factor in ((1, 2.0), (2, 1.0)):
        state = jax.tree.map(lambda leaf, f=factor: leaf * f, variables)
        store.save(step, {**state, "moments": state["params"]}, describe_run(config, sequences=1))
    store.close()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    (tmp_path / "run" / "summary.json").write_text("{}")
    to_hf(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert not (tmp_path / "back" / "summary.json").exists()
    assert_same_tensors(tensors_of(tmp_path / "back"), released.tensors)


def test_a_damaged_checkpoint_is_named(converted, convert, tmp_path):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    line = json.loads((converted / "ledger.json").read_text())["tensors"][name]
    assert line["to"] == "params/moe_layers/mlp/experts/gate_up_proj"
    assert line["index"] == [0, 5, ":", 1]
    file = converted / "checkpoints/0/state/params.moe_layers.mlp.experts.gate_up_proj/c.0.5.0.1.0"
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(raw)
    code, (message,) = convert("to-hf", converted, tmp_path / "back")
    assert code == 2 and name in message and str(file) in message and "changed" in message
    file.write_bytes(raw[:-1])
    code, (message,) = convert("to-hf", converted, tmp_path / "other")
    assert code == 2 and name in message and "ends early" in message
    assert not (tmp_path / "back").exists()


def test_a_ledger_that_disagrees_is_noticed(converted, tmp_path):
    ledger = json.loads((converted / "ledger.json").read_text())
    ledger["tensors"]["model.norm.weight"]["crc32"] ^= 1
    (converted / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight' is not the one in ledger\.json"):
        to_hf(converted, tmp_path / "back")


def test_a_step_trained_in_a_converted_folder_is_not_taken_for_the_original(
    bf16, converted, tmp_path
):
    _, variables = load_pretrained(bf16().folder, dtype="float32")
    store = CheckpointStore(converted / "checkpoints")
    metadata = store.read_metadata()
    del metadata["converted"]
    store.save(1, jax.tree.map(lambda leaf: leaf * 2, variables), metadata)
    store.close()
    to_hf(converted, tmp_path / "back")
    norm = "model.norm.weight"
    np.testing.assert_array_equal(
        tensors_of(tmp_path / "back")[norm].astype(np.float32),
        2 * bf16().tensors[norm].astype(np.float32),
    )


def test_bad_arguments(converted, convert, tmp_path):
    for size in ("0", "5XB", "-1GB", ""):
        code, (message,) = convert("to-hf", converted, tmp_path / "a", f"--max-shard-size={size}")
        assert code == 2 and "must be a size such as 5GB" in message
    code, (message,) = convert("to-hf", tmp_path / "none", tmp_path / "a")
    assert code == 2 and "neither a config.json nor checkpoints/" in message
    code, (message,) = convert("to-hf", converted, converted)
    assert code == 2 and "exists and is not empty" in message
