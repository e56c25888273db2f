"""The reward of self-critical training against CIDEr-D and BLEU-4 written out, and what counts as a word in it."""

import math
from collections import Counter

import pytest

from sat.config import load_config
from sat.data.loader import read_references
from sat.evaluation.ngram_scores import CiderD
from sat.model.objectives.options import SelfCriticalOptions
from sat.reward import CaptionReward, build_reward
from sat.text import END, UNK, CaptionTokenizer, build_tokenizer
from sat.training_data import open_data
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

TEXTS = [
    ["A red ball, near a dog.", "The dog's red ball!", "a ball"],
    ["two dogs run over the grass", "Dogs on grass", "two brown dogs are running over green grass near a fence"],
    ["a man holds a red ball", "the man", "a man with a ball in a park"],
    ["a zyzzyva on a red leaf", "a bug"],
]
DRAWN = [
    ("a red ball near a dog", True, 0),
    ("a red ball near a", False, 0),
    ("a dog", True, 0),
    ("", True, 1),
    ("dogs on grass", True, 1),
    ("two dogs run over the grass near a fence two dogs run over", False, 1),
    ("man man man man", True, 2),
    ("a <unk> on a red leaf", True, 3),
]
"""Words, whether `<end>` follows, and of which image."""


def tokenizer() -> CaptionTokenizer:
    return build_tokenizer([text for texts in TEXTS for text in texts if "zyzzyva" not in text] + ["on a leaf"], 1)


def words_of(text: str) -> list[str]:
    kept = "".join(letter if letter.isalpha() else " " for letter in text.lower())
    return [*kept.split(), "<end>"]


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(words: list[str], references: list[list[str]], documents: list[list[list[str]]]) -> float:
    """Vedantam et al. 2015, section 5, as coco-caption has it."""
    total = 0.0
    for n in (1, 2, 3, 4):
        frequency = Counter(gram for texts in documents for gram in {g for text in texts for g in ngrams(text, n)})

        def weights(text: list[str], n: int = n, frequency: Counter = frequency) -> dict:
            idf = {gram: math.log(len(documents) / max(1, frequency[gram])) for gram in ngrams(text, n)}
            return {gram: count * idf[gram] for gram, count in ngrams(text, n).items()}

        mine = weights(words)
        for text in references:
            theirs = weights(text)
            norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            near = math.exp(-((len(words) - len(text)) ** 2) / 72)
            found = sum(min(value, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, value in mine.items())
            total += 10 / 4 / len(references) * near * (found / norm if norm else 0)
    return total


def bleu_4(words: list[str], references: list[list[str]]) -> float:
    """Of the caption alone, Papineni et al. 2002, no fraction quite 0 or without a value, as coco-caption has it."""
    product = 1.0
    for n in (1, 2, 3, 4):
        most: Counter = Counter()
        for text in references:
            most |= ngrams(text, n)
        product *= (sum((ngrams(words, n) & most).values()) + 1e-15) / (max(len(words) - n + 1, 0) + 1e-9)
    nearest = min((abs(len(text) - len(words)), len(text)) for text in references)[1]
    return product**0.25 * min(1.0, math.exp(1 - nearest / len(words)))


def length(words: list[str], references: list[list[str]]) -> float:
    _, nearest = min((abs(len(text) - len(words)), len(text)) for text in references)
    return min(len(words), nearest) / max(len(words), nearest)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 0.5, 0.25)])
def test_a_reward_is_the_weighted_sum_of_what_is_rewarded(weights):
    documents = [[words_of(text) for text in texts] for texts in TEXTS]
    options, known = SelfCriticalOptions(cider_d=weights[0], bleu_4=weights[1], length=weights[2]), tokenizer()
    reward = CaptionReward(known, options, CiderD(documents))
    said = [[*text.split(), "<end>"] if ended else text.split() for text, ended, _ in DRAWN]
    found = reward([[known.words.index(word) for word in words] for words in said], [TEXTS[i] for _, _, i in DRAWN])
    for (_, _, image), words, ours in zip(DRAWN, said, found, strict=True):
        parts = cider_d(words, documents[image], documents), bleu_4(words, documents[image])
        expected = sum(map(math.prod, zip(weights, (*parts, length(words, documents[image])), strict=True)))
        assert ours == pytest.approx(expected, rel=1e-7, abs=1e-12), words


def test_a_caption_that_ends_is_worth_more_than_one_that_is_cut_and_unknown_words_match_nothing():
    documents, known = [[words_of(text) for text in texts] for texts in TEXTS], tokenizer()
    reward = CaptionReward(known, SelfCriticalOptions(), CiderD(documents))
    ball = known.encode("a red ball near a dog", 20)
    ended, cut, none = reward([[*ball, END], ball, [UNK, UNK, UNK]], [TEXTS[0], TEXTS[0], TEXTS[3]])
    assert ended > cut > 0 and none == 0


def test_document_frequencies_are_those_of_the_training_captions_of_all_data_sets(tmp_path):
    make_feature_dataset(tmp_path / "data", {"train": 9, "val": 4})
    more = make_feature_dataset(
        tmp_path / "more", {"train": 5}, captions=lambda _, i: [f"more of {i}", ""], name="more"
    )
    given = [*SMALL, *with_tokenizer(tmp_path), f"data.extra=[{{features: {tmp_path}/more, weight: 1}}]"]
    config = load_config(None, [*given, "train.objective=self_critical", "train.start_from=any"])
    data = open_data(config)
    reward = build_reward(data, config.data.train_splits, config.self_critical)
    texts = [*read_references(data.main, "train").values(), *read_references(more, "train").values()]
    documents = [[words_of(text) for text in each if text] for each in texts]
    words = data.tokenizer.words
    drawn = [words.index(word) for word in documents[2][3]]
    assert reward([drawn], [texts[2]]) == pytest.approx([cider_d(documents[2][3], documents[2], documents)])
