"""Hugging Face folders as released, BF16 and FP8, small; and `convert.py` in this process."""

import dataclasses
import importlib.util
import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import cli
from tests.oracles import hf

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
# Wider than a block of 128, and no multiple of it.
FP8_SIZES = {
    "hidden_size": 200,
    "intermediate_size": 300,
    "moe_intermediate_size": 136,
    "q_lora_rank": 144,
    "kv_lora_rank": 130,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
IN_BF16 = ("embed_tokens", "lm_head", "head.weight", "mlp.gate.weight", "eh_proj", "norm")


@dataclasses.dataclass
class Released:
    """A folder, its tensors, and for FP8 weights their values in float32."""

    folder: Path
    config: dict
    tensors: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


def as_released(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All in BF16 but the router's bias, as the release has them."""
    return {
        name: array if name.endswith("correction_bias") else array.astype(BF16)
        for name, array in weights.items()
    }


def with_fp8(tensors: dict[str, np.ndarray], seed: int) -> tuple[dict, dict]:
    """(tensors with random codes and scales for the linears, their values in float32)."""
    rng = np.random.default_rng(seed)
    result, values = {}, {}
    for name, array in tensors.items():
        result[name] = array
        if array.ndim < 2 or any(part in name for part in IN_BF16):
            continue
        rows, columns = array.shape
        codes = rng.integers(0, 256, array.shape, dtype=np.uint8)
        codes[(codes & 0x7F) == 0x7F] ^= 1  # NaN
        scale = rng.uniform(1e-4, 1e-2, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
        result[name] = codes.view(E4M3)
        result[name + "_scale_inv"] = scale
        spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:rows, :columns]
        values[name] = codes.view(E4M3).astype(np.float32) * spread
    return result, values


def save(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 3) -> Path:
    """As `hf.save`, for dtypes that safetensors' NumPy writer lacks too; and a tokenizer file."""
    codes = {np.dtype(BF16): "BF16", np.dtype(E4M3): "F8_E4M3", np.dtype(np.float32): "F32"}
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, data = {}, b""
        for name in names[shard::shards]:
            array, start = tensors[name], len(data)
            data += array.tobytes()
            header[name] = {
                "dtype": codes[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [start, len(data)],
            }
            weight_map[name] = file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


@pytest.fixture(scope="session")
def bf16(tmp_path_factory):
    """Factory: `bf16("base")` is a variant of `tests.oracles.hf` as it would be released."""
    made = {}

    def make(variant: str = "base") -> Released:
        if variant not in made:
            config = hf.config_of(variant)
            tensors = as_released(hf.random_weights(config, 3))
            folder = save(tmp_path_factory.mktemp(f"bf16_{variant}"), config, tensors)
            made[variant] = Released(folder, config, tensors, {})
        return made[variant]

    return make


@pytest.fixture(scope="session")
def fp8(tmp_path_factory) -> Released:
    """An FP8 folder with an MTP layer."""
    config = hf.config_of("base", **FP8_SIZES)
    tensors, values = with_fp8(as_released(hf.random_weights(config, 3)), seed=5)
    return Released(save(tmp_path_factory.mktemp("fp8"), config, tensors), config, tensors, values)


@pytest.fixture
def convert(capsys, monkeypatch):
    """`convert("from-hf", SRC, DST)` -> (exit code, lines on stderr without progress)."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(script.main)
        lines = capsys.readouterr().err.splitlines()
        return ended.value.code, [
            line for line in lines if "GB/" not in line and "MB/s" not in line
        ]

    return call


def digest(folder: Path) -> dict[str, int]:
    """{file: CRC-32} of everything below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder, read by a few lines of this file's own."""
    kinds = {"BF16": BF16, "F8_E4M3": E4M3, "F32": np.float32}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    result = {}
    for file in sorted(set(index["weight_map"].values())):
        raw = (folder / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                continue
            assert index["weight_map"][name] == file
            begin, end = entry["data_offsets"]
            array = np.frombuffer(raw[start + begin : start + end], kinds[entry["dtype"]])
            result[name] = array.reshape(entry["shape"])
    assert result.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in result.values())
    return result


def assert_same_tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name
