"""The training loss: next-token, multi-token and sequence-balance terms (sections 2.1.2, 2.2)."""

import flax.struct
import jax
import jax.numpy as jnp

from dsv3_jax.model.transformer import Routing, Transformer

_CHUNK_TOKENS = 1024  # tokens whose float32 logits exist at once


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


def _one_chunk(hidden, kernel, targets, weights):
    """Weighted nats of a chunk, and the gradient of their sum by the logits."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    hit = targets[..., None] == jnp.arange(kernel.shape[1])
    return (nats * weights).sum(), (jnp.exp(log_probs) - hit) * weights[..., None]


def _chunked(*arrays):
    count = max(1, -(-arrays[0].shape[0] * arrays[0].shape[1] // _CHUNK_TOKENS))
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

    def add(total, chunk):
        hidden, targets, weights = chunk
        return total + _one_chunk(hidden, kernel, targets, weights)[0], None

    total, _ = jax.lax.scan(add, jnp.float32(0), _chunked(hidden, targets, weights))
    return total


def _cross_entropy_forward(hidden, kernel, targets, weights):
    def add(carry, chunk):
        total, dkernel = carry
        hidden, targets, weights = chunk
        nats, dlogits = _one_chunk(hidden, kernel, targets, weights)
        dlogits = dlogits.astype(kernel.dtype)
        dhidden = jnp.einsum("BTV,DV->BTD", dlogits, kernel)
        dkernel += jnp.einsum("BTD,BTV->DV", hidden, dlogits, preferred_element_type=jnp.float32)
        return (total + nats, dkernel), dhidden

    start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
    (total, dkernel), dhidden = jax.lax.scan(add, start, _chunked(hidden, targets, weights))
    dhidden = _joined(dhidden, hidden.shape[1])
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

    def score(chunk):
        hidden, targets = chunk
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - target
        return nats, logits.argmax(-1).astype(jnp.int32)

    nats, best = jax.lax.map(score, _chunked(hidden, targets))
    return _joined(nats, targets.shape[1]), _joined(best, targets.shape[1])


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
