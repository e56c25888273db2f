"""BLEU, ROUGE-L and CIDEr-D in this process, of tokenised captions: pycocoevalcap's scores to the last bit, fast.

What pycocoevalcap calls CIDEr is CIDEr-D (Vedantam et al. 2015, section 5: clipped counts, a Gaussian on the difference
in length) with the document frequencies of the references that are scored; here these may come from elsewhere too, as
self-critical training wants them. The work is done by `ngrams.cpp`, compiled on first use. Where there is no compiler
pycocoevalcap's own classes and a CIDEr-D in Python do it, with the same bits.

A caption is a string of words between white space. As there, BLEU and CIDEr split at any white space of Unicode,
ROUGE-L at each single space.
"""

import ctypes
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sat.model.kernels.build import build

FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC")
SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("ngrams.cpp", "ngrams.h"))
ORDERS = 4
"""Longest n-gram."""
BETA = 1.2
"""ROUGE-L: weight of recall against precision."""
SIGMA = 6.0
"""CIDEr-D: width of the Gaussian, in words."""
SMALL, TINY = 1e-9, 1e-15
"""BLEU: added below and above a fraction, as pycocoevalcap does."""

Captions = Sequence[str]
"""One of each image."""
References = Sequence[Sequence[str]]
"""Of each image."""
Words = Sequence[str]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled pass and where it is from, or None and why there is none."""
    return build("ngrams", SOURCE, FLAGS, [HEADER])


# ------------------------------------------------------------------ BLEU


def bleu_counts(references: References, captions: Captions) -> Counts:
    """[images, 10]: n-grams found in a reference (1 to 4 words), n-grams, words, words of the nearest reference."""
    compiled, _ = library()
    if compiled is None:
        return _bleu_counts_in_python(references, captions)
    counts = np.empty((len(captions), 2 * ORDERS + 2), np.int64)
    compiled.bleu_counts(*_packed(references, captions), _pointer(counts))
    return counts


def bleu_of_each(counts: Counts) -> Floats:
    """BLEU-1 to 4 of each image alone, [4, images]: Papineni et al. 2002, smoothed as pycocoevalcap does."""
    matches, totals, words, nearest = counts[:, :4], counts[:, 4:8], counts[:, 8], counts[:, 9]
    products = np.cumprod((matches + TINY) / (totals + SMALL), axis=1)
    scores = [[value ** (1.0 / n) for value in products[:, n - 1].tolist()] for n in range(1, ORDERS + 1)]
    ratios = (words + TINY) / (nearest + SMALL)
    penalty = [math.exp(1 - 1 / ratio) if ratio < 1 else 1.0 for ratio in ratios.tolist()]  # numpy's exp differs
    return np.array(scores, np.float64).reshape(ORDERS, len(counts)) * np.array(penalty, np.float64)


def bleu(counts: Counts, brevity_penalty: bool = True) -> tuple[float, float, float, float]:
    """BLEU-1 to 4 of all images together."""
    *fractions, words, nearest = counts.sum(axis=0).tolist()
    product, scores = 1.0, []
    for n in range(1, ORDERS + 1):
        product *= (fractions[n - 1] + TINY) / (fractions[ORDERS + n - 1] + SMALL)
        scores.append(product ** (1.0 / n))
    ratio = (words + TINY) / (nearest + SMALL)
    if brevity_penalty and ratio < 1:
        scores = [score * math.exp(1 - 1 / ratio) for score in scores]
    one, two, three, four = scores
    return one, two, three, four


def _bleu_counts_in_python(references: References, captions: Captions) -> Counts:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=ORDERS)
    for texts, caption in zip(references, captions, strict=True):
        scorer += (caption, list(texts))
    rows = []
    for each in scorer.ctest:
        nearest = min((abs(words - each["testlen"]), words) for words in each["reflen"])[1]
        rows.append([*each["correct"], *each["guess"], each["testlen"], nearest])
    return np.array(rows, np.int64).reshape(len(captions), 2 * ORDERS + 2)


# ------------------------------------------------------------------ ROUGE-L


def rouge_l(references: References, captions: Captions) -> Floats:
    """ROUGE-L of each image, [images]: Lin 2004, of the best precision and the best recall, beta 1.2."""
    compiled, _ = library()
    if compiled is None:
        from pycocoevalcap.rouge.rouge import Rouge

        pairs = zip(references, captions, strict=True)
        return np.array([Rouge().calc_score([caption], list(texts)) for texts, caption in pairs], np.float64)
    scores = np.empty(len(captions), np.float64)
    compiled.rouge_l(*_packed(references, captions), ctypes.c_double(BETA**2), _pointer(scores))
    return scores


# ------------------------------------------------------------------ CIDEr-D


class CiderD:
    """CIDEr-D with the document frequencies of given references.

    `documents`: of each image its references, each as words without white space. Raises ValueError where there is none.
    """

    def __init__(self, documents: Sequence[Sequence[Words]]) -> None:
        self._count([[" ".join(words) for words in texts] for texts in documents])

    @classmethod
    def of_captions(cls, documents: References) -> "CiderD":
        """As the constructor, of captions as strings."""
        made = cls.__new__(cls)
        made._count(documents)
        return made

    @classmethod
    def of_references(cls, references: References, captions: Captions) -> Floats:
        """CIDEr-D of captions with the document frequencies of their own references, as pycocoevalcap's CIDEr."""
        made = cls.__new__(cls)
        made._count(references, keep=True)
        if not all(references):
            raise ValueError("a caption has no reference to be scored against; leave it out")
        return made._score(references, captions, (*_counted(references), *_bytes_of(captions)), kept=True)

    def score(self, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> Floats:
        """CIDEr-D of each of n hypotheses against its references, float64 [n], 0 to 10. Raises ValueError without any
        reference."""
        joined = [[" ".join(words) for words in texts] for texts in references]
        return self.score_captions(joined, [" ".join(words) for words in hypotheses])

    def score_captions(self, references: References, captions: Captions) -> Floats:
        """As `score`, of captions as strings."""
        return self._score(references, captions, _packed(references, captions), kept=False)

    def _score(self, references: References, captions: Captions, packed: tuple[Any, ...], kept: bool) -> Floats:
        if self._frequency is not None:
            pairs = zip(references, captions, strict=True)
            return np.array([self._score_in_python(texts, caption) for texts, caption in pairs], np.float64)
        scores = np.empty(len(captions), np.float64)
        logs = (ctypes.c_double(self._log_images), _pointer(self._logs))
        where = (self._handle, ctypes.c_int64(kept))
        self._compiled.cider_d(*where, *logs, ctypes.c_double(SIGMA), *packed, _pointer(scores))
        return scores

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._compiled.documents_free(handle)

    def _count(self, documents: References, keep: bool = False) -> None:
        if not documents:
            raise ValueError("CIDEr-D needs document frequencies; give the references of one image at least")
        self._handle: ctypes.c_void_p | None = None
        self._frequency: Mapping[tuple[str, ...], int] | None = None
        self._log_images = float(np.log(float(len(documents))))
        compiled, _ = library()
        if compiled is None:
            sets = (set().union(*(_ngrams(text) for text in texts)) for texts in documents)
            self._frequency = frequency = Counter(ngram for each in sets for ngram in each)
            most = max(frequency.values(), default=0)
        else:
            self._compiled = compiled
            compiled.documents_new.restype = ctypes.c_void_p
            compiled.documents_most.restype = ctypes.c_int64
            self._handle = ctypes.c_void_p(compiled.documents_new(*_packed_references(documents), ctypes.c_int64(keep)))
            most = compiled.documents_most(self._handle)
        self._logs: Floats = np.log(np.maximum(1.0, np.arange(most + 1, dtype=np.float64)))

    def _score_in_python(self, references: Sequence[str], caption: str) -> float:
        vectors, norms, bigrams = self._weigh(caption)
        scores = [0.0] * ORDERS
        for reference in references:
            theirs, their_norms, their_bigrams = self._weigh(reference)
            penalty = math.e ** (-(float(bigrams - their_bigrams) ** 2) / (2 * SIGMA**2))
            for n in range(ORDERS):
                value = 0.0
                for ngram, weight in vectors[n].items():
                    there = theirs[n].get(ngram, 0.0)
                    value += min(weight, there) * there
                if norms[n] != 0 and their_norms[n] != 0:
                    value /= norms[n] * their_norms[n]
                scores[n] += value * penalty
        return sum(scores) / ORDERS / len(references) * 10.0

    def _weigh(self, caption: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Weights of a caption's n-grams by length, their norms, and its bigrams."""
        assert self._frequency is not None
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        norms, bigrams = [0.0] * ORDERS, 0
        for ngram, times in _ngrams(caption).items():
            n = len(ngram) - 1
            weight = float(times) * (self._log_images - self._logs[self._frequency.get(ngram, 0)])
            vectors[n][ngram] = weight
            norms[n] += pow(weight, 2)
            bigrams += times if n == 1 else 0
        return vectors, [math.sqrt(norm) for norm in norms], bigrams


def _ngrams(caption: str) -> dict[tuple[str, ...], int]:
    """How often each n-gram occurs, in the order of first occurrence, shorter ones first."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


# ------------------------------------------------------------------ to C++


def _packed(references: References, captions: Captions) -> tuple[Any, ...]:
    """Images, references of each, and all captions as bytes with their sizes: each image's caption, then references."""
    lines: list[str] = []
    for texts, caption in zip(references, captions, strict=True):
        if not texts:
            raise ValueError("a caption has no reference to be scored against; leave it out")
        lines.append(caption)
        lines += texts
    return (*_counted(references), *_bytes_of(lines))


def _packed_references(references: References) -> tuple[Any, ...]:
    return (*_counted(references), *_bytes_of([text for texts in references for text in texts]))


def _counted(references: References) -> tuple[ctypes.c_int64, Any]:
    return ctypes.c_int64(len(references)), _pointer(np.fromiter(map(len, references), np.int64, len(references)))


def _bytes_of(lines: Iterable[str]) -> tuple[ctypes.c_char_p, Any]:
    encoded = [line.encode("utf-8", "surrogatepass") for line in lines]
    return ctypes.c_char_p(b"".join(encoded)), _pointer(np.fromiter(map(len, encoded), np.int64, len(encoded)))


def _pointer(array: npt.NDArray[Any]) -> Any:
    """The array's memory as an argument, which keeps the array while it lives."""
    return array.ctypes.data_as(ctypes.c_void_p)
