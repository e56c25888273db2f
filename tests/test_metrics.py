"""Scores are those of the published metrics, to the last bit, and captions never change places."""

import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sat.evaluation import java, tokenizer
from sat.evaluation.metrics import score
from sat.evaluation.options import METRICS

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("SAT_REAL_DATA", ROOT.parent / "shared/data")) / "coco_val2017/captions_val2017.json"
NO_JAVA = ("BLEU", "ROUGE-L", "CIDEr")
NO_BLEU = ("ROUGE-L", "CIDEr")
WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "man",
    "on",
    "in",
    "with",
    "red",
    "blue",
    "ball",
    "grass",
    "street",
    "riding",
    "sitting",
    "bench",
    "near",
    "two",
]


def real_captions() -> dict[str, list[str]]:
    if not REAL.is_file():
        pytest.skip(f"no COCO captions at {REAL}; set SAT_REAL_DATA")
    captions = defaultdict(list)
    for entry in json.loads(REAL.read_text())["annotations"]:
        captions[str(entry["image_id"])].append(entry["caption"])
    return dict(sorted(captions.items()))


def made_up_captions(images: int, references: int, seed: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    draw = random.Random(seed)
    texts = [[draw.choices(WORDS, k=draw.randint(6, 12)) for _ in range(references)] for _ in range(images)]
    hypotheses = [[*draw.choice(group)[:-2], draw.choice(WORDS)] for group in texts]

    def join(caption):
        return " ".join(caption)

    return (
        {f"image{i}": [join(caption) for caption in group] for i, group in enumerate(texts)},
        {f"image{i}": join(caption) for i, caption in enumerate(hypotheses)},
    )


def ngrams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(references: dict[str, list[str]], hypotheses: dict[str, str], order: int) -> float:
    """Papineni et al. 2002, over the corpus, closest reference length."""
    log_precision = 0.0
    for n in range(1, order + 1):
        matched = total = 0
        for i, hypothesis in hypotheses.items():
            most = Counter()
            for reference in references[i]:
                most |= ngrams(reference, n)
            matched += (ngrams(hypothesis, n) & most).total()
            total += ngrams(hypothesis, n).total()
        log_precision += math.log(matched / total) / order
    length = sum(len(text.split()) for text in hypotheses.values())
    closest = sum(
        min((abs(len(r.split()) - len(h.split())), len(r.split())) for r in references[i])[1]
        for i, h in hypotheses.items()
    )
    return math.exp(log_precision + min(0.0, 1 - closest / length))


def cider(references: dict[str, list[str]], hypotheses: dict[str, str]) -> float:
    """CIDEr-D of Vedantam et al. 2015 as coco-caption has it: clipped, Gaussian on the number of bigrams, sigma 6."""
    images, total = len(references), 0.0

    def weigh(text: str, n: int) -> dict[tuple, float]:
        return {g: count * math.log(images / max(1, documents[g])) for g, count in ngrams(text, n).items()}

    for n in range(1, 5):
        documents = Counter(g for texts in references.values() for g in set().union(*(ngrams(t, n) for t in texts)))
        for i, hypothesis in hypotheses.items():
            v = weigh(hypothesis, n)
            for reference in references[i]:
                w = weigh(reference, n)
                dot = sum(min(v[g], w[g]) * w[g] for g in v if g in w)
                norm = math.hypot(*v.values()) * math.hypot(*w.values())
                apart = ngrams(hypothesis, 2).total() - ngrams(reference, 2).total()
                total += (dot / norm if norm else 0.0) * math.exp(-(apart**2) / 72) / len(references[i])
    return 10 * total / 4 / images


def test_bleu_and_cider_equal_independent_implementations():
    references, hypotheses = made_up_captions(images=30, references=3, seed=1)
    result = score(references, hypotheses, ("BLEU", "CIDEr"))
    assert result.reasons == {} and result.images == 30
    assert list(result.values) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]
    for order in range(1, 5):
        assert result.values[f"BLEU-{order}"] == pytest.approx(bleu(references, hypotheses, order), rel=1e-6)
    assert result.values["CIDEr"] == pytest.approx(cider(references, hypotheses), rel=1e-6)


def test_order_of_ids_does_not_change_the_scores():
    references, hypotheses = made_up_captions(images=20, references=2, seed=2)
    turned = score(dict(reversed(references.items())), hypotheses, NO_JAVA)
    expected = score(references, dict(sorted(hypotheses.items())), NO_JAVA)
    assert turned.values == pytest.approx(expected.values)


BREAKS = [*"\n\r\v\f\u2028\u2029\ud800"]


@pytest.mark.faults
def test_line_breaks_and_half_characters_are_spaces_and_never_move_a_caption_to_another_image():
    references, hypotheses = made_up_captions(images=len(BREAKS), references=2, seed=3)
    clean = score(references, hypotheses, NO_JAVA)
    for odd, image in zip(BREAKS, references):
        references[image] = [f"{odd}{text}".replace(" ", odd, 2) for text in references[image]]
        hypotheses[image] = hypotheses[image].replace(" ", odd, 1) + odd
    found = score(references, hypotheses, NO_JAVA)
    assert found.values == clean.values and all((found.per_image[n] == clean.per_image[n]).all() for n in NO_BLEU)
    changed = 3 * (len(BREAKS) - 1)  # of a newline pycocoevalcap makes a space itself
    assert found.reasons == {"captions": f"{changed} had line breaks or half characters, which became spaces"}


@pytest.mark.faults
def test_no_caption_is_too_long_and_empty_emoji_and_hebrew_ones_are_scored():
    hebrew = "שלום עולם"
    references = {"long": ["word " * 10_000], "empty": ["a dog"], "emoji": ["a 😀 dog"], "hebrew": [hebrew]}
    hypotheses = {"long": "a word", "empty": "", "emoji": "a dog", "hebrew": hebrew}
    result = score(references, hypotheses, ("ROUGE-L",))
    precision, recall = 1 / 2, 1 / 10_000
    long = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert result.values["ROUGE-L"] == pytest.approx((long + 0 + 1 + 1) / 4)
    assert result.image_ids == ("emoji", "empty", "hebrew", "long") and result.reasons == {}
    assert result.per_image["ROUGE-L"] == pytest.approx([1, 0, 1, long])


def test_references_without_a_word_count_and_an_image_without_references_is_left_out_and_named():
    references, hypotheses = made_up_captions(images=3, references=2, seed=4)
    expected = score(references | {"bare": ["", ""]}, hypotheses | {"bare": "a dog"}, ("BLEU",))
    result = score(references | {"bare": ["", "?"], "none": []}, hypotheses | {"bare": "a dog", "none": ""}, ("BLEU",))
    assert result.values == expected.values and result.images == 4
    assert result.reasons == {
        "images": "1 left out, they have no references: none",
        "references": "2 have no word; they are scored as they are",
    }
    with pytest.raises(ValueError, match="no image can be scored: no reference has a word"):
        score({"bare": ["..."]}, {"bare": "a dog"}, ("BLEU",))


def test_one_image_alone_is_said_to_have_no_cider():
    result = score({"0": ["a dog"]}, {"0": "a dog"}, ("CIDEr",))
    assert result.values["CIDEr"] == 0 and "1 alone has CIDEr 0" in result.reasons["images"]


def test_unk_counts_as_a_word_that_no_other_word_matches():
    references = {"0": ["a unk dog", "a unknown dog"]}
    values = score(references, {"0": "a <unk> dog<unk>"}, ("BLEU", "ROUGE-L")).values
    assert values["BLEU-1"] == pytest.approx(2 / 4)


def test_cider_d_takes_the_document_frequencies_of_other_images():
    references, hypotheses = made_up_captions(images=12, references=3, seed=8)
    others = list(references.values())
    some = {image: references[image] for image in list(references)[:2]}
    found = score(some, {image: hypotheses[image] for image in some}, ("CIDEr", "CIDEr-D"), documents=others)
    whole = score(references, hypotheses, ("CIDEr", "CIDEr-D"))
    assert (whole.per_image["CIDEr-D"] == whole.per_image["CIDEr"]).all()
    where = [whole.image_ids.index(image) for image in found.image_ids]
    assert (found.per_image["CIDEr-D"] == whole.per_image["CIDEr"][where]).all()
    assert found.values["CIDEr"] != found.values["CIDEr-D"]
    assert "|df:other-12|" in found.signature["CIDEr-D"] and "|df:references|" in found.signature["CIDEr"]


def test_signature_and_digest_say_what_was_scored_and_by_what():
    references, hypotheses = made_up_captions(images=3, references=2, seed=9)
    first = score(references, hypotheses, ("BLEU",))
    assert first.signature["BLEU"].startswith("BLEU|images:3|refs:2|case:lc|tok:ptb-3.4.1|left_out:0|pycocoevalcap:1.")
    turned = score(dict(reversed(references.items())), dict.fromkeys(references, "a dog"), ("BLEU",))
    assert turned.references_digest == first.references_digest
    more = references | {"image1": [*references["image1"], "a dog"], "none": []}
    found = score(more, hypotheses | {"none": "x"}, ("BLEU",))
    assert found.references_digest != first.references_digest and "|refs:2-3|" in found.signature["BLEU"]
    assert "|left_out:1|" in found.signature["BLEU"]


def theirs(references, hypotheses) -> tuple[list[str], dict]:
    """pycocoevalcap's scores of all and of each image, by its own tokenizer, in the order of the references."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in references.items()})
    res = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in hypotheses.items()})
    whole, each = Bleu(4).compute_score(gts, res, verbose=0)
    found = {f"BLEU-{n + 1}": (whole[n], each[n]) for n in range(4)}
    for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        found[name] = scorer.compute_score(gts, res)
    return list(gts), found


ODD_CAPTIONS = [
    *(
        "",
        "dog",
        "Ünïcödé 犬 café 😀 שלום |",
        "22\u00a03/4 street D.",
        "a <unk> dog<unk> a|||b -- (x) can't",
        'a "b" &amp; \x85\x00',
    ),
    "a man riding a wave on a board " * 60,
]


@pytest.mark.faults
def test_all_equal_pycocoevalcap_to_the_last_bit_whatever_the_locale_and_with_two_evaluations_at_once(
    monkeypatch, tmp_path
):
    """Its own tokenizer included: the package as it is, in a copy that it may write to."""
    shutil.copytree(java.package_folder(), tmp_path / "pycocoevalcap", ignore=shutil.ignore_patterns("spice"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{java.java_folder()}:{os.environ['PATH']}")
    captions = dict(list(real_captions().items())[:200])
    draw = random.Random(1)
    references, hypotheses = {i: c[1:] for i, c in captions.items()}, {i: c[0] for i, c in captions.items()}
    for image in draw.sample(list(captions), 80):
        hypotheses[image] = draw.choice([*ODD_CAPTIONS, captions[draw.choice(list(captions))][0]])
        references[image][0] = draw.choice([*ODD_CAPTIONS, references[image][0]])
    images, expected = theirs(references, hypotheses)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE")
    with ThreadPoolExecutor(2) as pool:
        found, second = pool.map(lambda names: score(references, hypotheses, names), [METRICS, NO_JAVA])
    order = sorted(range(len(images)), key=images.__getitem__)
    for name, (whole, each) in expected.items():
        assert found.values[name] == whole, name
        assert found.per_image[name].tolist() == [float(each[i]) for i in order], name
    assert second.values == {name: value for name, value in found.values.items() if name != "METEOR"}


def test_ids_that_only_one_side_has_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1 have no hypothesis \(b\), 2 have no references \(c, d\)"):
        score({"a": ["x"], "b": ["x"]}, {"a": "x", "c": "x", "d": "x"})


def test_an_unknown_metric_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown metrics \['WER'\]; choose from .*METEOR"):
        score({"a": ["x"]}, {"a": "x"}, ("WER",))


def test_without_java_the_rules_split_real_captions_like_the_ptb_tokenizer():
    captions = [text for texts in real_captions().values() for text in texts]
    (split,) = tokenizer.tokenize(captions, deadline=time.monotonic() + 60)
    assert not split.without_java and split.changed == 0
    pairs = zip(split.lines, tokenizer.by_rules(captions, "no Java").lines, strict=True)
    assert sum(a == b for a, b in pairs) / len(captions) > 0.998
