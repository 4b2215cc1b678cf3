"""Embedding and output head on a mesh: the rows, losses and gradients of one device."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.vocabulary import lookup
from dsv3_jax.training.losses import cross_entropy, token_scores

B, T, V, D = 8, 6, 20, 16
MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 2, "fsdp": 4},
    {"replica": 2, "expert": 4},
]
on_meshes = pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: "-".join(f"{a}{n}" for a, n in mesh.items())
)


def make(mesh):
    return make_mesh(types.SimpleNamespace(**{**dict.fromkeys(AXES, 1), **mesh}))


@functools.cache
def case(batch=B):
    """table, ids, hidden, head, targets, weights; one token fills a quarter of the ids."""
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, V, (2, batch, T))
    ids[:, : T // 4 + 1] = 7
    floats = [
        rng.normal(size=s).astype(np.float32) for s in ((V, D), (batch, T, D), (D, V), (batch, T))
    ]
    table, hidden, head, weights = floats
    return table, ids.astype(np.int32), hidden, head, targets.astype(np.int32), abs(weights)


@jax.jit
def look(table, ids, dout):
    out, vjp = jax.vjp(lambda table: lookup(table, ids, jnp.float32), table)
    return out, vjp(dout)[0]


@jax.jit
def score(hidden, head, targets, weights):
    loss, gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))(
        hidden, head, targets, weights
    )
    return (loss, *gradients), token_scores(hidden, head, targets)


@pytest.mark.parametrize("batch", [B, 3])  # 3 divides no axis: some devices hold equal tokens
@on_meshes
def test_lookup_equals_one_device(mesh, batch):
    table, ids, dout, *_ = case(batch)
    with jax.set_mesh(make(mesh)):
        out, dtable = look(table, ids, dout)
    assert np.array_equal(out, table[ids])
    want = np.zeros((V, D))
    np.add.at(want, ids, dout.astype(np.float64))
    assert np.linalg.norm(dtable - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("batch", [B, 3])
@on_meshes
def test_losses_equal_one_device(mesh, batch):
    arguments = case(batch)[2:]
    one, (nats, best) = score(*arguments)
    with jax.set_mesh(make(mesh)):
        many, (nats_there, best_there) = score(*arguments)
    for a, b in zip((*one, nats), (*many, nats_there), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)
    assert np.array_equal(best, best_there)


def test_equal_logits_the_first_column_wins():
    *_, targets, _ = case()
    with jax.set_mesh(make(MESHES[0])):
        _, best = jax.jit(token_scores)(np.ones((B, T, D)), np.ones((D, V)), targets)
    assert not np.any(best)


def test_lookup_moves_own_tokens_and_nothing_else(capfd):
    """One exchange of tokens by the expert axis, slices gathered by fsdp; nothing replicated."""
    mesh = make({"fsdp": 2, "expert": 4})
    table, ids, dout, *_ = case()
    tokens = NamedSharding(mesh, PartitionSpec(("fsdp", "expert")))
    placed = NamedSharding(mesh, PartitionSpec("tensor", ("fsdp", "expert")))
    arguments = (jax.device_put(table, placed), *jax.device_put((ids, dout), tokens))
    with jax.set_mesh(mesh):
        text = look.lower(*arguments).compile().as_text()
    assert "rematerialization" not in capfd.readouterr().err
    found = re.findall(r"= (\w+\[[\d,]*\])\S* ([a-z-]*(?:gather|reduce|all)[a-z-]*)\(", text)
    assert ("f32[20,4]", "all-gather") in found
    wide = [shape for shape, kind in found if kind == "all-gather" and shape.startswith("f32")]
    assert wide == ["f32[20,4]"]  # two slices of two columns: never the table, never the batch
