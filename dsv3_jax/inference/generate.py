"""Autoregressive generation: prefill, then one token at a time through the absorbed cache."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoints.convert import load_pretrained
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.sampling import sample
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.transformer import Transformer


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "temperature", "top_p", "eos_id")
)
def _generate(
    model: Transformer,
    variables: dict,
    prompt: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_id: int,
) -> jax.Array:
    batch, length = prompt.shape
    cache = init_cache(model.config, batch, length + max_new_tokens, model.runtime.compute_dtype)
    draw = functools.partial(sample, temperature=temperature, top_p=top_p)
    out = model.apply(variables, prompt, cache=cache)
    key, first_key = jax.random.split(key)
    token = draw(out.logits[:, -1], first_key)
    tokens = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        i, token, ended, *_ = carry
        return (i < max_new_tokens) & ~ended.all()

    def step(carry):
        i, token, ended, tokens, cache, key = carry
        out = model.apply(variables, token[:, None], cache=cache)
        key, step_key = jax.random.split(key)
        token = jnp.where(ended, eos_id, draw(out.logits[:, -1], step_key))
        return i + 1, token, ended | (token == eos_id), tokens.at[:, i].set(token), out.cache, key

    start = (jnp.int32(1), token, token == eos_id, tokens, out.cache, key)
    return jax.lax.while_loop(unfinished, step, start)[3]


def generate(
    model: Transformer,
    variables: dict,
    prompt: np.ndarray | jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continues each row of `prompt`.

    Args:
      model, variables: as for `model.apply`.
      prompt: int32 [B, T], all rows of one length.
      max_new_tokens: tokens to add at most.
      eos_id: a row ends after this token and is filled up with it.
      temperature: 0 takes the likeliest token.
      top_p: nucleus to draw from.
      seed: of the random draws.

    Returns:
      The new tokens, int32 [B, max_new_tokens].

    Raises:
      ConfigError: an empty prompt, or more positions than the model has.
    """
    length, limit = prompt.shape[1], model.config.max_position_embeddings
    if length == 0 or max_new_tokens < 1:
        raise ConfigError(
            f"prompt length {length} and {max_new_tokens=} must both be at least 1 (generate)"
        )
    if length + max_new_tokens > limit:
        raise ConfigError(
            f"prompt length {length} plus {max_new_tokens=} must be at most "
            f"max_position_embeddings={limit} (generate)"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"{temperature=} must be >= 0 and {top_p=} in (0, 1] (generate)")
    tokens = _generate(
        model,
        variables,
        jnp.asarray(prompt, jnp.int32),
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        top_p=float(top_p),
        eos_id=int(eos_id),
    )
    return np.asarray(tokens)


def complete(
    model: Transformer, variables: dict, tokenizer: Tokenizer, prompt: str, **options
) -> str:
    """The text that follows `prompt`, up to the end-of-sentence token; options of `generate`."""
    ids = np.asarray([tokenizer.encode_prompt(prompt)], np.int32)
    new = generate(model, variables, ids, eos_id=tokenizer.eos_id, **options)[0].tolist()
    end = new.index(tokenizer.eos_id) if tokenizer.eos_id in new else len(new)
    return tokenizer.decode(new[:end])


def generate_text(path: str | Path, prompt: str, *, dtype: str = "bfloat16", **options) -> str:
    """Loads the model and tokenizer at `path` (see `load_pretrained`) and completes `prompt`.

    Raises:
      ConfigError: no tokenizer.json beside the weights, or what `load_pretrained` and `generate`
        refuse.
    """
    folder = Path(path)
    model, variables = load_pretrained(folder, dtype=dtype)
    places = [folder / "tokenizer.json", folder.parent / "tokenizer.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"no tokenizer.json beside the weights ({folder})")
    return complete(model, variables, Tokenizer.load(found), prompt, **options)
