"""The table of parameters' places: every parameter has one row, and devices share the bytes."""

import importlib.util
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.parallel import rules
from dsv3_jax.parallel.rules import parameter_axes, parameter_spec, parameter_table

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def parameters(preset):
    """{path without its collection: shape} of a preset's variables."""
    spec = importlib.util.spec_from_file_location("preset", preset)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(module.get_config().model))
    return {tuple(key.key for key in path[1:]): leaf.shape for path, leaf in leaves}


@pytest.fixture(scope="module")
def v3():
    return parameters(next(path for path in PRESETS if path.stem == "v3_671b"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_parameter_of_every_preset_has_one_row(preset):
    for path, shape in parameters(preset).items():
        axes = parameter_axes(path)
        assert len(axes) == len(shape), path
        named = [axis for group in axes for axis in group]
        assert len(named) == len(set(named)), f"{path} would lie on an axis twice"


def test_a_path_without_a_row_or_with_two_is_an_error(monkeypatch):
    for path in (("norm", "bias"), ("moe_layers", "mlp", "kernel"), ("layers", "norm", "weight")):
        with pytest.raises(KeyError, match="matches 0 rows, must match 1"):
            parameter_axes(path)
    monkeypatch.setitem(rules.PARAMETER_AXES, "norm/.*", ((),))
    with pytest.raises(KeyError, match="'norm/weight' matches 2 rows"):
        parameter_axes(("norm", "weight"))


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 16},
        {"expert": 64},
        {"fsdp": 8, "expert": 32},
        {"fsdp": 1024},
        {"fsdp": 16, "expert": 64},
        {"replica": 2, "fsdp": 4, "expert": 16, "tensor": 4, "context": 2},
    ],
    ids=str,
)
def test_devices_share_v3_evenly(v3, sizes):
    held = 0
    for path, shape in v3.items():
        spec = parameter_spec(sizes, path, shape)
        axes_of = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
        ways = [math.prod(sizes[axis] for axis in axes) for axes in axes_of]
        assert all(n % way == 0 for n, way in zip(shape, ways, strict=True)), path
        held += math.prod(shape) // math.prod(ways)
    total = sum(map(math.prod, v3.values()))
    sharing = math.prod(size for axis, size in sizes.items() if axis not in ("replica", "context"))
    # Experts are nearly all of it. With only experts shared out the rest is too: see the rows.
    assert total / sharing <= held < 1.02 * total / sharing + 1e6


def test_places_of_some_parameters(v3):
    sizes = {"fsdp": 4, "expert": 8, "tensor": 2}
    both = ("fsdp", "expert")
    for path, expected in {
        ("embed_tokens", "embedding"): (("tensor",), both),
        ("lm_head", "kernel"): (both, ("tensor",)),
        ("moe_layers", "mlp", "experts", "gate_up_proj"): (
            None,
            "expert",
            "fsdp",
            None,
            "tensor",
        ),
        ("mtp_0", "layer", "mlp", "experts", "down_proj"): (("expert",), ("tensor",), ("fsdp",)),
        ("dense_layers", "self_attn", "o_proj", "kernel"): (None, ("tensor",), both),
        ("moe_layers", "self_attn", "q_b_proj", "kernel"): (None, None, ("tensor", *both)),
        ("norm", "weight"): (None,),
    }.items():
        assert parameter_spec(sizes, path, v3[path]) == PartitionSpec(*expected), path


def test_axes_that_do_not_divide_are_left_out_from_the_last():
    path = ("lm_head", "kernel")
    sizes = {"fsdp": 4, "expert": 6, "tensor": 2}
    for hidden, expected in ((48, ("fsdp", "expert")), (20, ("fsdp",)), (18, None)):
        assert parameter_spec(sizes, path, (hidden, 7)) == PartitionSpec(expected, None)
    assert parameter_spec({}, path, (48, 8)) == PartitionSpec(None, None)
    assert parameter_spec({"tensor": 2}, path, (48, 8)) == PartitionSpec(None, ("tensor",))


def test_the_table_of_v3_on_a_pod(v3):
    """Every parameter has a line: 16 x 64 chips hold a 1,024th of the experts and projections."""
    lines = parameter_table({"fsdp": 16, "expert": 64}, v3).splitlines()
    assert len(lines) == len(v3) + 2
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert cells["moe_layers/mlp/experts/gate_up_proj"] == (
        "58 x 256 expert x 7168 fsdp x 2 x 2048 58 x 4 x 448 x 2 x 2048"
    )
    assert cells["embed_tokens/embedding"] == "129280 x 7168 fsdp·expert 129280 x 7"
    assert cells["moe_layers/mlp/gate/e_score_correction_bias"] == "58 x 256 58 x 256"
    total = sum(math.prod(shape) for shape in v3.values())
    assert cells[str(len(v3))].startswith(f"parameters {total:,} ")
    held = int(lines[-1].split()[-1].replace(",", ""))
    assert total / 1024 < held < 1.01 * total / 1024
