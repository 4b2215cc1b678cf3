"""Held-out loss, perplexity, bits per byte, and how well the MTP modules see ahead."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.transformer import Routing, Transformer
from dsv3_jax.training.losses import token_scores


@dataclasses.dataclass(frozen=True)
class HeldOutResult:
    """Scores over all target tokens of the evaluated rows.

    loss: nats a token. bits_per_byte: over the UTF-8 bytes the targets stand for (special tokens
    stand for none, their nats count). accuracy: share of next tokens ranked first. mtp_accuracy:
    share of second-next tokens that the first MTP module ranks first; mtp_acceptance: share of
    positions where it agrees with what the main model itself ranks first one token later (greedy
    speculative decoding would accept those). None without MTP. load: tokens each expert received,
    int64 [L, E].
    """

    loss: float
    bits_per_byte: float
    accuracy: float
    mtp_accuracy: float | None
    mtp_acceptance: float | None
    load: np.ndarray
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def _loads(routing: Routing, real_B: jax.Array, n_experts: int) -> list[jax.Array]:
    """Tokens each expert received in real rows, int32 [L, E] of each stack of layers."""
    stacks = [] if routing.moe_layers is None else [(routing.moe_layers.topk_idx, 0)]
    stacks += [(stats.topk_idx[None], depth) for depth, stats in enumerate(routing.mtp, start=1)]
    loads = []
    for topk_idx_LBTK, ahead in stacks:
        # An MTP module's last positions have no next token and do not count.
        topk_idx_LBTK = topk_idx_LBTK[:, :, : topk_idx_LBTK.shape[2] - ahead]
        chosen_LBTKE = topk_idx_LBTK[..., None] == jnp.arange(n_experts)
        loads.append((chosen_LBTKE & real_B[:, None, None, None]).sum((1, 2, 3)))
    return loads


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(model: Transformer, variables: dict, tokens: jax.Array, real_B: jax.Array):
    """Sums over one batch of rows [B, T + 1]; rows with real_B False count nothing."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    has_mtp = model.config.num_nextn_predict_layers > 0
    states = model.apply(variables, inputs, mtp=has_mtp, method="hidden_states")
    kernel = variables["params"]["lm_head"]["kernel"].astype(states.main.dtype)
    nats, best = token_scores(states.main, kernel, targets)
    real = real_B[:, None]
    sums = {"nats": (nats * real).sum(), "hits": ((best == targets) & real).sum()}
    if has_mtp:
        _, ahead = token_scores(states.mtp[0], kernel, jnp.roll(targets, -1, axis=1))
        sums["mtp_hits"] = ((ahead[:, :-1] == targets[:, 1:]) & real).sum()
        sums["mtp_agrees"] = ((ahead[:, :-1] == best[:, 1:]) & real).sum()
    loads = _loads(states.routing, real_B, model.config.n_routed_experts)
    return {**sums, "load": jnp.concatenate(loads)} if loads else sums


def evaluate(
    model: Transformer,
    variables: dict,
    sequences: np.ndarray,
    byte_lengths: np.ndarray,
    *,
    batch_size: int,
) -> HeldOutResult:
    """Scores rows of tokens.

    Args:
      model, variables: as for `model.apply`.
      sequences: int32 [N, T + 1].
      byte_lengths: int32 [V], UTF-8 bytes of each token.
      batch_size: rows evaluated at once.

    Returns:
      The scores over N · T target tokens.
    """
    totals: dict[str, np.ndarray] = {}
    for first in range(0, len(sequences), batch_size):
        rows = sequences[first : first + batch_size]
        real = np.arange(batch_size) < len(rows)
        padded = np.zeros((batch_size, sequences.shape[1]), np.int32)
        padded[: len(rows)] = rows
        for name, value in _score_batch(model, variables, padded, real).items():
            value = np.asarray(value, np.float64 if name == "nats" else np.int64)
            totals[name] = totals.get(name, 0) + value
    targets = sequences[:, 1:]
    ahead = len(sequences) * (targets.shape[1] - 1)
    has_mtp = "mtp_hits" in totals
    return HeldOutResult(
        loss=float(totals["nats"] / targets.size),
        bits_per_byte=float(totals["nats"] / math.log(2) / byte_lengths[targets].sum()),
        accuracy=float(totals["hits"] / targets.size),
        mtp_accuracy=float(totals["mtp_hits"] / ahead) if has_mtp else None,
        mtp_acceptance=float(totals["mtp_agrees"] / ahead) if has_mtp else None,
        load=totals.get("load", np.zeros((0, 0), np.int64)),
        tokens=int(targets.size),
    )
