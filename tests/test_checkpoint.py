"""Checkpoints appear whole or not at all, only a whole one is used, and saving waits for nothing."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat import checkpoint, files
from sat.checkpoint import Saver, SaveResult
from sat.config import load_config
from sat.data.plan import CURSOR_VERSION, Cursor
from sat.engine.processes import Processes
from sat.run_folder import open_run
from sat.stopping import Wish
from sat.train_state import Identity, Progress, TrainState

ROOT = Path(__file__).parents[1]


def tensors_of(number: float) -> dict[str, torch.Tensor]:
    names = ("weights/a.weight", "weights/count", "exp_avg/a.weight", "exp_avg_sq/a.weight", "step", "average/a.weight")
    return {name: torch.full((3, 2), number) if "a." in name else torch.tensor(number) for name in names}


def state_of(step: int, words: str = "") -> TrainState:
    cursor = Cursor(CURSOR_VERSION, "digest", 1, 0, 0)
    return TrainState(Progress(cursor, step), Identity({"words": words}, [], "digest"), 9, "DDP on 1 ranks")


def save(folder: Path, step: int, keep: int = 2, number: float = 1.0) -> list[SaveResult]:
    saver = Saver(folder, Processes(), keep)
    saver.begin(step, tensors_of(number), state_of(step))
    return saver.wait()


def test_the_newest_by_step_number_is_used_whatever_the_file_times(tmp_path):
    for step in (9, 10, 200):
        assert save(tmp_path, step, keep=5) == [SaveResult(step)]
    for age, path in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        os.utime(path, (10**9 + age, 10**9 + age))
    assert checkpoint.latest(tmp_path).name == "step-00000200"


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


@pytest.mark.parametrize("seed", range(12))
def test_any_single_flipped_bit_or_cut_is_noticed_and_the_older_one_used(tmp_path, seed):
    for step in (1, 2):
        save(tmp_path, step)
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


def test_any_single_flipped_bit_of_the_commit_is_harmless_or_passed_over(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
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
def test_a_commit_that_names_nothing_is_no_checkpoint(tmp_path, content):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / checkpoint.COMMIT).write_text(content)
    with pytest.warns(UserWarning, match=r"step-00000002 is passed over: .*COMMIT\.json"):
        assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_a_folder_under_another_steps_name_is_passed_over(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match=r"step-00000009 is passed over: .*of step 1"):
        assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_all_damaged_stops_instead_of_starting_afresh(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"state\.json is missing"),
        pytest.raises(ValueError, match="all 1 checkpoints"),
    ):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_is_read_as_it_was_given_and_holds_no_code(tmp_path):
    save(tmp_path, 3, number=0.5)
    path = tmp_path / "step-00000003"
    found, expected = checkpoint.read(path), tensors_of(0.5)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert TrainState.read(path) == state_of(3)
    assert load_file(path / "model.safetensors").keys() == {"a.weight", "count"}
    assert {each.suffix for each in path.iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path):
    save(tmp_path, 3)
    file = tmp_path / "step-00000003/state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(ValueError, match="step-00000003 has format 1, this version continues format 2"):
        TrainState.read(file.parent)


def test_a_failed_save_is_told_keeps_the_older_one_and_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    (result,) = save(tmp_path, 2)
    assert result.step == 2 and "No space left" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weights/a.weight", "exp_avg_sq/a.weight", "average/a.weight"])
def test_what_is_not_finite_is_never_saved(tmp_path, name, value):
    save(tmp_path, 1)
    saver, tensors = Saver(tmp_path, Processes(), 2), tensors_of(1.0)
    tensors[name][1, 1] = value
    saver.begin(2, tensors, state_of(2))
    assert saver.wait() == [SaveResult(2, f"ValueError: not finite: {name}")]
    assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_numbers_whose_sum_is_too_large_for_their_type_are_saved(tmp_path):
    saver, tensors = Saver(tmp_path, Processes(), 2), tensors_of(1.0)
    tensors["exp_avg_sq/a.weight"][:] = 3e38
    saver.begin(2, tensors, state_of(2))
    assert saver.wait() == [SaveResult(2)]
    assert checkpoint.read(checkpoint.latest(tmp_path))["exp_avg_sq/a.weight"].isfinite().all()


def test_saving_goes_on_beside_training_and_the_next_save_waits_for_it(tmp_path, monkeypatch):
    allowed, plain, order = threading.Event(), checkpoint.save_file, []

    def slow(*arguments):
        assert allowed.wait(60)
        plain(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver = Saver(tmp_path, Processes(), 5)
    saver.begin(1, tensors_of(1.0), state_of(1))
    assert saver.poll() == [] and not list(tmp_path.glob("step-*/COMMIT.json"))  # begin did not wait
    second = threading.Thread(target=lambda: (saver.begin(2, tensors_of(2.0), state_of(2)), order.append("second")))
    second.start()
    second.join(0.2)
    assert second.is_alive() and order == []
    allowed.set()
    second.join(60)
    assert saver.wait() == [SaveResult(1), SaveResult(2)] and saver.poll() == []
    assert [checkpoint.read(tmp_path / f"step-0000000{n}")["step"].item() for n in (1, 2)] == [1.0, 2.0]


def test_ranks_that_do_not_write_are_told_nothing_before_all_wait(tmp_path):
    saver = Saver(tmp_path, Processes(rank=1), 2)
    saver.begin(1, {}, state_of(1))
    assert saver.poll() == [] and not list(tmp_path.iterdir())


KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.test_checkpoint import save
calls = deadline = 0
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
for line in sys.stdin:
    folder, deadline = Path(line.split()[0]), int(line.split()[1])
    if not (child := os.fork()):
        save(folder, 2, number=2.0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.faults
def test_killed_at_any_system_call_that_matters_the_newest_committed_one_is_whole(tmp_path):
    outcomes, pipe = set(), subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as server:
        for deadline in range(1, 60):
            folder = tmp_path / str(deadline)
            save(folder, 1)
            server.stdin.write(f"{folder} {deadline}\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            assert code in (0, 9)
            newest = checkpoint.latest(folder)
            number = 2.0 if newest.name.endswith("2") else 1.0
            assert all(torch.all(value == number) for value in checkpoint.read(newest).values())
            outcomes.add(number)
            save(folder, 3)
            assert not list(folder.glob("*.tmp-*"))
            if code == 0:
                break
        server.stdin.close()
    assert code == 0 and outcomes == {1.0, 2.0} and deadline > 15


def test_a_life_begins_by_removing_what_a_kill_has_left_half_done(tmp_path, alone):
    folder = tmp_path / "run"
    for name in ("checkpoints/step-00000024", "best", "status.json", "config.yaml"):
        path = files.temporary_name(folder / name, (folder / name).parent)
        path.mkdir(parents=True) if "." not in name else path.write_text("")
    theirs = folder / "best.tmp-mine"
    theirs.mkdir()
    config = load_config(None, [f"train.run_dir={folder}", "tracking.mlflow_uri=none"])
    with open_run(config, alone, Progress(Cursor(1, "digest", 0, 0, 0)), Wish()):
        assert [*folder.rglob("*.tmp-*")] == [theirs]
