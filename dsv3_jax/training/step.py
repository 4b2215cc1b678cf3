"""One optimizer step as a pure function: gradients, AdamW, and the update of the expert biases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import TrainConfig
from dsv3_jax.model.moe import RoutingStats
from dsv3_jax.model.transformer import Routing, Transformer, init_variables
from dsv3_jax.training import optimizer
from dsv3_jax.training.losses import LossTerms, loss_terms


@flax.struct.dataclass
class TrainState:
    """Everything a run's future depends on.

    step: int32, steps taken, skipped ones included. sequences: uint32, sequences consumed, which
    is also the global index of the next example. params: float32 master weights. router_state:
    expert biases, float32. skipped, skipped_in_row: int32, steps whose loss or gradient was not
    finite.
    """

    step: jax.Array
    sequences: jax.Array
    params: dict
    router_state: dict
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array


@flax.struct.dataclass
class StepMetrics:
    """What one step reports: float32 scalars, but for the int32 `load` and counts.

    loss: main + mtp_weight · mtp_loss + balance_weight · balance_loss. load: tokens per expert,
    int32 [L, E], the MTP modules' layers last. max_vio: over all layers, the largest ratio of a
    layer's highest load to its mean, minus one (arXiv 2408.15664). skipped: 1 if the step changed
    nothing because its loss or gradient was not finite; skipped_in_row: how many such end here.
    buffer_overflows: MoE layers, over all microbatches, in which a device received more rows than
    `runtime.expert_buffer_factor` gives room for; buffer_need: the factor that would have sufficed
    in the layer that needs most, mean over microbatches (0 without an expert axis).
    """

    loss: jax.Array
    main_loss: jax.Array
    mtp_loss: jax.Array
    balance_loss: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    load: jax.Array
    max_vio: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    buffer_overflows: jax.Array
    buffer_need: jax.Array


def init_state(model: Transformer, config: TrainConfig) -> TrainState:
    """A fresh state from the config's seed."""
    return state_of(init_variables(model, jax.random.key(config.seed)), config)


def state_of(variables: dict, config: TrainConfig) -> TrainState:
    """The state of a run that has yet to take its first step from these variables."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        sequences=jnp.zeros((), jnp.uint32),
        params=variables["params"],
        router_state=variables.get("router_state", {}),
        opt_state=optimizer.make_optimizer(config.optimizer).init(variables["params"]),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def update_bias(bias_E: jax.Array, load_E: jax.Array, speed: jax.Array) -> jax.Array:
    """Lowers the bias of overloaded experts by `speed`, raises that of underloaded ones.

    Auxiliary-loss-free balancing (report section 2.1.2): bias + speed · sign(mean load - load),
    compared in integers, so that no rounding of the mean can turn a sign. Leading axes (layers)
    are independent.
    """
    total = load_E.sum(-1, keepdims=True)
    floor, exact = total // load_E.shape[-1], total % load_E.shape[-1] == 0
    above = load_E > floor
    below = jnp.where(exact, load_E < floor, load_E <= floor)
    return bias_E + speed * (below.astype(jnp.float32) - above.astype(jnp.float32))


def update_router_state(router_state: dict, routing: Routing, speed: jax.Array) -> dict:
    """Every bias updated from its own layer's load, the MTP modules' gates included."""
    loads = {f"mtp_{depth}": stats.load for depth, stats in enumerate(routing.mtp)}
    if routing.moe_layers is not None:
        loads["moe_layers"] = routing.moe_layers.load

    def update(path: tuple, bias: jax.Array) -> jax.Array:
        return update_bias(bias, loads[path[0].key], speed)

    return jax.tree_util.tree_map_with_path(update, router_state)


def _all_loads(routing: Routing) -> jax.Array:
    """int32 [L, E] of all MoE layers; [0, 0] without any."""
    loads = [] if routing.moe_layers is None else [routing.moe_layers.load]
    loads += [stats.load[None] for stats in routing.mtp]
    return jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)


def _buffer_use(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """(overflows of all MoE layers, int32; the buffer factor that the worst needs, float32)."""
    received = [stats.received for stats in (routing.moe_layers, *routing.mtp) if stats]
    overflows = [layers.overflow.reshape(-1) for layers in received]
    need = [layers.need.reshape(-1) for layers in received]
    zero = [jnp.zeros(1, jnp.int32)]
    return jnp.concatenate(zero + overflows).sum(), jnp.concatenate(zero + need).max()


def _max_vio(load: jax.Array) -> jax.Array:
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return (load.max(-1, initial=0) / mean - 1).max(initial=0)


def _accumulate(loss_and_grad: Callable, params: dict, tokens: jax.Array):
    """Mean of losses and gradients, sum of loads, over microbatches: tokens [A, B, T + 1]."""
    if tokens.shape[0] == 1:
        return loss_and_grad(params, tokens[0])

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, loss_and_grad(params, microbatch)), None

    shapes = jax.eval_shape(loss_and_grad, params, tokens[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, tokens)
    return jax.tree.map(
        lambda a: a / tokens.shape[0] if jnp.issubdtype(a.dtype, jnp.floating) else a, total
    )


def _only_loads(routing: Routing) -> Routing:
    """Drops the per-token choices, which do not add up over microbatches."""

    def strip(stats: RoutingStats) -> RoutingStats:
        # None is an empty pytree, which nothing is added to.
        # pyrefly: ignore[bad-argument-type]
        return dataclasses.replace(stats, topk_idx=None, topk_weight=None)

    moe_layers = None if routing.moe_layers is None else strip(routing.moe_layers)
    return Routing(moe_layers, tuple(strip(stats) for stats in routing.mtp))


def make_train_step(
    model: Transformer, config: TrainConfig
) -> Callable[[TrainState, dict], tuple[TrainState, StepMetrics]]:
    """The pure function train_step(state, batch) -> (state, metrics), ready for `jax.jit`.

    `batch["tokens"]` is int32 [A, B, T + 1]: A microbatches of B sequences, accumulated. Expert
    biases move once a step, from the load of all microbatches. A step whose loss or gradient norm
    is not finite leaves parameters, moments and biases as they were and is counted.
    """
    tx = optimizer.make_optimizer(config.optimizer)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, StepMetrics]:
        tokens = batch["tokens"]
        seen = state.sequences.astype(jnp.float32) * (tokens.shape[-1] - 1)
        mtp_weight = optimizer.mtp_weight(config.loss, seen)

        def loss_fn(params: dict, microbatch: jax.Array) -> tuple[jax.Array, LossTerms]:
            variables = {"params": params, "router_state": state.router_state}
            terms = loss_terms(model, variables, microbatch)
            loss = terms.main + mtp_weight * terms.mtp + config.loss.balance_weight * terms.balance
            return loss, dataclasses.replace(terms, routing=_only_loads(terms.routing))

        loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, terms), grads = _accumulate(loss_and_grad, state.params, tokens)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        rate = optimizer.learning_rate(config.optimizer, state.step, seen)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        speed = optimizer.bias_update_speed(config.loss, seen)
        router_state = update_router_state(state.router_state, terms.routing, speed)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = (~finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            sequences=state.sequences + tokens.shape[0] * tokens.shape[1],
            params=keep(params, state.params),
            router_state=keep(router_state, state.router_state),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        load = _all_loads(terms.routing)
        buffer_overflows, buffer_need = _buffer_use(terms.routing)
        return new_state, StepMetrics(
            loss=loss,
            main_loss=terms.main,
            mtp_loss=terms.mtp,
            balance_loss=terms.balance,
            learning_rate=rate,
            grad_norm=grad_norm,
            load=load,
            max_vio=_max_vio(load),
            skipped=skipped,
            skipped_in_row=new_state.skipped_in_row,
            buffer_overflows=buffer_overflows,
            buffer_need=buffer_need,
        )

    return train_step


def jit_train_step(
    model: Transformer, config: TrainConfig, state: TrainState, mesh: Mesh | None
) -> jax.stages.Wrapped:
    """`make_train_step` as a run uses it: `state` is donated and stays where it lies.

    Args:
      state: arrays, or shapes with shardings.
      mesh: None for one device.
    """
    placed = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = (jax.tree.map(lambda leaf: leaf.sharding, state), everywhere)
    return jax.jit(make_train_step(model, config), donate_argnums=0, out_shardings=placed)


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
    """How the step is compiled for the mesh's, or the default, devices."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "tpu":
        return {}
    return {
        # Weights are gathered before a product, not passed around a ring of devices during it:
        # over fsdp and expert together the ring would have as many steps as there are devices.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # It fails on some accumulated gradients (V3 without MTP: RET_CHECK user->opcode() ==
        # HloOpcode::kAdd, libtpu 0.0.42) and moves none of ours out of the loop.
        "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
    }
