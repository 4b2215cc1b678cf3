"""From logits to the next token."""

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array, key: jax.Array, *, temperature: float, top_p: float = 1.0
) -> jax.Array:
    """Draws a token a row: logits float32 [B, V] -> int32 [B].

    `temperature` 0 takes the likeliest token. `top_p` below 1 keeps the smallest set of tokens
    whose probability reaches it, the likeliest always included.
    """
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p).at[:, 0].set(True)
        lowest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
