"""What captions and the vocabulary tell of a leak between splits, in one pass over the captions of each."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from sat.shards.manifest import Manifest
from sat.shards.store import make_store
from sat.text import SPECIALS, CaptionTokenizer, normalise


@dataclass(frozen=True)
class Repeated:
    """The captions to be scored that stand word by word in the training captions."""

    captions: int
    """Of the held-out splits."""
    repeated: int
    wholly: tuple[tuple[str, str], ...]
    """(held-out image, training image): every caption of the one, two at least, is one of the other's."""


@dataclass(frozen=True)
class Words:
    """A vocabulary beside the captions."""

    words: int
    only_held_out: tuple[str, ...]
    """Words that held-out captions have and no training caption."""
    nowhere: int
    """Words of no caption at all."""
    least: int
    """Occurrences in the training captions of the rarest word that has any."""
    missing: tuple[str, ...]
    """Words that occur at least so often in the training captions and are not in the vocabulary."""


def captions_in(manifests: Iterable[Manifest], splits: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(image id, captions) of all images of these splits."""
    for manifest in manifests:
        store = make_store(manifest.root)
        for split in splits:
            for index in manifest.shards.of_split(split):
                rows = store.rows(manifest, index)
                yield from zip(rows["image_id"].to_pylist(), rows["captions"].to_pylist(), strict=True)


def repeated_captions(
    manifests: Sequence[Manifest], train: Sequence[str], held_out: Sequence[str], words: str = "basic"
) -> Repeated:
    """Which held-out captions are training captions too, punctuation and case aside."""
    scored = {
        image_id: [text for text in (normalise(each, words) for each in texts) if text]
        for image_id, texts in captions_in(manifests, held_out)
    }
    wanted = {text for texts in scored.values() for text in texts}
    owners: dict[str, set[str]] = defaultdict(set)
    for image_id, texts in captions_in(manifests, train):
        for text in {normalise(each, words) for each in texts} & wanted:
            owners[text].add(image_id)
    wholly = []
    for image_id, texts in scored.items():
        if len(set(texts)) > 1 and all(text in owners for text in texts):
            shared = reduce(set.intersection, (owners[text] for text in set(texts)))
            wholly += [(image_id, min(shared))] if shared else []
    count = sum(map(len, scored.values()))
    return Repeated(count, sum(text in owners for texts in scored.values() for text in texts), tuple(wholly))


def words_beside(
    tokenizer: CaptionTokenizer, manifests: Sequence[Manifest], train: Sequence[str], held_out: Sequence[str]
) -> Words:
    """The vocabulary beside the words of the training and of the held-out captions."""
    rule = tokenizer.word_rule
    in_train, in_held_out = (_counts(manifests, splits, rule) for splits in (train, held_out))
    known = tokenizer.words[len(SPECIALS) :]
    foreign = [word for word in known if word not in in_train]
    least = min((in_train[word] for word in known if word in in_train), default=0)
    missing = sorted(in_train.keys() - set(known), key=lambda word: (-in_train[word], word))
    return Words(
        words=len(known),
        only_held_out=tuple(word for word in foreign if word in in_held_out),
        nowhere=sum(word not in in_held_out for word in foreign),
        least=least,
        missing=tuple(word for word in missing if in_train[word] >= least),
    )


def _counts(manifests: Sequence[Manifest], splits: Sequence[str], rule: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _, texts in captions_in(manifests, splits):
        for text in texts:
            counts.update(normalise(text, rule).split())
    return counts
