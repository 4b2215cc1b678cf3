"""The network: `ModelConfig`, which reads and writes Hugging Face's `config.json`."""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import ConfigError, check_type, nearest_name, require


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
        require(self.factor >= 1, f"factor={self.factor} must be at least 1", place)
        require(
            self.original_max_position_embeddings > 0,
            f"original_max_position_embeddings={self.original_max_position_embeddings} "
            "must be positive",
            place,
        )
        require(
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
        check_type(name, value, float, place)
    named = " and ".join(f"{name}={value}" for name, value in found.items())
    require(len(set(found.values())) <= 1, f"{named} must be equal", place)
    return float(next(iter(found.values()), 10000.0))


def _without_theta(section: dict[str, Any] | None) -> dict[str, Any]:
    """A position-scaling section with its type spelled one way and without the base; {} if none."""
    section = {k: v for k, v in (section or {}).items() if k != "rope_theta" and v is not None}
    if "type" in section:
        section.setdefault("rope_type", section.pop("type"))
    return {} if section == {"rope_type": "default"} else section


def _rope_from_hf(raw: dict[str, Any], place: str) -> tuple[float, RopeScaling | None]:
    """Reads `rope_theta` and YaRN from either spelling (`rope_scaling` or `rope_parameters`)."""
    for key in ("rope_parameters", "rope_scaling"):
        require(
            isinstance(raw.get(key) or {}, dict),
            f"{key}={raw.get(key)!r} must be an object or null",
            place,
        )
    spellings = [_without_theta(raw.get(key)) for key in ("rope_scaling", "rope_parameters")]
    scaling = spellings[0] or spellings[1]
    require(
        spellings[1] in ({}, scaling),
        f"rope_scaling={raw.get('rope_scaling')} and "
        f"rope_parameters={raw.get('rope_parameters')} must say the same",
        place,
    )
    theta = _rope_theta_from_hf(raw, place)
    if not scaling:
        return theta, None
    kind = scaling.get("rope_type")
    require(kind == "yarn", f"rope_scaling type {kind!r} must be 'yarn' or absent", place)
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    for key in scaling:
        require(
            key in known | {"rope_type"},
            f"unknown rope_scaling key {key!r}{nearest_name(key, known)}",
            place,
        )
    values = {key: scaling[key] for key in known if scaling.get(key) is not None}
    for key, value in values.items():
        kind = int if key == "original_max_position_embeddings" else float
        check_type(f"rope_scaling.{key}", value, kind, place)
    for key in ("mscale", "mscale_all_dim"):
        values.setdefault(key, None)
    for key in ("factor", "original_max_position_embeddings"):
        require(key in values, f"rope_scaling has no {key!r}", place)
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
            require(value > 0, f"{name}={value} must be positive", place)
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative", place)
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank={self.q_lora_rank} must be positive or null",
            place,
        )
        require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} must be at most "
            f"num_hidden_layers={self.num_hidden_layers}",
            place,
        )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value} must be positive and finite", place)
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs",
            place,
        )
        self._check_routing(place)

    def _check_routing(self, place: str) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        require(
            experts % groups == 0,
            f"n_routed_experts={experts} must be divisible by n_group={groups}",
            place,
        )
        require(
            self.topk_group <= groups,
            f"topk_group={self.topk_group} must be at most n_group={groups}",
            place,
        )
        require(
            experts // groups >= 2 or groups == 1,
            f"n_routed_experts={experts} over n_group={groups} leaves fewer than two experts a "
            "group: a group's score is the sum of its two best",
            place,
        )
        reachable = self.topk_group * (experts // groups)
        require(
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
            except (ValueError, RecursionError) as error:  # bad UTF-8 and deep nesting too
                raise ConfigError(f"not valid JSON: {error} ({place})") from error
            require(isinstance(raw, dict), "the top level must be an object", place)
        if "num_mtp_layers" in raw:  # transformers' newer name of the same field
            raw.setdefault("num_nextn_predict_layers", raw.pop("num_mtp_layers"))
        model_type = raw.get("model_type", "deepseek_v3")
        require(
            model_type in _HF_MODEL_TYPES,
            f"model_type={model_type!r} must be one of {', '.join(_HF_MODEL_TYPES)}",
            place,
        )
        for key, allowed in _HF_REQUIRED.items():
            value = raw.get(key, allowed[0])
            require(value in allowed, f"{key}={value!r} must be {allowed[0]!r}", place)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        heads = raw.get("num_attention_heads", fields["num_attention_heads"].default)
        kv_heads = raw.get("num_key_value_heads", heads)
        require(
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
            check_type(key, value, fields[key].type, place)
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
