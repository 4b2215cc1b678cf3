"""Latent attention of one sequence over the context axis.

Each device holds T / context positions. What travels is the compressed keys and values, C + R
numbers a position for all heads together (576 for V3, where expanded ones are 40,960); every device
expands them for its own queries, a few heads at a time, so that memory stays bounded.

Causality makes late queries dear: each device hands the later half of its queries to its mirror
image on the axis, and all have equal work.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import axis_sizes, mesh_axes

_EXPANDED = 2**28  # values of expanded keys and values that exist at once
_BLOCK = 512  # queries whose scores exist at once


def shares_sequences(length: int) -> bool:
    """Whether the current mesh shares out the positions of sequences of this length."""
    return mesh_axes("sequence", length) != ()


def attend_over_context(
    q: jax.Array, kv: jax.Array, k_pe: jax.Array, kernel: jax.Array, *, scale: float
) -> jax.Array:
    """Causal attention of all positions; query t sees keys 0..t, softmax in float32.

    Args:
      q: queries, [B, T, N, P + R].
      kv: compressed keys and values, [B, T, C].
      k_pe: the rotated part of the keys, which all heads share, [B, T, R].
      kernel: expands `kv` for every head to a key of P and a value of H, [C, N, P + H].
      scale: factor on the scores.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    rope = k_pe.shape[-1]
    tokens = (mesh_axes("batch", q.shape[0]) or None, mesh_axes("sequence", q.shape[1]))
    heads = mesh_axes("heads", q.shape[2]) or None

    def on_each_device(q: jax.Array, kv: jax.Array, kernel: jax.Array) -> jax.Array:
        kv = jax.lax.all_gather(kv, "context", axis=1, tiled=True)
        q, starts = _mirror(q), _starts(q.shape[1])
        return _mirror(_by_heads(q, starts, kv, kernel, rope, scale))

    return jax.shard_map(
        on_each_device,
        in_specs=(
            PartitionSpec(*tokens, heads),
            PartitionSpec(*tokens),
            PartitionSpec(None, heads),
        ),
        out_specs=PartitionSpec(*tokens, heads),
        check_vma=False,
    )(q, jnp.concatenate([kv, k_pe], axis=-1), kernel)


def _mirror(x: jax.Array) -> jax.Array:
    """Exchanges the later half of the positions [b, t, ...] with the mirror image; undoes itself.

    An odd number of positions stays where it is: right, and not balanced.
    """
    devices = axis_sizes()["context"]
    if x.shape[1] % 2:
        return x
    early, late = jnp.split(x, 2, axis=1)
    pairs = [(device, devices - 1 - device) for device in range(devices)]
    return jnp.concatenate([early, jax.lax.ppermute(late, "context", pairs)], axis=1)


def _starts(length: int) -> tuple[jax.Array, ...]:
    """First positions of the runs of queries here: both halves, or all."""
    device = jax.lax.axis_index("context")
    if length % 2:
        return (device * length,)
    mirror = axis_sizes()["context"] - 1 - device
    return device * length, mirror * length + length // 2


def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(min(number, max(limit, 1)), 0, -1) if number % n == 0)


def _by_heads(q, starts, kv, kernel, rope: int, scale: float) -> jax.Array:
    """q [b, t, n, P + R], kv [b, T, C + R], kernel [C, n, P + H] -> [b, t, n, H]."""
    batch, length, heads, width = q.shape
    nope = width - rope
    block = _largest_divisor(length // len(starts), _BLOCK)
    first = jnp.concatenate(
        [start + jnp.arange(0, length // len(starts), block) for start in starts]
    )
    values = width + kernel.shape[2] - nope
    together = _largest_divisor(heads, _EXPANDED // (batch * kv.shape[1] * values))
    # float32: gradients of all heads are summed here, one group after the other.
    kv = kv.astype(jnp.float32)

    @jax.checkpoint
    def some_heads(q: jax.Array, kernel: jax.Array, kv: jax.Array) -> jax.Array:
        kv_BSC, k_pe_BSR = jnp.split(kv.astype(q.dtype), [kernel.shape[0]], axis=-1)
        expanded = jnp.einsum("BSC,CNX->BSNX", kv_BSC, kernel)
        k_nope_BSNP, v_BSNH = jnp.split(expanded, [nope], axis=-1)
        k_pe_BSNR = jnp.broadcast_to(k_pe_BSR[:, :, None], (*k_nope_BSNP.shape[:3], rope))
        k = jnp.concatenate([k_nope_BSNP, k_pe_BSNR], axis=-1)
        attend = functools.partial(_attend_block, k=k, v=v_BSNH, scale=scale)
        blocks = jnp.moveaxis(q.reshape(batch, -1, block, *q.shape[2:]), 1, 0)
        out = jax.lax.map(lambda pair: jax.checkpoint(attend)(*pair), (blocks, first))
        return jnp.moveaxis(out, 0, 1).reshape(batch, length, together, -1)

    def groups(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], heads // together, together, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    out = jax.lax.map(lambda pair: some_heads(*pair, kv), (groups(q, 2), groups(kernel, 1)))
    return jnp.moveaxis(out, 0, 2).reshape(batch, length, heads, -1)


def _attend_block(q, first, *, k, v, scale: float) -> jax.Array:
    """Queries at `first`.. and of keys only as many devices' shares as hold those they see."""
    devices = axis_sizes()["context"]
    share = k.shape[1] // devices

    def attend(last: int) -> jax.Array:
        scores = jnp.einsum("btnd,bsnd->bnts", q, k[:, :last], preferred_element_type=jnp.float32)
        seen = first + jnp.arange(q.shape[1])[:, None] >= jnp.arange(last)
        weights = jax.nn.softmax(jnp.where(seen, scores * scale, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v[:, :last])

    branches = [functools.partial(attend, (d + 1) * share) for d in range(devices)]
    return jax.lax.switch((first + q.shape[1] - 1) // share, branches)
