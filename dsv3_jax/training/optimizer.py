"""AdamW with the report's schedules (section 4.2), every schedule a pure function of tokens.

`tokens` is the number of tokens consumed *before* the step (sequences times sequence length), a
float32 scalar. At 1.48e13 tokens float32 resolves 1.0e6 tokens, a sixtieth of one of the report's
batches, so no boundary moves by a step. The limits in the configuration exceed int32 and are
turned into floats before they meet an array.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import BatchConfig, LossConfig, OptimizerConfig

_DECAYED_LEAVES = frozenset({"kernel", "embedding", "gate_up_proj", "down_proj"})
_UNDECAYED_LEAVES = frozenset({"weight"})  # norm scales


def learning_rate(config: OptimizerConfig, step: jax.Array, tokens: jax.Array) -> jax.Array:
    """Learning rate of one optimizer step (report section 4.2).

    The warm-up is linear in steps: step `i` (from 0) uses `(i + 1) / warmup_steps` of the token
    schedule, so the line starts at 0 before the first step, no step is wasted at a rate of 0, and
    step `warmup_steps - 1` is the first at the full rate. The token schedule is constant at
    `peak_lr` until `constant_tokens`, a half cosine to `decay_lr` over `decay_tokens`, constant
    for `hold_tokens`, then `final_lr`.

    Args:
      config: the rates and limits.
      step: int32 scalar, optimizer steps completed before this one.
      tokens: float32 scalar, tokens consumed before this step.

    Returns:
      float32 scalar.
    """
    constant = float(config.constant_tokens)
    decay_end = constant + float(config.decay_tokens)
    hold_end = decay_end + float(config.hold_tokens)
    tokens = jnp.asarray(tokens, jnp.float32)
    progress = (tokens - constant) / max(float(config.decay_tokens), 1.0)
    progress = jnp.where(tokens >= decay_end, 1.0, jnp.clip(progress, 0.0, 1.0))
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    rate = config.decay_lr + (config.peak_lr - config.decay_lr) * cosine
    rate = jnp.where(tokens >= hold_end, config.final_lr, rate)
    completed = jnp.asarray(step, jnp.float32) + 1.0
    return rate * jnp.minimum(1.0, completed / max(float(config.warmup_steps), 1.0))


def mtp_weight(config: LossConfig, tokens: jax.Array) -> jax.Array:
    """Weight (lambda) of the MTP loss after `tokens` tokens; float32 scalar."""
    tokens = jnp.asarray(tokens, jnp.float32)
    early = tokens < float(config.mtp_switch_tokens)
    return jnp.where(early, jnp.float32(config.mtp_weight), jnp.float32(config.mtp_weight_final))


def bias_update_speed(config: LossConfig, tokens: jax.Array) -> jax.Array:
    """Step (gamma) of the expert-bias update after `tokens` tokens; float32 scalar, 0 at last."""
    tokens = jnp.asarray(tokens, jnp.float32)
    active = tokens < float(config.bias_update_tokens)
    return jnp.where(active, jnp.float32(config.bias_update_speed), jnp.float32(0.0))


def batch_size(config: BatchConfig, tokens: int) -> int:
    """Sequences in the step that starts after `tokens` tokens; runs on the host.

    The first `ramp_tokens` tokens are split into `ramp_stages` stages of equal length. Stage `s`
    uses `initial_size + s / ramp_stages * (size - initial_size)` sequences, rounded down to whole
    microbatches; from `ramp_tokens` on, `size`. The report names only the two ends.

    Args:
      config: the ramp.
      tokens: tokens consumed before the step, an exact Python int.

    Returns:
      A multiple of `microbatch_size` between `initial_size` and `size`.
    """
    if config.initial_size is None or tokens >= config.ramp_tokens:
        return config.size
    stage = tokens * config.ramp_stages // config.ramp_tokens
    growth = (config.size - config.initial_size) * stage // config.ramp_stages
    return config.initial_size + growth // config.microbatch_size * config.microbatch_size


def decay_mask(params: Any) -> Any:
    """Which parameters decay: the matrices and the embedding, never a norm's scale.

    Decided by leaf name, because a stack of norm scales `[L, D]` has the rank of a matrix. The
    router's bias is not in `params` and so can never decay.

    Args:
      params: nested dict of parameters.

    Returns:
      The same tree with a bool for every leaf.

    Raises:
      ValueError: a leaf whose name is in neither list.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        if name not in _DECAYED_LEAVES | _UNDECAYED_LEAVES:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} must be named one of "
                f"{sorted(_DECAYED_LEAVES | _UNDECAYED_LEAVES)} to decide on weight decay "
                "(decay_mask)"
            )
        return name in _DECAYED_LEAVES

    return jax.tree_util.tree_map_with_path(decays, params)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that keeps both moments in `moment_dtype` (optax narrows only one).

    The arithmetic is float32: the moments are widened, updated, used, and rounded for storage.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    dtype = jnp.dtype(config.moment_dtype)

    def init(params: Any) -> optax.ScaleByAdamState:
        # Two separate trees: shared buffers could not be donated twice.
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params),
            nu=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params),
        )

    def cast_moments(state: Any, dtype: Any) -> Any:
        return state._replace(mu=_cast(state.mu, dtype), nu=_cast(state.nu, dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, cast_moments(state, jnp.float32), params)
        return updates, cast_moments(state, dtype)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate (report section 4.2).

    Gradients become float32, are clipped to `clip_norm` by their global norm (computed in
    float32), pass through Adam with both moments stored in `moment_dtype`, and
    `weight_decay * parameter` is added where `decay_mask` says so. The caller applies
    `parameter - learning_rate * update` to the float32 master weights; decay is decoupled from
    the gradient but, as in AdamW, scaled by the learning rate.
    """
    return optax.chain(
        optax.stateless(lambda updates, _: _cast(updates, jnp.float32)),
        optax.clip_by_global_norm(config.clip_norm),
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )
