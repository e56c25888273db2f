"""No fault of Java costs an evaluation or outlives it, and METEOR's is started once for many scores."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from sat.evaluation import java, meteor, metrics, spice
from sat.evaluation.metrics import score, scorer_kept
from tests.helpers_launch import quick_meteor
from tests.test_metrics import NO_JAVA, ROOT, made_up_captions


def fake_java(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "java").write_text("#!/bin/sh\n" + textwrap.dedent(script))
    (folder / "java").chmod(0o755)


def any_alive(pids: Path) -> bool:
    """Whether any of the processes runs whose numbers are in the file: METEOR's and the tokenizer's, each a line."""
    return any(runs(Path("/proc") / pid) for pid in pids.read_text().split())


def runs(process: Path) -> bool:
    """Whether the process runs; one that is dead but not yet collected (Z) does not."""
    try:
        return (process / "stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@functools.cache
def healthy() -> tuple[dict, dict, metrics.Scores]:
    references, hypotheses = made_up_captions(images=10, references=2, seed=5)
    return references, hypotheses, score(references, hypotheses, NO_JAVA)


def check_only_meteor_is_missing(monkeypatch, folder: Path | None, timeout_s: float, reason: str) -> metrics.Scores:
    """Other metrics are those of a healthy evaluation; returns within the time-out."""
    references, hypotheses, expected = healthy()
    monkeypatch.setattr(java, "java_folder", lambda: folder and str(folder))
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
    fake_java(tmp_path / "bin", f"echo $$ >> {tmp_path}/pids; exec sleep 1000")
    check_only_meteor_is_missing(monkeypatch, tmp_path / "bin", 8, "ran out of time")
    wait_for(lambda: not any_alive(tmp_path / "pids"))


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
    real = shutil.which("java", path=java.java_folder())
    fake_java(tmp_path, f'case "$*" in *meteor*) {script};; *) exec "{real}" "$@";; esac')
    result = check_only_meteor_is_missing(monkeypatch, tmp_path, 10, reason)
    assert "tokenizer" not in result.reasons


@pytest.mark.faults
def test_a_tokenizer_that_loses_a_line_is_noticed(monkeypatch, tmp_path):
    fake_java(tmp_path, f'"{shutil.which("java", path=java.java_folder())}" "$@" | sed 3d')
    check_only_meteor_is_missing(monkeypatch, tmp_path, 60, "did not give back")


@pytest.mark.faults
def test_when_the_evaluation_is_killed_its_java_goes_too(tmp_path):
    fake_java(tmp_path / "bin", f"echo $$ >> {tmp_path}/pids; exec sleep 1000")
    script = """if True:
        import sys
        from sat.evaluation import java, metrics
        java.java_folder = lambda: sys.argv[1]
        metrics.score({"0": ["a"]}, {"0": "a"})
    """
    command = [sys.executable, "-c", script, tmp_path / "bin"]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    wait_for(lambda: (tmp_path / "pids").exists() and any_alive(tmp_path / "pids"))
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not any_alive(tmp_path / "pids"))


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
    arguments = "{'0': ['dog'], '1': ['cat']}, {'0': 'dog', '1': 'cat'}, ['BLEU']"
    script = f"from sat.evaluation.metrics import score; print(score({arguments}))"
    command = ["unshare", "-Urm", "sh", "-c", f'{mount}; exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'BLEU-1': 0.99999" in done.stdout and "reasons={}" in done.stdout


@pytest.mark.faults
def test_without_room_for_temporary_files_only_what_needs_java_is_missing(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    result = score({"0": ["a dog"], "1": ["a cat"]}, {"0": "a dog", "1": "a cat"})
    assert result.values["CIDEr"] > 0 and result.values["METEOR"] is None
    assert all("/nowhere" in result.reasons[name] for name in ("METEOR", "tokenizer"))


def starts(folder: Path) -> list[Path]:
    """Of METEOR, as `counted_java` noted them: folders of /proc."""
    return [Path("/proc") / pid for pid in (folder / "starts").read_text().split()]


def counted_java(folder: Path) -> None:
    """A `java` that notes each start of METEOR by its process id."""
    real = shutil.which("java", path=java.java_folder())
    fake_java(folder, f'case "$*" in *meteor*) echo $$ >> {folder}/starts;; esac; exec "{real}" "$@"')


@pytest.mark.faults
def test_meteors_java_starts_once_for_many_scores_again_after_it_dies_and_ends_with_the_block(monkeypatch, tmp_path):
    counted_java(tmp_path)
    monkeypatch.setattr(java, "java_folder", lambda: str(tmp_path))
    monkeypatch.setattr(meteor, "package_folder", lambda: quick_meteor() / "pycocoevalcap")
    references, hypotheses = made_up_captions(images=4, references=2, seed=11)
    with scorer_kept():
        first = score(references, hypotheses, ("METEOR",))
        assert (
            score(references, hypotheses, ("METEOR",)).per_image["METEOR"].tolist()
            == first.per_image["METEOR"].tolist()
        )
        (first_start,) = starts(tmp_path)
        os.kill(int(first_start.name), signal.SIGKILL)
        wait_for(lambda: not runs(first_start))
        assert score(references, hypotheses, ("METEOR",)).values == first.values
    assert len(starts(tmp_path)) == 2
    wait_for(lambda: not any(map(runs, starts(tmp_path))))


def test_spice_says_what_it_needs_and_is_asked_where_that_is_there(monkeypatch, tmp_path):
    references, hypotheses = made_up_captions(images=2, references=2, seed=12)
    monkeypatch.delenv("SAT_JAVA8", raising=False)
    found = score(references, hypotheses, ("SPICE",))
    assert found.values == {"SPICE": None} and "SAT_JAVA8=" in found.reasons["SPICE"]
    package = tmp_path / "pycocoevalcap"
    shutil.copytree(java.package_folder(), package, copy_function=os.symlink, ignore=shutil.ignore_patterns("lib"))
    (package / "spice/lib").mkdir()
    for jar in spice.JARS:
        (package / "spice/lib" / jar).touch()
    answer = json.dumps([{"image_id": i, "scores": {"All": {"f": 0.25 + i / 2}}} for i in range(2)])
    fake_java(tmp_path / "bin", f"while [ $1 != -out ]; do shift; done; echo '{answer}' > $2")
    monkeypatch.setenv("SAT_JAVA8", str(tmp_path / "bin/java"))
    monkeypatch.setattr(spice, "package_folder", lambda: package)
    found = score(references, hypotheses, ("SPICE",))
    assert found.values == {"SPICE": 0.5} and found.per_image["SPICE"].tolist() == [0.25, 0.75]
