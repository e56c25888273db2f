"""One command, one style of error: a sentence, once, whoever starts the program and on however many processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat import cli
from sat.stopping import START_AGAIN

ROOT = Path(__file__).parents[1]

PROGRAM = '''
"""Fails, waits or succeeds as asked, on this rank or on all."""
import os, signal, sys, time
from pathlib import Path
from sat.cli import run_program

def main(what: str, folder: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if what == "all_fail":
        raise ValueError("the setting is wrong")
    if what == "no_file":
        open(folder / "missing.txt")
    if what == "bug":
        assert rank == 7, "only our bug"
    if what in ("first_fails", "last_fails"):
        import torch.distributed as dist
        dist.init_process_group("gloo")
        if rank == {"first_fails": 0, "last_fails": dist.get_world_size() - 1}[what]:
            raise ValueError("this rank alone cannot go on")
        dist.barrier()
    if what == "killed" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        asked = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda received, _: asked.append(received))
        (folder / f"ready-{rank}").touch()
        for received, state in ((1, "saving"), (2, "saved")):  # the second signal comes in the middle of the save
            while len(asked) < received:
                time.sleep(0.02)
            (folder / f"{state}-{rank}").touch()

if __name__ == "__main__":
    run_program(main)
'''


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}


def command(how: str, processes: int, *arguments: object) -> list[str]:
    """Our launcher's, or accelerate's, for this program."""
    if how == "accelerate":
        given = ["accelerate.commands.launch", "--config_file", "launch/cpu.yaml", "--num_processes", processes, "-m"]
        return [sys.executable, "-m", *map(str, [*given, "program", *arguments])]
    call = "import sys; from sat.engine.launcher import launch; from pathlib import Path; "
    call += f"sys.exit(launch(Path('launch/cpu.yaml'), 'program', sys.argv[1:], {processes}))"
    return [sys.executable, "-c", call, *map(str, arguments)]


def run(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    environment = environment or os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------ the command


def called(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status and output of `sat ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["sat", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["bench"], ["bench", "--help"]], ids=" ".join)
def test_the_command_lists_everything_without_loading_anything(monkeypatch, capsys, arguments):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    status, out, err = called(monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    assert [f"sat {name} " in out for name in cli.PROGRAMS] == [True] * len(cli.PROGRAMS)
    assert [f"sat bench {name} " in out for name in cli.BENCHMARKS] == [True] * len(cli.BENCHMARKS)


@pytest.mark.parametrize("name", [*cli.PROGRAMS, *(f"bench {name}" for name in cli.BENCHMARKS)])
def test_every_sub_command_has_a_help_of_its_own(monkeypatch, capfd, name):
    status, out, err = called(monkeypatch, capfd, *name.split(), "--help")
    assert (status, err) == (0, "")
    assert "Usage:" in out and name.split()[-1] in out and "--help" in out
    assert len(out.split("Options:")[0].splitlines()) > 3, "nothing says what it does"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "choose one of prepare, lint, train, evaluate"),
        (["bench", "nonsense"], "choose one of step"),
        (["train"], "Missing argument 'CONFIG'. (see sat train --help)"),
        (["summary", "run", "--splt", "val"], "No such option: --splt"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_status_2(monkeypatch, capsys, arguments, words):
    status, out, err = called(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["train", "configs/demo.yaml", "train.learning_rat=1"], "nearest valid one is 'train.learning_rate'"),
        (["train", "--launch", "nowhere.yaml", "configs/demo.yaml"], "no launcher configuration 'nowhere.yaml'"),
        (["train", "--launch=launch/cpu.yaml", "--processes", "two", "x"], "--processes is 'two'"),
        (["evaluate", "nowhere"], "nowhere/best is not a trained model"),
        (["caption", "nowhere.jpg"], "nowhere.jpg"),
        (["sync", "nowhere"], "no tracking.json"),
        (["summary", "nowhere"], "nowhere/evaluation-test.json is missing"),
    ],
)
def test_what_a_user_does_wrong_is_one_sentence_and_exit_status_1(monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(ROOT)
    status, out, err = called(monkeypatch, capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_the_modules_run_as_programs():
    listed = run([sys.executable, "-m", "sat.cli"])
    assert (listed.returncode, listed.stderr) == (0, "") and "sat train" in listed.stdout
    refused = run([sys.executable, "-m", "sat.train", "nowhere.yaml"])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "error: no config file nowhere.yaml; the shipped ones are in configs/\n"


# ------------------------------------------------------------------ under a launcher


@pytest.mark.parametrize(
    ("what", "processes"), [("no_file", 1), ("all_fail", 2), ("first_fails", 2), ("last_fails", 2)]
)
def test_an_error_is_one_sentence_on_any_number_of_processes(environment, tmp_path, what, processes):
    began = time.monotonic()
    done = run(command("ours", processes, what, tmp_path), environment)
    assert time.monotonic() - began < 60, "the others waited for the rank that had gone"
    assert done.returncode == 1
    words = {"all_fail": "the setting is wrong", "no_file": f"{tmp_path}/missing.txt: No such file or directory"}
    assert done.stderr == f"error: {words.get(what, 'this rank alone cannot go on')}\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_under_accelerate_our_processes_say_it_once_too(environment, tmp_path, processes):
    done = run(command("accelerate", processes, "all_fail", tmp_path), environment)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error:")] == ["error: the setting is wrong"]
    # the rest is accelerate's own: its traceback, and with several processes torch's table, which ends with our words
    assert done.stderr.count("Traceback") == 1
    assert processes == 1 or "  traceback : the setting is wrong" in lines


def test_a_bug_shows_its_traceback_once(environment, tmp_path):
    done = run(command("ours", 2, "bug", tmp_path), environment)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == done.stderr.count("AssertionError: only our bug") == 1


def test_success_and_a_killed_rank_have_their_exit_status(environment, tmp_path):
    assert run(command("ours", 2, "succeed", tmp_path), environment).returncode == 0
    killed = run(command("ours", 2, "killed", tmp_path), environment)
    assert killed.returncode == START_AGAIN
    assert killed.stderr == "error: rank 0 was ended by SIGKILL\n"


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)])
def test_a_signal_reaches_every_rank_a_second_one_too_and_a_clean_stop_is_success(
    environment, tmp_path, processes, number
):
    arguments = command("ours", processes, "stopped", tmp_path)
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        until = time.monotonic() + 120
        for state in ("ready", "saving"):
            while len(list(tmp_path.glob(f"{state}-*"))) < processes:
                assert time.monotonic() < until and launcher.poll() is None
                time.sleep(0.05)
            launcher.send_signal(number)
        assert launcher.wait(60) == 0
        assert launcher.stderr.read() == ""
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == [f"saved-{rank}" for rank in range(processes)]
