"""`runtime.fp8_experts`: the same layer up to FP8's rounding, on one device and on a mesh."""

import contextlib

import jax
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, RuntimeConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    hidden_size=144,  # a whole tile and a ragged one
    moe_intermediate_size=136,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=0,
    n_group=2,
    topk_group=1,
)


def layer(fp8: bool, mesh: jax.sharding.Mesh | None = None) -> list[np.ndarray]:
    """(result, its gradients by the tokens, by `down_proj` and by `gate_up_proj`, loads)."""
    runtime = RuntimeConfig(compute_dtype="float32", fp8_experts=fp8)
    moe = MoE(CONFIG, runtime)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dout = (jax.random.normal(key, (8, 9, CONFIG.hidden_size)) for key in keys[:2])
    variables = jax.jit(moe.init)(keys[2], x[:1, :1])
    state = {"router_state": variables["router_state"]}

    @jax.jit
    def run(params, x, dout):
        def forward(params, x):
            out, stats = moe.apply({"params": params, **state}, x)
            return out, stats.load

        out, pull, load = jax.vjp(forward, params, x, has_aux=True)
        dparams, dx = pull(dout)
        return out, dx, *(dparams["experts"][name] for name in ("down_proj", "gate_up_proj")), load

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return list(map(np.asarray, run(variables["params"], x, dout)))


@pytest.fixture(scope="module")
def in_fp8() -> list[np.ndarray]:
    return layer(True)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_rounds_as_e4m3_does(in_fp8):
    """Three bits of mantissa leave 2.6 % of a number: two operands and two products, 4 to 7 %."""
    *ours, load = in_fp8
    *exact, exact_load = layer(False)
    np.testing.assert_array_equal(load, exact_load)
    for mine, want in zip(ours, exact, strict=True):
        assert 0.02 < apart(mine, want) < 0.08


def test_a_mesh_computes_the_same(in_fp8):
    """A row is quantised alone. The gradient of weights shares scales between rows of an expert,
    which reach another device in another order: those differ by what FP8 leaves of a number."""
    on_mesh = layer(True, make_mesh(ParallelConfig(fsdp=2, expert=4)))
    out, dx, *weights, load = in_fp8
    assert apart(on_mesh[0], out) < 1e-5
    assert apart(on_mesh[1], dx) < 1e-5
    for mine, want in zip(on_mesh[2:4], weights, strict=True):
        assert apart(mine, want) < 0.05
    np.testing.assert_array_equal(on_mesh[4], load)
