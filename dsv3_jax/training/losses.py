"""The training loss: next-token, multi-token and sequence-balance terms (sections 2.1.2, 2.2)."""

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax.model.transformer import Routing, Transformer
from dsv3_jax.parallel.vocabulary import run_head

CHUNK_TOKENS = 1024  # tokens of a device whose float32 logits exist at once


@flax.struct.dataclass
class LossTerms:
    """Each term without its weight, float32 scalars; `routing` carries the expert loads.

    main: mean cross-entropy of token i + 1, nats. mtp: the same of the MTP modules, averaged over
    depths. balance: sequence-wise balance loss, summed over all MoE layers, MTP's included.
    """

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array
    routing: Routing


def _chunks(a: jax.Array, count: int) -> jax.Array:
    """[B, T, ...] -> [count, B, T', ...], padded with zeros to count · T' positions."""
    batch, length = a.shape[:2]
    width = -(-length // count)
    padding = [(0, 0), (0, count * width - length)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, padding).reshape(batch, count, width, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)


def _scores(columns, hidden, kernel, targets):
    """Logits of the columns here, log of the sum of exp of all, and where the target is."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    top = columns.max(logits.max(-1))
    log_norm = top + jnp.log(columns.sum(jnp.exp(logits - top[..., None]).sum(-1)))
    hit = (targets - columns.first)[..., None] == jnp.arange(kernel.shape[1])
    nats = log_norm - columns.sum(jnp.where(hit, logits, 0).sum(-1))
    return logits, log_norm, hit, nats


def _one_chunk(columns, kernel, hidden, targets, weights):
    """Weighted nats of a chunk, and the gradient of their sum by the logits."""
    logits, log_norm, hit, nats = _scores(columns, hidden, kernel, targets)
    dlogits = (jnp.exp(logits - log_norm[..., None]) - hit) * weights[..., None]
    return (nats * weights).sum(), dlogits


def _chunked(*arrays):
    count = max(1, -(-arrays[0].shape[0] * arrays[0].shape[1] // CHUNK_TOKENS))
    return tuple(_chunks(a, count) for a in arrays)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`: [count, B, T', ...] -> [B, T, ...]."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


@jax.custom_vjp
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum over positions of weight · cross-entropy of softmax(hidden · kernel), in nats.

    The [B, T, V] logits never exist at once: chunks of positions are taken in turn. Under
    differentiation each chunk's gradient is computed beside its loss, from the same logits.

    Args:
      hidden: [B, T, D], the dtype of `kernel`.
      kernel: output head, [D, V].
      targets: int32 [B, T].
      weights: float32 [B, T]; zero drops a position. They take no gradient.

    Returns:
      float32 scalar.
    """

    def total(columns, kernel, *tokens):
        def add(total, chunk):
            return total + _one_chunk(columns, kernel, *chunk)[0], None

        return (jax.lax.scan(add, jnp.float32(0), _chunked(*tokens))[0],)

    return run_head(total, ("sum",), kernel, hidden, targets, weights)[0]


def _total_and_gradients(columns, kernel, hidden, targets, weights):
    """Of a device's own tokens: weighted nats, gradient by `hidden`, float32 by `kernel`."""

    def add(carry, chunk):
        total, dkernel = carry
        hidden = chunk[0]
        nats, dlogits = _one_chunk(columns, kernel, *chunk)
        dlogits = dlogits.astype(kernel.dtype)
        dhidden = columns.sum(jnp.einsum("BTV,DV->BTD", dlogits, kernel))
        dkernel += jnp.einsum("BTD,BTV->DV", hidden, dlogits, preferred_element_type=jnp.float32)
        return (total + nats, dkernel), dhidden

    start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
    (total, dkernel), dhidden = jax.lax.scan(add, start, _chunked(hidden, targets, weights))
    return total, _joined(dhidden, hidden.shape[1]), dkernel


def _cross_entropy_forward(hidden, kernel, targets, weights):
    outputs = ("sum", "tokens", "kernel")
    total, dhidden, dkernel = run_head(
        _total_and_gradients, outputs, kernel, hidden, targets, weights
    )
    return total, (dhidden, dkernel.astype(kernel.dtype))


def _cross_entropy_backward(residuals, g):
    dhidden, dkernel = residuals
    return (g * dhidden).astype(dhidden.dtype), (g * dkernel).astype(dkernel.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def token_scores(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target in nats, float32 [B, T], and the likeliest token, int32 [B, T].

    Arguments as for `cross_entropy`; logits exist a chunk at a time.
    """

    def score(columns, kernel, *tokens):
        def one_chunk(chunk):
            logits, _, _, nats = _scores(columns, chunk[0], kernel, chunk[1])
            best, here = columns.max(logits.max(-1)), logits.max(-1)
            first = columns.first + logits.argmax(-1).astype(jnp.int32)
            # Of equal logits the first column counts, wherever it lies.
            return nats, columns.min(jnp.where(here == best, first, jnp.iinfo(jnp.int32).max))

        length = tokens[0].shape[1]
        return tuple(_joined(a, length) for a in jax.lax.map(one_chunk, _chunked(*tokens)))

    nats, best = run_head(score, ("tokens", "tokens"), kernel, hidden, targets)
    return nats, best


def _shifted_weights(depth: int, shape: tuple[int, ...]) -> jax.Array:
    """Equal weights, summing to one, on the positions whose token i + depth + 1 is known."""
    batch, length = shape
    known = (jnp.arange(length) < length - depth).astype(jnp.float32)
    return jnp.broadcast_to(known / (batch * (length - depth)), shape)


def loss_terms(model: Transformer, variables: dict, tokens: jax.Array) -> LossTerms:
    """All loss terms of a batch of rows; tokens int32 [B, T + 1].

    Position i reads tokens up to i and is scored on token i + 1; MTP depth k on token i + k + 1
    (k from 1), over the positions where the row holds it.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    depths = model.config.num_nextn_predict_layers
    states = model.apply(variables, inputs, mtp=depths > 0, method="hidden_states")
    kernel = variables["params"]["lm_head"]["kernel"].astype(states.main.dtype)
    main = cross_entropy(states.main, kernel, targets, _shifted_weights(0, targets.shape))
    mtp = jnp.float32(0)
    for depth, hidden in enumerate(states.mtp, start=1):
        # Wrapped targets have weight zero.
        ahead = jnp.roll(targets, -depth, axis=1)
        mtp += cross_entropy(hidden, kernel, ahead, _shifted_weights(depth, targets.shape))
    stacks = [stats for stats in (states.routing.moe_layers, *states.routing.mtp) if stats]
    balance = sum((stats.balance_loss.sum() for stats in stacks), jnp.float32(0))
    return LossTerms(main, mtp / max(depths, 1), balance, states.routing)
