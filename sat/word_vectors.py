"""Word vectors (GloVe, word2vec and fastText in text form) into the embedding of a vocabulary.

The surprise: words without a vector are not zero but drawn with the mean and deviation of those that were found, so
that a rare word begins as an ordinary one; how many were found is returned, and never assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sat.text import CaptionTokenizer


@dataclass(frozen=True)
class Coverage:
    """How much of a vocabulary a file of word vectors knew."""

    found: int
    words: int
    missing: tuple[str, ...]
    """Words without a vector, in the vocabulary's order."""

    def __str__(self) -> str:
        some = (
            f"; without: {', '.join(self.missing[:8])}{' ...' if len(self.missing) > 8 else ''}" if self.missing else ""
        )
        return f"word vectors for {self.found} of {self.words} words ({self.found / max(self.words, 1):.1%}){some}"


@torch.no_grad()
def load_word_vectors(path: str | Path, tokenizer: CaptionTokenizer, embedding: nn.Embedding, tune: bool) -> Coverage:
    """Copy the vectors of the tokenizer's words into `embedding` [V, E]; `tune` says whether training changes them.

    The special tokens keep their initial vectors, for good where `tune` is false. Raises ValueError naming file and
    line for a vector that is not E numbers, and when no word at all was found.
    """
    ids = {word: index for index, word in enumerate(tokenizer.words)}
    rows = torch.zeros_like(embedding.weight)
    known = torch.zeros(len(rows), dtype=torch.bool)
    for word, vector in _vectors(Path(path), embedding.embedding_dim, ids):
        rows[ids[word]] = vector
        known[ids[word]] = True
    specials = [index for index, word in enumerate(tokenizer.words) if word.startswith("<") and word.endswith(">")]
    known[specials] = False
    if not known.any():
        raise ValueError(
            f"{path} has a vector for none of the {len(ids)} words of the vocabulary; is it lower case, and text?"
        )
    missing = torch.ones(len(rows), dtype=torch.bool) & ~known
    missing[specials] = False
    mean, std = rows[known].mean(0), rows[known].std(0, unbiased=False)
    generator = torch.Generator().manual_seed(0)
    rows[missing] = mean + std * torch.randn(int(missing.sum()), rows.shape[1], generator=generator)
    embedding.weight[known | missing] = rows[known | missing].to(embedding.weight)
    embedding.weight.requires_grad_(tune)
    without = tuple(tokenizer.words[index] for index in missing.nonzero().flatten().tolist())
    return Coverage(int(known.sum()), len(ids) - len(specials), without)


def _vectors(path: Path, dim: int, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """(word, vector) of the wanted words. A first line of two numbers (word2vec's header) is passed over."""
    if not path.is_file():
        raise ValueError(f"model.word_vectors: no file {path}")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            fields = line.strip(" \r\n").split(" ")
            if fields == [""] or (number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields)):
                continue
            parts, values = fields[:-dim], fields[-dim:]
            word = " ".join(parts)  # the GloVe files of the web have words with spaces
            if not parts or any(map(_is_number, parts[1:])):
                raise ValueError(
                    f"{path}, line {number} ({fields[0][:20]!r}): {len(fields) - 1} numbers, but model.embedding_dim "
                    f"is {dim}; give a file of that width or set model.embedding_dim"
                )
            if word in wanted:
                try:
                    vector = torch.tensor([float(value) for value in values])
                except ValueError:
                    raise ValueError(f"{path}, line {number} ({word[:20]!r}): not all of it are numbers") from None
                if not vector.isfinite().all():
                    raise ValueError(f"{path}, line {number} ({word[:20]!r}): its numbers are not all finite")
                yield word, vector


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
