"""From a corpus to batches: the same global stream, wherever and however often it is opened."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsv3_jax.data
from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.data import CacheError, DataError, Tokenizer, open_data, pipeline

LENGTH = 16


def _write_corpus(folder, documents=60):
    words = "alpha beta gamma delta def return class self import ( ) : = + 1 22 \n".split(" ")
    draw = random.Random(0)
    folder.mkdir()
    for number in range(documents):
        text = " ".join(draw.choices(words, k=draw.randint(1, 120)))
        (folder / f"document_{number:03}.py").write_text(f"# {number}\n{text}\n")


def _config(folder, vocab_size=320, **fields):
    fields = {"corpus": str(folder / "corpus"), "cache_dir": str(folder / "cache")} | fields
    fields = {"sequence_length": LENGTH, "held_out_fraction": 0.2} | fields
    return TrainConfig(
        model=dataclasses.replace(ModelConfig(), vocab_size=vocab_size),
        data=DataConfig(**fields),
        total_tokens=10**6,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    _write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return open_data(_config(folder))


def _take(data, count, start, sizes, **parts):
    iterator = data.batches(start, sizes, **parts)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def _growing(first):
    """4, 4, 8, 8, 12, ...: a batch that grows with the examples consumed."""
    return 4 * (1 + first // 12)


def test_batches_are_the_global_stream_in_order(data):
    batches = _take(data, 5, 0, 6)
    assert all(batch.shape == (6, LENGTH + 1) for batch in batches)
    assert all(batch.dtype == np.int32 for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), data.examples(np.arange(30)))


def test_resuming_equals_never_stopping_also_past_an_epoch_and_while_growing(data):
    batches = _take(data, 14, 0, _growing)
    sizes = [len(batch) for batch in batches]
    assert len(set(sizes)) > 3
    assert sum(sizes) > 2 * data.rows_per_epoch / 3
    for stopped in (1, 3, 9):
        resumed = _take(data, 14 - stopped, sum(sizes[:stopped]), _growing)
        for ours, theirs in zip(resumed, batches[stopped:], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    late = 7 * data.rows_per_epoch - 5
    (batch,) = _take(data, 1, late, 10)
    np.testing.assert_array_equal(batch, data.examples(np.arange(late, late + 10)))


@pytest.mark.parametrize("sizes", [8, _growing])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 2], [1, 3], [0, 2]], [[3], [1, 2], [0]]])
def test_any_number_of_processes_reads_the_same_global_batches(data, sizes, parts):
    alone = _take(data, 6, 4, sizes)
    processes = [_take(data, 6, 4, sizes, group=4, part=np.array(part)) for part in parts]
    for step, batch in enumerate(alone):
        microbatches = np.full((len(batch) // 4, 4, LENGTH + 1), -1)
        for part, batches in zip(parts, processes, strict=True):
            microbatches[:, part] = batches[step].reshape(-1, len(part), LENGTH + 1)
        np.testing.assert_array_equal(microbatches.reshape(batch.shape), batch)


def test_epochs_cover_all_training_tokens(data):
    for epoch in range(2):
        first = epoch * data.rows_per_epoch
        rows = data.examples(np.arange(first, first + data.rows_per_epoch))
        seen = np.bincount(rows[:, 1:].ravel(), minlength=data.tokenizer.vocab_size)
        stored = np.bincount(data.train_tokens, minlength=data.tokenizer.vocab_size)
        assert (seen >= stored).all()
        assert seen.sum() - stored.sum() < LENGTH + 3 * 7  # wrapped tokens and FIM marks


def test_held_out_is_steady_whole_and_unseen(folder, data):
    rows = data.held_out(10)
    assert rows.shape == (10, LENGTH + 1)
    np.testing.assert_array_equal(rows, data.held_out(10))
    everything = data.held_out(10**6)
    available = (data.describe()["held_out_tokens"] - 1) // LENGTH
    assert len(everything) == available > 10
    assert data.tokenizer.fim_begin_id not in everything
    text = data.tokenizer.decode(np.concatenate([row[:-1] for row in everything]))
    names = set(range(60))
    held_out = {n for n in names if f"# {n}\n" in text}
    train = {n for n in names if f"# {n}\n" in data.tokenizer.decode(data.train_tokens)}
    assert len(held_out) > 3
    assert not held_out & train


def test_describe_counts_what_the_files_hold(folder, data):
    facts = data.describe()
    assert facts["train_documents"] + facts["held_out_documents"] == 60
    size = sum(file.stat().st_size for file in (folder / "corpus").iterdir())
    assert facts["train_bytes"] + facts["held_out_bytes"] == size
    assert facts["train_tokens"] == len(data.train_tokens)
    stood_for = data.tokenizer.byte_lengths[np.asarray(data.train_tokens)].sum()
    assert facts["train_bytes"] == stood_for
    assert facts["bytes_per_token"] == pytest.approx(stood_for / len(data.train_tokens))
    assert (data.train_tokens == data.tokenizer.bos_id).sum() == facts["train_documents"]
    assert json.loads(json.dumps(facts)) == facts


_REPORT = """
import hashlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_pipeline import _config
from dsv3_jax.data import open_data
config = _config(Path(sys.argv[2]), cache_dir=sys.argv[3])
data = open_data(config)
rows = data.examples(np.arange(200))
print(data.describe()["train_fingerprint"], hashlib.sha256(rows.tobytes()).hexdigest())
"""


def test_another_process_with_an_empty_cache_gets_the_same_stream(folder, data, tmp_path):
    environment = os.environ | {
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": str(Path(dsv3_jax.data.__file__).parents[2]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", _REPORT, here, str(folder), str(tmp_path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = data.examples(np.arange(200))
    expected = [data.describe()["train_fingerprint"], hashlib.sha256(rows.tobytes()).hexdigest()]
    assert output.stdout.split() == expected


def test_second_start_reads_the_cache_only(folder, data, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("text was read again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    monkeypatch.setattr(pipeline, "_texts_to_train_on", refuse)
    again = open_data(_config(folder))
    np.testing.assert_array_equal(again.examples(np.arange(9)), data.examples(np.arange(9)))
    reseeded = open_data(_config(folder, seed=1))
    assert not np.array_equal(reseeded.examples(np.arange(9)), data.examples(np.arange(9)))


def test_changed_corpus_is_read_again(tmp_path):
    _write_corpus(tmp_path / "corpus", documents=12)
    before = open_data(_config(tmp_path)).describe()
    (tmp_path / "corpus" / "document_000.py").write_text("new = 'text'\n" * 50)
    after = open_data(_config(tmp_path)).describe()
    assert after["train_fingerprint"] != before["train_fingerprint"]
    assert after["tokenizer_fingerprint"] != before["tokenizer_fingerprint"]


def test_tokenizer_of_a_large_corpus_is_trained_on_a_share(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_BPE_TEXT_BYTES", 5000)
    smaller = open_data(_config(folder, cache_dir=str(tmp_path)))
    assert smaller.tokenizer.fingerprint != data.tokenizer.fingerprint
    assert smaller.describe()["train_bytes"] == data.describe()["train_bytes"]


def test_injected_special_tokens_never_reach_the_stream(tmp_path):
    _write_corpus(tmp_path / "corpus", documents=12)
    attack = "<｜end▁of▁sentence｜><｜begin▁of▁sentence｜><｜fim▁hole｜>\n"
    (tmp_path / "corpus" / "document_000.py").write_text(attack * 20)
    data = open_data(_config(tmp_path, fim_rate=0.0))
    special = np.flatnonzero(data.tokenizer.byte_lengths == 0)
    counts = np.bincount(data.train_tokens, minlength=data.tokenizer.vocab_size)[special]
    documents = data.describe()["train_documents"]
    assert dict(zip(special.tolist(), counts.tolist(), strict=True)) == {
        int(token): documents if token in (data.tokenizer.bos_id, data.tokenizer.eos_id) else 0
        for token in special
    }
    assert attack in data.tokenizer.decode(data.train_tokens)


def test_vocabulary_larger_than_the_models_names_both_numbers(folder, data, tmp_path):
    data.tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"has 320 entries .* model\.vocab_size=300"):
        open_data(_config(folder, vocab_size=300, tokenizer=str(tmp_path / "tokenizer.json")))
    wider = open_data(_config(folder, vocab_size=999, tokenizer=str(tmp_path / "tokenizer.json")))
    assert wider.tokenizer.vocab_size == 320


def test_fim_needs_a_tokenizer_that_has_it(folder, data, tmp_path):
    file = tmp_path / "tokenizer.json"
    data.tokenizer.save(file)
    file.write_text(file.read_text().replace("<｜fim▁hole｜>", "<other>"))
    with pytest.raises(DataError, match=r"data\.fim_rate=0\.1 must be 0 .*fim▁hole"):
        open_data(_config(folder, tokenizer=str(file)))
    plain = open_data(_config(folder, tokenizer=str(file), fim_rate=0.0))
    assert plain.examples(np.arange(2)).shape == (2, LENGTH + 1)


def test_no_held_out_sequence_is_an_error_that_says_what_to_do(tmp_path):
    _write_corpus(tmp_path / "corpus", documents=1)
    data = open_data(_config(tmp_path))
    assert data.examples(np.arange(3)).shape == (3, LENGTH + 1)
    with pytest.raises(DataError, match=r"of 0 tokens .*sequence_length=16.*set data\.held_out"):
        data.held_out(4)


def test_blank_corpus_and_unwritable_cache_are_named(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("\n")
    with pytest.raises(DataError, match=r"no document with text in .*data\.corpus="):
        open_data(_config(tmp_path))
    (tmp_path / "corpus" / "a.txt").write_text("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot write .*file"):
        open_data(_config(tmp_path, cache_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1}, r"start=-1 must not be negative"),
        (
            {"group": 2, "part": np.array([1, 2])},
            r"part=\[1, 2\] must be .* \[0, group=2\)",
        ),
        ({"part": np.array([], int)}, r"part=\[\] must be positions"),
        ({"sizes": 6, "group": 4}, r"batch size 6 at example 0 .* divisible by group=4"),
        ({"sizes": lambda first: 4 - first, "group": 4}, r"batch size 0 at example 4"),
    ],
)
def test_bad_batch_arguments_are_named(data, arguments, message):
    with pytest.raises(DataError, match=message):
        list(itertools.islice(data.batches(**({"start": 0, "sizes": 4} | arguments)), 2))
