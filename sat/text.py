"""Captions to word ids and back, on Hugging Face `tokenizers` at word level.

What a word is, is a setting of the vocabulary, saved as the normaliser inside the tokenizer's one JSON file:

    basic       lower case runs of letters, marks and digits; all else separates them. "man's" is "man s", so the
                word "man" still counts. ZWNJ and ZWJ stay inside words, soft hyphens go.
    characters  as basic, but every character (with its marks) of a script that is written without spaces (Chinese,
                Japanese, Thai, Lao, Khmer, Burmese, Tibetan) is a word of its own; other scripts keep their words
    none        the captions are split already: words are what spaces separate, exactly as they stand
"""

import hashlib
import json
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
WORD_RULES = ("basic", "characters", "none")
"""What a word may be; see above."""
REMEMBERED = 1 << 16
"""Pieces of captions whose ids are remembered."""

_INSIDE = r"[\p{L}\p{M}\p{N}]"
_JOINER = r"[\x{200c}\x{200d}]"
_BETWEEN_WORDS = rf"(?:[^\p{{L}}\p{{M}}\p{{N}}\x{{200c}}\x{{200d}}]|(?<!{_INSIDE}){_JOINER}|{_JOINER}(?!{_INSIDE}))+"
"""No letter, mark or digit, and no joiner between two of them."""
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_AROUND_CHARACTERS = rf"(?<={_UNSPACED})(?!\p{{M}})|(?={_UNSPACED})(?!\p{{M}})"
"""The places before and after a character, with its marks, of a script without spaces."""


class CaptionTokenizer:
    """A vocabulary of words: ids 0-3 are the specials, then the words from the most to the least frequent."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises ValueError when the tokenizer's first four ids are not the specials."""
        found = tuple(tokenizer.id_to_token(index) for index in range(len(SPECIALS)))
        if found != SPECIALS:
            raise ValueError(f"not a caption tokenizer: ids 0-3 are {found}, expected {SPECIALS}")
        if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.WhitespaceSplit):
            raise ValueError(
                f"not a caption tokenizer: words must be split by spaces, not by {tokenizer.pre_tokenizer}"
            )
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

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
    def word_rule(self) -> str:
        """What a word is: one of WORD_RULES, told by the normaliser; that of an older file is `basic`."""
        mine = _description(self._tokenizer)
        known = {rule: _description(_without_words(rule)) for rule in WORD_RULES}
        return next((rule for rule, description in known.items() if description == mine), "basic")

    @cached_property
    def digest(self) -> str:
        """sha256 of the words in order: equal digests mean equal ids."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Ids of the first `max_words` words, without <start> and <end>; unknown words are UNK.

        No rule looks across a space, so what stands between two spaces is normalised once and remembered: a caption
        takes the library 30 us, and this 2.
        """
        ids: list[int] = []
        for piece in caption.split():
            found = self._known.get(piece)
            ids += self._learn(piece) if found is None else found
        return ids[:max_words]

    def _learn(self, piece: str) -> list[int]:
        """The ids of what stands between two spaces; they are remembered."""
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        ids: list[int] = self._tokenizer.encode(piece, add_special_tokens=False).ids
        self._known[piece] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Words up to the first END, joined by spaces; PAD and START are skipped, UNK reads `<unk>`."""
        words = []
        for index in map(int, ids):
            if index == END:
                break
            if index not in (PAD, START):
                words.append(self.words[index])
        return " ".join(words)


def build_tokenizer(captions: Iterable[str], min_count: int, words: str = "basic") -> CaptionTokenizer:
    """The words that occur at least `min_count` times; equal captions in any order give an equal tokenizer.

    Raises ValueError for another `words` than those of WORD_RULES.
    """
    counts = count_words(captions, words)
    kept = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    return CaptionTokenizer(_without_words(words, kept))


def count_words(captions: Iterable[str], words: str = "basic") -> Counter[str]:
    """Occurrences of every word of the normalised captions."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(normalise(caption, words).split())
    return counts


def normalise(caption: str, words: str = "basic") -> str:
    """The caption's words, separated by single spaces; may be empty. `words` is one of WORD_RULES, else ValueError."""
    return " ".join(_normalizer(words).normalize_str(caption).split())


def looks_unsegmented(counts: Counter[str]) -> bool:
    """Whether words are so long that they must be sentences of a script without spaces: 8 letters or more each.

    The words of English captions have 4.3 letters in the mean, of German ones 5.5; Chinese sentences 15.
    """
    total = sum(counts.values())
    return total > 0 and sum(len(word) * count for word, count in counts.items()) / total >= 8


def _without_words(words: str, vocabulary: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of this rule, of the specials and these words."""
    known = {word: index for index, word in enumerate((*SPECIALS, *vocabulary))}
    tokenizer = Tokenizer(WordLevel(known, unk_token=SPECIALS[UNK]))
    tokenizer.normalizer = _normalizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _description(tokenizer: Tokenizer) -> object:
    """The normaliser as the file describes it."""
    return json.loads(tokenizer.to_str())["normalizer"]


@lru_cache(maxsize=len(WORD_RULES))
def _normalizer(words: str) -> normalizers.Normalizer:
    if words not in WORD_RULES:
        raise ValueError(f"words {words!r} is unknown; choose one of {', '.join(WORD_RULES)}")
    if words == "none":  # a caption's own "<unk>" loses its bracket, it must not become ours
        brackets = normalizers.Replace(Regex(r"<+(?=(?:pad|start|end|unk)>)"), "")
        return normalizers.Sequence([normalizers.NFC(), brackets])
    soft_hyphens, drop = normalizers.Replace("\u00ad", ""), normalizers.Replace(Regex(_BETWEEN_WORDS), " ")
    steps = [normalizers.NFC(), normalizers.Lowercase(), soft_hyphens, drop]
    if words == "characters":
        steps.append(normalizers.Replace(Regex(_AROUND_CHARACTERS), " "))
    return normalizers.Sequence(steps)
