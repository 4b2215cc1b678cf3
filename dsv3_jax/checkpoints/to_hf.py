"""A checkpoint to a Hugging Face folder, in bounded memory: `convert.py to-hf`."""

import dataclasses
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.direct_io import DirectWriter, bytes_of
from dsv3_jax.checkpoints.fp8 import DEFAULT_BLOCK, quantize_blocks
from dsv3_jax.checkpoints.hf_folder import (
    Output,
    copy_side_files,
    header_of,
    shards_of,
    write_config,
    write_index,
)
from dsv3_jax.checkpoints.ledger import FP8, LEDGER, SCALE_SUFFIX, read_ledger, write_ledger
from dsv3_jax.checkpoints.safetensors_io import DTYPE_CODES, WeightsError
from dsv3_jax.checkpoints.staging import Staging
from dsv3_jax.checkpoints.tensor_bands import has_nonfinite
from dsv3_jax.checkpoints.transfer import Progress, disk_full_names, run_all
from dsv3_jax.checkpoints.weight_sources import Source, open_source
from dsv3_jax.config import ConfigError, ModelConfig

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype(np.float32)
# What each stored dtype holds without rounding.
_HOLDS = {
    _BFLOAT16: (_BFLOAT16,),
    _FLOAT32: (_FLOAT32, _BFLOAT16, np.dtype(np.float16)),
    np.dtype(np.float16): (np.dtype(np.float16),),
    np.dtype(np.float64): (np.dtype(np.float64),),
}
# Linears that the release leaves in BF16 (README_WEIGHTS.md).
_NOT_QUANTIZED = {"gate", "lm_head", "eh_proj"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    fp8: bool = False,
    allow_nonfinite: bool = False,
    max_shard_size: str = "5GB",
) -> str:
    """Writes a folder that transformers, vLLM and SGLang read; interrupted, the same call goes on.

    Tensors get the dtype they had in the folder the weights came from, if that is known and no
    rounding lies between, so those come back bit for bit. Others become BF16, the router's bias
    float32, as in the release.

    Args:
      source: a folder that `from_hf` made, a training run (its newest checkpoint), or a Hugging
        Face folder, to quantise, dequantise or shard it anew.
      destination: a folder that does not exist yet, or is empty.
      fp8: quantise the linears that the source's folder had in FP8, or else those of the release:
        all but embedding, head, gates and the MTP modules' eh_proj. Scales that the source
        has kept are used again, so FP8 weights come back as they were.
      allow_nonfinite: accept NaN and infinite weights.
      max_shard_size: largest shard, as "5GB" or "500MB"; a single tensor may be larger.

    Returns:
      A sentence on how many tensors were written, and how many have the bytes they had in the
      folder that the weights came from, if its ledger is there.

    Raises:
      WeightsError: a tensor of the source is damaged, missing, not finite, or other than its
        ledger says.
      ConfigError: a source of another kind, or a destination that is taken or too small.
    """
    limit = _parse_size(max_shard_size)
    export = _Export(open_source(source), Path(destination).absolute(), fp8, allow_nonfinite)
    export.run(limit)
    facts = read_ledger(export.destination / LEDGER)
    same, compared = facts["same_bytes"], facts["compared_to_origin"]
    known = f", {same} of {compared} with the bytes they came with" if compared else ""
    return f"{len(facts['tensors'])} tensors{known} ({export.destination / LEDGER})"


@dataclasses.dataclass(frozen=True)
class _Item:
    """A tensor to write: `row` says where from, `name` what it is called (a tied copy's own)."""

    name: str
    row: hf_names.Row
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def outputs(self) -> list[Output]:
        outputs = [Output(self.name, self.dtype, self.shape)]
        if self.dtype == FP8:
            grid = tuple(-(-n // b) for n, b in zip(self.shape, DEFAULT_BLOCK, strict=True))
            outputs.append(Output(self.name + SCALE_SUFFIX, _FLOAT32, grid))
        return outputs


class _Export:
    def __init__(self, source: Source, destination: Path, fp8: bool, allow_nonfinite: bool) -> None:
        self.source, self.destination = source, destination
        self.fp8, self.allow_nonfinite = fp8, allow_nonfinite
        self.was_fp8 = FP8 in source.tensors.values()
        self.items = [self._item(name, row) for name, row in _release_order(source.config)]
        if source.tensors:  # a tied copy is written where there was one
            copies = hf_names.tied_copies(source.config).keys() - source.tensors.keys()
            self.items = [item for item in self.items if item.name not in copies]
        self.places: dict[str, tuple[str, int]] = {}

    def _item(self, name: str, row: hf_names.Row) -> _Item:
        return _Item(name, row, self._dtype(name, row), self.source.shape(row))

    def _dtype(self, name: str, row: hf_names.Row) -> np.dtype:
        """The dtype to write a tensor in."""
        source = self.source
        before = source.tensors.get(name)
        if self.fp8:
            released = row.transpose and not _NOT_QUANTIZED & set(row.path)
            if before == FP8 if self.was_fp8 else released:
                return FP8
        if before is not None and before in _HOLDS[source.dtype(row)]:
            return before
        return _FLOAT32 if row.path[0] == "router_state" else _BFLOAT16

    def run(self, limit: int) -> None:
        job = {
            "direction": "to-hf",
            "source": self.source.identity,
            "--fp8": self.fp8,
            "--max-shard-size": limit,
        }
        staging = Staging(self.destination, job)
        try:
            if not staging.is_finished:
                with disk_full_names("the end of the conversion", staging.partial):
                    self._write(staging, limit)
            staging.publish()
        finally:
            staging.close()

    def _write(self, staging: Staging, limit: int) -> None:
        shards = shards_of([item.outputs for item in self.items], limit)
        left = [item for item in self.items if not self._is_done(item, staging)]
        total, remaining = (
            sum(output.nbytes for item in items for output in item.outputs)
            for items in (self.items, left)
        )
        staging.require_space(remaining)
        for file, outputs in shards.items():
            header, offsets = header_of(outputs)
            with DirectWriter(staging.result / file, 0, len(header)) as writer:
                writer.write(np.frombuffer(header, np.uint8))
            self.places |= {name: (file, offset) for name, offset in offsets.items()}

        def carry_out(item: _Item) -> None:
            with disk_full_names(f"tensor {item.name!r}", staging.partial):
                self._write_tensor(item, staging, progress)

        with Progress("writing", total, total - remaining) as progress:
            run_all(left, carry_out, progress)
        staging.flush()
        write_index(staging.result, shards)
        embedding = next(item for item in self.items if "embed_tokens" in item.row.path)
        write_config(
            staging.result,
            self.source.config,
            self.source.hf_config,
            embedding.dtype.name,
            fp8=self.fp8,
        )
        copy_side_files(self.source.folder, staging.result)
        self._write_ledger(staging)

    def _is_done(self, item: _Item, staging: Staging) -> bool:
        record = staging.done.get(item.name)
        if record is not None and record.get("nonfinite"):
            self._refuse_nonfinite(item)
        return record is not None

    def _write_tensor(self, item: _Item, staging: Staging, progress: Progress) -> None:
        file, offset = self.places[item.name]
        record: dict[str, Any] = {}
        scales: list[np.ndarray] = []
        crc32 = 0
        path = staging.result / file
        with DirectWriter(path, offset, item.outputs[0].nbytes) as writer:
            for band in self._converted(item, record, scales):
                crc32 = zlib.crc32(bytes_of(band), crc32)
                writer.write(band)
                progress.advance(band.nbytes)
        record["crc32"] = {item.name: crc32}
        if scales:
            scale = np.concatenate(scales)
            name = item.name + SCALE_SUFFIX
            with DirectWriter(path, self.places[name][1], scale.nbytes) as writer:
                writer.write(scale)
            record["crc32"][name] = zlib.crc32(bytes_of(scale))
        self._check_unchanged(item, crc32)
        size = sum(output.nbytes for output in item.outputs)
        staging.finished(item.name, record, [staging.result / file], size)

    def _converted(
        self, item: _Item, record: dict[str, Any], scales: list[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """The tensor as it is to be written, by bands; adds the scales of FP8 to `scales`."""
        earlier = self.source.scale(item.row.name) if item.dtype == FP8 else None
        done = 0
        for band in self.source.bands(item.row):
            if has_nonfinite(band):
                self._refuse_nonfinite(item)
                record["nonfinite"] = True
            if item.dtype == FP8:
                rows = slice(done, done - (-len(band) // DEFAULT_BLOCK[0]))
                done = rows.stop
                kept = None if earlier is None else earlier[rows]
                band, scale = quantize_blocks(band, DEFAULT_BLOCK, kept)
                scales.append(scale)
            yield np.ascontiguousarray(band.astype(item.dtype, copy=False))

    def _refuse_nonfinite(self, item: _Item) -> None:
        if not self.allow_nonfinite:
            raise WeightsError(
                f"tensor {item.name!r} has NaN or infinite weights; --allow-nonfinite accepts "
                f"them ({self.source.folder})"
            )

    def _check_unchanged(self, item: _Item, crc32: int) -> None:
        """A tensor that was stored without rounding comes back as the ledger has it."""
        before = self.source.tensors.get(item.name)
        known = self.source.checksums.get(item.name, crc32)
        if before == item.dtype != FP8 and known != crc32:
            raise WeightsError(
                f"tensor {item.name!r} is not the one in {LEDGER}: checksum {crc32}, not {known} "
                f"({self.source.folder})"
            )

    def _write_ledger(self, staging: Staging) -> None:
        lines, before = {}, self.source.checksums
        for item in self.items:
            for output in item.outputs:
                crc32 = staging.done[item.name]["crc32"][output.name]
                lines[output.name] = {
                    "status": "scale" if output.name != item.name else "mapped",
                    "file": self.places[output.name][0],
                    "dtype": DTYPE_CODES[output.dtype],
                    "shape": list(output.shape),
                    "crc32": crc32,
                    "from": "/".join(item.row.path),
                    "index": [":" if isinstance(i, slice) else i for i in item.row.index],
                    "transposed": item.row.transpose,
                }
                if item.name != item.row.name:
                    lines[output.name] |= {"status": "tied", "reason": f"equals {item.row.name}"}
                if output.name in before:
                    lines[output.name]["same_bytes"] = before[output.name] == crc32
        same = [line["same_bytes"] for line in lines.values() if "same_bytes" in line]
        facts = {"direction": "to-hf", "compared_to_origin": len(same), "same_bytes": sum(same)}
        write_ledger(staging.result / LEDGER, facts, lines)


def _release_order(config: ModelConfig) -> Iterator[tuple[str, hf_names.Row]]:
    """(name, row) of every tensor, tied copies included: embedding, layers, norm, head, MTP."""
    rows = {row.name: row for row in hf_names.rows(config)}
    copies = hf_names.tied_copies(config)
    names = {**{name: name for name in rows}, **copies}

    def place(name: str) -> tuple[int, int]:
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            number = int(match[1])
            return (1 if number < config.num_hidden_layers else 3), number
        return (0, 0) if "embed_tokens" in name else (2, 0)

    for name in sorted(names, key=place):  # stable: as in the table within a layer
        yield name, rows[names[name]]


def _parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text!r} must be a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
