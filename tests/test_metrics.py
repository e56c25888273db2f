"""Scores are those of the published metrics, captions never change places, and no fault of Java costs an evaluation."""

import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sat.evaluation import metrics
from sat.evaluation.metrics import sanitise, score

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("SAT_REAL_DATA", ROOT.parent / "shared/data")) / "coco_val2017/captions_val2017.json"
NO_JAVA = ("BLEU", "ROUGE-L", "CIDEr")
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


@pytest.mark.faults
def test_human_captions_score_as_humans_do_under_a_german_locale_and_with_two_evaluations_at_once(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE")
    captions = dict(list(real_captions().items())[:250])
    references, hypotheses = {i: c[1:] for i, c in captions.items()}, {i: c[0] for i, c in captions.items()}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda names: score(references, hypotheses, names), [list(metrics.NAMES), NO_JAVA])
    assert second.values == {name: value for name, value in first.values.items() if name != "METEOR"}
    assert first.reasons == {} and first.images == 250
    assert 0.7 < first.values["CIDEr"] < 1.2
    assert 0.15 < first.values["BLEU-4"] < 0.25
    assert 0.20 < first.values["METEOR"] < 0.30
    assert 0.40 < first.values["ROUGE-L"] < 0.55


ODD = [*"\n\r\v\f\t\x00\x1c\x85\u00a0\u200b\u2028\u2029\ufeff\ud800", "|||"]


@pytest.mark.faults
def test_odd_characters_are_spaces_and_never_move_a_caption_to_another_image():
    references, hypotheses = made_up_captions(images=len(ODD), references=2, seed=3)
    clean = score(references, hypotheses, NO_JAVA)
    for odd, image in zip(ODD, references):
        references[image] = [f"{odd}{text}".replace(" ", odd, 2) for text in references[image]]
        hypotheses[image] = hypotheses[image].replace(" ", odd, 1) + odd
    assert score(references, hypotheses, NO_JAVA) == clean


@pytest.mark.faults
def test_a_caption_of_ten_thousand_words_is_cut_and_empty_emoji_and_hebrew_ones_are_scored():
    assert sanitise("word " * 10_000) == " ".join(["word"] * metrics.MAX_WORDS)
    hebrew = "שלום עולם"
    references = {"long": ["word " * 10_000], "empty": ["a dog"], "emoji": ["a 😀 dog"], "hebrew": [hebrew]}
    hypotheses = {"long": "a word", "empty": "", "emoji": "a dog", "hebrew": hebrew}
    result = score(references, hypotheses, ("ROUGE-L",))
    precision, recall = 1 / 2, 1 / metrics.MAX_WORDS
    long = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert result.values["ROUGE-L"] == pytest.approx((long + 0 + 1 + 1) / 4)


def test_an_image_whose_references_have_no_word_is_left_out_and_named():
    references, hypotheses = made_up_captions(images=3, references=2, seed=4)
    expected = score(references, hypotheses, ("BLEU",))
    result = score(references | {"bare": ["", "?"], "none": []}, hypotheses | {"bare": "a dog", "none": ""}, ("BLEU",))
    assert result.values == expected.values and result.images == 3
    assert result.reasons == {"images": "2 left out, none of their references has a word: bare, none"}
    with pytest.raises(ValueError, match="no image can be scored.*bare"):
        score({"bare": ["..."]}, {"bare": "a dog"}, ("BLEU",))


def test_unk_counts_as_a_word_that_matches_nothing():
    references = {"0": ["a <unk> dog", "a unk dog", "a qzunkq dog", "a <UNK> qzunkqq dog"]}
    values = score(references, {"0": "a <unk> dog<unk>"}, ("BLEU", "ROUGE-L")).values
    assert values["BLEU-1"] == pytest.approx(2 / 4)
    assert values == score(references, {"0": "a foreign dog word"}, ("BLEU", "ROUGE-L")).values


def test_ids_that_only_one_side_has_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1 have no hypothesis \(b\), 2 have no references \(c, d\)"):
        score({"a": ["x"], "b": ["x"]}, {"a": "x", "c": "x", "d": "x"})


def test_an_unknown_metric_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown metrics \['SPICE'\]; choose from .*METEOR"):
        score({"a": ["x"]}, {"a": "x"}, ("SPICE",))


def fake_java(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "java").write_text("#!/bin/sh\n" + textwrap.dedent(script))
    (folder / "java").chmod(0o755)


def alive(pid_file: Path) -> bool:
    """Whether the process runs; one that is dead but not yet collected (Z) does not."""
    try:
        return Path(f"/proc/{pid_file.read_text().strip()}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@functools.cache
def healthy() -> tuple[dict, dict, metrics.Scores]:
    references, hypotheses = made_up_captions(images=10, references=2, seed=5)
    return references, hypotheses, score(references, hypotheses, NO_JAVA)


def check_only_meteor_is_missing(monkeypatch, folder: Path | None, timeout_s: float, reason: str) -> metrics.Scores:
    """Other metrics are those of a healthy evaluation; returns within the time-out."""
    references, hypotheses, expected = healthy()
    monkeypatch.setattr(metrics, "java_folder", lambda: folder and str(folder))
    began = time.monotonic()
    result = score(references, hypotheses, timeout_s=timeout_s)
    assert time.monotonic() - began < timeout_s + 2
    assert result.values == expected.values | {"METEOR": None}
    assert reason in result.reasons["METEOR"]
    return result


@pytest.mark.faults
def test_without_java_meteor_is_missing_and_the_tokenizer_is_said_to_be_replaced(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = check_only_meteor_is_missing(monkeypatch, None, 60, "No such file or directory: 'java'")
    assert "rules that agree with the PTB tokenizer" in result.reasons["tokenizer"]


@pytest.mark.faults
def test_a_java_that_hangs_ends_with_the_time_out_and_is_killed(monkeypatch, tmp_path):
    fake_java(tmp_path / "bin", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    check_only_meteor_is_missing(monkeypatch, tmp_path / "bin", 8, "ran out of time")
    assert not alive(tmp_path / "pid")


METEOR_FAULTS = {
    "dies": ("echo boom >&2; exit 3", "METEOR's Java ended: boom"),
    "answers_nonsense": ("while read line; do echo nonsense; done", "METEOR's Java ended"),
    "hangs": ("exec sleep 1000", "ran out of time"),
}
"""What Java does when it is asked for METEOR, and the reason to be read."""


@pytest.mark.faults
@pytest.mark.parametrize("fault", METEOR_FAULTS)
def test_a_meteor_that_fails_leaves_its_reason(monkeypatch, tmp_path, fault):
    script, reason = METEOR_FAULTS[fault]
    real = shutil.which("java", path=metrics.java_folder())
    fake_java(tmp_path, f'case "$*" in *meteor*) {script};; *) exec "{real}" "$@";; esac')
    result = check_only_meteor_is_missing(monkeypatch, tmp_path, 10, reason)
    assert "tokenizer" not in result.reasons


@pytest.mark.faults
def test_a_tokenizer_that_loses_a_line_is_noticed(monkeypatch, tmp_path):
    fake_java(tmp_path, f'"{shutil.which("java", path=metrics.java_folder())}" "$@" | sed 3d')
    check_only_meteor_is_missing(monkeypatch, tmp_path, 60, "did not give back")


@pytest.mark.faults
def test_when_the_evaluation_is_killed_its_java_goes_too(tmp_path):
    fake_java(tmp_path / "bin", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    script = """if True:
        import sys
        from sat.evaluation import metrics
        metrics.java_folder = lambda: sys.argv[1]
        metrics.score({"0": ["a"]}, {"0": "a"})
    """
    command = [sys.executable, "-c", script, tmp_path / "bin"]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    assert alive(tmp_path / "pid")
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not alive(tmp_path / "pid"))


def wait_for(condition, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.mark.faults
def test_a_read_only_installation_is_enough():
    site = sysconfig.get_paths()["purelib"]
    mount = f"mount --bind '{site}' '{site}' && mount -o remount,ro,bind '{site}' && ! touch '{site}/x' 2>/dev/null"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only (unshare -Urm)")
    script = "from sat.evaluation.metrics import score; print(score({'0': ['a dog']}, {'0': 'a dog'}, ('BLEU',)))"
    command = ["unshare", "-Urm", "sh", "-c", f'{mount}; exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'BLEU-1': 0.99999" in done.stdout and "reasons={}" in done.stdout


@pytest.mark.faults
def test_without_room_for_temporary_files_every_metric_is_missing_with_the_reason(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    result = score({"0": ["a dog"]}, {"0": "a dog"}, NO_JAVA)
    assert set(result.values.values()) == {None}
    assert all("/nowhere" in result.reasons[name] for name in NO_JAVA)


def test_without_java_the_rules_split_real_captions_like_the_ptb_tokenizer(tmp_path):
    captions = [sanitise(text) for texts in real_captions().values() for text in texts]
    metrics._link_package(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    reasons = {}
    results = metrics._run_children([metrics.TOKENIZER], tmp_path, time.monotonic() + 60, reasons)
    assert reasons == {}
    rules = [" ".join(metrics.PTB_LIKE.findall(text.lower())) for text in captions]
    assert sum(a == b for a, b in zip(results[metrics.TOKENIZER], rules, strict=True)) / len(captions) > 0.998
