"""Captions that do not see the picture, to hold a model against.

The blind baseline (the same model fed shuffled features) needs no second decoding: images are decoded independently of
one another, so the caption of image i under the features of image j is the caption of image j.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from sat.text import normalise


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
        "blind": {image_id: captions[ids[(i + half) % len(ids)]] for i, image_id in enumerate(ids)},
        "most_frequent": dict.fromkeys(ids, most_frequent_caption(training_captions, words)),
    }


def most_frequent_caption(captions: Iterable[str], words: str = "basic") -> str:
    """The normalised caption that occurs most often, the first in the alphabet among equals.

    Raises ValueError where there is no caption.
    """
    counts = Counter(text for text in (normalise(caption, words) for caption in captions) if text)
    if not counts:
        raise ValueError("no captions to choose the most frequent one from")
    return min(counts, key=lambda text: (-counts[text], text))
