"""Documents are streamed in a fixed order, split without overlap, and bad input is named."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.sources import DataError, name_fraction, open_corpus


def _corpus(path, **fields):
    return open_corpus(DataConfig(corpus=str(path), **fields))


def _texts(documents):
    return {document.name: document.text for document in documents}


def _all_texts(corpus):
    return _texts(corpus.train) | _texts(corpus.held_out)


def test_stdlib_holds_out_whole_packages_and_nothing_of_them_trains():
    corpus = open_corpus(DataConfig())
    train, held_out = _texts(corpus.train), _texts(corpus.held_out)
    train_packages = {name.split("/")[0].removesuffix(".py") for name in train}
    held_out_packages = {name.split("/")[0] for name in held_out}
    assert held_out_packages == {"http", "json", "tomllib", "pydoc_data"}
    assert not train_packages & held_out_packages
    assert not set(train.values()) & set(held_out.values())
    assert train_packages <= set(sys.stdlib_module_names)
    assert not any("/test/" in name or "/tests/" in name for name in train)
    sizes = [sum(len(text.encode()) for text in part.values()) for part in (train, held_out)]
    assert sizes[0] > 5_000_000
    assert 0.04 < sizes[1] / sum(sizes) < 0.15
    assert "pydoc_data/topics/assignment" in held_out
    assert list(train) == sorted(train)


def test_folder_reads_known_files_in_name_order_and_keeps_every_byte(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.py").write_bytes("é = 1\r\n".encode())
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    (tmp_path / "d.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "id": 3}\n')
    table = pyarrow.table({"id": [0, 1], "text": ["four", "five"]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    corpus = _corpus(tmp_path)
    expected = {
        "a.txt": "one",
        "b/x.py": "é = 1\r\n",
        "d.jsonl:1": "two",
        "d.jsonl:3": "three",
        "e.parquet:0": "four",
        "e.parquet:1": "five",
    }
    assert _all_texts(corpus) == expected
    assert [document.name for document in corpus.train] == sorted(_texts(corpus.train))


def test_hash_split_is_by_name_disjoint_and_near_the_fraction(tmp_path):
    rows = [json.dumps({"body": f"document {number}"}) for number in range(2000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    corpus = _corpus(tmp_path, text_field="body", held_out_fraction=0.1)
    train, held_out = _texts(corpus.train), _texts(corpus.held_out)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 2000
    assert 150 < len(held_out) < 250
    assert all(name_fraction(name) < 0.1 for name in held_out)
    more = _corpus(tmp_path, text_field="body", held_out_fraction=0.2)
    assert set(held_out) < set(_texts(more.held_out))
    assert corpus.train.fingerprint != corpus.held_out.fingerprint
    assert corpus.train.fingerprint != more.train.fingerprint


def test_single_document_trains_and_explicit_held_out_is_used(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    # A fraction this close to 1 would hold out any document but the first.
    alone = _corpus(tmp_path / "a.txt", held_out_fraction=0.999999)
    assert _texts(alone.train) == {"a.txt": "alpha"}
    assert _texts(alone.held_out) == {}
    pair = _corpus(tmp_path / "a.txt", held_out=str(tmp_path / "b.txt"))
    assert _texts(pair.train) == {"a.txt": "alpha"}
    assert _texts(pair.held_out) == {"b.txt": "beta"}


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    first = _corpus(tmp_path).train.fingerprint
    assert _corpus(tmp_path).train.fingerprint == first
    (tmp_path / "b.txt").write_text("beta")
    assert _corpus(tmp_path).train.fingerprint != first


def test_long_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.data.sources._DOCUMENT_BYTES", 100)
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    parts = list(_corpus(tmp_path, held_out=str(tmp_path)).train)
    assert "".join(part.text for part in parts) == text
    assert len(parts) > 5
    assert len({part.name for part in parts}) == len(parts)
    assert all(part.text.endswith("\n") for part in parts)


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"ab\xffcd", ["0xff", "offset 2", "UTF-8", "a.txt"]),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ["JSON", "a.jsonl:2"]),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', ["'text'", "text_field", "a.jsonl:2"]),
        ("a.jsonl", "[1]", ["'text'", "a.jsonl:1"]),
        ("a.jsonl", '{"text": 5}', ["int", "string", "a.jsonl:1"]),
        ("a.jsonl", '{"text": "\\ud800"}', ["surrogate", "a.jsonl:1"]),
        ("a.jsonl", b'{"text": "\xe9"}', ["0xe9", "UTF-8", "a.jsonl:1"]),
        ("a.txt", "  \n", ["no document with text", "a.txt"]),
        ("a.parquet", "not parquet", ["Parquet", "a.parquet"]),
    ],
)
def test_unreadable_document_is_named_in_one_line(tmp_path, name, content, parts):
    _write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(_corpus(tmp_path / name).train)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"body": ["x"]}, ["'text'", "body", "a.parquet"]),
        ({"text": ["x", None]}, ["NoneType", "string", "a.parquet, row 1"]),
    ],
)
def test_bad_parquet_columns_are_named(tmp_path, columns, parts):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        list(_corpus(tmp_path).train)
    for part in parts:
        assert part in str(caught.value)


def test_missing_and_empty_corpora_are_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"data\.corpus='.*nowhere' must be 'stdlib' or an exist"):
        _corpus(missing)
    with pytest.raises(DataError, match=r"data\.held_out='.*nowhere'"):
        open_corpus(DataConfig(held_out=str(missing)))
    with pytest.raises(DataError, match=r"must hold at least one file of text"):
        _corpus(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.png' must hold at least one file of text"):
        _corpus(tmp_path / "a.png")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet needs pyarrow: pip install .dsv3-jax\[data\]"):
        list(_corpus(tmp_path).train)
