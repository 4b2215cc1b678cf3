"""The TPU kernels through the real compiler, ahead of time: no TPU is needed, and none is used."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import tpu, tpu_tiles

pytest.importorskip("libtpu")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Rows, groups, K, N: DeepSeek-V3's gate and up in one, its down; few and many rows a group;
# decoding; one device's eight experts.
SHAPES = {
    "A": (32768, 32, 7168, 4096),
    "B": (32768, 32, 2048, 7168),
    "C": (65536, 256, 7168, 4096),
    "D": (65536, 256, 2048, 7168),
    "decode": (256, 256, 7168, 4096),
    "shard": (8192, 8, 2048, 7168),
}
DIRECTIONS = ("forward", "dgrad", "wgrad")
# By default each direction for each generation, and forward for each chip.
DEFAULT = [
    ("v5e", "A", "forward"),
    *(("v5p", "C", "forward"), ("v5p", "D", "dgrad"), ("v5p", "A", "wgrad")),
    *(("v6e", "decode", "forward"), ("v6e", "decode", "dgrad"), ("v6e", "D", "wgrad")),
    *(("tpu7x", "B", "forward"), ("tpu7x", "A", "dgrad"), ("tpu7x", "C", "wgrad")),
]
HBM_GB = {"v5e": 17.2, "v5p": 103, "v6e": 34.4, "tpu7x": 103}


def _fits(chip, shape, direction):
    """Whether x, w, dy and the result lie in one chip's memory; V3's 256 experts may not."""
    rows, groups, k, n = SHAPES[shape]
    result = {"forward": rows * n, "dgrad": rows * k, "wgrad": groups * k * n}[direction]
    return 2e-9 * (rows * (k + n) + groups * k * n + result) < 0.95 * HBM_GB[chip]


EVERY = itertools.product(TOPOLOGIES, SHAPES, DIRECTIONS)
REST = [case for case in EVERY if case not in DEFAULT and _fits(*case)]


def _run(direction, x, w, sizes, dy):
    if direction == "forward":
        return tpu.grouped_matmul(x, w, sizes)
    _, vjp = jax.vjp(lambda x, w: tpu.grouped_matmul(x, w, sizes), x, w)
    return vjp(dy)[DIRECTIONS.index(direction) - 1]


def _compile(chip, shape, direction, dtype):
    """One direction compiled for one chip; what it does not use is no argument of the program."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud for its metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test workers compile side by side
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows, groups, k, n = SHAPES[shape]
    arguments = [
        jax.ShapeDtypeStruct(size, kind, sharding=replicated)
        for size, kind in (
            ((rows, k), dtype),
            ((groups, k, n), dtype),
            ((groups,), jnp.int32),
            ((rows, n), dtype),
        )
    ]
    with jax.set_mesh(mesh):
        assert tpu_tiles.is_supported()
        return jax.jit(functools.partial(_run, direction)).lower(*arguments).compile()


def _check(chip, shape, direction, dtype):
    compiled = _compile(chip, shape, direction, dtype)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # Lists of tasks; a transposed copy of the weights, or of the rows, would be far larger.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20


@pytest.mark.parametrize(("chip", "shape", "direction"), DEFAULT)
def test_compiles_without_copies_in_memory(chip, shape, direction):
    _check(chip, shape, direction, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape", "direction"), REST)
def test_compiles_for_every_chip_and_shape(chip, shape, direction):
    _check(chip, shape, direction, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_in_float32(chip, direction):
    _check(chip, "B", direction, jnp.float32)
