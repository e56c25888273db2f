"""BLEU, ROUGE-L and CIDEr-D of our own are pycocoevalcap's to the last bit, compiled or not, on odd captions too."""

import math
import random
import shutil
from collections import Counter

import numpy as np
import pytest

from sat.evaluation import ngram_scores
from sat.evaluation.ngram_scores import CiderD, bleu, bleu_counts, bleu_of_each, rouge_l
from sat.model.kernels.build import COMPILERS

WORDS = [
    *[
        "a",
        "the",
        "dog",
        "cat",
        "man",
        "on",
        "in",
        "with",
        "red",
        "ball",
        "grass",
        "riding",
        "near",
        "two",
        "of",
        ".",
        "|",
        "ünder",
        "犬",
        "😀",
    ],
    "22\u00a03/4",
    "x\u2003y",
    "",
]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
ways = pytest.mark.parametrize("way", [pytest.param("compiled", marks=needs_compiler), "python"], indirect=True)


@pytest.fixture
def way(request, monkeypatch):
    """The scores are the same by the compiled pass and, where there is no compiler, without."""
    if request.param == "python":
        monkeypatch.setattr(ngram_scores, "library", lambda: (None, "there is no C++ compiler"))


def corpus(images: int, seed: int) -> tuple[list[list[str]], list[str]]:
    """References and captions: repeated, shuffled, empty, of one word, of up to 150, with odd white space."""
    draw = random.Random(seed)

    def caption(longest: int = 14) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(0, longest)))

    references = [[caption() for _ in range(draw.randint(1, 6))] for _ in range(images)]
    captions = [
        draw.choice([caption(), draw.choice(texts), caption(150), "", "dog", "dog " * 9]) for texts in references
    ]
    return references, captions


def theirs(scorer, references, captions):
    """Score of all and of each by a class of pycocoevalcap."""
    whole, each = scorer.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)})
    return whole, np.array(each)


@ways
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_pycocoevalcap_to_the_last_bit(way, seed, capsys):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, captions = corpus(images=150, seed=seed)
    whole, each = theirs(Bleu(4), references, captions)
    counts = bleu_counts(references, captions)
    assert (bleu_of_each(counts) == each).all() and list(bleu(counts)) == list(whole)
    whole, each = theirs(Rouge(), references, captions)
    found = rouge_l(references, captions)
    assert (found == each).all() and np.mean(found) == whole
    whole, each = theirs(Cider(), references, captions)
    found = CiderD.of_references(references, captions)
    assert (found == each).all() and np.mean(found) == whole
    assert (CiderD.of_captions(references).score_captions(references, captions) == each).all()
    capsys.readouterr()  # Bleu prints


@ways
def test_cider_d_takes_document_frequencies_from_elsewhere(way):
    from pycocoevalcap.cider.cider import Cider

    references, captions = corpus(images=80, seed=5)
    _, each = theirs(Cider(), references, captions)
    scorer = CiderD([[text.split() for text in texts] for texts in references])
    some = [7, 3, 3, 70]  # the documents are those of all 80
    found = scorer.score([captions[i].split() for i in some], [[t.split() for t in references[i]] for i in some])
    assert found.dtype == np.float64 and (found == each[some]).all()


def cider_d(documents, hypothesis, references) -> float:
    """Vedantam et al. 2015, with counts in place of frequencies and lengths in bigrams, as their own program has it."""

    def ngrams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weigh(words, n):
        there = [set().union(*(ngrams(text, n) for text in texts)) for texts in documents]
        return {
            g: count * math.log(len(documents) / max(1, sum(g in each for each in there)))
            for g, count in ngrams(words, n).items()
        }

    total = 0.0
    for n in range(1, 5):
        for reference in references:
            v, w = weigh(hypothesis, n), weigh(reference, n)
            norm = math.hypot(*v.values()) * math.hypot(*w.values())
            apart = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            dot = sum(min(v[g], w[g]) * w[g] for g in v if g in w)
            total += (dot / norm if norm else 0.0) * math.exp(-(apart**2) / 72) / len(references)
    return 10 * total / 4


@ways
def test_cider_d_of_words_that_no_document_has(way):
    split = [[text.split() for text in texts] for texts in corpus(images=30, seed=6)[0]]
    hypotheses = [["a", "zebra", "near", "the", "zebra", "near"], ["zebra"], []]
    references = [[["a", "zebra", "near", "the", "man"], ["the", "dog"]], [["zebra"], ["zebra", "crossing"]], [["a"]]]
    expected = [cider_d(split, *pair) for pair in zip(hypotheses, references)]
    assert CiderD(split).score(hypotheses, references) == pytest.approx(expected, rel=1e-9)
    assert expected[0] > 1 and expected[1] > 1


@ways
def test_without_documents_or_references_the_mistake_is_named(way):
    with pytest.raises(ValueError, match="needs document frequencies; give the references of one image at least"):
        CiderD([])
    with pytest.raises(ValueError, match="a caption has no reference"):
        CiderD([[["a"]]]).score([["a"]], [[]])
    assert bleu_counts([], []).shape == (0, 10) and rouge_l([], []).shape == (0,)


def test_bleu_without_its_brevity_penalty():
    counts = bleu_counts([["a dog runs on the grass"]], ["a dog runs"])
    with_penalty, without = bleu(counts), bleu(counts, brevity_penalty=False)
    assert without[0] == pytest.approx(1) and with_penalty[0] == pytest.approx(math.exp(1 - 6 / 3))
