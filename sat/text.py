"""Captions to word ids and back, on Hugging Face `tokenizers` at word level.

Punctuation becomes a space, it is not merely deleted: "man's" is "man s", so the word "man"
still counts. The same normaliser runs for every caption and is saved inside the tokenizer's one JSON file.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from sat import files

PAD, START, END, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
"""Their ids are PAD, START, END, UNK. No caption can contain them: `normalise` drops the brackets."""


class CaptionTokenizer:
    """A vocabulary of words: ids 0-3 are the specials, then the words from the most to the least frequent."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises ValueError when the tokenizer's first four ids are not the specials."""
        found = tuple(tokenizer.id_to_token(index) for index in range(len(SPECIALS)))
        if found != SPECIALS:
            raise ValueError(f"not a caption tokenizer: ids 0-3 are {found}, expected {SPECIALS}")
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CaptionTokenizer":
        """Read the file of `save`. Raises ValueError naming the file when it is missing or no caption tokenizer."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer; make it with preprocessing.build_vocab")
        try:
            return cls(Tokenizer.from_file(os.fspath(path)))
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        files.write_text(Path(path), self._tokenizer.to_str(pretty=True) + "\n")

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def words(self) -> list[str]:
        """The word of every id, specials included."""
        return [str(self._tokenizer.id_to_token(index)) for index in range(self.vocab_size)]

    @cached_property
    def digest(self) -> str:
        """sha256 of the words in order: equal digests mean equal ids."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Ids of the first `max_words` words, without <start> and <end>; unknown words are UNK."""
        return self._tokenizer.encode(caption, add_special_tokens=False).ids[:max_words]

    def decode(self, ids: Sequence[int]) -> str:
        """Words up to the first END, joined by spaces; PAD and START are skipped, UNK reads `<unk>`."""
        words = []
        for index in map(int, ids):
            if index == END:
                break
            if index not in (PAD, START):
                words.append(self.words[index])
        return " ".join(words)


def build_tokenizer(captions: Iterable[str], min_count: int) -> CaptionTokenizer:
    """The words that occur at least `min_count` times; equal captions in any order give an equal tokenizer."""
    counts = count_words(captions)
    kept = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    vocabulary = {word: index for index, word in enumerate((*SPECIALS, *kept))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIALS[UNK]))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return CaptionTokenizer(tokenizer)


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Occurrences of every word of the normalised captions."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(normalise(caption).split())
    return counts


def normalise(caption: str) -> str:
    """Lower case words of letters and digits of any script, separated by single spaces; may be empty."""
    return " ".join(_normalizer().normalize_str(caption).split())


@lru_cache(maxsize=1)
def _normalizer() -> normalizers.Normalizer:
    drop = normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}]+"), " ")
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), drop])
