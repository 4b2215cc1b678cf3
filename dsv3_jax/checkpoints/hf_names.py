"""The one table between Hugging Face tensor names and this library's parameters, both directions.

A `Row` ties one tensor name to one slot: a parameter, and where in it the tensor lies (the layer
of a stack, the expert, the gate or up half). `rows(config)` lists them all, so that a tensor with
no row and a parameter slot with no tensor are both visible.
"""

import dataclasses
import re
from collections.abc import Iterator

from dsv3_jax.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor and the slot it fills.

    name: Hugging Face tensor name.
    path: collection, then the parameter's path: ("params", "norm", "weight").
    index: index into the parameter that yields the slot; () is the whole parameter.
    transpose: the file holds [out, in] where the slot is [in, out].
    """

    name: str
    path: Path
    index: tuple[int | slice, ...] = ()
    transpose: bool = False


_ATTENTION_LINEARS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_FFN = ("gate_proj", "up_proj", "down_proj")
_GATE_UP_HALF = {"gate_proj": 0, "up_proj": 1}


def _layer_rows(
    config: ModelConfig, number: int, path: Path, index: tuple[int, ...], *, moe: bool
) -> Iterator[Row]:
    """Rows of decoder layer `number`, whose parameters lie below `path` at stack `index`."""
    prefix = f"model.layers.{number}"

    def linear(module: str, *inner: str) -> Row:
        where = ("params", *path, *inner, "kernel")
        return Row(f"{prefix}.{module}.weight", where, index, transpose=True)

    def norm(module: str, *inner: str) -> Row:
        return Row(f"{prefix}.{module}.weight", ("params", *path, *inner, "weight"), index)

    attention = list(_ATTENTION_LINEARS)
    norms = ["kv_a_layernorm"]
    if config.q_lora_rank is None:
        attention.append("q_proj")
    else:
        attention += ["q_a_proj", "q_b_proj"]
        norms.append("q_a_layernorm")
    for name in attention:
        yield linear(f"self_attn.{name}", "self_attn", name)
    for name in norms:
        yield norm(f"self_attn.{name}", "self_attn", name)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield norm(name, name)
    if not moe:
        for name in _FFN:
            yield linear(f"mlp.{name}", "mlp", name)
        return
    yield linear("mlp.gate", "mlp", "gate")
    bias = "e_score_correction_bias"
    where = ("router_state", *path, "mlp", "gate", bias)
    yield Row(f"{prefix}.mlp.gate.{bias}", where, index)
    if config.n_shared_experts > 0:
        for name in _FFN:
            yield linear(f"mlp.shared_experts.{name}", "mlp", "shared_experts", name)
    experts = ("params", *path, "mlp", "experts")
    for expert in range(config.n_routed_experts):
        at = (*index, expert)
        for name in _FFN:
            tensor = f"{prefix}.mlp.experts.{expert}.{name}.weight"
            if name in _GATE_UP_HALF:
                half = (*at, slice(None), _GATE_UP_HALF[name])
                yield Row(tensor, (*experts, "gate_up_proj"), half, transpose=True)
            else:
                yield Row(tensor, (*experts, name), at, transpose=True)


def rows(config: ModelConfig) -> Iterator[Row]:
    """Every tensor of a released checkpoint that fills a parameter, each exactly once."""
    yield Row("model.embed_tokens.weight", ("params", "embed_tokens", "embedding"))
    yield Row("model.norm.weight", ("params", "norm", "weight"))
    yield Row("lm_head.weight", ("params", "lm_head", "kernel"), transpose=True)
    for number in range(config.num_hidden_layers):
        moe = number >= config.num_dense_layers
        stack = "moe_layers" if moe else "dense_layers"
        offset = config.num_dense_layers if moe else 0
        yield from _layer_rows(config, number, (stack,), (number - offset,), moe=moe)
    for depth in range(config.num_nextn_predict_layers):
        number = config.num_hidden_layers + depth
        prefix, module = f"model.layers.{number}", f"mtp_{depth}"
        for name in ("enorm", "hnorm"):
            yield Row(f"{prefix}.{name}.weight", ("params", module, name, "weight"))
        where = ("params", module, "eh_proj", "kernel")
        yield Row(f"{prefix}.eh_proj.weight", where, transpose=True)
        where = ("params", module, "shared_head_norm", "weight")
        yield Row(f"{prefix}.shared_head.norm.weight", where)
        yield from _layer_rows(config, number, (module, "layer"), (), moe=True)


def mtp_module(name: str, config: ModelConfig) -> int | None:
    """Which of the config's MTP modules a tensor belongs to; None: to none of them."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    depth = int(match[1]) - config.num_hidden_layers if match else -1
    return depth if 0 <= depth < config.num_nextn_predict_layers else None


def tied_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors of the MTP layers that repeat another: {copy's name: original's name}."""
    copies = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{prefix}.shared_head.head.weight"] = "lm_head.weight"
    return copies


_LEFTOVERS = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "recomputed from the configuration",
}


def ignored_because(name: str) -> str | None:
    """Why a tensor of this name is skipped on reading, or None when it may not be."""
    for pattern, reason in _LEFTOVERS.items():
        if re.fullmatch(pattern, name):
            return reason
    return None
