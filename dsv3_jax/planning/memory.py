"""Bytes that one device needs for a train step, from shapes alone.

The state is exact: the shapes of the real train state under the real sharding rules. Gradients
have the parameters' shapes. What lives for a while (activations kept for the backward pass, one
layer's working set, logits) is modelled from the network's own sizes; docs/scaling.md compares
the model with compiled programs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import (
    BatchConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
)
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.experts import buffer_rows
from dsv3_jax.parallel.placement import require_fit, state_shardings
from dsv3_jax.training.losses import CHUNK_TOKENS
from dsv3_jax.training.step import TrainState, init_state
from pallas_kernels.attention.portable import BLOCK

Sizes = Mapping[str, int]
FLOAT = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    parameters, optimizer: with counters and expert biases, exact. gradients: float32, twice where
    microbatches accumulate, exact. copies: the parameters in the compute dtype; compilers take the
    cast out of the loops. kept: activations that wait for the backward pass. working: what one
    layer's backward pass, or the logits, hold at their peak.
    """

    parameters: int
    optimizer: int
    gradients: int
    copies: int
    kept: int
    working: int

    @property
    def arguments(self) -> int:
        """What the step is called with, without the batch."""
        return self.parameters + self.optimizer

    @property
    def temporaries(self) -> int:
        return self.gradients + self.copies + self.kept + self.working

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def abstract_mesh(sizes: Sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


@functools.cache
def _state_shapes(config: TrainConfig) -> TrainState:
    model = Transformer(config.model, config.runtime)
    return jax.eval_shape(lambda: init_state(model, config))


def abstract_state(config: TrainConfig, mesh: Any) -> TrainState:
    """The train state's shapes, types and shardings, without a byte of it."""
    # Neither mesh nor batch nor the way it is computed changes a shape: a search asks once.
    plain = {"parallel": ParallelConfig(), "batch": BatchConfig(), "runtime": RuntimeConfig()}
    state = _state_shapes(dataclasses.replace(config, **plain))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )


def local_bytes(tree: Any) -> int:
    """Bytes of one device's parts of a pytree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device computes of a microbatch.

    tokens: positions, of `sequences` sequences. rows: choices that leave here (tokens times K).
    received: rows of the receive buffer. heads, ffn, expert_ffn, vocab: after the tensor axis.
    exchanged: rows travel to their experts; in_rounds: in as many rounds as it takes, and the
    backward pass computes the experts again.
    """

    sequences: int
    tokens: int
    rows: int
    received: int
    heads: int
    ffn: int
    expert_ffn: int
    vocab: int
    exchanged: bool
    in_rounds: bool


def share_of(config: TrainConfig, sizes: Sizes) -> Share:
    """One device's part of a microbatch on a mesh of these sizes.

    Raises:
      ConfigError: the mesh does not divide the microbatch, the sequence or the network.
    """
    model, tensor = config.model, sizes["tensor"]
    require_fit(abstract_mesh(sizes), config)
    ways = sizes["replica"] * sizes["fsdp"] * sizes["expert"]
    sequences = config.batch.microbatch_size // ways
    tokens = sequences * config.data.sequence_length // sizes["context"]
    rows = tokens * model.num_experts_per_tok
    exchanged = sizes["expert"] > 1
    factor, choices = config.runtime.expert_buffer_factor, model.num_experts_per_tok
    local = model.n_routed_experts // sizes["expert"]
    return Share(
        sequences=sequences,
        tokens=tokens,
        rows=rows,
        received=buffer_rows(factor, rows, choices, local, sizes["expert"]) if exchanged else rows,
        heads=model.num_attention_heads // tensor,
        ffn=-(-model.intermediate_size // tensor),
        expert_ffn=model.moe_intermediate_size // tensor,
        vocab=-(-model.vocab_size // tensor),
        exchanged=exchanged,
        in_rounds=exchanged and config.runtime.on_overflow == "exact",
    )


def _attention_widths(model: ModelConfig, share: Share) -> dict[str, int]:
    """Values a token of each intermediate of one attention, in the compute dtype."""
    heads = share.heads
    query_rank = model.q_lora_rank or 0
    return {
        "norm": model.hidden_size,
        "q_a": 2 * query_rank,  # before and after its norm
        "kv_a": 2 * (model.kv_lora_rank + model.qk_rope_head_dim),
        "q": 2 * heads * model.qk_head_dim,  # before and after rotation
        "kv": heads * (model.qk_nope_head_dim + model.v_head_dim),
        "k": heads * model.qk_head_dim,
        "out": 2 * heads * model.v_head_dim,  # two layouts
    }


def _routed_bytes(config: TrainConfig, share: Share, itemsize: int) -> int:
    """Bytes of all intermediates of one layer's routed experts."""
    hidden, width = config.model.hidden_size, share.expert_ffn
    # Rows and results; gate and up, also in float32; the activation.
    received = 2 * hidden * itemsize + 2 * width * (itemsize + FLOAT) + width * itemsize
    total = share.received * received + share.tokens * hidden * FLOAT
    if share.exchanged:  # rows as they leave, arrive and go back
        total += (share.rows + 2 * share.received) * hidden * itemsize
    return total


def _unrouted_bytes(config: TrainConfig, share: Share, itemsize: int) -> int:
    """Bytes of the other intermediates of one MoE layer's FFN: norm, gate, shared experts."""
    model, tokens = config.model, share.tokens
    shared = 3 * model.n_shared_experts * share.expert_ffn
    values = (model.hidden_size + shared) * itemsize + 4 * model.n_routed_experts * FLOAT
    return tokens * values


def _kept_bytes(config: TrainConfig, share: Share, itemsize: int, *, moe: bool) -> int:
    """Of one layer, until its backward pass, under the remat policy."""
    model, tokens = config.model, share.tokens
    layer_input = tokens * model.hidden_size * itemsize
    attention = tokens * sum(_attention_widths(model, share).values()) * itemsize
    attended = tokens * share.heads * (model.v_head_dim * itemsize + FLOAT)
    dense = 3 * tokens * share.ffn * itemsize
    policy = config.runtime.remat_policy
    if policy == "full":
        return layer_input
    if policy == "attention":
        return layer_input + attended
    if policy == "none":
        routed = 0 if share.in_rounds else _routed_bytes(config, share, itemsize)
        ffn = _unrouted_bytes(config, share, itemsize) + routed if moe else dense
        return layer_input + attention + ffn
    projections = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    projections += share.heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    shared = 2 * model.n_shared_experts * share.expert_ffn + model.hidden_size
    ffn = tokens * shared * itemsize + tokens * model.n_routed_experts * FLOAT
    dense_dots = tokens * (2 * share.ffn + model.hidden_size) * itemsize
    dots = tokens * (projections + model.hidden_size) * itemsize
    return layer_input + dots + (ffn if moe else dense_dots)


def gathered_bytes(config: TrainConfig, sizes: Sizes, itemsize: int) -> dict[str, int]:
    """Bytes in the compute dtype that one device gathers, whole after the fsdp axes.

    "dense" and "moe": of one layer's matrices outside the routed experts; "experts": of one
    layer's experts here; "head"; "mtp": its projection.
    """
    model, tensor = config.model, sizes["tensor"]
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = model.q_lora_rank or 0
    whole = hidden * (query + model.kv_lora_rank + model.qk_rope_head_dim)
    shared_out = (query or hidden) * heads * model.qk_head_dim + heads * model.v_head_dim * hidden
    shared_out += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = whole + shared_out // tensor
    expert = 3 * hidden * model.moe_intermediate_size // tensor
    return {
        "dense": (attention + 3 * hidden * model.intermediate_size // tensor) * itemsize,
        "moe": (attention + model.n_shared_experts * expert) * itemsize
        + hidden * model.n_routed_experts * FLOAT,
        "experts": model.n_routed_experts // sizes["expert"] * expert * itemsize,
        "head": hidden * model.vocab_size // tensor * itemsize,
        "mtp": 2 * hidden * hidden * itemsize,
    }


def _working_bytes(
    config: TrainConfig, sizes: Sizes, share: Share, itemsize: int, *, scores: bool
) -> int:
    """The peak of what comes and goes: a layer's backward pass, or the logits."""
    model, length = config.model, config.data.sequence_length
    gathered = gathered_bytes(config, sizes, itemsize)
    attention = share.tokens * sum(_attention_widths(model, share).values()) * itemsize
    if scores:
        # Scores, weights and the gradient of either, of a block of queries.
        attention += 4 * FLOAT * share.sequences * share.heads * min(length, BLOCK) * length
    dense = 3 * share.tokens * share.ffn * itemsize
    stacks = [attention + dense + max(attention, dense) + 2 * gathered["dense"]]
    if model.num_moe_layers + model.num_nextn_predict_layers > 0:
        moe = _routed_bytes(config, share, itemsize) + _unrouted_bytes(config, share, itemsize)
        # Weights and their gradients; the exchange adds the experts' to those of other rounds.
        weights = 2 * (gathered["moe"] + gathered["experts"])
        weights += gathered["experts"] if share.exchanged else 0
        stacks.append(attention + moe + max(attention, moe) + weights)
    positions = min(share.tokens, CHUNK_TOKENS)
    logits = positions * share.vocab * (2 * FLOAT + itemsize)
    head = model.hidden_size * share.vocab * (FLOAT + 2 * itemsize)
    return max(*stacks, logits + head)


def step_intermediates(config: TrainConfig, sizes: Sizes) -> int:
    """Bytes of everything one device's layers compute on the way, forward, for one microbatch."""
    share, model = share_of(config, sizes), config.model
    itemsize = np.dtype(config.runtime.compute_dtype).itemsize
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    attention = share.tokens * sum(_attention_widths(model, share).values()) * itemsize
    dense = 3 * share.tokens * share.ffn * itemsize
    moe = _routed_bytes(config, share, itemsize) + _unrouted_bytes(config, share, itemsize)
    layers = model.num_dense_layers + moe_layers
    return layers * attention + model.num_dense_layers * dense + moe_layers * moe


def estimate(config: TrainConfig, sizes: Sizes, *, scores: bool) -> Memory:
    """Bytes on each device of a mesh of these sizes (`mesh_sizes`).

    Args:
      config: the run.
      sizes: of the mesh.
      scores: attention scores lie in memory, as those of its portable form do.

    Raises:
      ConfigError: the mesh does not divide the microbatch or the network.
    """
    share = share_of(config, sizes)
    state = abstract_state(config, abstract_mesh(sizes))
    itemsize = np.dtype(config.runtime.compute_dtype).itemsize
    model = config.model
    parameters = local_bytes(state.params)
    accumulates = config.batch.size > config.batch.microbatch_size
    mtp = model.num_nextn_predict_layers
    kept = model.num_dense_layers * _kept_bytes(config, share, itemsize, moe=False)
    kept += (model.num_moe_layers + mtp) * _kept_bytes(config, share, itemsize, moe=True)
    # The states before the head, and their gradients.
    kept += 2 * (1 + mtp) * share.tokens * model.hidden_size * itemsize
    return Memory(
        parameters=parameters + local_bytes(state.router_state),
        optimizer=local_bytes(state) - parameters - local_bytes(state.router_state),
        gradients=parameters * (2 if accumulates else 1),
        copies=0 if itemsize == FLOAT else parameters * itemsize // FLOAT,
        kept=kept,
        working=_working_bytes(config, sizes, share, itemsize, scores=scores),
    )
