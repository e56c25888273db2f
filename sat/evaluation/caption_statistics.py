"""What captions are like, whatever they are worth: how long, of how many words, how varied, how new."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sat.text import normalise


@dataclass(frozen=True)
class CaptionStatistics:
    """Of captions split into lower-case words without punctuation."""

    captions: int
    mean_words: float
    shortest: int
    longest: int
    vocabulary: int
    """Different words."""
    distinct: float
    """Different captions / captions."""
    commonest: float
    """Share of the captions that are the commonest one."""
    novel: float | None
    """Share of the captions that no training caption equals; None without training captions."""
    new_words: int | None
    """Different words that no training caption has; None without."""


def statistics_of(
    captions: Sequence[str], training: Iterable[str] | None = None, words: str = "basic"
) -> CaptionStatistics:
    """Statistics of `captions`; `words` is what a word is, see `sat.text`. Raises ValueError where there are none."""
    if not captions:
        raise ValueError("there are no captions to describe")
    texts = [normalise(caption, words) for caption in captions]
    lengths = [len(text.split()) for text in texts]
    vocabulary = {word for text in texts for word in text.split()}
    counts = Counter(texts)
    known = None if training is None else {normalise(caption, words) for caption in training}
    return CaptionStatistics(
        captions=len(texts),
        mean_words=sum(lengths) / len(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        vocabulary=len(vocabulary),
        distinct=len(counts) / len(texts),
        commonest=max(counts.values()) / len(texts),
        novel=None if known is None else sum(text not in known for text in texts) / len(texts),
        new_words=None if known is None else len(vocabulary - {word for text in known for word in text.split()}),
    )
