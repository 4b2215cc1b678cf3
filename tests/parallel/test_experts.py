"""Routed experts on a mesh: the same sums and gradients as on one device, whatever the routing."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.moe import select_experts
from dsv3_jax.parallel.exchange import _in_parts
from dsv3_jax.parallel.experts import Buffer, buffer_rows, run_experts
from dsv3_jax.parallel.mesh import AXES, activation_spec, constrain, make_mesh, per_token
from dsv3_jax.parallel.placement import _leaves_a_gpu_process
from pallas_kernels import reference

B, T, D, E, F, K = 8, 6, 10, 16, 12, 3
TWICE = Buffer(2.0, "exact")
SLOTS = TWICE._replace(way="slots")
V3 = ModelConfig()  # 256 experts, 8 groups, 4 of them a token


def sizes(**given: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**dict.fromkeys(AXES, 1), **given})


def compute(rows, row_weight, gate_up, down, group_sizes):
    """SwiGLU experts by the oracle of the grouped product."""
    both = reference.grouped_matmul(rows, gate_up.reshape(*gate_up.shape[:2], -1), group_sizes)
    gate, up = jnp.split(both, 2, axis=-1)
    hidden = jax.nn.silu(gate) * up * row_weight[:, None]
    return reference.grouped_matmul(hidden, down, group_sizes)


@functools.cache
def case(routing: str, batch: int) -> tuple:
    """(x, topk_idx, topk_weight, gate_up, down): `skewed` sends every token to expert 5 and none
    to the last three quarters of the experts."""
    rng = np.random.default_rng(0)
    pool = E if routing == "spread" else E // 4 + 2
    idx = np.stack([rng.permutation(pool)[:K] for _ in range(B * T)]).reshape(B, T, K)
    if routing == "skewed":
        idx = np.where((idx == 5).any(-1, keepdims=True), idx, [5, 0, 1])
    x = rng.normal(size=(B, T, D))
    weight = rng.random((B, T, K))
    gate_up, down = rng.normal(size=(E, D, 2, F)) * 0.3, rng.normal(size=(E, F, D)) * 0.3
    floats = [a.astype(np.float32) for a in (x[:batch], weight[:batch], gate_up, down)]
    return floats[0], idx[:batch].astype(np.int32), *floats[1:]


def outputs_and_gradients(x, idx, weight, gate_up, down, buffer=TWICE):
    """(out, dx, dweight, dgate_up, ddown) and what the exchange reports."""

    def loss(x, weight, gate_up, down):
        out, received = run_experts(compute, x, idx, weight, gate_up, down, buffer=buffer)
        return (out * jnp.cos(jnp.arange(D))).sum(), (out, received)

    grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    grads, (out, received) = grad(x, weight, gate_up, down)
    return (out, *grads), received


@functools.cache
def program(buffer):
    """One for all meshes and routings: jit compiles it once a mesh and shape."""
    return jax.jit(functools.partial(outputs_and_gradients, buffer=buffer))


def on_mesh(mesh, arguments, buffer=TWICE):
    with jax.set_mesh(make_mesh(sizes(**mesh))):
        return program(buffer)(*arguments)


@functools.cache
def on_one_device(routing, batch=B):
    return jax.jit(outputs_and_gradients)(*case(routing, batch))[0]


def check_equal(one, many):
    for name, a, b in zip(("out", "x", "weight", "gate_up", "down"), one, many, strict=True):
        # Sums over experts, devices and tokens run in another order: rounding, no more.
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a), name


def by_loop(x, idx, weight, gate_up, down):
    """The plain meaning: every token through each of its experts."""
    out = np.zeros(x.shape)
    for b, t, k in np.ndindex(idx.shape):
        gate, up = np.einsum("d,dhf->hf", x[b, t].astype(np.float64), gate_up[idx[b, t, k]])
        hidden = gate / (1 + np.exp(-gate)) * up
        out[b, t] += weight[b, t, k] * (hidden @ down[idx[b, t, k]])
    return out


MESHES = [
    {"fsdp": 8},
    {"expert": 8},
    {"expert": 4, "fsdp": 2},
    {"tensor": 2, "expert": 4},
    {"context": 2, "fsdp": 4},
    {"replica": 2, "expert": 4},
    {"context": 2, "expert": 2, "tensor": 2},
]


@pytest.mark.parametrize("routing", ["spread", "skewed"])
def test_one_device_equals_a_plain_loop(routing):
    out = on_one_device(routing)[0]
    assert np.linalg.norm(out - by_loop(*case(routing, B))) <= 1e-6 * np.linalg.norm(out)


# batch 3 divides no axis: every device of the expert axis then has all tokens.
@pytest.mark.parametrize("batch", [8, 3])
@pytest.mark.parametrize("routing", ["spread", "skewed"])
@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: "-".join(f"{a}{n}" for a, n in mesh.items())
)
def test_any_mesh_equals_one_device(mesh, routing, batch):
    many, _ = on_mesh(mesh, case(routing, batch))
    check_equal(on_one_device(routing, batch), many)


def test_a_device_receives_nothing():
    """`skewed` leaves the last devices without a row: their weights get zero gradients."""
    (*_, gate_up, down), _ = on_mesh({"expert": 8}, case("skewed", B))
    assert not np.any(gate_up[E // 2 :]) and not np.any(down[E // 2 :])
    assert np.any(gate_up[5]) and np.any(down[5])


def received_of_an_equal_share(idx, devices):
    """Rows of the fullest device over an equal share, counted on the host."""
    rows = np.bincount(idx.reshape(-1) // (E // devices), minlength=devices)
    return rows.max() / (idx.size / devices)


@pytest.mark.parametrize("routing", ["spread", "skewed"])
@pytest.mark.parametrize("mesh", [{"expert": 8}, {"expert": 4, "fsdp": 2}], ids=str)
def test_slots_carry_the_same_rows(mesh, routing):
    many, _ = on_mesh(mesh, case(routing, B), SLOTS)
    check_equal(on_one_device(routing), many)


def rows_of_the_fullest_pair(idx, devices):
    """Rows that one device has for another, over an equal share for each, on the host."""
    pairs = [
        np.bincount(one.reshape(-1) // (E // devices), minlength=devices).max()
        for one in np.split(idx, devices)
    ]
    return max(pairs) * devices**2 / idx.size


def test_slots_that_overflow_are_filled_again():
    """`skewed`: every device has at least one row of each token for the same one."""
    arguments = case("skewed", B)
    need = rows_of_the_fullest_pair(arguments[1], 8)
    assert need > 2.6  # three rounds
    many, received = on_mesh({"expert": 8}, arguments, SLOTS._replace(factor=1.3))
    check_equal(on_one_device("skewed"), many)
    assert received.overflow == 1 and received.need == pytest.approx(need, rel=1e-6)


def test_slots_under_stop():
    stop = SLOTS._replace(factor=1.5, on_overflow="stop")
    (out, *_), received = on_mesh({"expert": 8}, case("skewed", B), stop)
    assert received.overflow == 1 and np.isnan(out).all()


def test_runs_in_parts():
    start, size = np.array([0, 7, 7, 20], np.int32), np.array([7, 0, 13, 3], np.int32)
    starts, sizes = (np.asarray(a).reshape(4, 5) for a in _in_parts(start, size, 5))
    for i in range(4):
        rows = [np.arange(a, a + n) for a, n in zip(starts[i], sizes[i], strict=True)]
        assert np.concatenate(rows).tolist() == list(range(start[i], start[i] + size[i]))
        assert sizes[i].max() == -(-size[i] // 5)


@pytest.mark.parametrize("factor", [1.0, 1.3, 100.0])
def test_rows_that_do_not_fit_travel_in_further_rounds(factor):
    """`skewed` gives one of eight devices 3.67 equal shares of the rows."""
    arguments = case("skewed", B)
    many, received = on_mesh({"expert": 8}, arguments, Buffer(factor, "exact"))
    check_equal(on_one_device("skewed"), many)
    need = received_of_an_equal_share(arguments[1], 8)
    assert 2 < need and received.need == pytest.approx(need, rel=1e-6)
    assert received.overflow == (factor < need)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "expert": 4}, {"expert": 2, "tensor": 2, "context": 2}]
)
def test_overflow_beside_other_axes(mesh):
    """Devices of one exchange agree on its rounds; others may need more or fewer."""
    many, received = on_mesh(mesh, case("skewed", B), Buffer(1.0, "exact"))
    check_equal(on_one_device("skewed"), many)
    assert received.overflow == 1


def test_overflow_under_stop_is_never_a_number():
    arguments = case("skewed", B)
    (out, *_), received = on_mesh({"expert": 8}, arguments, Buffer(1.5, "stop"))
    assert received.overflow == 1 and np.isnan(out).all()
    many, received = on_mesh({"expert": 8}, arguments, Buffer(4.0, "stop"))
    assert received.overflow == 0
    check_equal(on_one_device("skewed"), many)


def test_the_buffer_never_exceeds_what_can_arrive():
    # 64 devices of 4 experts; 4,096 tokens of 8 choices each: at most 4 of them go to one device.
    assert buffer_rows(2.0, 4096 * 8, 8, 4, 64) == 2 * 4096 * 8
    assert buffer_rows(1e9, 4096 * 8, 8, 4, 64) == 64 * 4096 * 4
    assert buffer_rows(1.0001, 7 * 3, 3, 100, 2) == 22


def test_gradients_of_experts_return_to_their_owners_by_a_reduce_scatter():
    with jax.set_mesh(make_mesh(sizes(expert=4, fsdp=2))):
        text = program(TWICE).lower(*case("spread", B)).compile().as_text()
    found = re.findall(r"= (f32\[4,[\d,]*\])\S* (all-reduce|reduce-scatter)\(", text)
    assert sorted(found) == [("f32[4,12,5]", "reduce-scatter"), ("f32[4,5,2,12]", "reduce-scatter")]


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ({"expert": 8}, "parallel.expert=8 must divide n_routed_experts=12"),
        ({"tensor": 8}, "parallel.tensor=8 must divide moe_intermediate_size=12"),
    ],
)
def test_indivisible_experts_are_refused(mesh, text):
    x, idx, weight, gate_up, down = case("skewed", B)
    with jax.set_mesh(make_mesh(sizes(**mesh))), pytest.raises(ConfigError, match=text):
        jax.jit(outputs_and_gradients)(x, idx, weight, gate_up[:12], down[:12])


@pytest.mark.parametrize(
    ("platform", "shape", "refused"),
    [
        ("gpu", (1, 1, 4, 1, 1), True),
        ("gpu", (1, 2, 2, 1, 1), False),
        ("gpu", (1, 1, 2, 2, 1), True),
        ("cpu", (1, 1, 4, 1, 1), False),
    ],
)
def test_ragged_exchange_of_gpus_stays_in_a_process(platform, shape, refused):
    """Four devices, two of each process."""
    device = functools.partial(types.SimpleNamespace, platform=platform)
    devices = np.array([device(process_index=i // 2) for i in range(4)]).reshape(shape)
    mesh = types.SimpleNamespace(
        devices=devices, axis_names=AXES, shape=dict(zip(AXES, shape, strict=True))
    )
    assert _leaves_a_gpu_process(mesh) == refused


def test_mesh_infers_one_size():
    assert dict(make_mesh(sizes(expert=-1, fsdp=2)).shape) == {
        "replica": 1, "fsdp": 2, "expert": 4, "tensor": 1, "context": 1,
    }  # fmt: skip


@pytest.mark.parametrize("given", [{"expert": 3}, {"expert": -1, "fsdp": 3}, {}])
def test_mesh_of_a_wrong_size_is_refused(given):
    with pytest.raises(ConfigError, match=r"must multiply to the 8 devices"):
        make_mesh(sizes(**given))


def test_activations_follow_the_table():
    with jax.set_mesh(make_mesh(sizes(fsdp=2, expert=2, tensor=2))):
        spec = activation_spec((4, 5, 6), ("batch", "sequence", "heads"))
        assert spec == jax.sharding.PartitionSpec(("fsdp", "expert"), None, "tensor")
        # 6 sequences: two ways, not four.
        assert activation_spec((6,), ("batch",)) == jax.sharding.PartitionSpec("fsdp")
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", None) is x  # no mesh, nothing to do


def test_per_token_needs_no_communication():
    x = np.random.default_rng(0).normal(size=(8, 4, 16)).astype(np.float32)

    def best(x, bias):
        return jax.lax.top_k(x + bias, 3)[1]

    bias = np.linspace(0, 1, 16, dtype=np.float32)
    with jax.set_mesh(make_mesh(sizes(expert=4, context=2))):
        spec = activation_spec(x.shape, ("batch", "sequence", None))
        placed = jax.device_put(x, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec))
        compiled = jax.jit(lambda x: per_token(best, x, bias)).lower(placed).compile()
        assert np.array_equal(compiled(placed), best(x, bias))
    assert "all-gather" not in compiled.as_text()


def destinations(config, per_run):
    """Runs of `per_run` experts that each of 2,000 tokens is sent to, for a random router."""
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (2000, config.n_routed_experts)))
    bias = 0.1 * jax.random.normal(jax.random.key(1), scores.shape[1:])
    idx, _ = jax.jit(functools.partial(select_experts, config=config))(scores, bias)
    return np.array([len(set(row)) for row in (np.asarray(idx) // per_run).tolist()])


@pytest.mark.parametrize("devices", [8, 16, 64])
def test_a_token_crosses_to_at_most_topk_group_groups(devices):
    """Device d holds the d-th run of experts: a group lies on consecutive devices of the axis."""
    per_device, per_group = 256 // devices, 256 // V3.n_group
    assert per_group % per_device == 0  # no device holds parts of two groups
    groups = destinations(V3, per_group)
    assert groups.max() == V3.topk_group
    # The limit is the gate's doing: the same scores without groups reach more.
    assert destinations(dataclasses.replace(V3, n_group=1, topk_group=1), per_group).max() > 6
    assert destinations(V3, per_device).max() <= V3.topk_group * per_group // per_device
    order = make_mesh(sizes(expert=8)).devices.reshape(-1).tolist()
    assert order == sorted(order, key=lambda device: device.id)
