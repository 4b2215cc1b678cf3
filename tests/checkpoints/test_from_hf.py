"""Conversion of Hugging Face folders: what is stored, what is refused, and interruptions."""

import errno
import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoints import array_store, direct_io, hf_names
from dsv3_jax.checkpoints.convert import abstract_variables
from dsv3_jax.checkpoints.from_hf import from_hf
from dsv3_jax.checkpoints.metadata import config_from_dict
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ModelConfig
from tests.checkpoints.conftest import BF16, save

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def restore(folder, sharding=None):
    """(config, variables) as `CheckpointStore` reads them: BF16, the router in float32."""
    store = CheckpointStore(folder / "checkpoints")
    config = config_from_dict(store.read_metadata()["config"]).model

    def abstract(path, leaf):
        dtype = jnp.float32 if "gate" in [key.key for key in path] else jnp.bfloat16
        spec = None if sharding is None else sharding([key.key for key in path], leaf)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=spec)

    targets = jax.tree_util.tree_map_with_path(abstract, abstract_variables(config))
    return config, store.restore(None, targets)[0]


def test_a_checkpoint_holds_every_tensor_where_the_ledger_says(fp8, tmp_path):
    from_hf(fp8.folder, tmp_path / "ours")
    config, variables = restore(tmp_path / "ours")
    assert config == ModelConfig.from_hf(fp8.folder)
    ledger = json.loads((tmp_path / "ours" / "ledger.json").read_text())
    lines = ledger["tensors"]
    assert lines.keys() == fp8.tensors.keys()
    tied = {name for name, line in lines.items() if line["status"] == "tied"}
    assert tied == {
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    }
    for name, line in lines.items():
        if line["status"] == "mapped":
            leaf = variables
            for key in line["to"].split("/"):
                leaf = leaf[key]
            index = tuple(slice(None) if i == ":" else i for i in line["index"])
            found = np.asarray(leaf[index])
            want = fp8.values.get(name, fp8.tensors[name])
            want = want.astype(found.dtype)
            assert found.tobytes() == (want.T if line["transposed"] else want).tobytes(), name
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "checkpoints",
        "fp8_scales.safetensors",
        "generation_config.json",
        "ledger.json",
        "tokenizer.json",
    ]


def test_float32_keeps_every_bit_of_fp8_times_scale(fp8, tmp_path):
    from_hf(fp8.folder, tmp_path / "ours", dtype="float32")
    _, variables = load_pretrained(tmp_path / "ours", dtype="float32")
    found = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_up_proj"][0, 3, :, 1]
    np.testing.assert_array_equal(np.asarray(found).T, fp8.values[EXPERT])


def test_devices_of_an_expert_fsdp_mesh_hold_their_slices(bf16, tmp_path):
    from_hf(bf16().folder, tmp_path / "ours")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"), axis_types=auto)

    def sharding(path, leaf):
        spec = {"gate_up_proj": (None, "expert", "fsdp"), "down_proj": (None, "expert", "fsdp")}
        axes = spec.get(path[-1], ("fsdp",) if leaf.shape[0] % 2 == 0 else ())
        if path[1].startswith("mtp") and path[-1] in spec:
            axes = axes[1:]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    _, variables = restore(tmp_path / "ours", sharding)
    _, whole = restore(tmp_path / "ours")
    stack = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    assert {shard.data.shape for shard in stack.addressable_shards} == {(2, 3, 20, 2, 18)}
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(whole), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        # Several bands and tiles, the last band padded, as a vocabulary or a dense FFN has them.
        (hf_names.Row("a", ("params", "a"), (), True), (2200, 2500)),
        (hf_names.Row("b", ("params", "b"), (1,), True), (3, 1030, 700)),
        (hf_names.Row("c", ("params", "c"), (1, 0, slice(None), 1), True), (2, 2, 300, 2, 1280)),
        (hf_names.Row("d", ("params", "d"), ()), (2500, 33)),
        (hf_names.Row("e", ("params", "e"), (2,)), (4, 5000)),
    ],
)
def test_tiles_are_read_by_tensorstore_and_by_us(row, shape, tmp_path):
    slot = array_store.Slot(row, shape, np.dtype(np.float32))
    tensor = np.random.default_rng(0).random(slot.tensor_shape, np.float32)
    array_store.write_arrays(tmp_path, {row.path: slot}, {})
    with array_store.SlotWriter(slot, tmp_path) as writer:
        for rows in slot.bands():
            writer.write(tensor[rows].T if row.transpose else tensor[rows])
        writer.write_index()
    assert (tmp_path / slot.file).stat().st_size == slot.nbytes
    place = {"driver": "file", "path": f"{tmp_path}/params.{row.name}/"}
    spec = {"driver": "zarr3", "kvstore": place}
    stored = ts.open(spec).result()[row.index].read().result()
    np.testing.assert_array_equal(stored.T if row.transpose else stored, tensor)
    bands = array_store.read_slot(slot, tmp_path, writer.crc32)
    bands = [(band.T if row.transpose else band).copy() for band in bands]
    np.testing.assert_array_equal(np.concatenate(bands), tensor)


@pytest.mark.parametrize("refused", [False, True])
def test_ranges_of_a_file_are_written_past_the_cache_or_through_it(tmp_path, monkeypatch, refused):
    """`refused`: a file system that opens files for direct access and then takes none."""
    path, rng = tmp_path / "file", np.random.default_rng(0)
    content = rng.integers(0, 256, 9_000_001, dtype=np.uint8)
    calls = []
    if refused:
        for name in ("pwrite", "preadv"):
            monkeypatch.setattr(os, name, _refusing(getattr(os, name), calls))
    starts = [0, 1, 4096, 4097, 1_300_000, 6_000_000, 6_000_001, len(content)]
    for begin, end in random.Random(0).sample([*zip(starts, starts[1:], strict=False)], 7):
        with direct_io.DirectWriter(path, begin, end - begin) as writer:
            for part in np.array_split(content[begin:end], 3):
                writer.write(part)
    assert path.read_bytes() == content.tobytes()
    with direct_io.DirectReader(path, 5_000_000) as reader:
        for begin, size in [(0, 10), (4095, 2), (1_299_999, 5_000_000), (9_000_000, 1)]:
            read = reader.read(begin, size)
            assert read.tobytes() == content[begin : begin + size].tobytes()
        with pytest.raises(ValueError, match="ends early"):
            reader.read(9_000_000, 2)
    assert bool(calls) == refused


def _refusing(call, calls):
    import fcntl

    def refuse(descriptor, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            calls.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(descriptor, *rest)

    return refuse


def damage(released, folder, change):
    """A copy of a folder with changed tensors: `change(tensors, config)`."""
    tensors, config = dict(released.tensors), json.loads(json.dumps(released.config))
    change(tensors, config)
    return save(folder, config, tensors)


def _poke(name, position, value):
    def change(tensors, config):
        array = tensors[name].copy()
        array.view(f"u{array.dtype.itemsize}")[position] = value
        tensors[name] = array

    return change


SCALE = EXPERT + "_scale_inv"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EXPERT, _poke(EXPERT, (100, 150), 0x7F)),  # e4m3 NaN
        (EXPERT, _poke(EXPERT, (135, 199), 0xFF)),  # -NaN
        (SCALE, _poke(SCALE, (1, 1), 0x7F800000)),  # infinity
        (SCALE, _poke(SCALE, (0, 0), 0xFFC00000)),  # -NaN
        (EXPERT, _poke(SCALE, (1, 0), 0x7F000000)),  # finite, but times 448 is not
        ("model.norm.weight", _poke("model.norm.weight", 7, 0x7F80)),
        ("lm_head.weight", _poke("lm_head.weight", (88, 199), 0xFF81)),
    ],
)
def test_nan_and_infinities_are_refused_by_name(fp8, convert, tmp_path, name, change):
    folder = damage(fp8, tmp_path / "bad", change)
    if name == "lm_head.weight":  # the tied copy is as bad
        tensors = fp8.tensors | {}
        change(tensors, None)
        tensors["model.layers.2.shared_head.head.weight"] = tensors[name]
        folder = save(folder, fp8.config, tensors)
    code, (message,) = convert("from-hf", folder, tmp_path / "ours")
    assert code == 2 and repr(name) in message and "--allow-nonfinite" in message
    assert str(folder / "model-0") in message
    assert not (tmp_path / "ours").exists()
    code, lines = convert("from-hf", folder, tmp_path / "ours", "--allow-nonfinite")
    assert (code, lines) == (0, [])
    lines = json.loads((tmp_path / "ours" / "ledger.json").read_text())["tensors"]
    assert [n for n, line in lines.items() if line.get("nonfinite")] == [
        name.removesuffix("_scale_inv")
    ]


def _without(name):
    return lambda tensors, config: tensors.pop(name)


def _with(name, value):
    return lambda tensors, config: tensors.update({name: value})


TIED = "model.layers.2.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (_without(SCALE), EXPERT, "has no"),
        (_without("model.norm.weight"), "model.norm.weight", "is missing"),
        (_with("model.extra", np.zeros(3, BF16)), "model.extra", "fills no parameter"),
        (_with(EXPERT, np.zeros((136, 199), BF16)), EXPERT, "has shape [136, 199]"),
        (_with(SCALE, np.zeros((2, 1), np.float32)), SCALE, "[2, 2]: a scale for each block"),
        (_with(TIED, np.zeros((89, 200), BF16)), TIED, "must equal 'model.embed_tokens.weight'"),
        (_with(TIED, np.zeros((89, 2), BF16)), TIED, "must equal 'model.embed_tokens.weight'"),
        (lambda t, c: c.pop("quantization_config"), "weight", "needs a quantization_config"),
    ],
)
def test_left_over_and_misfitting_tensors_are_named(fp8, convert, tmp_path, change, name, message):
    folder = damage(fp8, tmp_path / "bad", change)
    code, (line,) = convert("from-hf", folder, tmp_path / "ours")
    assert code == 2 and name in line and message in line and str(folder) in line
    assert not (tmp_path / "ours").exists()


def test_damaged_folders_are_refused(bf16, convert, tmp_path):
    def refused(*parts):
        code, lines = convert("from-hf", tmp_path / "bad", tmp_path / "ours")
        assert code == 2 and len(lines) == 1, lines
        assert all(part in lines[0] for part in parts), lines
        assert not (tmp_path / "ours").exists()

    shutil.copytree(bf16().folder, tmp_path / "bad")
    index = tmp_path / "bad" / "model.safetensors.index.json"
    shard = tmp_path / "bad" / "model-00002-of-00003.safetensors"
    good, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(good[:-1])
    refused("truncated", shard.name)
    shard.write_bytes((2**60).to_bytes(8, "little") + good[8:])
    refused(str(2**60), shard.name)
    shard.write_bytes(good.replace(b'"BF16"', b'"U16" ', 1))
    refused("dtype uint16", shard.name)
    start = 8 + int.from_bytes(good[:8], "little")
    first, second = list(json.loads(good[8:start]))[:2]
    shard.write_bytes(good[:start].replace(second.encode(), first.encode()) + good[start:])
    refused(shard.name)
    shard.unlink()
    refused("missing", shard.name)
    shard.write_bytes(good)
    index.write_text(listed.replace(f'"{shard.name}"', f'"../{shard.name}"'))
    refused("../", index.name)
    (tmp_path / "bad" / "config.json").unlink()
    refused("no config.json")


def test_a_destination_that_is_taken_or_too_small_is_refused(bf16, convert, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    code, (line,) = convert("from-hf", bf16().folder, taken)
    assert code == 2 and line == f"error: {taken} exists and is not empty"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        code, (line,) = convert("from-hf", bf16().folder, tmp_path / "ours")
    assert code == 2 and "needed" in line and "0.1 MB available" in line
    (taken / "mine").unlink()
    assert convert("from-hf", bf16().folder, taken)[0] == 0  # empty: taken over
    assert not (tmp_path / "taken.partial").exists()
