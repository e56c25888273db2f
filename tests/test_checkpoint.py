"""Checkpoints appear whole or not at all, and only a whole one is used."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sat import checkpoint
from sat.engine.processes import Processes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def alone():
    return Processes()


def write_three(text: str):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text * 50)
        (folder / "state.json").write_text(json.dumps({"text": text}))
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "part-0").write_text(text)

    return write


def test_the_newest_by_step_number_is_used_whatever_the_file_times(tmp_path, alone):
    for step in (9, 10, 200):
        assert checkpoint.save(tmp_path, step, alone, write_three(str(step)), keep=5)
    for age, path in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        os.utime(path, (10**9 + age, 10**9 + age))
    assert checkpoint.latest(tmp_path).name == "step-00000200"


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path, alone):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, alone, write_three("x"), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


@pytest.mark.parametrize("seed", range(12))
def test_any_single_flipped_bit_or_cut_is_noticed_and_the_older_one_used(tmp_path, alone, seed):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, alone, write_three("abc"), keep=2)
    random_ = random.Random(seed)
    files = sorted(p for p in (tmp_path / "step-00000002").rglob("*") if p.is_file() and p.name != checkpoint.COMMIT)
    victim = random_.choice(files)
    content = bytearray(victim.read_bytes())
    if seed % 3 == 0:
        content = content[: random_.randrange(len(content))]
    else:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=victim.name):
        assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_any_single_flipped_bit_of_the_commit_is_harmless_or_passed_over(tmp_path, alone):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, alone, write_three("abc"), keep=2)
    commit = tmp_path / "step-00000002" / checkpoint.COMMIT
    content, used = commit.read_bytes(), 0
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        commit.write_bytes(flipped)
        reason = checkpoint.damage(commit.parent)
        if reason is None:
            used += 1
            assert json.loads(flipped) == json.loads(content)  # white space
    assert used < len(content)


@pytest.mark.parametrize(
    "content", ['{"step": 2, "files": {}}', '{"files": {}}', "[]", "null", '{"step": 2, "files": 3}']
)
def test_a_commit_that_names_nothing_is_no_checkpoint(tmp_path, alone, content):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, alone, write_three("abc"), keep=2)
    (tmp_path / "step-00000002" / checkpoint.COMMIT).write_text(content)
    with pytest.warns(UserWarning, match=r"step-00000002 is passed over: .*COMMIT\.json"):
        assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_a_folder_under_another_steps_name_is_passed_over(tmp_path, alone):
    checkpoint.save(tmp_path, 1, alone, write_three("abc"), keep=2)
    checkpoint.save(tmp_path, 2, alone, write_three("abc"), keep=2)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match=r"step-00000009 is passed over: .*of step 1"):
        assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_all_damaged_stops_instead_of_starting_afresh(tmp_path, alone):
    checkpoint.save(tmp_path, 1, alone, write_three("abc"), keep=2)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"state\.json is missing"),
        pytest.raises(ValueError, match="all 1 checkpoints"),
    ):
        checkpoint.latest(tmp_path)


def test_a_failed_save_warns_keeps_the_older_one_and_leaves_nothing(tmp_path, alone):
    checkpoint.save(tmp_path, 1, alone, write_three("abc"), keep=2)

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left"):
        assert not checkpoint.save(tmp_path, 2, alone, full, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


KILLED = """
import os, sys, shutil
from pathlib import Path
from sat import checkpoint
from sat.engine.processes import Processes
from tests.test_checkpoint import write_three
folder, deadline = Path(sys.argv[1]), int(sys.argv[2])
alone, calls = Processes(), 0
def lethal(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os._exit(9)
        return function(*args, **kwargs)
    return wrapped
os.fsync, os.rename, os.replace = lethal(os.fsync), lethal(os.rename), lethal(os.replace)
shutil.rmtree = lethal(shutil.rmtree)
checkpoint.save(folder, 2, alone, write_three("new"), keep=2)
"""


@pytest.mark.faults
def test_killed_at_any_system_call_that_matters_the_newest_committed_one_is_whole(tmp_path, alone):
    outcomes = set()
    for deadline in range(1, 40):
        folder = tmp_path / str(deadline)
        checkpoint.save(folder, 1, alone, write_three("old"), keep=2)
        child = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(deadline)], cwd=ROOT, timeout=120)
        assert child.returncode in (0, 9)
        newest = checkpoint.latest(folder)
        text = "new" if newest.name.endswith("2") else "old"
        assert json.loads((newest / "state.json").read_text()) == {"text": text}
        outcomes.add(text)
        checkpoint.save(folder, 3, alone, write_three("next"), keep=2)
        assert not list(folder.glob("*.tmp-*"))
        if child.returncode == 0:
            break
    assert child.returncode == 0 and outcomes == {"old", "new"}
