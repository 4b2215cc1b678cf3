"""Hostile safetensors files and folders, with the safetensors package as the judge of the format.

The rule: whatever is accepted, the package accepts too and reads alike; whatever is refused is
refused with `WeightsError` and without allocating more than the file gives reason to.
"""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.checkpoints.safetensors_io import WeightsError, open_folder, read_header, same_bytes

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

# The examples share one file: each writes it anew.
fuzzed = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def raw_file(header, data=b"\0\0\0\0"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(folder, header, data=b"\0\0\0\0", name="model.safetensors"):
    path = folder / name
    path.write_bytes(raw_file(header, data))
    return path


def accepted_and_refused_alike(path, content):
    """Reads `content` as a file: refuses it properly, or reads what the package reads."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        entries = read_header(path)
        tensors = {name: entry.read() for name, entry in entries.items()}
    except WeightsError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Parsed JSON takes some ten times the text; a tensor's bytes are mapped, not read.
        assert peak < 200_000 + 50 * len(content)
    expected = dict(safetensors.deserialize(content))
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert list(tensor.shape) == expected[name]["shape"]
        assert tensor.tobytes() == bytes(expected[name]["data"])
    return True


arrays = st.builds(
    lambda dtype, shape, seed: (
        np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
        if np.dtype(dtype).kind != "V"
        else np.random.default_rng(seed).normal(size=shape).astype(dtype)
    ),
    st.sampled_from(
        [np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64]
        + [np.uint64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
    ),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(0, 9),
)


@fuzzed
@given(st.dictionaries(st.text(max_size=8), arrays, max_size=6))
def test_valid_files_read_as_written(tmp_path, tensors):
    tensors.pop("__metadata__", None)
    path = tmp_path / "a.safetensors"
    assert accepted_and_refused_alike(path, safetensors.numpy.save(tensors, {"format": "pt"}))
    for name, entry in read_header(path).items():
        assert entry.dtype == tensors[name].dtype
        assert entry.nbytes == tensors[name].nbytes
        np.testing.assert_array_equal(entry.read(), tensors[name])


numbers = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63)]),
    st.sampled_from([True, False, None, 4.0, 1e308, "4", [4], {}]),
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
entries_ = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "U8", "F8_E4M3", "F4", "f32", "", None, 7, []]),
            "shape": st.lists(numbers, max_size=4) | numbers,
            "data_offsets": st.lists(numbers, max_size=3) | numbers,
        },
        optional={"more": any_json},
    ),
    any_json,
)


@st.composite
def plausible_headers(draw):
    """Tensors laid out as they should be, one thing then perhaps changed to something else."""
    header, end = {}, 0
    for name in draw(st.lists(st.sampled_from("abcd"), max_size=4)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if header and draw(st.booleans()):
        entry = header[draw(st.sampled_from(sorted(header)))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key == "dtype" or draw(st.booleans()):
            entry[key] = draw(st.one_of(numbers, st.lists(numbers, max_size=3)))
        elif entry[key]:
            entry[key] = [*entry[key]]
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(numbers)
    return header, draw(st.sampled_from([end, end, end, end + 1, max(end - 1, 0)]))


@fuzzed
@given(plausible_headers())
def test_any_header_is_read_alike_or_refused(tmp_path, drawn):
    header, size = drawn
    content = raw_file(header, bytes(range(size % 256)).ljust(size, b"x"))
    accepted_and_refused_alike(tmp_path / "a.safetensors", content)


@fuzzed
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries_, max_size=3) | any_json,
    st.integers(0, 20),
)
def test_any_json_is_read_alike_or_refused(tmp_path, header, size):
    content = raw_file(json.dumps(header).encode(), b"\1" * size)
    accepted_and_refused_alike(tmp_path / "a.safetensors", content)


@fuzzed
@given(st.data())
def test_any_damage_to_a_valid_file_is_read_alike_or_refused(tmp_path, data):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8)}
    content = bytearray(safetensors.numpy.save(tensors, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["flip", "set", "insert", "delete", "cut"]))
        if kind == "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del content[where : where + data.draw(st.integers(1, 9))]
        elif kind == "cut":
            del content[where:]
        elif where < len(content):
            value = data.draw(st.integers(0, 255))
            content[where] = content[where] ^ (1 << value % 8) if kind == "flip" else value
    accepted_and_refused_alike(tmp_path / "a.safetensors", bytes(content))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ONE, "data_offsets": [0, 3]}, "does not fit bytes 0..3"),
        ({**ONE, "shape": [2], "data_offsets": [0, 8]}, "file of .*truncated"),
        ({**ONE, "shape": [-1]}, "malformed"),
        ({**ONE, "shape": [True]}, "malformed"),
        ({**ONE, "shape": [1.0]}, "malformed"),
        ({**ONE, "shape": "1"}, "malformed"),
        ({**ONE, "shape": [2**64]}, "malformed"),
        ({**ONE, "shape": [2**31, 2**31, 2]}, "too large a shape"),
        ({**ONE, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "too large a shape"),
        ({**ONE, "shape": [1] * 65}, "too large a shape"),
        ({**ONE, "data_offsets": [4, 0]}, "does not fit bytes 4..0"),
        ({**ONE, "data_offsets": [0, 4, 4]}, "malformed"),
        ({"dtype": "F32", "shape": [1]}, "malformed"),
        ({**ONE, "dtype": "Q4"}, "unsupported dtype 'Q4'"),
        ({**ONE, "dtype": ["F32"]}, "malformed"),
        ([], "malformed"),
        (None, "malformed"),
    ],
)
def test_bad_entries_are_named(tmp_path, entry, message):
    path = write(tmp_path, {"lm_head.weight": entry})
    with pytest.raises(WeightsError, match=f"'lm_head.weight'.*{message}.*model.safetensors"):
        read_header(path)


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header length 0 does not fit the 0 bytes"),
        (b"\2\0\0\0\0\0\0", "header length 2 does not fit the 7 bytes"),
        ((2**62).to_bytes(8, "little") + b"{}", "header length 4611686018427387904 does not fit"),
        (raw_file(b"{not json"), "not valid JSON"),
        (raw_file(b"[]", b""), "must be a JSON object"),
        (raw_file(b" {}", b""), "must be a JSON object"),
        (raw_file(b'{"a\xff": 1}'), "not valid JSON: 'utf-8' codec"),
        (raw_file('{"a": 1}'.encode("utf-16")), "must be a JSON object"),
        (raw_file(b'{"\\ud800": 1}'), "not valid JSON: .*surrogates"),
        (raw_file(b'{"a": NaN}'), "not valid JSON: NaN"),
        (raw_file(b'{"a": ' + b"[" * 200_000), "not valid JSON: nested too deep"),
        (raw_file(b'{"a": ' + b"9" * 9000 + b"}"), "not valid JSON: Exceeds the limit"),
        (raw_file(TWICE), "not valid JSON: 'a' is there twice"),
        (raw_file({"__metadata__": {"a": 1}}, b""), "__metadata__ must map names to strings"),
        (raw_file({"__metadata__": []}, b""), "__metadata__ must map names to strings"),
        (raw_file({"a": ONE, "b": ONE}), "'a' and 'b' overlap"),
        (raw_file({"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, b"123456"), "'a' and 'b' over"),
        (
            raw_file({"a": ONE, "b": {**ONE, "data_offsets": [6, 10]}}, b"0123456789"),
            "2 bytes between 'a' and 'b' belong to no tensor",
        ),
        (raw_file({"a": {**ONE, "data_offsets": [1, 5]}}, b"12345"), "1 bytes between the header"),
        (raw_file({"a": ONE}, b"123456"), "2 bytes after 'a'"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    assert not accepted_and_refused_alike(tmp_path / "a.safetensors", content)
    with pytest.raises(WeightsError, match=message):
        read_header(tmp_path / "a.safetensors")


def test_the_largest_header_is_the_formats(tmp_path, monkeypatch):
    path = write(tmp_path, {"a": ONE})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr("dsv3_jax.checkpoints.safetensors_io.MAX_HEADER", length)
    read_header(path)
    monkeypatch.setattr("dsv3_jax.checkpoints.safetensors_io.MAX_HEADER", length - 1)
    with pytest.raises(WeightsError, match=f"header length {length} does not fit"):
        read_header(path)


def test_things_that_are_not_files_are_refused_without_waiting(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "loop", "zero", "absent", "x" * 300):
        with pytest.raises(WeightsError, match=f"not a readable file .*{name}"):
            read_header(tmp_path / name)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    entry = read_header(write(tmp_path, {"a": ONE}))["a"]
    os.truncate(entry.file, 20)
    with pytest.raises(WeightsError, match="cannot be read.*model.safetensors"):
        entry.read()


def test_same_bytes(tmp_path):
    base = np.arange(23, dtype=np.int16)
    last, nan = base.copy(), np.full(23, np.nan, np.float16)
    last[-1] += 256  # only in its last byte
    tensors = {"a": base, "b": base.copy(), "last": last, "nan": nan, "nan2": nan.copy()}
    tensors |= {"bits": nan.view(np.int16), "short": base[:22], "none": base[:0], "none2": base[:0]}
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({name: a.copy() for name, a in tensors.items()}, path)
    entries = read_header(path)
    for chunk in (1, 5, 46, 1000):
        assert same_bytes(entries["a"], entries["b"], chunk)
        assert same_bytes(entries["nan"], entries["nan2"], chunk)
        assert same_bytes(entries["none"], entries["none2"], chunk)
        for one, other in (("a", "last"), ("nan", "bits"), ("a", "short")):
            assert not same_bytes(entries[one], entries[other], chunk)


SHARD = "model-00001-of-00001.safetensors"


def write_index(folder, weight_map):
    raw = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map})
    raw = raw if isinstance(raw, bytes) else raw.encode()
    (folder / "model.safetensors.index.json").write_bytes(raw)


@pytest.mark.parametrize(
    "shard",
    [
        f"../{SHARD}",
        f"/etc/{SHARD}",
        f"sub/{SHARD}",
        f"..\\{SHARD}",
        f"C:{SHARD}",
        f"./{SHARD}",
        "..",
        "",
        "model.bin",
        f"a\0{SHARD}",
        f"a\n{SHARD}",
        f"\ud800{SHARD}",
        7,
        None,
        [SHARD],
        {"a": SHARD},
    ],
)
def test_shards_must_be_file_names_of_the_folder(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        write(place, {"a": ONE}, name=SHARD)
    write_index(folder, {"a": shard})
    with pytest.raises(WeightsError, match=r"must be a \.safetensors file name|surrogates") as info:
        open_folder(folder)
    assert "\n" not in str(info.value) and "index.json" in str(info.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "no readable weight_map"),
        (b"{}", "no readable weight_map"),
        (b'{"weight_map": []}', "no readable weight_map"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"weight_map": {"a": "%s", "a": "b"}}' % SHARD.encode(), "'a' is there twice"),
        ({"a": "absent.safetensors"}, "shard 'absent.safetensors' is missing"),
        ({"a": "x" * 300 + ".safetensors"}, "is missing"),
        ({"a": SHARD, "b": SHARD}, f"tensor 'b' is not in '{SHARD}' as the index says"),
        ({"b": SHARD}, f"tensor 'b' is not in '{SHARD}' as the index says"),
    ],
)
def test_bad_indices_are_refused(tmp_path, index, message):
    write(tmp_path, {"a": ONE}, name=SHARD)
    write_index(tmp_path, index)
    with pytest.raises(WeightsError, match=message):
        open_folder(tmp_path)


def test_tensors_beside_the_index_are_named(tmp_path):
    write(tmp_path, {"a": ONE, "b": {**ONE, "data_offsets": [4, 8]}}, b"12345678", SHARD)
    write_index(tmp_path, {"a": SHARD})
    with pytest.raises(WeightsError, match=f"tensor 'b' of '{SHARD}' is not in the index"):
        open_folder(tmp_path)
    # In the index, but a second time in another shard.
    write_index(tmp_path, {"a": SHARD, "b": SHARD, "c": "other.safetensors"})
    second = {"b": ONE, "c": {**ONE, "data_offsets": [4, 8]}}
    write(tmp_path, second, b"12345678", name="other.safetensors")
    with pytest.raises(WeightsError, match="tensor 'b' of 'other.safetensors' is not in the index"):
        open_folder(tmp_path)


def test_a_hub_cache_of_links_is_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs, {"a": ONE}, b"\0\0\x80\x3f", name="5f3c")
    write_index(blobs, {"a": SHARD})
    (blobs / "model.safetensors.index.json").rename(blobs / "77aa")
    (snapshot / SHARD).symlink_to("../../blobs/5f3c")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/77aa")
    assert open_folder(snapshot)["a"].read() == [1.0]
    (blobs / "5f3c").unlink()
    with pytest.raises(WeightsError, match=f"shard '{SHARD}' is missing"):
        open_folder(snapshot)


def test_without_an_index_there_is_one_file(tmp_path):
    with pytest.raises(WeightsError, match="0 .safetensors files"):
        open_folder(tmp_path)
    write(tmp_path, {"a": ONE})
    assert set(open_folder(tmp_path)) == {"a"}
    write(tmp_path, {"b": ONE}, name="second.safetensors")
    with pytest.raises(WeightsError, match="2 .safetensors files without"):
        open_folder(tmp_path)
