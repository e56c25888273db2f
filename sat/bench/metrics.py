"""The metrics in this process against pycocoevalcap's own, and whether they agree to the last bit.

By default on captions made up here; `--references` takes any COCO captions file. The first caption of each image is
scored against the others, after pycocoevalcap's tokenizer where Java is there. METEOR is asked with its Java already
running, as in a training, against one that starts.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

WORDS = 4000
IMAGES, CAPTIONS = 5000, 5
ROUNDS = 3
Scored = tuple[Any, Any]
"""Of all images, and of each."""


def run(
    references: Annotated[Path | None, typer.Option(help="COCO captions file; default: made-up captions")] = None,
    images: Annotated[int, typer.Option(help="images at most")] = IMAGES,
    meteor: Annotated[bool, typer.Option(help="METEOR too, which needs Java")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict[str, object]]:
    """Seconds of each metric, of pycocoevalcap's, and whether both give the same bits for every image."""
    from sat.bench.harness import report
    from sat.evaluation import tokenizer

    captions = read_captions(references, images) if references else made_up_captions(images)
    flat = [text for texts in captions for text in texts]
    (tokens,) = tokenizer.tokenize(flat, deadline=time.monotonic() + 600)
    lines = iter(tokens.lines)
    split = [[next(lines) for _ in texts] for texts in captions]
    rest, first = [texts[1:] for texts in split], [texts[0] for texts in split]
    rows = [row(name, *pair) for name, pair in contenders(rest, first).items()]
    names = ("seconds", "pycocoevalcap_seconds")
    sums = {name: sum(float(str(each[name])) for each in rows) for name in names}
    equal = all(each["equal"] for each in rows)
    rows.append({"metric": "the four", **sums, "ratio": sums[names[1]] / sums[names[0]], "equal": equal})
    if meteor:
        rows.append(meteor_row(rest, first))
    report(rows, json_file)
    return rows


def row(metric: str, ours: Callable[[], Scored], theirs: Callable[[], Scored]) -> dict[str, object]:
    """A row of the table. CPU seconds would hide nothing here: both are measured in turn, ours the median of a few."""
    ours()  # builds what is compiled
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        found = ours()
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    expected = theirs()
    their_seconds, seconds = time.perf_counter() - began, sorted(times)[ROUNDS // 2]
    numbers = {"seconds": seconds, "pycocoevalcap_seconds": their_seconds, "ratio": their_seconds / seconds}
    equal = all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(found, expected, strict=True))
    return {"metric": metric, **numbers, "equal": equal}


def contenders(
    references: Sequence[Sequence[str]], captions: Sequence[str]
) -> dict[str, tuple[Callable[[], Scored], Callable[[], Scored]]]:
    """Metric -> ours and theirs; what pycocoevalcap calls CIDEr is CIDEr-D."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from sat.evaluation.ngram_scores import CiderD, bleu, bleu_counts, bleu_of_each, rouge_l

    given = dict(enumerate(map(list, references))), {i: [text] for i, text in enumerate(captions)}

    def our_bleu() -> Scored:
        counts = bleu_counts(references, captions)
        return bleu(counts), bleu_of_each(counts)

    def of_mean(each: Any) -> Scored:
        return np.mean(each), each

    def our_cider() -> Scored:
        return of_mean(CiderD.of_references(references, captions))

    return {
        "BLEU": (our_bleu, lambda: Bleu(4).compute_score(*given, verbose=0)),
        "ROUGE-L": (lambda: of_mean(rouge_l(references, captions)), lambda: Rouge().compute_score(*given)),
        "CIDEr": (our_cider, lambda: Cider().compute_score(*given)),
        "CIDEr-D": (our_cider, lambda: Cider().compute_score(*given)),
    }


def meteor_row(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, object]:
    """A METEOR that runs already, against one that starts and waits for the answer to each image, as theirs does."""
    from pycocoevalcap.meteor import meteor

    from sat.evaluation.java import java_folder
    from sat.evaluation.meteor import Meteor

    given = dict(enumerate(map(list, references))), {i: [text] for i, text in enumerate(captions)}
    os.environ["PATH"] = os.pathsep.join(filter(None, [java_folder(), os.environ.get("PATH")]))
    with closing(Meteor()) as kept:
        return row(
            "METEOR",
            lambda: kept.score(references, captions, time.monotonic() + 3600),
            lambda: meteor.Meteor().compute_score(*given),
        )


def read_captions(path: Path, images: int) -> list[list[str]]:
    """The captions of up to so many images of a COCO file, those with two or more."""
    found: dict[object, list[str]] = {}
    try:
        for each in json.loads(path.read_text())["annotations"]:
            found.setdefault(each["image_id"], []).append(each["caption"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not in COCO's captions format ({type(error).__name__}: {error})") from error
    return [texts for texts in found.values() if len(texts) > 1][:images]


def made_up_captions(images: int, seed: int = 1) -> list[list[str]]:
    """Captions with words as frequent as in a language, those of an image alike."""
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(WORDS)]
    weights = [1 / (n + 1) for n in range(WORDS)]
    topics = [draw.choices(words, weights, k=12) for _ in range(images)]
    return [[" ".join(draw.choices(topic, k=draw.randint(7, 14))) for _ in range(CAPTIONS)] for topic in topics]
