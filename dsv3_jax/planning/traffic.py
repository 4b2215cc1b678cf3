"""Bytes between devices and floating-point operations of a step, from shapes alone.

The same form as what `hlo.py` reads from a compiled program: bytes that one device sends, by kind
and mesh axes, in a whole step. What the model counts: weights gathered once forward and once
backward for every microbatch, their gradients reduced as often, rows of tokens that travel to
experts and back, and partial sums of the tensor axis.
"""

import math

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.planning.hlo import Collective
from dsv3_jax.planning.memory import FLOAT, Sizes, gathered_bytes, share_of
from dsv3_jax.training.flops import train_flops_per_token


def microbatches(config: TrainConfig) -> int:
    """Of the largest step of the run."""
    return config.batch.size // config.batch.microbatch_size


def step_tokens(config: TrainConfig) -> int:
    """Of the largest step of the run."""
    return config.batch.size * config.data.sequence_length


def model_flops(config: TrainConfig) -> int:
    """Of a step on all devices: what the mathematics needs, MTP included, nothing recomputed."""
    per_token = train_flops_per_token(config.model, config.data.sequence_length, mtp=True)
    return per_token * step_tokens(config)


def executed_flops(config: TrainConfig) -> int:
    """`model_flops` and what the remat policy computes again: a part of the forward pass."""
    model, sequence = config.model, config.data.sequence_length
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    head = (1 + model.num_nextn_predict_layers) * model.vocab_size * model.hidden_size
    forward = train_flops_per_token(model, sequence, mtp=True) // 3 - 2 * head
    scores = layers * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * sequence
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    routed = 2 * moe_layers * model.num_experts_per_tok * expert
    exchanged = config.parallel.expert != 1 and config.runtime.on_overflow == "exact"
    again = {
        "none": routed if exchanged else 0,
        "full": forward,
        "attention": forward - scores,
        "dots": scores + routed,
    }[config.runtime.remat_policy]
    return model_flops(config) + again * step_tokens(config)


def layer_weights(config: TrainConfig, sizes: Sizes, itemsize: int) -> tuple[int, int]:
    """Bytes of all layers' weights in the compute dtype: (outside the experts, experts here)."""
    model = config.model
    gathered = gathered_bytes(config, sizes, itemsize)
    mtp = model.num_nextn_predict_layers
    moe_layers = model.num_moe_layers + mtp
    common = model.num_dense_layers * gathered["dense"] + moe_layers * gathered["moe"]
    return common + mtp * gathered["mtp"], moe_layers * gathered["experts"]


def _merged(found: list[Collective]) -> list[Collective]:
    """One of each kind and axes, the largest first."""
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
    for c in found:
        sent, calls = sums.get((c.kind, c.axes), (0, 0))
        sums[c.kind, c.axes] = (sent + c.sent, calls + c.calls)
    merged = (Collective(*key, *value) for key, value in sums.items())
    return sorted(merged, key=lambda c: -c.sent)


def estimate_collectives(config: TrainConfig, sizes: Sizes) -> list[Collective]:
    """Everything of size that one device sends in a step, the largest first.

    Raises:
      ConfigError: the mesh does not divide the microbatch or the network.
    """
    share, times = share_of(config, sizes), microbatches(config)
    itemsize = np.dtype(config.runtime.compute_dtype).itemsize
    model = config.model
    mtp = model.num_nextn_predict_layers
    layers, moe_layers = model.num_hidden_layers + mtp, model.num_moe_layers + mtp
    common, experts = layer_weights(config, sizes, itemsize)
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], size: float, calls: int) -> None:
        """`calls` collectives a microbatch, `size` bytes of the larger side together."""
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        group = math.prod(sizes[axis] for axis in axes)
        factor = 2 if kind == "all-reduce" else 1
        sent = round(factor * size * (group - 1) / group * times)
        if sent:
            found.append(Collective(kind, axes, sent, calls * times))

    add("all-gather", ("fsdp", "expert"), 2 * common, 2 * layers)
    add("reduce-scatter", ("fsdp", "expert"), common, layers)
    # The head: once a use, and its gradient in float32.
    vocabulary = gathered_bytes(config, sizes, itemsize)["head"]
    add("all-gather", ("fsdp", "expert"), (1 + mtp) * vocabulary, 1 + mtp)
    add("reduce-scatter", ("fsdp", "expert"), (1 + mtp) * vocabulary * FLOAT // itemsize, 1 + mtp)
    add("all-gather", ("fsdp",), 2 * experts, 2 * moe_layers)
    add("reduce-scatter", ("fsdp",), experts, moe_layers)
    split = sizes["fsdp"] * sizes["expert"]
    local = common / split + experts / sizes["fsdp"]
    add("all-reduce", ("replica",), local, layers)
    # There and back; there again where the backward pass starts from the layer's input; the
    # gradients' way back and there.
    keeps = config.runtime.remat_policy == "none" and not share.in_rounds
    passes = 4 if keeps else 5
    slots = config.runtime.expert_exchange == "slots"  # sent whole, however full
    rows = (share.received if slots else share.rows) * model.hidden_size * itemsize
    kind = "all-to-all" if slots else "ragged-all-to-all"
    add(kind, ("expert",), passes * moe_layers * rows, passes * moe_layers)
    # Attention's and the FFN's output, and the gradient of either's input.
    sums = share.tokens * model.hidden_size * itemsize
    add("all-reduce", ("tensor",), 4 * layers * sums, 4 * layers)
    width = model.num_attention_heads // sizes["tensor"]
    width *= model.qk_nope_head_dim + model.v_head_dim
    keys = share.tokens * sizes["context"] * (width + model.qk_rope_head_dim) * itemsize
    add("all-gather", ("context",), 2 * layers * keys, 2 * layers)
    add("reduce-scatter", ("context",), layers * keys, layers)
    add("all-reduce", ("context",), common / split + experts / sizes["fsdp"], layers)
    return _merged(found)
