"""What a model is held against: captions that do not see the picture, and a human's.

The blind baseline (the same model fed shuffled features) needs no second decoding: images are decoded independently of
one another, so the caption of image i under the features of image j is the caption of image j.

The human's caption is one of the image's own references, scored against the others. That is one reference fewer than
the model has, and every metric grows with their number; so the model is scored against those same references too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sat import files
from sat.text import normalise

BLIND, MOST_FREQUENT, REFERENCE, AGAINST_REST = "blind", "most_frequent", "reference", "model_against_rest"
"""The names under which their scores are kept."""


@dataclass(frozen=True)
class LeftOut:
    """One reference of each image that has several, and the others."""

    captions: Mapping[str, str]
    """image_id -> the reference that was left out."""
    rest: Mapping[str, Sequence[str]]
    """image_id -> its other references."""


def baselines(
    captions: Mapping[str, str], training_captions: Iterable[str], words: str = "basic"
) -> dict[str, dict[str, str]]:
    """Captions by baseline and image: `blind` (shuffled features) and `most_frequent` (of the training captions).

    `captions`: the model's, by image_id; `words`: what a word is, see `sat.text`. Raises ValueError where there are
    fewer than two, or no training captions.
    """
    ids = sorted(captions)
    if len(ids) < 2:
        raise ValueError(f"baselines need at least 2 images, the split has {len(ids)}")
    half = len(ids) // 2
    return {
        BLIND: {image_id: captions[ids[(i + half) % len(ids)]] for i, image_id in enumerate(ids)},
        MOST_FREQUENT: dict.fromkeys(ids, most_frequent_caption(training_captions, words)),
    }


def most_frequent_caption(captions: Iterable[str], words: str = "basic") -> str:
    """The normalised caption that occurs most often, the first in the alphabet among equals.

    Raises ValueError where there is no caption.
    """
    counts = Counter(text for text in (normalise(caption, words) for caption in captions) if text)
    if not counts:
        raise ValueError("no captions to choose the most frequent one from")
    return min(counts, key=lambda text: (-counts[text], text))


def leave_one_out(references: Mapping[str, Sequence[str]]) -> LeftOut:
    """Take one reference from each image that has at least two; which one is a hash of its id.

    Not always the first: annotators are often listed in an order, and the one who wrote most would speak for all.
    """
    captions, rest = {}, {}
    for image_id, texts in references.items():
        if len(texts) > 1:
            chosen = int(files.sha256_of(image_id)[:8], 16) % len(texts)
            captions[image_id], rest[image_id] = texts[chosen], [*texts[:chosen], *texts[chosen + 1 :]]
    return LeftOut(captions, rest)
