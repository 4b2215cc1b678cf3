"""Tiny random checkpoints in the released layout, and transformers' model on the same folder.

The tensors are drawn here from the released names alone, not by a library under test, and written
as `config.json` plus safetensors. Sizes are awkward and pairwise different, so a swapped axis is
an error and not a coincidence; weights are large enough that every part moves the logits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from tests.oracles.reference import Config, Weights

YARN: Config = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    # With theta 100 and 8 rotary dimensions the ramp runs over all four pairs.
    "beta_fast": 2,
    "beta_slow": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
BASE: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 89,
    "hidden_size": 40,
    "intermediate_size": 50,
    "moe_intermediate_size": 18,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "max_position_embeddings": 640,
    "rope_theta": 100.0,
    "rope_scaling": YARN,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.006,
}
# Each entry changes what its name says relative to BASE; together they cover the family.
VARIANTS: dict[str, Config] = {
    "base": {},
    "moonlight": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
        "n_shared_experts": 1,
        "rope_theta": 10000.0,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.446,
    },
    "two_mtp_modules": {
        "num_nextn_predict_layers": 2,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "rope_scaling": {**YARN, "mscale": 1.7, "mscale_all_dim": 0.6},
    },
    "kimi": {
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
    },
    "all_dense": {
        "first_k_dense_replace": 3,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        # No mscale keys: cos and sin take the default amplitude and the softmax none. Both betas
        # fall before the first pair, so the ramp's two ends coincide.
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 3,
            "beta_slow": 3,
        },
    },
}
# Weights of these seeds leave every decision of every gate a margin of 1e-3 on the inputs of
# `token_ids`, so rounding cannot re-route a token (asserted in the parity tests).
SEEDS = {"base": 4, "moonlight": 35, "two_mtp_modules": 4, "kimi": 7, "all_dense": 0}


def token_ids(config: Config, batch: int = 2, length: int = 37) -> np.ndarray:
    """Random token ids int32 [batch, length], well past YARN's original length of 16."""
    rng = np.random.default_rng(1)
    return rng.integers(0, config["vocab_size"], (batch, length)).astype(np.int32)


def config_of(variant: str, **changes: Any) -> Config:
    """The `config.json` dictionary of a variant."""
    return {**BASE, **VARIANTS[variant], **changes}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint of this config, by name."""
    d, v = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    depth = config["num_nextn_predict_layers"]
    for index in range(config["num_hidden_layers"] + depth):
        prefix = f"model.layers.{index}."
        dense = index < min(config["first_k_dense_replace"], config["num_hidden_layers"])
        shapes |= {prefix + k: s for k, s in _layer_shapes(config, dense).items()}
        if index >= config["num_hidden_layers"]:
            shapes[prefix + "embed_tokens.weight"] = (v, d)
            shapes[prefix + "enorm.weight"] = (d,)
            shapes[prefix + "hnorm.weight"] = (d,)
            shapes[prefix + "eh_proj.weight"] = (d, 2 * d)
            shapes[prefix + "shared_head.norm.weight"] = (d,)
            shapes[prefix + "shared_head.head.weight"] = (v, d)
    return shapes


def _layer_shapes(config: Config, dense: bool) -> dict[str, tuple[int, ...]]:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = (
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    c, a = config["kv_lora_rank"], config["q_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.kv_a_proj_with_mqa.weight": (c + rope, d),
        "self_attn.kv_a_layernorm.weight": (c,),
        "self_attn.kv_b_proj.weight": (heads * (nope + v), c),
        "self_attn.o_proj.weight": (d, heads * v),
    }
    if a is None:
        shapes["self_attn.q_proj.weight"] = (heads * (nope + rope), d)
    else:
        shapes["self_attn.q_a_proj.weight"] = (a, d)
        shapes["self_attn.q_a_layernorm.weight"] = (a,)
        shapes["self_attn.q_b_proj.weight"] = (heads * (nope + rope), a)

    def ffn(prefix: str, width: int) -> None:
        shapes[prefix + "gate_proj.weight"] = (width, d)
        shapes[prefix + "up_proj.weight"] = (width, d)
        shapes[prefix + "down_proj.weight"] = (d, width)

    if dense:
        ffn("mlp.", config["intermediate_size"])
        return shapes
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes["mlp.gate.weight"] = (experts, d)
    shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        ffn(f"mlp.experts.{expert}.", width)
    if config["n_shared_experts"]:
        ffn("mlp.shared_experts.", width * config["n_shared_experts"])
    return shapes


def random_weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors under the released names, drawn in the order of their names.

    Linear weights keep activations near 1 and norm weights scatter around 1. Correction biases
    come in three kinds in turn over the MoE layers: all biased scores negative; two experts at
    +5 and -5; small ones.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    moe_layers = 0
    for name, shape in tensor_shapes(config).items():
        if name.endswith("e_score_correction_bias"):
            kind, moe_layers = moe_layers % 3, moe_layers + 1
            value = rng.normal(0, 0.15, shape)
            if kind == 0:
                value -= 1.6
            elif kind == 1:
                up, down = rng.permutation(shape[0])[:2]
                value[up], value[down] = 5.0, -5.0
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        elif "embed_tokens" in name:
            value = rng.normal(0, 1, shape)
        else:
            value = rng.normal(0, 1.4 * shape[1] ** -0.5, shape)
        if config["rms_norm_eps"] > 1e-6 and "_a_proj" in name:
            # Low-rank activations of about 0.01, or the epsilon of their norm would not show.
            value[: config["kv_lora_rank"]] *= 0.01
            if "q_a_proj" in name:
                value[config["kv_lora_rank"] :] *= 0.01
        weights[name] = value.astype(np.float32)
    # Released checkpoints repeat the main embedding and head in every MTP layer.
    for name in weights:
        if ".layers." in name and name.endswith("embed_tokens.weight"):
            weights[name] = weights["model.embed_tokens.weight"]
        elif name.endswith("shared_head.head.weight"):
            weights[name] = weights["lm_head.weight"]
    return weights


def save(folder: Path, config: Config, weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Writes a Hugging Face folder; with several shards also the index that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(arrays)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def as_torch(weights: dict[str, np.ndarray], requires_grad: bool = False) -> Weights:
    """Float64 torch copies for `reference.forward`; biases never require a gradient."""
    result = {}
    for name, array in weights.items():
        tensor = torch.tensor(np.asarray(array), dtype=torch.float64)
        tensor.requires_grad_(requires_grad and not name.endswith("e_score_correction_bias"))
        result[name] = tensor
    return result


def load_transformers(folder: Path) -> Any:
    """transformers' `DeepseekV3ForCausalLM` on the folder: float32, eager attention and experts."""
    import transformers
    from transformers import DeepseekV3ForCausalLM

    transformers.logging.set_verbosity_error()  # it lists the MTP tensors as unexpected
    transformers.logging.disable_progress_bar()
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"], info["missing_keys"]
    beyond = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(8))
    strange = [name for name in info["unexpected_keys"] if not name.startswith(beyond)]
    assert not strange, strange
    return model.eval()


def load_transformers_mtp(main_model: Any, weights: dict[str, np.ndarray]) -> Any:
    """transformers' own MTP modules beside `main_model`, filled from released-name tensors.

    Its `MtpModel.from_pretrained` finds the tensors by the class's pattern "model.layers.61", so
    a model with another number of layers is filled by hand here.
    """
    from transformers.modeling_layers import MtpModel

    depth = main_model.config.num_mtp_layers
    first = main_model.config.num_hidden_layers
    module = MtpModel(main_model, depth)
    outside = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    state = {}
    for k in range(depth):
        prefix = f"model.layers.{first + k}."
        layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        layer.pop("embed_tokens.weight")
        layer.pop("shared_head.head.weight")
        state[f"layers.{k}.post_norm.weight"] = layer.pop("shared_head.norm.weight")
        for name, array in fuse_experts(layer).items():
            place = name if name in outside else f"mtp_block.{name}"
            state[f"layers.{k}.{place}"] = array
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    shared = ("embed_tokens.", "shared_head.", "rotary_emb.")
    assert not unexpected and all(name.startswith(shared) for name in missing), missing
    return module.eval()


def fuse_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Released per-expert tensors stacked the way transformers keeps them in memory."""
    result = dict(weights)
    stems = {name.split("experts.0.")[0] for name in weights if "experts.0." in name}
    for stem in stems:
        count = sum(
            name.startswith(stem + "experts.") and name.endswith("down_proj.weight")
            for name in weights
        )
        parts = [
            [result.pop(f"{stem}experts.{e}.{part}_proj.weight") for e in range(count)]
            for part in ("gate", "up", "down")
        ]
        gate, up, down = (np.stack(part) for part in parts)
        result[stem + "experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[stem + "experts.down_proj"] = down
    return result


def split_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `fuse_experts`, for weights and for gradients."""
    result = {}
    for name, array in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(array):
                gate, up = np.split(both, 2)
                result[f"{stem}{e}.gate_proj.weight"] = gate
                result[f"{stem}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for e, down in enumerate(array):
                result[f"{stem}{e}.down_proj.weight"] = down
        else:
            result[name] = array
    return result
