"""Hugging Face folders in and out: round trip, the ledger of names, damaged files."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3_jax import load_pretrained, to_hf_state_dict
from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.safetensors_io import WeightsError
from dsv3_jax.config import ConfigError, ModelConfig


@pytest.mark.parametrize("variant", ["base", "kimi"])
def test_round_trip_is_exact(checkpoint, variant):
    loaded = checkpoint(variant)
    tensors = to_hf_state_dict(loaded.model.config, loaded.variables)
    assert set(tensors) == set(loaded.weights)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, loaded.weights[name], err_msg=name)


def test_every_parameter_element_has_exactly_one_row(checkpoint):
    config = ModelConfig.from_hf(checkpoint("base").folder)
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int32), abstract_variables(config))
    names = [row.name for row in hf_names.rows(config)]
    assert len(names) == len(set(names))
    for row in hf_names.rows(config):
        leaf = filled
        for key in row.path:
            leaf = leaf[key]
        leaf[row.index] += 1
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(filled))


def test_bfloat16_keeps_the_router_in_float32(checkpoint):
    loaded = checkpoint("base")
    _, variables = load_pretrained(loaded.folder)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(variables["router_state"])}
    assert dtypes == {"float32"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        expected = "float32" if "gate'" in jax.tree_util.keystr(path) else "bfloat16"
        assert leaf.dtype == expected, jax.tree_util.keystr(path)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a checkpoint with one file, to be damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint("base").folder, copy)
    return copy


def _edit(folder, change):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_left_over_and_misshapen_tensors_are_named(folder):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    kept = {}
    _edit(folder, lambda tensors: kept.update({name: tensors.pop(name)}))
    with pytest.raises(WeightsError, match=rf"'{name}' is missing"):
        load_pretrained(folder)
    _edit(folder, lambda tensors: tensors.update({name: kept[name][:-1]}))
    with pytest.raises(WeightsError, match=rf"'{name}' has shape .*needs"):
        load_pretrained(folder)
    _edit(folder, lambda tensors: tensors.update({name: kept[name], "model.extra": kept[name]}))
    with pytest.raises(WeightsError, match="'model.extra' fills no parameter"):
        load_pretrained(folder)


def test_unequal_tied_copies_are_named(folder, checkpoint):
    number = checkpoint("base").config["num_hidden_layers"]
    copy = f"model.layers.{number}.embed_tokens.weight"
    _edit(folder, lambda tensors: tensors.update({copy: tensors[copy] + 1}))
    with pytest.raises(WeightsError, match=f"'{copy}' must equal 'model.embed_tokens.weight'"):
        load_pretrained(folder)


def test_bad_arguments(tmp_path, folder):
    with pytest.raises(ConfigError, match="dtype='float16'"):
        load_pretrained(folder, dtype="float16")
    with pytest.raises(WeightsError, match="neither a config.json nor checkpoints/"):
        load_pretrained(tmp_path)
