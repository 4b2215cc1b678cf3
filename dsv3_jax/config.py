"""Frozen configuration dataclasses: the network, how it is computed, its data and its training.

`ModelConfig` carries Hugging Face's field names, so a released `config.json` reads one to one
(`ModelConfig.from_hf`). Every other dataclass is one section of `TrainConfig`, which the files in
`configs/` return and the command line overrides (`--optimizer.peak-lr 3e-4`).

Validation happens on construction: a `ConfigError` names the value, the rule and the class.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration value breaks a rule; the message names value, rule and place."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _require(condition: bool, message: str, place: str) -> None:
    if not condition:
        raise ConfigError(f"{message} ({place})")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN position scaling (arXiv 2309.00071; report section 4.3), as in `rope_scaling`.

    `mscale` and `mscale_all_dim` follow Hugging Face: their ratio scales cos and sin, and
    `mscale_all_dim` alone enters the softmax scale (squared). `None` means absent from the file.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0

    def __post_init__(self) -> None:
        place = "RopeScaling"
        _require(self.factor >= 1, f"factor={self.factor} must be at least 1", place)
        _require(
            self.original_max_position_embeddings > 0,
            f"original_max_position_embeddings={self.original_max_position_embeddings} "
            "must be positive",
            place,
        )
        _require(
            self.beta_fast >= self.beta_slow > 0,
            f"beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}, both > 0",
            place,
        )


# Keys of a Hugging Face config.json that carry no information this implementation needs.
_HF_IGNORED = frozenset(
    """
    _attn_implementation_autoset _experts_implementation _name_or_path
    add_cross_attention architectures attention_dropout aux_loss_alpha auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id head_dim id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads qk_head_dim quantization_config remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id seq_aux suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed use_bfloat16
    use_cache
    """.split()
)

# Keys whose value must be the one this architecture has; anything else would be another network.
_HF_REQUIRED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "tie_word_embeddings": (False,),
}
_HF_MODEL_TYPES = ("deepseek_v3", "kimi_k2")


def _rope_theta_from_hf(raw: dict[str, Any], place: str) -> float:
    """The base of the frequencies, wherever the file has it; 10000 where it has none."""
    found = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    for key in ("rope_parameters", "rope_scaling"):
        if (inner := (raw.get(key) or {}).get("rope_theta")) is not None:
            found[f"{key}.rope_theta"] = inner
    for name, value in found.items():
        _check_type(name, value, float, place)
    named = " and ".join(f"{name}={value}" for name, value in found.items())
    _require(len(set(found.values())) <= 1, f"{named} must be equal", place)
    return float(next(iter(found.values()), 10000.0))


def _rope_from_hf(raw: dict[str, Any], place: str) -> tuple[float, RopeScaling | None]:
    """Reads `rope_theta` and YaRN from either spelling (`rope_scaling` or `rope_parameters`)."""
    for key in ("rope_parameters", "rope_scaling"):
        _require(
            isinstance(raw.get(key) or {}, dict),
            f"{key}={raw.get(key)!r} must be an object or null",
            place,
        )
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    scaling.pop("rope_theta", None)
    theta = _rope_theta_from_hf(raw, place)
    kind = scaling.get("rope_type", scaling.get("type", "default" if not scaling else None))
    if kind == "default":
        return theta, None
    _require(kind == "yarn", f"rope_scaling type {kind!r} must be 'yarn' or absent", place)
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    for key in scaling:
        _require(
            key in known | {"type", "rope_type"},
            f"unknown rope_scaling key {key!r}{nearest_name(key, known)}",
            place,
        )
    values = {key: scaling[key] for key in known if scaling.get(key) is not None}
    for key, value in values.items():
        kind = int if key == "original_max_position_embeddings" else float
        _check_type(f"rope_scaling.{key}", value, kind, place)
    for key in ("mscale", "mscale_all_dim"):
        values.setdefault(key, None)
    for key in ("factor", "original_max_position_embeddings"):
        _require(key in values, f"rope_scaling has no {key!r}", place)
    return theta, RopeScaling(**values)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network, in Hugging Face's field names (report section 2; released `config.json`).

    Defaults are the released 671B model without position scaling; `n_group`/`topk_group`,
    `num_nextn_predict_layers` (MTP depth) and the sigmoid gate are part of it, not options.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        place = "ModelConfig"
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
            "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
        ).split()
        for name in positive:
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive", place)
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value} must not be negative", place)
        _require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank={self.q_lora_rank} must be positive or null",
            place,
        )
        _require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} must be at most "
            f"num_hidden_layers={self.num_hidden_layers}",
            place,
        )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name}={value} must be positive and finite", place)
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs",
            place,
        )
        self._check_routing(place)

    def _check_routing(self, place: str) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        _require(
            experts % groups == 0,
            f"n_routed_experts={experts} must be divisible by n_group={groups}",
            place,
        )
        _require(
            self.topk_group <= groups,
            f"topk_group={self.topk_group} must be at most n_group={groups}",
            place,
        )
        _require(
            experts // groups >= 2 or groups == 1,
            f"n_routed_experts={experts} over n_group={groups} leaves fewer than two experts a "
            "group: a group's score is the sum of its two best",
            place,
        )
        reachable = self.topk_group * (experts // groups)
        _require(
            self.num_experts_per_tok <= reachable,
            f"num_experts_per_tok={self.num_experts_per_tok} must be at most the {reachable} "
            f"experts in topk_group={self.topk_group} groups",
            place,
        )

    @property
    def num_dense_layers(self) -> int:
        """Number of leading layers with a dense FFN."""
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers, without the MTP modules."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the position-free part plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_hf(
        cls, source: str | Path | dict[str, Any], *, ignore: Iterable[str] = ()
    ) -> "ModelConfig":
        """Reads a Hugging Face `config.json` of the DeepSeek-V3 family.

        V3, R1, V3.1, Kimi K2 and Moonlight files read as they are (`q_lora_rank: null`,
        `n_group: 1` and an absent `rope_scaling` included).

        Args:
          source: a `config.json`, the folder that holds one, or the parsed dictionary.
          ignore: further keys to skip. Without it a key this reader does not know is an error,
            because it may describe another network.

        Raises:
          ConfigError: unknown key (with the nearest known name), a value of another
            architecture, or a broken rule.
          FileNotFoundError: no such file.
        """
        if isinstance(source, dict):
            raw, place = dict(source), "config.json"
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            place = str(path)
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ConfigError(f"not valid JSON: {error} ({place})") from error
            _require(isinstance(raw, dict), "the top level must be an object", place)
        if "num_mtp_layers" in raw:  # transformers' newer name of the same field
            raw.setdefault("num_nextn_predict_layers", raw.pop("num_mtp_layers"))
        model_type = raw.get("model_type", "deepseek_v3")
        _require(
            model_type in _HF_MODEL_TYPES,
            f"model_type={model_type!r} must be one of {', '.join(_HF_MODEL_TYPES)}",
            place,
        )
        for key, allowed in _HF_REQUIRED.items():
            value = raw.get(key, allowed[0])
            _require(value in allowed, f"{key}={value!r} must be {allowed[0]!r}", place)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        heads = raw.get("num_attention_heads", fields["num_attention_heads"].default)
        kv_heads = raw.get("num_key_value_heads", heads)
        _require(
            kv_heads in (heads, None),
            f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads}: MLA has no "
            "grouped queries",
            place,
        )
        known = {*fields, *_HF_REQUIRED, "model_type", "num_key_value_heads", "rope_parameters"}
        for key in raw:
            if key not in known and key not in _HF_IGNORED and key not in set(ignore):
                hint = nearest_name(key, known)
                raise ConfigError(f"unknown key {key!r}{hint} ({place})")
        values = {key: raw[key] for key in fields if key in raw}
        values["rope_theta"], values["rope_scaling"] = _rope_from_hf(raw, place)
        groups = values.get("n_group", 0)
        if groups is None or (groups == 1 and values.get("topk_group", 1) is None):
            values |= {"n_group": 1, "topk_group": 1}  # no groups, so nothing to choose among
        for key, value in values.items():
            _check_type(key, value, fields[key].type, place)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dictionary that `from_hf` reads back to an equal `ModelConfig`."""
        raw = dataclasses.asdict(self)
        raw["num_key_value_heads"] = self.num_attention_heads
        raw.update({key: allowed[0] for key, allowed in _HF_REQUIRED.items()})
        raw["architectures"] = ["DeepseekV3ForCausalLM"]
        raw["model_type"] = "deepseek_v3"
        if self.rope_scaling is not None:
            scaling = {k: v for k, v in raw["rope_scaling"].items() if v is not None}
            raw["rope_scaling"] = {"type": "yarn", **scaling}
        return raw


def _check_type(key: str, value: Any, annotation: Any, place: str) -> None:
    """Refuses a JSON value of the wrong kind before arithmetic on it can raise something vague."""
    if annotation is int or annotation == (int | None):
        fits = isinstance(value, int) and not isinstance(value, bool)
        fits = fits or (value is None and annotation is not int)
        _require(fits, f"{key}={value!r} must be an integer", place)
    elif annotation is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(fits, f"{key}={value!r} must be a number", place)
    elif annotation is bool:
        _require(isinstance(value, bool), f"{key}={value!r} must be true or false", place)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How the network is computed; nothing here changes what it computes.

    `compute_dtype`: activations and the weights they meet ("bfloat16" or "float32"); gate,
    softmax, norm statistics and logits are always float32.
    `remat_policy`: what the backward pass recomputes: "none" keeps everything, "full" keeps only
    each layer's input, "dots" keeps the results of weight matmuls, "attention" keeps each layer's
    attention output.
    `unroll_layers`: writes the loop over layers out: faster steps (no copies of what the backward
    pass keeps) for a compilation that grows with the layers.
    `grouped_matmul`: implementation of `pallas_kernels.grouped_matmul`; null picks one.
    """

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat_policy: Literal["none", "full", "dots", "attention"] = "full"
    unroll_layers: bool = False
    grouped_matmul: str | None = None


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the device mesh's axes. This version trains on one device: every size is 1."""

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            _require(
                size == 1,
                f"{field.name}={size} must be 1: training runs on one device in this version",
                "ParallelConfig",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokens and packing (report section 4.1).

    `corpus`: "stdlib" (the running Python's standard library, held out by whole packages) or a
    path to a file or folder of text, source, .jsonl or .parquet files.
    `held_out`: a second path for evaluation; null holds out whole documents of `corpus`
    (fraction `held_out_fraction`, chosen by a hash of the document's name).
    `text_field`: the field that holds the text in .jsonl and .parquet rows.
    `tokenizer`: "corpus-bpe" (byte-level BPE of `model.vocab_size` entries trained on the corpus
    and cached), "deepseek-v3" (the released 128K tokenizer), or a `tokenizer.json` path.
    `fim_rate`: share of documents rewritten as Fill-in-Middle, prefix-suffix-middle order.
    `cache_dir`: tokenizers and token files are kept here; null is `~/.cache/dsv3_jax`.
    """

    corpus: str = "stdlib"
    held_out: str | None = None
    held_out_fraction: float = 0.05
    text_field: str = "text"
    tokenizer: str = "corpus-bpe"
    sequence_length: int = 4096
    fim_rate: float = 0.1
    seed: int = 0
    cache_dir: str | None = None
    prefetch: int = 4

    def __post_init__(self) -> None:
        place = "DataConfig"
        _require(
            self.sequence_length >= 2,
            f"sequence_length={self.sequence_length} must be at least 2",
            place,
        )
        _require(0 <= self.fim_rate <= 1, f"fim_rate={self.fim_rate} must be in [0, 1]", place)
        _require(
            0 < self.held_out_fraction < 1,
            f"held_out_fraction={self.held_out_fraction} must be in (0, 1)",
            place,
        )
        _require(self.seed >= 0, f"seed={self.seed} must not be negative", place)
        _require(self.prefetch >= 1, f"prefetch={self.prefetch} must be at least 1", place)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sequences an optimizer step and how they are split (report section 4.2).

    The batch grows from `initial_size` to `size` over the first `ramp_tokens` tokens, in
    `ramp_stages` equal stages, by accumulating more microbatches of `microbatch_size` sequences.
    `initial_size` null means no ramp.
    """

    size: int = 15360
    microbatch_size: int = 15360
    initial_size: int | None = None
    ramp_tokens: int = 0
    ramp_stages: int = 5

    def __post_init__(self) -> None:
        place = "BatchConfig"
        first = self.size if self.initial_size is None else self.initial_size
        for name in ("size", "microbatch_size", "ramp_stages"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive", place)
        _require(
            0 < first <= self.size,
            f"initial_size={first} must be positive and at most size={self.size}",
            place,
        )
        for name, value in (("size", self.size), ("initial_size", first)):
            _require(
                value % self.microbatch_size == 0,
                f"{name}={value} must be divisible by microbatch_size={self.microbatch_size}",
                place,
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its five-part learning rate (report section 4.2).

    Linear warm-up over `warmup_steps` steps to `peak_lr`; constant until `constant_tokens`;
    cosine over `decay_tokens` to `decay_lr`; constant for `hold_tokens`; then `final_lr`.
    """

    peak_lr: float = 2.2e-4
    warmup_steps: int = 2000
    constant_tokens: int = 10_000_000_000_000
    decay_tokens: int = 4_300_000_000_000
    decay_lr: float = 2.2e-5
    hold_tokens: int = 333_000_000_000
    final_lr: float = 7.3e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_skipped_in_a_row: int = 10

    def __post_init__(self) -> None:
        place = "OptimizerConfig"
        for name in ("peak_lr", "decay_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            sound = math.isfinite(value) and value >= 0
            _require(sound, f"{name}={value} must be finite and not negative", place)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}={value} must be in [0, 1)", place)
        for name in ("warmup_steps", "constant_tokens", "decay_tokens", "hold_tokens"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value} must not be negative", place)
        for name in ("clip_norm", "eps", "max_skipped_in_a_row"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive", place)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses and the balancing speed (report sections 2.1.2, 2.2 and 4.2).

    `mtp_weight` (lambda) holds until `mtp_switch_tokens`, then `mtp_weight_final`;
    `bias_update_speed` (gamma) holds until `bias_update_tokens`, then 0;
    `balance_weight` (alpha) weighs the sequence-wise balance loss.
    """

    mtp_weight: float = 0.3
    mtp_weight_final: float = 0.1
    mtp_switch_tokens: int = 10_000_000_000_000
    balance_weight: float = 1e-4
    bias_update_speed: float = 1e-3
    bias_update_tokens: int = 14_300_000_000_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            sound = 0 <= value < math.inf
            _require(sound, f"{field.name}={value} must be finite and not negative", "LossConfig")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written (asynchronously) and how many stay, plus the best one."""

    every_steps: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive", "CheckpointConfig")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during training and the sample at its end."""

    every_steps: int = 1000
    sequences: int = 64
    final_sequences: int = 512
    prompt: str = "def "
    sample_tokens: int = 128
    temperature: float = 0.8

    def __post_init__(self) -> None:
        place = "EvaluationConfig"
        for name in ("every_steps", "sequences", "final_sequences", "sample_tokens"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive", place)
        _require(
            self.temperature >= 0, f"temperature={self.temperature} must not be negative", place
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run. It ends after `total_tokens`, or after `steps` steps if that is less.

    `steps` does not move any schedule: a run stopped early and resumed is the run never stopped.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    total_tokens: int = 14_800_000_000_000
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        place = "TrainConfig"
        _require(self.total_tokens > 0, f"total_tokens={self.total_tokens} must be > 0", place)
        _require(
            self.steps is None or self.steps > 0, f"steps={self.steps} must be positive", place
        )
        _require(
            self.total_tokens / self.data.sequence_length < 2**32,
            f"total_tokens={self.total_tokens} over sequence_length={self.data.sequence_length} "
            "must stay below 2**32 sequences, the range of the sequence counter",
            place,
        )
        _require(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"sequence_length={self.data.sequence_length} must be at most "
            f"max_position_embeddings={self.model.max_position_embeddings}",
            place,
        )
        _require(
            self.model.num_nextn_predict_layers < self.data.sequence_length - 1,
            f"num_nextn_predict_layers={self.model.num_nextn_predict_layers} must be below "
            f"sequence_length={self.data.sequence_length} - 1",
            place,
        )
