"""Captions to measure with: batches that are all different, as those of training are."""

import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY, CAPTIONS = 10_000, 5
COCO_WORDS = {
    7: 0.82,
    8: 16.0,
    9: 22.2,
    10: 21.4,
    11: 15.2,
    12: 10.0,
    13: 5.81,
    14: 3.4,
    15: 1.87,
    16: 1.1,
    17: 0.7,
    18: 0.44,
    19: 0.28,
    20: 0.18,
    21: 0.12,
    22: 0.1,
    23: 0.09,
    24: 0.06,
    25: 0.05,
    26: 0.03,
    28: 0.02,
    30: 0.02,
    36: 0.02,
    44: 0.01,
}
"""Words per caption of COCO val2017, in per cent: stands in where the captions themselves are not at hand."""


def caption_batches(count: int, images: int) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """`count` batches of captions int64 [B, K, T + 1] of B `images` with lengths int64 [B, K], and where they are from.

    COCO's own captions where they are at hand and enough, else words by Zipf's law in captions as long as COCO's.
    """
    rng = random.Random(0)
    root = Path(os.environ.get("SAT_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    file = root / "coco_val2017" / "captions_val2017.json"
    found = _real_captions(file) if file.exists() else []
    source = "captions of COCO val2017"
    if len(found) < count * images:
        ranks = range(4, VOCABULARY)
        zipf = list(itertools.accumulate(1 / rank for rank in ranks))
        sizes = rng.choices(list(COCO_WORDS), list(COCO_WORDS.values()), k=count * images * CAPTIONS)
        sentences = [rng.choices(ranks, cum_weights=zipf, k=size) for size in sizes]
        found = [sentences[i : i + CAPTIONS] for i in range(0, len(sentences), CAPTIONS)]
        source = "lengths as in COCO, words by Zipf's law"
    chosen = rng.sample(found, count * images)
    return [_padded(chosen[i : i + images]) for i in range(0, len(chosen), images)], source


def _padded(images: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([[len(caption) + 1 for caption in captions] for captions in images])
    captions = torch.zeros(*lengths.shape, int(lengths.max()) + 1, dtype=torch.int64)
    for b, image in enumerate(images):
        for k, caption in enumerate(image):
            captions[b, k, : len(caption) + 2] = torch.tensor([1, *caption, 2])
    return captions, lengths


def _real_captions(file: Path) -> list[list[list[int]]]:
    """Word ids, by frequency, of five captions of every image."""
    by_image: dict[int, list[list[str]]] = {}
    for annotation in json.loads(file.read_text())["annotations"]:
        words = re.findall(r"[a-z0-9']+", annotation["caption"].lower())[:50]
        by_image.setdefault(annotation["image_id"], []).append(words)
    frequency = Counter(word for captions in by_image.values() for caption in captions for word in caption)
    ids = {word: 4 + rank for rank, (word, _) in enumerate(frequency.most_common(VOCABULARY - 4))}
    return [[[ids.get(w, 3) for w in words] for words in by_image[image][:CAPTIONS]] for image in sorted(by_image)]
