"""Speed and memory of `convert.py from-hf` on a slice of V3 at its true width, beside `cp`.

    python scripts/benchmark_conversion.py --work DIR [--experts 256] [--moe-layers 1] [--mtp]
        [--vocab-size 129280] [--dtype fp8] [--rounds 2] [--json FILE] [--keep]

Writes a folder with V3's own shapes (hidden 7168, experts of 2048, one dense layer, embedding and
head) and random weights, FP8 with scales or bfloat16; converts it in a process of its own; copies
the result with `cp`, a few GB at a time, each portion deleted again once it is on the disk. Every
timing starts with the files to be read dropped from the page cache and ends when all bytes are on
the disk (fsync); the two take turns, so that a drift of the disk meets both. A sample of the result
is compared with weights dequantised here. The default takes 16 GB and 28 GB for the result;
everything is deleted at the end.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.hf_folder import Output, header_of, shards_of, write_index
from dsv3_jax.checkpoints.ledger import SCALE_SUFFIX, parameter_shapes, tensor_shape
from dsv3_jax.checkpoints.safetensors_io import TensorEntry, open_folder
from dsv3_jax.cli import OneLineParser, run
from dsv3_jax.config import ConfigError, ModelConfig, RopeScaling

_FP8, _BF16, _F32 = (
    np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32)
)
_BLOCK = 128
_CHUNK = 1 << 26
_SHARD = 4_300_000_000  # as released
_PORTION = 4_000_000_000
_GIB = 1 << 30
# Of the released V3: bytes of its files, and the bfloat16 bytes of what becomes of them.
_RELEASED_BYTES = 688_590_000_000


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmark_conversion.py", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--moe-layers", type=int, default=1)
    parser.add_argument("--mtp", action="store_true", help="add an MTP layer")
    parser.add_argument("--vocab-size", type=int, default=129280, help="less: less disk")
    parser.add_argument("--dtype", choices=("fp8", "bfloat16"), default="fp8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the two folders behind")
    args = parser.parse_args(argv)
    config = _config(args.experts, args.moe_layers, args.mtp, args.vocab_size)
    args.work.mkdir(parents=True, exist_ok=True)
    _require_space(config, args.work, args.dtype)
    work = Path(tempfile.mkdtemp(prefix="benchmark_conversion.", dir=args.work))
    try:
        result = _measure(config, work, args)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    _print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _config(experts: int, moe_layers: int, mtp: bool, vocab_size: int) -> ModelConfig:
    grouped = experts % 8 == 0 and experts >= 16
    return ModelConfig(
        vocab_size=vocab_size,
        num_hidden_layers=1 + moe_layers,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        num_experts_per_tok=min(8, experts),
        n_group=8 if grouped else 1,
        topk_group=4 if grouped else 1,
        num_nextn_predict_layers=int(mtp),
        rope_scaling=RopeScaling(),
    )


def _outputs(config: ModelConfig, dtype: str) -> list[list[Output]]:
    """The tensors of the folder, a weight and its scales together, in the released order."""
    shapes = parameter_shapes(abstract_variables(config))
    groups = []
    for row in hf_names.rows(config):
        shape = tensor_shape(shapes[row.path], row)
        if row.path[-1] == "e_score_correction_bias":
            groups.append([Output(row.name, _F32, shape)])
        elif dtype == "fp8" and _is_fp8(row.path):
            grid = tuple(-(-n // _BLOCK) for n in shape)
            scale = Output(row.name + SCALE_SUFFIX, _F32, grid)
            groups.append([Output(row.name, _FP8, shape), scale])
        else:
            groups.append([Output(row.name, _BF16, shape)])
    vocabulary = (config.vocab_size, config.hidden_size)
    tied = hf_names.tied_copies(config)
    return groups + [[Output(name, _BF16, vocabulary)] for name in tied]


def _is_fp8(path: tuple[str, ...]) -> bool:
    """Whether the release has a parameter in FP8."""
    return ("self_attn" in path or "mlp" in path) and path[-1] != "weight" and "gate" not in path


def _require_space(config: ModelConfig, work: Path, dtype: str) -> None:
    source = sum(output.nbytes for group in _outputs(config, dtype) for output in group)
    shapes = parameter_shapes(abstract_variables(config))
    needed = source + 2 * sum(map(math.prod, shapes.values())) + 2 * _PORTION
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ConfigError(f"{free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed ({work})")


def _generate(config: ModelConfig, folder: Path, dtype: str, seed: int) -> int:
    """Writes the folder, a chunk at a time; returns its bytes."""
    folder.mkdir()
    shards = shards_of(_outputs(config, dtype), _SHARD)
    tied = hf_names.tied_copies(config)
    for name, outputs in shards.items():
        header, offsets = header_of(outputs)
        with (folder / name).open("wb") as file:
            file.write(header)
            for output in sorted(outputs, key=lambda output: offsets[output.name]):
                # A tied copy is drawn like the tensor it repeats.
                drawn = tied.get(output.name, output.name)
                rng = np.random.default_rng([seed, *drawn.encode()])
                for chunk in _random_chunks(output, rng):
                    file.write(chunk)
    write_index(folder, shards)
    raw = config.to_hf()
    if dtype == "fp8":
        block = [_BLOCK, _BLOCK]
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": block,
        }
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return _flush(folder)


def _random_chunks(output: Output, rng: np.random.Generator) -> Iterator[bytes]:
    """Bytes of a random tensor: every finite FP8 code, or weights of about 0.02."""
    left = math.prod(output.shape)
    while left:
        count = min(left, _CHUNK)
        left -= count
        if output.dtype == _FP8:
            codes = rng.integers(0, 254, count, np.uint8)
            yield (codes + (codes >= 0x7F)).tobytes()  # past the NaN at 0x7F; 0xFF is not drawn
        elif output.dtype == _BF16:
            bits = rng.integers(0, 1 << 16, count, np.uint16)
            # Sign, mantissa and the exponent's last bit are drawn: 2^-7 to 2^-5.
            yield ((bits & 0x80FF) | 0x3C00).tobytes()
        else:
            yield rng.uniform(1e-4, 4e-4, count).astype(np.float32).tobytes()


def _measure(config: ModelConfig, work: Path, args) -> dict:
    source, converted = work / "source", work / "converted"
    start = time.perf_counter()
    read = _generate(config, source, args.dtype, args.seed)
    print(f"generated {read / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
    rounds = []
    for number in range(args.rounds):
        shutil.rmtree(converted, ignore_errors=True)
        _forget(source)
        seconds, rss = _convert(source, converted)
        written = _flush(converted)
        record = {"convert_s": seconds, "peak_rss_bytes": rss, "written_bytes": written}
        if number == 0:
            _verify(config, source, converted, args.seed)
        record["cp_s"] = _copy(converted, work / "copy")
        rounds.append(record)
        print(f"round {number + 1}: {_round_line(record)}", flush=True)
    return _summary(config, args, read, rounds)


# Linux counts the memory of the process that starts another as the other's: a small one starts it.
_LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}")
"""


def _convert(source: Path, destination: Path) -> tuple[float, int]:
    """Seconds until the result is on the disk, and the process's peak resident memory in bytes."""
    script, usage = Path(__file__).resolve().with_name("convert.py"), source.with_name("usage")
    command = [sys.executable, str(script), "from-hf", str(source), str(destination)]
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(usage)]
    path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    subprocess.run([*launcher, *command], env={**os.environ, "PYTHONPATH": path}, check=True)
    _flush(destination)
    seconds = time.perf_counter() - start
    code, peak = map(int, usage.read_text().split())
    if code:
        raise RuntimeError(f"convert.py from-hf ended with exit code {code}")
    return seconds, peak * 1024  # Linux counts in kB


def _copy(folder: Path, target: Path) -> float:
    """Seconds that `cp` takes for every file below `folder`, until the copies are on the disk."""
    _forget(folder)
    seconds, portion, size = 0.0, [], 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        portion.append(str(file.relative_to(folder)))
        size += file.stat().st_size
        if size < _PORTION and number + 1 < len(files):
            continue
        target.mkdir()
        start = time.perf_counter()
        command = ["cp", "--parents", "--reflink=never", *portion, str(target)]
        subprocess.run(command, cwd=folder, check=True)
        _flush(target)
        seconds += time.perf_counter() - start
        shutil.rmtree(target)
        portion, size = [], 0
    return seconds


def _flush(folder: Path) -> int:
    """Writes a folder's files to the disk; returns their bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return size


def _forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that they are read from the disk."""
    _flush(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _verify(config: ModelConfig, source: Path, converted: Path, seed: int) -> None:
    """Compares a random tensor of every parameter, read by TensorStore, with the source's."""
    import tensorstore

    entries = open_folder(source)
    by_path: dict[hf_names.Path, list[hf_names.Row]] = {}
    for row in hf_names.rows(config):
        by_path.setdefault(row.path, []).append(row)
    rng = np.random.default_rng(seed)
    state = converted / "checkpoints" / "0" / "state"
    for rows in by_path.values():
        row = rows[rng.integers(len(rows))]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": ""}}
        spec["kvstore"]["path"] = str(state / ".".join(row.path)) + "/"
        stored = tensorstore.open(spec, read=True).result()[row.index]
        entry = entries[row.name]
        some = slice(0, min(1000, entry.shape[0]))
        stored = (stored.T if row.transpose else stored)[some].read().result()
        expected = entry.read()[some].astype(np.float32)
        if entry.dtype == _FP8:
            expected = expected * _scales(entries[row.name + SCALE_SUFFIX], expected.shape)
        if not np.array_equal(stored, expected.astype(stored.dtype)):
            raise RuntimeError(f"{row.name} was not converted as it should be ({converted})")
    print(f"one random tensor of each of {len(by_path)} parameters compared: equal", flush=True)


def _scales(entry: TensorEntry, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of every element of the first rows of a weight."""
    row, column = np.ogrid[: shape[0], : shape[1]]
    return entry.read()[row // _BLOCK, column // _BLOCK]


def _summary(config: ModelConfig, args, read: int, rounds: list[dict]) -> dict:
    rates = {
        name: statistics.median(r["written_bytes"] / r[f"{name}_s"] for r in rounds)
        for name in ("convert", "cp")
    }
    released = ModelConfig(rope_scaling=RopeScaling())
    shapes = parameter_shapes(abstract_variables(released))
    whole = 2 * sum(map(math.prod, shapes.values()))
    return {
        "experts": config.n_routed_experts,
        "moe_layers": config.num_moe_layers,
        "mtp_layers": config.num_nextn_predict_layers,
        "dtype": args.dtype,
        "read_bytes": read,
        "written_bytes": rounds[0]["written_bytes"],
        "convert_bytes_per_s": rates["convert"],
        "cp_bytes_per_s": rates["cp"],
        "ratio": rates["convert"] / rates["cp"],
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "whole_v3_written_bytes": whole,
        "whole_v3_s": whole / rates["convert"],
        "whole_v3_cp_s": whole / rates["cp"],
        "rounds": rounds,
    }


def _round_line(record: dict) -> str:
    rates = {
        name: record["written_bytes"] / record[f"{name}_s"] / 1e9 for name in ("convert", "cp")
    }
    return (
        f"convert {record['convert_s']:.1f} s ({rates['convert']:.2f} GB/s), cp "
        f"{record['cp_s']:.1f} s ({rates['cp']:.2f} GB/s), peak RSS "
        f"{record['peak_rss_bytes'] / _GIB:.2f} GiB"
    )


def _print_table(result: dict) -> None:
    print(
        f"\n{result['experts']} experts, {result['moe_layers']} MoE and {result['mtp_layers']} MTP "
        f"layers, {result['dtype']}: {result['read_bytes'] / 1e9:.2f} GB read, "
        f"{result['written_bytes'] / 1e9:.2f} GB written; medians of {len(result['rounds'])}"
    )
    print(f"{'':12}{'GB/s written':>14}{'whole V3':>14}")
    for name in ("convert", "cp"):
        rate = result[f"{name}_bytes_per_s"] / 1e9
        minutes = result["whole_v3_s" if name == "convert" else "whole_v3_cp_s"] / 60
        print(f"{name:12}{rate:14.2f}{minutes:11.0f} min")
    print(
        f"convert / cp: {result['ratio']:.2f}; peak RSS {result['peak_rss_bytes'] / _GIB:.2f} GiB"
    )
    print(
        f"whole V3: {_RELEASED_BYTES / 1e9:.0f} GB read, "
        f"{result['whole_v3_written_bytes'] / 1e9:.0f} GB written, at these rates"
    )


if __name__ == "__main__":
    run(main)
