"""What a folder of weights holds, from its headers alone: `convert.py inspect PATH`."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.convert import abstract_variables, stored_arrays
from dsv3_jax.checkpoints.from_hf import SCALES
from dsv3_jax.checkpoints.ledger import (
    FP8,
    SCALE_SUFFIX,
    assign,
    block_size,
    parameter_shapes,
    tensor_shape,
)
from dsv3_jax.checkpoints.metadata import config_from_dict
from dsv3_jax.checkpoints.origin import checkpoint_folder
from dsv3_jax.checkpoints.safetensors_io import (
    DTYPE_CODES,
    TensorEntry,
    WeightsError,
    open_folder,
    strict_json,
)
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ConfigError, ModelConfig

_LARGEST = 5
_LISTED = 8  # names of one kind; of the rest only the number
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
Shapes = Mapping[hf_names.Path, tuple[int, ...]]


def describe(path: str | Path) -> str:
    """Several lines on a Hugging Face folder, a run or a converted folder; reads no weights.

    Tensors that fill no parameter, and parameters without a tensor, are named and not refused.

    Raises:
      WeightsError: neither kind of folder, or damaged shards: the message names the file.
      CheckpointError: the checkpoint is damaged.
    """
    folder = Path(path)
    run = checkpoint_folder(folder)
    if run is not None:
        return "\n".join(_describe_checkpoint(folder, run))
    if (folder / "config.json").is_file():
        return "\n".join(_describe_hf_folder(folder))
    raise WeightsError(f"neither a config.json nor checkpoints/ of a run ({folder})")


def _describe_hf_folder(folder: Path) -> Iterator[str]:
    raw = _read_config(folder)
    entries = open_folder(folder)
    yield f"{folder}: Hugging Face folder, model_type {raw.get('model_type')!r}"
    config, shapes = None, {}
    try:
        config = ModelConfig.from_hf(folder)
        shapes = parameter_shapes(abstract_variables(config))
        yield from _network(config, shapes)
    except ConfigError as error:
        yield _line("refused", str(error))
    yield _line("quantisation", _quantization(raw.get("quantization_config"), entries))
    files = Counter(entry.file for entry in entries.values())
    size = sum(file.stat().st_size for file in files)
    yield _line("files", f"{_count(len(files), 'shard')}, {_bytes(size)}")
    yield _line("tokenizer", _tokenizer(folder))
    sizes = {name: (DTYPE_CODES[e.dtype], e.shape, e.nbytes) for name, e in entries.items()}
    yield from _tables("tensor", sizes)
    if config is not None:
        yield from _ledger(folder, config, shapes, entries)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    raw = strict_json(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"the top level must be an object ({path})")
    return raw


def _network(config: ModelConfig, shapes: Shapes) -> Iterator[str]:
    """Layers, sizes and numbers of trained weights."""
    dense, moe, mtp = (
        config.num_dense_layers,
        config.num_moe_layers,
        config.num_nextn_predict_layers,
    )
    experts = (
        f"{config.n_routed_experts} experts in {_count(config.n_group, 'group')}, "
        f"{config.num_experts_per_tok} a token, {config.n_shared_experts} shared"
    )
    yield _line(
        "layers", f"{dense} dense + {moe} MoE ({experts}) + {_count(mtp, 'MTP module', 'no')}"
    )
    yarn = config.rope_scaling
    positions = f"{config.max_position_embeddings:,} positions" + (
        f" (YaRN: {yarn.factor:g} x {yarn.original_max_position_embeddings:,})" if yarn else ""
    )
    yield _line(
        "sizes",
        f"hidden {config.hidden_size}, FFN {config.intermediate_size}, expert "
        f"{config.moe_intermediate_size}, {config.num_attention_heads} heads, ranks "
        f"{config.q_lora_rank or 'none'} (q) and {config.kv_lora_rank} (kv), vocabulary "
        f"{config.vocab_size:,}; {positions}",
    )
    total = active = ahead = 0.0
    for (collection, module, *rest), shape in shapes.items():
        size = math.prod(shape)
        if collection != "params":
            continue
        if module.startswith("mtp_"):
            ahead += size
            continue
        total += size
        if "experts" in rest:
            size *= config.num_experts_per_tok / config.n_routed_experts
        elif module == "embed_tokens":
            size = config.hidden_size  # one row
        active += size
    line = f"{_number(total)}, {_number(active)} active a token"
    yield _line("parameters", line + (f"; MTP {_number(ahead)} more" if mtp else ""))


def _quantization(described: Any, entries: Mapping[str, TensorEntry]) -> str:
    weights = sum(entry.dtype == FP8 for entry in entries.values())
    if described is None:
        return "none" if not weights else f"{weights:,} FP8 tensors, not described in config.json"
    facts = described if isinstance(described, dict) else {"": described}
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"{weights:,} FP8 weights; config.json: {said}"


def _tables(kind: str, sizes: Mapping[str, tuple[str, tuple[int, ...], int]]) -> Iterator[str]:
    """Bytes by dtype, and the largest of {name: (dtype, shape, bytes)}."""
    number: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for dtype, _, size in sizes.values():
        number[dtype] += 1
        held[dtype] += size
    yield ""
    for dtype, size in held.most_common():
        yield _line(dtype, f"{_count(number[dtype], kind):>16}  {_bytes(size):>10}")
    yield _line("all", f"{_count(number.total(), kind):>16}  {_bytes(held.total()):>10}")
    yield f"\nlargest {kind}s"
    largest = sorted(sizes.items(), key=lambda item: (-item[1][2], item[0]))[:_LARGEST]
    width = max((len(name) for name, _ in largest), default=0)
    for name, (dtype, shape, size) in largest:
        yield f"  {name:<{width}}  {_bytes(size):>10}  {dtype} {list(shape)}"


def _ledger(
    folder: Path, config: ModelConfig, shapes: Shapes, entries: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """How the tensors fit the configuration."""
    rows = {row.name: row for row in hf_names.rows(config)}
    tied = hf_names.tied_copies(config)
    known = {f"{name}{suffix}" for name in (*rows, *tied) for suffix in ("", SCALE_SUFFIX)}
    unmapped: list[str] = []
    ignored: Counter[str] = Counter()
    for name in entries:
        if name not in known:
            reason = hf_names.ignored_because(name)
            if reason is None:
                unmapped.append(name)
            else:
                ignored[reason] += 1
    yield ""
    copies = [f"{copy} = {tied[copy]}" for copy in tied if copy in entries]
    yield from _names("tied copies", copies)
    for reason, number in ignored.items():
        yield _line("ignored", f"{_count(number, 'tensor')}: {reason}")
    yield from _names("unmapped", sorted(unmapped))
    yield from _names("missing", sorted(rows.keys() - entries.keys()))
    needed = {name: tensor_shape(shapes[row.path], row) for name, row in rows.items()}
    wrong = [
        f"{name} {list(entries[name].shape)}, needs {list(shape)}"
        for name, shape in needed.items()
        if name in entries and entries[name].shape != shape
    ]
    if wrong:
        yield from _names("misshapen", wrong)
    try:
        assign(folder, config, shapes, entries, block_size(folder))
        verdict = "every tensor and parameter has its place"
    except ConfigError as error:
        verdict = f"refused on loading: {error}"
    yield _line("verdict", verdict)


def _describe_checkpoint(folder: Path, run: Path) -> Iterator[str]:
    store = CheckpointStore(run)
    metadata = store.read_metadata()
    config = config_from_dict(metadata["config"]).model
    shapes = parameter_shapes(abstract_variables(config))
    stored = stored_arrays(store)
    steps = store.steps()
    converted = metadata.get("converted")
    kind = "converted weights" if converted else "training run"
    yield f"{folder}: {kind}, checkpoint of step {steps[-1]}"
    if not converted:
        numbers = ", ".join(map(str, steps))
        yield _line("steps", f"{numbers}; {metadata['sequences']:,} sequences seen")
    if start := metadata.get("init_from"):
        step = "" if start["step"] is None else f", step {start['step']}"
        yield _line("started from", f"{start['path']} ({start['kind']}{step})")
    yield _line("written by", ", ".join(f"{k} {v}" for k, v in metadata["versions"].items()))
    yield from _network(config, shapes)
    files = [path for path in store.state_folder(steps[-1]).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    yield _line("files", f"{_count(len(files), 'file')}, {_bytes(size)}")
    if (folder / SCALES).is_file():
        yield _line("quantisation", f"none; scales of the FP8 original in {SCALES}")
    yield _line("tokenizer", _tokenizer(folder))
    sizes = {
        "/".join(path): (str(a.dtype), a.shape, math.prod(a.shape) * a.dtype.itemsize)
        for path, a in stored.items()
    }
    yield from _tables("array", sizes)
    yield ""
    network = {path for path in stored if path[0] in ("params", "router_state")}
    rest = Counter(path[0] for path in stored if path not in network)
    if rest:
        others = ", ".join(f"{name} ({_count(number, 'array')})" for name, number in rest.items())
        yield _line("besides", others)
    yield from _names("unmapped", ["/".join(path) for path in sorted(network - shapes.keys())])
    yield from _names("missing", ["/".join(path) for path in sorted(shapes.keys() - network)])
    wrong = [
        f"{'/'.join(path)} {list(stored[path].shape)}, needs {list(shapes[path])}"
        for path in sorted(network & shapes.keys())
        if tuple(stored[path].shape) != shapes[path]
    ]
    if wrong:
        yield from _names("misshapen", wrong)


def _tokenizer(folder: Path) -> str:
    return ", ".join(name for name in _TOKENIZER if (folder / name).is_file()) or "no files"


def _names(title: str, names: list[str]) -> Iterator[str]:
    """The first names of a list, and how many more there are."""
    yield _line(title, names[0] if names else "none")
    for name in names[1:_LISTED]:
        yield _line("", name)
    if len(names) > _LISTED:
        yield _line("", f"and {len(names) - _LISTED:,} more")


def _line(title: str, text: str) -> str:
    return f"{title:<13} {text}"


def _count(number: int, noun: str, none: str = "0") -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else f"{none} {noun}s"


def _number(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B")).strip()


def _bytes(size: float) -> str:
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 1000 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    return f"{value:.{2 if power else 0}f} {units[power]}"
