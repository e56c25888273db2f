"""What self-critical training rewards a caption by: CIDEr-D, and by setting BLEU-4 and the length, in this process.

Words are those of the vocabulary's rule on both sides, but a reference keeps its rare ones, so `<unk>` matches nothing.
Surprising: `<end>` is a word here, of references and of captions that have one. Without it the best rewarded captions
end in the middle ("a man in a"): one more frequent word costs less than it may bring (as in the code of Luo 2020,
https://github.com/ruotianluo/self-critical.pytorch).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sat.data.loader import read_references
from sat.evaluation.ngram_scores import CiderD, bleu_counts, bleu_of_each
from sat.model.objectives.options import SelfCriticalOptions
from sat.text import END, SPECIALS, CaptionTokenizer, normalise
from sat.training_data import TrainingData

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CaptionReward:
    """A `Reward` (`sat.model.objectives.self_critical`)."""

    tokenizer: CaptionTokenizer
    options: SelfCriticalOptions
    cider_d: CiderD
    """With the document frequencies of the training captions."""

    def __call__(self, samples: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> list[float]:
        """The reward of each of the samples, ids of words, by the captions of its image; see `Reward`."""
        words, options = self.tokenizer.words, self.options
        said = [" ".join(words[index] for index in sample) for sample in samples]
        known = {id(texts): with_ends(texts, self.tokenizer.word_rule) for texts in references}  # samples share them
        human = [known[id(texts)] for texts in references]
        total = np.zeros(len(said))
        if options.cider_d:
            total += options.cider_d * self.cider_d.score_captions(human, said)
        if options.bleu_4:
            total += options.bleu_4 * bleu_of_each(bleu_counts(human, said))[3]
        if options.length:
            total += options.length * nearness(human, said)
        found: list[float] = total.tolist()
        return found


def with_ends(texts: Sequence[str], word_rule: str) -> list[str]:
    """The words of each caption that has one, and `<end>`."""
    return [f"{words} {SPECIALS[END]}" for text in texts if (words := normalise(text, word_rule))]


def nearness(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Floats:
    """[n]: of each caption's number of words and that of the reference nearest to it, the smaller over the greater."""
    pairs = zip(references, captions, strict=True)
    return np.array([_near(len(caption.split()), [len(text.split()) for text in texts]) for texts, caption in pairs])


def _near(length: int, others: Sequence[int]) -> float:
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return min(length, nearest) / max(length, nearest)


def build_reward(data: TrainingData, splits: Sequence[str], options: SelfCriticalOptions) -> CaptionReward:
    """With the document frequencies of the captions of the training `splits`, in each data set that has them."""
    documents: list[list[str]] = []
    for manifest, _ in data.sources:
        for split in (each for each in splits if manifest.splits.get(each)):
            found = read_references(manifest, split, data.reading.options).values()
            documents += [texts for each in found if (texts := with_ends(each, data.tokenizer.word_rule))]
    return CaptionReward(data.tokenizer, options, CiderD.of_captions(documents))
