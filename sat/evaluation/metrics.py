"""Score captions as pycocoevalcap does, image by image and together: BLEU, METEOR, ROUGE-L, CIDEr, CIDEr-D, SPICE.

Call it on one rank only. The package itself is not run: it writes into its own folder, hangs or shifts captions on odd
characters and hides a missing Java. Its Java programs are asked as it asks them, the rest is computed in this process,
with the same bits; whatever fails or runs out of time is None with its reason beside the others.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sat.evaluation import ngram_scores, tokenizer
from sat.evaluation.meteor import Meteor
from sat.evaluation.ngram_scores import CiderD
from sat.evaluation.options import METRICS
from sat.evaluation.signature import digest_of, sign
from sat.evaluation.spice import spice

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NAMES = {
    "CIDEr": ("CIDEr",),
    "CIDEr-D": ("CIDEr-D",),
    "BLEU": BLEU,
    "BLEU without brevity penalty": tuple(f"{name}-no-BP" for name in BLEU),
    "METEOR": ("METEOR",),
    "ROUGE-L": ("ROUGE-L",),
    "SPICE": ("SPICE",),
}
"""Metric -> names of its values in `Scores.values`."""

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
References = Mapping[str, Sequence[str]]


def _no_counts() -> Counts:
    return np.zeros((0, 10), np.int64)


@dataclass(frozen=True)
class Scores:
    """What a set of captions is worth."""

    values: dict[str, float | None]
    """CIDEr, CIDEr-D, BLEU-1..4, METEOR, ROUGE-L in their usual unit (CIDEr 0-10, the others 0-1), those asked for;
    None: see `reasons`."""
    reasons: dict[str, str]
    """Why a value is missing; under `tokenizer`, `captions`, `references` and `images` what was not as usual."""
    images: int
    """Images scored."""
    image_ids: tuple[str, ...] = ()
    """The images scored, sorted."""
    per_image: Mapping[str, Floats] = field(default_factory=dict, compare=False, repr=False)
    """Name of a value -> [images], the score of each of `image_ids` alone."""
    bleu_counts: Counts = field(default_factory=_no_counts, compare=False, repr=False)
    """[images, 10]: of n-grams of 1 to 4 words those found in a reference, those there are; the words of the caption
    and of the reference nearest in length. BLEU of any set of images follows from their sum. Zeros without BLEU."""
    signature: Mapping[str, str] = field(default_factory=dict)
    """Metric -> how it was computed, see `sat.evaluation.signature`."""
    references_digest: str = ""
    """SHA-256 of the images' ids and references: scores of different references cannot be compared."""


@dataclass
class _Work:
    """The images that can be scored, as words, in the order of the references; and what has been found."""

    ids: list[str]
    references: list[list[str]]
    captions: list[str]
    documents: list[list[str]]
    """Tokenised, whose document frequencies CIDEr-D takes; empty: the references'."""
    tokenizer: str
    left_out: int
    reasons: dict[str, str]
    found: dict[str, tuple[float, Floats | None]] = field(default_factory=dict)
    """Name of a value -> of all images, and of each."""
    counts: Counts = field(default_factory=_no_counts)

    def count_ngrams(self, metrics: Sequence[str]) -> None:
        """All that needs no Java."""
        if {"BLEU", "BLEU without brevity penalty"} & set(metrics):
            self.counts = ngram_scores.bleu_counts(self.references, self.captions)
            each = ngram_scores.bleu_of_each(self.counts)
            unpenalised = ngram_scores.bleu(self.counts, brevity_penalty=False)
            self.found |= dict(zip(BLEU, zip(ngram_scores.bleu(self.counts), each, strict=True), strict=True))
            self.found |= {f"{name}-no-BP": (value, None) for name, value in zip(BLEU, unpenalised, strict=True)}
        if "ROUGE-L" in metrics:
            self._keep("ROUGE-L", ngram_scores.rouge_l(self.references, self.captions))
        if {"CIDEr", "CIDEr-D"} & set(metrics):
            self._keep("CIDEr", CiderD.of_references(self.references, self.captions))
            self.found["CIDEr-D"] = self.found["CIDEr"]
        if "CIDEr-D" in metrics and self.documents:
            scorer = CiderD.of_captions(self.documents)
            self._keep("CIDEr-D", scorer.score_captions(self.references, self.captions))

    def ask_java(self, metrics: Sequence[str], meteor: Meteor, deadline: float) -> None:
        """METEOR and SPICE; one that fails leaves its reason."""
        for metric, ask in (("METEOR", meteor.score), ("SPICE", spice)):
            if metric not in metrics:
                continue
            try:
                if self.tokenizer == tokenizer.RULES:
                    raise RuntimeError(f"needs Java: {self.reasons['tokenizer']}")
                value, each = ask(self.references, self.captions, deadline)
                if not np.isfinite(value):
                    raise ValueError(f"it is not finite: {value}")
                self.found[metric] = value, np.array(each, np.float64)
            except (OSError, RuntimeError, ValueError) as error:
                self.reasons[metric] = str(error) or type(error).__name__

    def scores(self, metrics: Sequence[str], references: References) -> Scores:
        """What was found of these metrics, the images sorted by id."""
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        names = [name for metric in NAMES if metric in metrics for name in NAMES[metric]]
        each = {name: self.found[name][1] for name in names if name in self.found}
        counts = self.counts if len(self.counts) else np.zeros((len(self.ids), 10), np.int64)
        sizes = (self.tokenizer, self.left_out, len(self.documents))
        return Scores(
            values={name: self.found[name][0] if name in self.found else None for name in names},
            reasons=self.reasons,
            images=len(self.ids),
            image_ids=tuple(self.ids[i] for i in order),
            per_image={name: scores[order] for name, scores in each.items() if scores is not None},
            bleu_counts=counts[order],
            signature={metric: sign(metric, self.references, *sizes) for metric in NAMES if metric in metrics},
            references_digest=digest_of({i: references[i] for i in self.ids}),
        )

    def _keep(self, name: str, each: Floats) -> None:
        self.found[name] = float(np.mean(each)), each


class Scorer:
    """Scores captions, and keeps between calls what is dear: METEOR's Java, and the last references as words.

    Belongs to whoever scores again and again, in a `with closing(Scorer())`; every call returns in its time.
    """

    def __init__(self) -> None:
        self._meteor = Meteor()
        self._known: dict[str, tokenizer.Tokens] = {}

    def close(self) -> None:
        """End METEOR's Java, also in the middle of a score."""
        self._meteor.close()

    def get_ready(self, metrics: Sequence[str]) -> None:
        """Let METEOR's Java start, without waiting for it; what fails here is told by `score`."""
        if "METEOR" in metrics:
            with suppress(OSError, RuntimeError, ImportError):
                self._meteor.start()

    def score(
        self,
        references: References,
        hypotheses: Mapping[str, str],
        metrics: Sequence[str] = METRICS,
        timeout_s: float = 600.0,
        documents: Sequence[Sequence[str]] = (),
    ) -> Scores:
        """As the function `score`."""
        _check(references, hypotheses, metrics)
        deadline = time.monotonic() + timeout_s
        self.get_ready(metrics)  # its start-up goes on beside the tokenizer
        work = self._tokenize(references, hypotheses, documents, deadline)
        beside = threading.Thread(target=work.ask_java, args=(metrics, self._meteor, deadline), daemon=True)
        beside.start()
        work.count_ngrams(metrics)
        beside.join()
        return work.scores(metrics, references)

    def _tokenize(
        self,
        references: References,
        hypotheses: Mapping[str, str],
        documents: Sequence[Sequence[str]],
        deadline: float,
    ) -> _Work:
        """References and hypotheses as words, each side in its own order; without images that have no references."""
        scored = {image: texts for image, texts in references.items() if texts}
        asked = {image: text for image, text in hypotheses.items() if image in scored}
        groups = {
            "hypotheses": list(asked.values()),
            "references": [text for texts in scored.values() for text in texts],
            "documents": [text for texts in documents for text in texts],
        }
        by_group, reasons = self._words(groups, deadline)
        captions = dict(zip(asked, by_group["hypotheses"], strict=True))
        words = iter(by_group["references"])
        split = [[next(words) for _ in texts] for texts in scored.values()]
        words = iter(by_group["documents"])
        others = [[next(words) for _ in texts] for texts in documents]
        left_out = [image for image in references if image not in scored]
        reasons |= _remarks(split, left_out)
        name = tokenizer.RULES if "tokenizer" in reasons else tokenizer.NAME
        return _Work(list(scored), split, [captions[i] for i in scored], others, name, len(left_out), reasons)

    def _words(
        self, groups: Mapping[str, Sequence[str]], deadline: float
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Every group as words, and what was not as usual. Groups that are known are not split again."""
        keys = {name: digest_of({name: texts}) for name, texts in groups.items()}
        new = [name for name in groups if keys[name] not in self._known and groups[name]]
        found = dict.fromkeys(groups, tokenizer.Tokens((), 0)) | {
            name: self._known[keys[name]] for name in groups if keys[name] in self._known
        }
        split = tokenizer.tokenize(*(groups[name] for name in new), deadline=tokenizer.half_way(deadline))
        found |= dict(zip(new, split, strict=True))
        reasons: dict[str, str] = {}
        if why := next((each.without_java for each in split if each.without_java), ""):
            found = {name: tokenizer.by_rules(texts, why) for name, texts in groups.items()}
            reasons["tokenizer"] = f"{why}; captions were split by rules that agree with the PTB tokenizer on 99.8 %"
        else:
            self._known = {keys[name]: found[name] for name in groups if name != "hypotheses"}
        if changed := sum(each.changed for each in found.values()):
            reasons["captions"] = f"{changed} had line breaks or half characters, which became spaces"
        return {name: each.lines for name, each in found.items()}, reasons


_kept: list[Scorer] = []


@contextmanager
def scorer_kept() -> Iterator[Scorer]:
    """Inside, all calls of `score` in this process use one Scorer, whose Java ends with the block."""
    with closing(Scorer()) as scorer:
        _kept.append(scorer)
        try:
            yield scorer
        finally:
            _kept.remove(scorer)


def get_ready(metrics: Sequence[str]) -> None:
    """Inside `scorer_kept`: let Java start while the captions are still being searched for."""
    for scorer in _kept[-1:]:
        scorer.get_ready(metrics)


def score(
    references: References,
    hypotheses: Mapping[str, str],
    metrics: Sequence[str] = METRICS,
    timeout_s: float = 600.0,
    documents: Sequence[Sequence[str]] = (),
) -> Scores:
    """Score one caption per image against the human ones, as pycocoevalcap does, to the last bit.

    Ids match; both sides are tokenised in the order in which they are given. `documents`: of each of other images its
    references, whose document frequencies CIDEr-D takes in place of those of `references`. An image without references
    is left out and named in `reasons["images"]`. Takes at most `timeout_s` seconds, whatever hangs. Raises ValueError
    for unknown metrics, for ids that only one side has, and where no image can be scored.
    """
    if _kept:
        return _kept[-1].score(references, hypotheses, metrics, timeout_s, documents)
    with closing(Scorer()) as scorer:
        return scorer.score(references, hypotheses, metrics, timeout_s, documents)


def _remarks(references: Sequence[Sequence[str]], left_out: Sequence[str]) -> dict[str, str]:
    """What is to be known of the images. Raises ValueError where none can be scored."""
    found = {}
    bare = sum(not text for texts in references for text in texts)
    if left_out:
        found["images"] = f"{len(left_out)} left out, they have no references: {_some(left_out)}"
    if bare == sum(map(len, references)):
        raise ValueError(f"no image can be scored: {found.get('images', 'no reference has a word')}")
    if len(references) == 1:
        alone = "1 alone has CIDEr 0: every word of its references is in all documents"
        found["images"] = "; ".join(filter(None, [found.get("images"), alone]))
    if bare:
        found["references"] = f"{bare} have no word; they are scored as they are"
    return found


def _check(references: References, hypotheses: Mapping[str, str], metrics: Sequence[str]) -> None:
    unknown = sorted(set(metrics) - set(NAMES))
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(NAMES)}")
    without = [i for i in references if i not in hypotheses]
    foreign = [i for i in hypotheses if i not in references]
    if without or foreign:
        raise ValueError(
            "references and hypotheses must cover the same images: "
            f"{len(without)} have no hypothesis ({_some(without)}), "
            f"{len(foreign)} have no references ({_some(foreign)})"
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "") if ids else "none"
