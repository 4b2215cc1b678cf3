"""What a Hugging Face folder holds besides numbers: shards and their headers, config, tokenizer."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoints.fp8 import DEFAULT_BLOCK
from dsv3_jax.checkpoints.safetensors_io import DTYPE_CODES, INDEX
from dsv3_jax.config import ModelConfig

# Tokenizer, generation settings and licence; never weights in another format, and never code.
_COPIED = (
    "tokenizer*.json",
    "tokenizer.model",
    "*tiktoken*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
)
# Keys of config.json that the network does not need and a tokenizer or sampler may.
_PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a .safetensors file, and the first byte of every tensor in it.

    The widest dtypes come first, so that every tensor is aligned to its own.
    """
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for output in ordered:
        offsets[output.name], end = end, end + output.nbytes
        header[output.name] = {
            "dtype": DTYPE_CODES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offsets[output.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}


def shards_of(groups: Sequence[Sequence[Output]], limit: int) -> dict[str, list[Output]]:
    """{file: tensors}: shards of at most `limit` bytes; a group stays together."""
    shards: list[list[Output]] = []
    size = 0
    for group in groups:
        extra = sum(output.nbytes for output in group)
        if not shards or size + extra > limit:
            shards.append([])
            size = 0
        shards[-1] += group
        size += extra
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_index(folder: Path, shards: dict[str, list[Output]]) -> None:
    """Writes `model.safetensors.index.json`."""
    weight_map = {output.name: file for file, shard in shards.items() for output in shard}
    total = sum(output.nbytes for shard in shards.values() for output in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(
    folder: Path, config: ModelConfig, source: dict[str, Any], dtype: str, *, fp8: bool
) -> None:
    """Writes `config.json`; `source` is the one that the weights came with, {} if none."""
    raw = config.to_hf() | {key: source[key] for key in _PASSED_ON if key in source}
    raw["torch_dtype"] = dtype
    if fp8:
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(DEFAULT_BLOCK),
        }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer files, generation_config.json and the like."""
    names = {path.name for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)
