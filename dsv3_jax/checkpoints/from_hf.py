"""A Hugging Face folder to a checkpoint of ours, in bounded memory: `convert.py from-hf`.

DST/checkpoints/0/state   what CheckpointStore and load_pretrained read: params, router_state
DST/ledger.json           what became of every tensor, with checksums
DST/fp8_scales.safetensors  the scales of FP8 weights, with which they can be FP8 again
DST/tokenizer.json ...    files of SRC that are not weights
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.array_store import Slot, SlotWriter, write_arrays
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.direct_io import bytes_of
from dsv3_jax.checkpoints.hf_folder import Output, copy_side_files, header_of
from dsv3_jax.checkpoints.inventory import write_inventory
from dsv3_jax.checkpoints.ledger import (
    LEDGER,
    SCALE_SUFFIX,
    Assignment,
    assign,
    block_size,
    parameter_shapes,
    write_ledger,
)
from dsv3_jax.checkpoints.metadata import describe_run
from dsv3_jax.checkpoints.safetensors_io import (
    DTYPE_CODES,
    TensorEntry,
    WeightsError,
    open_folder,
)
from dsv3_jax.checkpoints.staging import Staging
from dsv3_jax.checkpoints.tensor_bands import (
    TensorFile,
    WeightReader,
    check_tied,
    checksum,
    has_nonfinite,
)
from dsv3_jax.checkpoints.transfer import Progress, disk_full_names, run_all
from dsv3_jax.config import ConfigError, ModelConfig, TrainConfig

SCALES = "fp8_scales.safetensors"
STATE = "checkpoints/0/state"
LAYOUT = "slots-1"  # of the arrays, see array_store

# The gate and its bias decide routing: they keep float32 whatever the rest is stored as.
_FLOAT32_MODULE = "gate"


def from_hf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "bfloat16",
    allow_nonfinite: bool = False,
) -> str:
    """Converts a Hugging Face folder; interrupted, the same call continues.

    Tensors are read, checked, dequantised and written a band of rows at a time, so memory does
    not depend on the number of layers. The gate and its bias are stored in float32.

    Args:
      source: config.json and safetensors with the released names, BF16 or FP8.
      destination: a folder that does not exist yet, or is empty.
      dtype: of the stored parameters, "bfloat16" or "float32".
      allow_nonfinite: accept NaN and infinite weights.

    Returns:
      A sentence on what became of the tensors.

    Raises:
      WeightsError: damaged files; a tensor that is missing, unknown, misshapen, not finite or not
        equal to the one it is tied to. The message names tensor and file.
      ConfigError: a config.json of another architecture; a destination that is taken, or too
        little room for it.
    """
    source, destination = Path(source), Path(destination).absolute()
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"{dtype=} must be 'bfloat16' or 'float32' (from_hf)")
    if not (source / "config.json").is_file():
        raise WeightsError(f"no config.json ({source})")
    conversion = _Conversion(source, destination, np.dtype(jnp.dtype(dtype)), allow_nonfinite)
    conversion.run()
    counts = ", ".join(f"{count} {status}" for status, count in conversion.counts().items())
    return f"{len(conversion.plan)} tensors: {counts} ({destination / LEDGER})"


class _Conversion:
    """One conversion: the plan, and how each of its tensors is carried out."""

    def __init__(
        self, source: Path, destination: Path, dtype: np.dtype, allow_nonfinite: bool
    ) -> None:
        self.source, self.destination = source, destination
        self.dtype, self.allow_nonfinite = dtype, allow_nonfinite
        self.config = ModelConfig.from_hf(source)
        self.block = block_size(source)
        self.shapes = parameter_shapes(abstract_variables(self.config))
        self.entries = open_folder(source)
        self.plan = assign(source, self.config, self.shapes, self.entries, self.block)

    def counts(self) -> dict[str, int]:
        """{"mapped": ..., "tied": ..., ...} of the tensors, statuses that occur."""
        counts: dict[str, int] = {}
        for item in self.plan:
            counts[item.status] = counts.get(item.status, 0) + 1
        return counts

    def run(self) -> None:
        staging = Staging(self.destination, self._job())
        try:
            if not staging.is_finished:
                with disk_full_names("the end of the conversion", staging.partial):
                    self._convert(staging)
            staging.publish()
        finally:
            staging.close()

    def _job(self) -> dict[str, Any]:
        """What the result depends on; an unfinished conversion of another job is not continued."""
        files = {}
        for file in sorted({entry.file for entry in self.entries.values()}):
            status = file.stat()
            files[file.name] = [status.st_size, status.st_mtime_ns]
        config = zlib.crc32((self.source / "config.json").read_bytes())
        return {
            "direction": "from-hf",
            "layout": LAYOUT,
            "source": {"files": files, "config.json": config},
            "--dtype": self.dtype.name,
        }

    def _slot(self, row: hf_names.Row) -> Slot:
        dtype = np.dtype(np.float32) if _FLOAT32_MODULE in row.path else self.dtype
        return Slot(row, self.shapes[row.path], dtype)

    def _convert(self, staging: Staging) -> None:
        state = staging.result / STATE
        slots = {item.row.path: self._slot(item.row) for item in self.plan if item.row}
        write_arrays(state, slots, self._record())
        work = [item for item in self.plan if item.status != "scale"]
        work.sort(key=lambda item: (item.entry.file, item.entry.offset))
        left = [item for item in work if not self._is_done(item, staging)]
        total, remaining = (sum(map(self._nbytes, items)) for items in (work, left))
        staging.require_space(remaining)

        def carry_out(item: Assignment) -> None:
            what = f"tensor {item.name!r} of {item.entry.file}"
            with disk_full_names(what, staging.partial):
                self._carry_out(item, staging, progress)

        with Progress("converting", total, total - remaining) as progress:
            run_all(left, carry_out, progress)
        staging.flush()
        self._finish(staging, state)

    def _nbytes(self, item: Assignment) -> int:
        """Bytes that `item` adds to the destination."""
        return self._slot(item.row).nbytes if item.row else 0

    def _is_done(self, item: Assignment, staging: Staging) -> bool:
        record = staging.done.get(item.name)
        if record is None:
            return False
        if record.get("nonfinite"):
            self._refuse_nonfinite(item.name, item.entry)
        if item.row is None:
            return True
        file = staging.result / STATE / self._slot(item.row).file
        return file.is_file() and file.stat().st_size == record["bytes"]

    def _carry_out(self, item: Assignment, staging: Staging, progress: Progress) -> None:
        record: dict[str, Any] = {}
        if item.row is not None:
            record = self._write_slot(item, self._slot(item.row), staging, progress)
            files = [staging.result / STATE / record["file"]]
            staging.finished(item.name, record, files, record["bytes"])
            return
        if item.status == "tied":
            original = self.entries[item.other]
            record["crc32"] = check_tied(item, original, progress.advance)
        else:
            record["crc32"] = checksum(item.name, item.entry)
        staging.finished(item.name, record, [], 0)

    def _write_slot(
        self, item: Assignment, slot: Slot, staging: Staging, progress: Progress
    ) -> dict[str, Any]:
        reader = WeightReader(item, self.block, slot.dtype)
        finite = True
        with SlotWriter(slot, staging.result / STATE) as writer:
            for band in reader.bands(transpose=slot.row.transpose):
                if has_nonfinite(band):
                    finite = False
                    self._refuse_nonfinite(*self._culprit(item, reader.scale))
                writer.write(band)
                progress.advance(band.nbytes)
            writer.write_index()
        record = {
            "crc32": reader.checksums[item.name],
            "file": slot.file,
            "bytes": slot.nbytes,
            "file_crc32": writer.crc32,
        }
        if item.scale is not None:
            record["scale_crc32"] = reader.checksums[item.name + SCALE_SUFFIX]
        return record if finite else {**record, "nonfinite": True}

    def _culprit(self, item: Assignment, scale: np.ndarray | None) -> tuple[str, TensorEntry]:
        """Of an FP8 weight and its scales, the one with a number that is not finite."""
        if item.scale is not None and scale is not None and not np.isfinite(scale).all():
            return item.name + SCALE_SUFFIX, item.scale
        return item.name, item.entry

    def _refuse_nonfinite(self, name: str, entry: TensorEntry) -> None:
        if not self.allow_nonfinite:
            raise WeightsError(
                f"tensor {name!r} has NaN or infinite weights; --allow-nonfinite accepts them "
                f"({entry.file})"
            )

    def _record(self) -> dict[str, Any]:
        """What the checkpoint says about itself, as a training run's does."""
        train = TrainConfig()
        length = min(train.data.sequence_length, self.config.max_position_embeddings)
        train = dataclasses.replace(
            train,
            model=self.config,
            data=dataclasses.replace(train.data, sequence_length=length),
            total_tokens=length,  # of its training nothing is known: the least that is valid
        )
        raw = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        converted = {"from": "safetensors", "layout": LAYOUT, "config.json": raw}
        metadata = describe_run(train, sequences=0) | {"converted": converted}
        return {"metadata": metadata, "metric": None}

    def _finish(self, staging: Staging, state: Path) -> None:
        """Writes what depends on all tensors."""
        records = staging.done
        known = {
            record["file"]: [record["bytes"], record["file_crc32"]]
            for record in records.values()
            if "file" in record
        }
        write_inventory(state, known)
        copy_side_files(self.source, staging.result)
        scales = [item for item in self.plan if item.status == "scale"]
        if scales:
            _write_scales(staging.result / SCALES, scales)
        facts = {
            "direction": "from-hf",
            "tensors_by_status": self.counts(),
            "parameters": {"/".join(path): list(shape) for path, shape in self.shapes.items()},
        }
        write_ledger(
            staging.result / LEDGER,
            facts,
            {item.name: self._line(item, records) for item in self.plan},
        )

    def _line(self, item: Assignment, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The ledger's record of a tensor."""
        entry = item.entry
        if item.status == "scale":
            crc32 = records[item.other]["scale_crc32"]
        else:
            crc32 = records[item.name]["crc32"]
        line: dict[str, Any] = {
            "status": item.status,
            "file": entry.file.name,
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "crc32": crc32,
        }
        if item.row is not None:
            line["to"] = "/".join(item.row.path)
            line["index"] = [":" if isinstance(i, slice) else i for i in item.row.index]
            line["transposed"] = item.row.transpose
            line["stored_as"] = self._slot(item.row).dtype.name
            if records[item.name].get("nonfinite"):
                line["nonfinite"] = True
        else:
            line["reason"] = (
                item.reason or {"tied": "equals ", "scale": "scale of "}[item.status] + item.other
            )
        return line


def _write_scales(path: Path, scales: list[Assignment]) -> None:
    header, _ = header_of(Output(item.name, item.entry.dtype, item.entry.shape) for item in scales)
    with path.open("wb") as file:
        file.write(header)
        for item in scales:
            with TensorFile(item.name, item.entry) as tensor:
                for band in tensor.bands():
                    file.write(bytes_of(band))
